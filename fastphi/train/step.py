"""A training step: the gradient of E‖x̂(x) − clean‖² over a batch, and Adam's update (§2.1, Appendix A);
where the run asks for them, the gradient's length is bounded, and the weights are averaged.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastphi import noise
from fastphi.engine import ops
from fastphi.support.world import World
from fastphi.train import average
from fastphi.train.process import total
from fastphi.train.record import RunState


class Share(NamedTuple):
    """What a process has of a step: images (n,), their noise levels (n,) and which draw of their noise."""

    indices: np.ndarray
    sigma: np.ndarray
    draw: int


class Part(Protocol):
    """Images that go through the network together. clean: (n, C, H, W); sigma: (n, 1, 1, 1)."""

    clean: Tensor
    sigma: Tensor

    def noisy(self) -> Tensor:
        """clean + σz, channels last: the layout in which convolutions are fastest."""
        ...


@dataclass
class Batch:
    """One process's share of a step. clean, noise: (n, C, H, W); sigma: (n, 1, 1, 1)."""

    indices: np.ndarray
    sigma: Tensor
    clean: Tensor
    noise: Tensor

    def split(self, size: int) -> list[Batch]:
        at = range(0, len(self.indices), size)
        return [Batch(*(v[i : i + size] for v in vars(self).values())) for i in at]

    def noisy(self) -> Tensor:
        x = self.clean + self.sigma * self.noise
        return x.contiguous(memory_format=torch.channels_last)


class Step:
    """The steps of a run: `draw` of each, ahead; `gradient`, which may be interrupted; `update`.

    denoiser: the run's model, or what wraps it. share: of a step, by its number from 0. amp: whether
    in bf16 autocast.
    """

    def __init__(
        self,
        run: RunState,
        denoiser: nn.Module,
        share: Callable[[int], Share],
        world: World,
        amp: bool,
    ) -> None:
        self.run, self.denoiser, self.world, self.amp = run, denoiser, world, amp
        self.share, self.images = share, run.split.images
        self.parameters: list[Tensor] = list(run.model.parameters())
        self.average: list[Tensor] = [] if run.average is None else list(run.average.parameters())
        self.device = self.parameters[0].device
        self.asks = torch.zeros(
            (), dtype=torch.float64, device=self.device
        )  # 1: this rank, to stop
        self.asked = False  # whether any rank had, at the last step whose loss is known
        self._known: list[tuple[int, float]] = []
        self._moved = False  # what the optimizer keeps, into large pages

    def draw(self, step: int) -> Any:
        """The step's images, their noise levels and their noise. By a thread of its own.

        The CPU makes the noise: on a GPU this class trains only where the compiled operators are missing,
        which alone make the same bits there.
        """
        share, c = self.share(step), self.run.config
        z = noise.normal(
            c.seed, share.indices, noise.stream("train"), share.draw, self.images.shape
        )
        return Batch(
            share.indices,
            torch.from_numpy(share.sigma).float().reshape(-1, 1, 1, 1).to(self.device),
            self.images.batch(share.indices).to(self.device),
            z.to(self.device),
        )

    def gradient(self, batch: Any) -> None:
        """Of the batch, into the parameters' .grad; FloatingPointError where it is not finite."""
        losses = self._backward(batch.split(self._together(batch.indices)))
        totals = self._totals(losses)
        self._scale = self._excess(totals)
        loss, norm, asks = totals.tolist()
        self._loss = self._checked(self.run.step + 1, loss, norm, losses, batch)
        self.asked = asks > 0

    def update(self, batch: Any) -> None:
        """The parameters by the gradient."""
        optimizer: Any = self.run.optimizer
        self._set_lr()
        optimizer.grad_scale = self._scale
        optimizer.step()
        if self.average:
            weight = average.weight(self.run.config, self.run.step + 1)
            average.follow(self.average, self.parameters, weight)
        if not self._moved:
            self._moved = True
            states = [v for state in optimizer.state.values() for v in state.values()]
            ops.move_to_large_pages([*states, *self.average])
        self._count_write()
        self._known.append((self.run.step + 1, self._loss))

    def losses(self, wait: bool) -> Iterator[tuple[int, float]]:
        """(step, loss per pixel and channel) of each step made, once and in order, where that is known by
        now; wait: of all of them. FloatingPointError where it is not finite."""
        while self._known:
            yield self._known.pop(0)

    def close(self) -> None:
        pass

    # --- what a step computes, on any device ---

    def _together(self, images: Sequence[Any] | np.ndarray | Tensor) -> int:
        return self.run.config.micro_batch or len(images)

    def _backward(self, parts: Sequence[Part]) -> Tensor:
        """Each image's loss (n,); the gradient of their mean is left in .grad."""
        self.run.optimizer.zero_grad()
        n = sum(len(part.sigma) for part in parts)
        losses = []
        for part in parts:
            with self._synchronised(part is parts[-1]):
                x = part.noisy()
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                    denoised = self.denoiser(x)
                loss = (denoised.float() - part.clean).square().sum(dim=(1, 2, 3))
                if self.run.config.loss_weight == "inverse-variance":
                    loss = loss / part.sigma.flatten() ** 2
                # the mean over this process's images; averaged over processes by DDP
                (loss.sum() / n).backward()
            losses.append(loss.detach())
        return torch.cat(losses)

    def _synchronised(self, last: bool) -> Any:
        """Processes exchange gradients once per step, with its last micro-batch."""
        if last or not isinstance(self.denoiser, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.denoiser.no_sync()

    def _totals(self, losses: Tensor) -> Tensor:
        """The sum of the losses, the gradient's norm and who asks to stop, over all ranks: (3,) float64."""
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None]
        )
        return total(self.world, torch.stack([losses.double().sum(), norm.double(), self.asks]))

    def _excess(self, totals: Tensor) -> Tensor | None:
        """By what Adam divides the gradient, so that it is no longer than `clip`: () float32, and no
        wait for a device. Processes have one gradient, and the sum of its norm is the same in all."""
        if (clip := self.run.config.clip) is None:
            return None
        return (totals[1] / (self.world.size * clip)).clamp(min=1).float()

    def _count_write(self) -> None:
        """For whoever keeps a form of the weights: a fused operator does not tell torch that it wrote."""
        torch.autograd.graph.increment_version([*self.parameters, *self.average])

    def _set_lr(self) -> None:
        for group in self.run.optimizer.param_groups:
            group["lr"] = self.run.lr(self.run.step + 1)

    def _checked(self, step: int, loss: float, norm: float, losses: Tensor, batch: Any) -> float:
        """The loss per pixel and channel; FloatingPointError on all processes where it is not finite."""
        if not math.isfinite(loss + norm):
            self.run.step = step - 1  # the last that changed the parameters
            bad = ~torch.isfinite(losses).cpu()
            sigma = batch.sigma.flatten().cpu()[bad].tolist()
            where = list(zip(batch.indices[bad.numpy()].tolist(), sigma, strict=True))
            raise FloatingPointError(_not_finite(step, sum(self.world.gather(where), [])))
        return loss / self.run.config.batch / math.prod(self.run.split.images.shape)


def _not_finite(step: int, where: list[tuple[int, float]]) -> str:
    named = [f"image {i} at σ = {s:.4g}" for i, s in where[:16]]
    return (
        f"step {step}: the {'loss' if named else 'gradient'} is NaN or Inf"
        + (f" ({', '.join(named)}{', ...' if len(where) > 16 else ''})" if named else "")
        + f"; the parameters are as after step {step - 1}, and the checkpoints intact"
    )
