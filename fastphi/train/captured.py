"""A training step on a GPU: one CUDA graph, two copies up and one down, and no wait for the device.

The graph decodes the images and makes their noise, and has the network forward and backward, the sum of
the losses, the gradient's norm, Adam and, where there is one, the average of the weights. What a step is
told goes up in two pieces: the images as they are stored, and its `Numbers`. What it tells comes down in
one: its losses, which the host reads when the step after it has been launched, so that the device never
waits for the host.

A loss or a gradient that is not finite must not change the parameters, and the host is late to see it:
`stop`, on the device, then makes Adam and the average leave everything as it is, in this step and in
those after it.

The same launches one by one, where they cannot be captured, give the same bits; their losses are read
at once.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastphi import noise
from fastphi.engine import contract, ops
from fastphi.engine.gpu.capture import captured
from fastphi.train import average
from fastphi.train.step import Step

log = logging.getLogger("fastphi")


class Numbers:
    """A step's, in one piece of memory: sample, draw (n,) int64 (fastphi/noise.py); sigma (n,), lr () and
    weight (), of the average, float32."""

    def __init__(self, n: int, **where: Any) -> None:
        self.whole = torch.empty(2 * n + (n + 3) // 2, dtype=torch.int64, **where)
        self.sample, self.draw, rest = self.whole.split([n, n, (n + 3) // 2])
        floats = rest.view(torch.float32)
        self.sigma, self.lr, self.weight = floats[:n], floats[n], floats[n + 1]


@dataclass
class Upload:
    """What goes up, in pinned memory. pixels: as `Images.stored` gives them."""

    indices: np.ndarray
    pixels: Tensor
    numbers: Numbers

    @property
    def sigma(self) -> Tensor:
        return self.numbers.sigma


@dataclass
class Decoded:
    """Images on the device. clean: (n, C, H, W); sigma: (n, 1, 1, 1); image: (n, H, W, C), noisy."""

    clean: Tensor
    sigma: Tensor
    image: Tensor

    def split(self, size: int) -> list[Decoded]:
        parts = zip(*(t.split(size) for t in vars(self).values()), strict=True)
        return [Decoded(*part) for part in parts]

    def noisy(self) -> Tensor:
        return self.image.permute(0, 3, 1, 2)


@dataclass
class Launched:
    """A step that the device may still be at. told: what came down (see `_launches`), when `done`."""

    step: int
    upload: Upload
    told: Tensor
    done: torch.cuda.Event


class CapturedStep(Step):
    """Steps as a graph; launch by launch where there is a `reason`, which the log says once."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stop = torch.zeros((), device=self.device)  # 1: parameters stay as they are
        self.reason = self._why_not()
        self._ready = False
        self._launched: deque[Launched] = deque()

    def draw(self, step: int) -> Upload:
        share = self.share(step)
        numbers = Numbers(len(share.indices), pin_memory=True)
        numbers.sample.copy_(torch.from_numpy(share.indices))
        numbers.draw.fill_(share.draw)
        numbers.sigma.copy_(torch.from_numpy(share.sigma))
        numbers.lr.fill_(self.run.lr(step + 1))
        numbers.weight.fill_(average.weight(self.run.config, step + 1))
        return Upload(share.indices, self.images.stored(share.indices).pin_memory(), numbers)

    def gradient(self, batch: Upload) -> None:
        """Before the first step: memory for what goes up, and the graph. The rest is the update's."""
        if self._ready:
            return
        self.pixels = torch.empty_like(batch.pixels, device=self.device)
        self.numbers = Numbers(len(batch.indices), device=self.device)
        self._put(batch)
        if self.reason is None:
            self._capture()
        if self.reason is not None:
            log.warning("training steps run launch by launch, not as a CUDA graph: %s", self.reason)
        self._ready = True

    def update(self, batch: Upload) -> None:
        self._set_lr()
        self._put(batch)
        if self.graph is None:
            self._launches()
        else:
            self.graph.replay()
        self._count_write()
        told = torch.empty(self.told.shape, dtype=self.told.dtype, pin_memory=True)
        told.copy_(self.told, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._launched.append(Launched(self.run.step + 1, batch, told, done))

    def losses(self, wait: bool) -> Iterator[tuple[int, float]]:
        under_way = 0 if wait or self.graph is None else 1
        while len(self._launched) > under_way:
            step = self._launched.popleft()
            if not step.done.query():  # the host is a whole step ahead, or was asked to wait
                step.done.synchronize()
            loss, norm, asks = step.told[:3].tolist()
            self.asked = asks > 0
            yield step.step, self._checked(step.step, loss, norm, step.told[3:], step.upload)

    def close(self) -> None:
        """The graph goes with its memory, of which the gradients are."""
        self.graph = None
        self.run.optimizer.zero_grad()

    # --- what a graph is captured of ---

    def _put(self, batch: Upload) -> None:
        self.pixels.copy_(batch.pixels, non_blocking=True)
        self.numbers.whole.copy_(batch.numbers.whole, non_blocking=True)

    def _launches(self) -> None:
        """A step, of `pixels` and `numbers`; `told`: `_totals` and each image's loss."""
        images = self._decoded()
        losses = self._backward(images.split(self._together(images.sigma)))
        totals = self._totals(losses)
        self.told = torch.cat([totals, losses.double()])
        finite = totals.isfinite().all()
        torch.maximum(self.stop, finite.logical_not().float(), out=self.stop)
        with self._on_device(self._excess(totals)):
            self.run.optimizer.step()
        if self.average:
            average.follow(self.average, self.parameters, self.numbers.weight, self.stop)

    def _decoded(self) -> Decoded:
        pixels, (n, c, h, w) = self.pixels, (len(self.pixels), *self.images.shape)
        clean = pixels
        if pixels.dtype == torch.uint8:
            clean = torch.empty(n, c, h, w, device=self.device)
            ops.image_to_nchw(pixels, clean)
        image = torch.empty(n, h, w, c, device=self.device)
        its, seed, stream = self.numbers, self.run.config.seed, noise.stream("train")
        ops.noisy_image(pixels, None, its.sigma, seed, its.sample, stream, its.draw, image)
        return Decoded(clean, its.sigma.reshape(-1, 1, 1, 1), image)

    @contextlib.contextmanager
    def _on_device(self, excess: Tensor | None) -> Iterator[None]:
        """Adam reads its rate, by what to divide the gradient and whether to stop from the device. Between
        the steps its settings are those of any run: they are in the checkpoints."""
        optimizer: Any = self.run.optimizer
        capturing = torch.cuda.is_current_stream_capturing()
        before = [(g["lr"], g["capturable"]) for g in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"], group["capturable"] = self.numbers.lr, capturing
        optimizer.grad_scale, optimizer.found_inf = excess, self.stop
        try:
            yield
        finally:
            del optimizer.grad_scale, optimizer.found_inf
            for group, (lr, capturable) in zip(optimizer.param_groups, before, strict=True):
                group["lr"], group["capturable"] = lr, capturable

    def _capture(self) -> None:
        """With `stop` set, so that the first run does not count."""
        self.stop.fill_(1)
        self._launches()  # compiles, loads and makes Adam's state, which a capture must not
        self.run.optimizer.zero_grad()  # the graph has gradients of its own
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.graph = captured(self._launches, self.device)
        if self.graph is None:
            self.reason = "the capture failed"  # how, has been said
            self.run.optimizer.zero_grad()
        self.stop.zero_()

    def _why_not(self) -> str | None:
        """Why the steps cannot be captured, or None."""
        model, optimizer = self.run.model, self.run.optimizer
        if self.world.size > 1:
            return f"{self.world.size} processes exchange their gradients"
        if self.run.config.compile:
            return "torch.compile runs the network"
        if (hook := contract.hooked(model)) is not None:
            return hook
        hooked: list[Any] = [model._forward_hooks, model._forward_pre_hooks]
        hooked += [model._backward_hooks, model._backward_pre_hooks]
        hooked += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        for p in self.parameters:
            hooked += [p._backward_hooks, p._post_accumulate_grad_hooks]
        return "the model, a parameter or the optimiser has a hook" if any(hooked) else None
