"""Training of the blind denoiser (§2.1, Appendix A).

    Trainer(TrainConfig(data="pack", out="run")).run()

The order of the images, their noise levels and their noise are functions of (seed, image, epoch):
the same whatever the number of processes, and after a resume. Several processes:
torchrun --nproc-per-node 4 -m fastphi train ...; the batch is divided among them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastphi import data, engine, noise
from fastphi.config import TrainingInfo
from fastphi.support import files, processes, validate
from fastphi.train import folder
from fastphi.train.config import TrainConfig
from fastphi.train.log import Callback, Writer
from fastphi.train.process import Interrupts, World, deterministic
from fastphi.train.record import RunState, Split
from fastphi.unet import UNet

__all__ = ["TrainConfig", "Trainer", "psnr"]

log = logging.getLogger("fastphi")


def psnr(
    model: UNet,
    images: Any,
    sigmas: Any,
    *,
    indices: Any = None,
    seed: int = 0,
    batch: int = 64,
) -> dict[float, float]:
    """PSNR of the denoised image in dB, per noise level: {σ: dB}.

    10 log10(1/MSE) per image (peak 1; MSE over pixels and channels), then the mean over images.
    Neither the noisy nor the denoised image is clipped. Noise is a function of (seed, image, place
    of σ in the list). images: anything `fastphi.data.open_images` takes; indices: which (all).
    Raises ValueError or TypeError for images, levels or indices that cannot be.
    """
    opened = data.open_images(images)
    sigmas = validate.sigmas(sigmas)
    indices = np.arange(len(opened)) if indices is None else np.asarray(indices)
    if not len(indices):
        raise ValueError("indices: expected at least one image, got none")
    validate.integer(batch, "batch", low=1)
    device = next(model.parameters()).device
    total = np.zeros(len(sigmas))
    for part in np.array_split(indices, -(-len(indices) // batch)):
        clean = opened.batch(part).to(device)
        for k, sigma in enumerate(sigmas):
            z = noise.normal(seed, part, noise.stream("evaluate", k), 0, opened.shape).to(device)
            with torch.no_grad():
                x = clean + sigma * z
                # by the ops, as they take a whole batch at a time in every engine
                denoised = model.walk(engine.pick(model, x, gradient=True).ops, x)
            mse = (denoised - clean).double().square().mean(dim=(1, 2, 3))
            total[k] += float(-10 * torch.log10(mse).sum())
    return {sigma: float(t) / len(indices) for sigma, t in zip(sigmas, total, strict=True)}


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


class Trainer:
    """A training run: `config.out` holds its state, and the same config goes on from there.

    images: what to train on, where `config.data` is not given: anything `fastphi.data.open_images`
    takes. Raises ValueError or TypeError, before any work, for what cannot be trained.
    """

    def __init__(self, config: TrainConfig, images: Any = None) -> None:
        if not isinstance(config, TrainConfig):
            raise TypeError(f"config: expected a TrainConfig, got {type(config).__name__}")
        if (images is None) == (config.data is None):
            raise ValueError("data: give either the path of a pack or images to the Trainer")
        # whatever folder is entered later, by a callback, say
        self.config = config = dataclasses.replace(config, out=config.out.absolute())
        self.world = World.here()
        self.images = data.open_images(config.data if images is None else images)
        self.split = self._split()
        self.device = config.find_device(self.world.local_rank)
        self.amp = config.mixed_precision(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # this generator, no device's
            model = UNet(config.model, backend=config.backend)
        self.model = model.to(self.device, torch.float32)  # whatever torch's default is
        low, high = float(config.sigma_min or 0), config.sigma_max
        name = config.data.name if config.data else "images in memory"
        self.model.training_info = TrainingInfo(low, high, self.images.mean, name)
        with self._autocast():  # an engine that cannot serve says so now
            x = torch.empty(0, dtype=torch.float32, device=self.device)
            self.engine = engine.pick(self.model, x, gradient=True).name
        if config.tensorboard:
            try:
                importlib.import_module("tensorboard")
            except ImportError:
                raise ValueError(
                    "tensorboard: the package is not installed (pip install tensorboard)"
                ) from None
        fused = self.device.type == "cuda"  # one kernel for all parameters
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.lr, fused=fused)
        self._order = functools.lru_cache(maxsize=2)(self._permutation)
        each = len(self.split.training) // config.batch
        steps = min(each * config.epochs, config.max_steps or 1 << 62)
        self.state = RunState(config, self.split, self.model, self.optimizer, each, steps)

    def run(self, callback: Callback | None = None, progress: bool = True) -> UNet:
        """Train to the end, or go on from the newest checkpoint in `config.out`.

        callback: called after every line of the log with that line (a dict), on the first process.
        Raises ValueError where the folder holds a run of other settings, FloatingPointError where
        the loss or its gradient is NaN or Inf, OSError where a file cannot be written. Ctrl-C and
        SIGTERM write a checkpoint of the last completed step first.
        """
        self.world.join(self.device)
        if folder.finished_elsewhere(self.state, self.world):
            return self.model
        with contextlib.ExitStack() as stack:
            if self.world.rank == 0:
                stack.enter_context(files.locked(self.config.out, "out", mark="checkpoints"))
            stack.enter_context(deterministic())
            stack.enter_context(torch.enable_grad())
            self.state.environment = self._environment()
            folder.resume(self.state, self.world)
            self._train(stack.enter_context(Interrupts()), callback, progress)
        return self.model

    # --- the algorithm ---

    def _train(self, interrupts: Interrupts, callback: Callback | None, progress: bool) -> None:
        """Steps from the state's on; on Ctrl-C or SIGTERM a checkpoint of the last completed one."""
        denoiser: nn.Module = self.model
        if self.config.compile:
            denoiser = torch.compile(denoiser)  # type: ignore[assignment]
        if self.world.size > 1:
            denoiser = DistributedDataParallel(denoiser)
        run, writer = self.state, None
        if self.world.rank == 0:
            writer = Writer(run, self._evaluate, callback, progress)
        batches = processes.prefetched(self._draw, range(run.step, run.steps))
        try:
            with contextlib.closing(batches):
                if writer:
                    writer.begin()
                began = time.perf_counter() - run.seconds
                for batch in batches:
                    loss = self._gradient(denoiser, batch)
                    with interrupts.hold():  # parameters, step and log go together
                        self._set_lr()
                        self.optimizer.step()
                        run.step += 1
                        run.seconds = time.perf_counter() - began
                        if writer:
                            writer.trained(loss)
                    if writer:
                        writer.after_step()
        except (KeyboardInterrupt, SystemExit):
            if writer:
                with interrupts.hold():
                    writer.checkpoint()
                log.warning("stopped after step %d; the same command goes on from there", run.step)
            raise
        finally:
            if writer:
                writer.close()

    def _draw(self, step: int) -> Batch:
        """This process's images of a step, their noise levels and their noise."""
        c, each = self.config, self.state.steps_per_epoch
        epoch, share = step // each, c.batch // self.world.size
        at = step % each * c.batch + self.world.rank * share
        indices = self.split.training[self._order(epoch)[at : at + share]]
        sigma = c.sigmas(noise.uniform(c.seed, indices, noise.stream("sigma"), epoch))
        z = noise.normal(c.seed, indices, noise.stream("train"), epoch, self.images.shape)
        return Batch(
            indices,
            torch.from_numpy(sigma).float().reshape(-1, 1, 1, 1).to(self.device),
            self.images.batch(indices).to(self.device),
            z.to(self.device),
        )

    def _gradient(self, denoiser: nn.Module, batch: Batch) -> float:
        """Gradient of E‖x̂(x) − clean‖² over the whole batch; the loss per pixel and channel."""
        self.optimizer.zero_grad()
        parts = batch.split(self.config.micro_batch or len(batch.indices))
        losses = []
        for part in parts:
            with self._synchronised(denoiser, part is parts[-1]):
                x = part.clean + part.sigma * part.noise
                with self._autocast():
                    # channels last: the layout in which convolutions are fastest
                    denoised = denoiser(x.contiguous(memory_format=torch.channels_last))
                loss = (denoised.float() - part.clean).square().sum(dim=(1, 2, 3))
                if self.config.loss_weight == "inverse-variance":
                    loss = loss / part.sigma.flatten() ** 2
                # the mean over this process's images; averaged over processes by DDP
                (loss.sum() / len(batch.indices)).backward()
            losses.append(loss.detach())
        return self._checked(torch.cat(losses), batch)

    def _set_lr(self) -> None:
        c, epoch = self.config, self.state.step // self.state.steps_per_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * 0.5 ** (epoch // c.lr_halve_every)

    # --- around it ---

    def _permutation(self, epoch: int) -> np.ndarray:
        return noise.permutation(
            self.config.seed, len(self.split.training), noise.stream("order"), epoch
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def _synchronised(self, denoiser: nn.Module, last: bool) -> Any:
        """Processes exchange gradients once per step, with its last micro-batch."""
        if last or not isinstance(denoiser, DistributedDataParallel):
            return contextlib.nullcontext()
        return denoiser.no_sync()

    def _checked(self, losses: Tensor, batch: Batch) -> float:
        """The loss over all processes; FloatingPointError on all of them where it is not finite."""
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.model.parameters() if p.grad is not None]
        )
        both = torch.stack([losses.double().sum(), norm.double()])
        loss, norm = self.world.sum(both).tolist()
        if not np.isfinite(loss + norm):
            bad = ~torch.isfinite(losses).cpu()
            sigma = batch.sigma.flatten().cpu()[bad].tolist()
            where = list(zip(batch.indices[bad.numpy()].tolist(), sigma, strict=True))
            raise FloatingPointError(self._not_finite(sum(self.world.gather(where), [])))
        return loss / self.config.batch / int(np.prod(self.images.shape))

    def _not_finite(self, where: list[tuple[int, float]]) -> str:
        named = [f"image {i} at σ = {s:.4g}" for i, s in where[:16]]
        return (
            f"step {self.state.step + 1}: the {'loss' if named else 'gradient'} is NaN or Inf"
            + (f" ({', '.join(named)}{', ...' if len(where) > 16 else ''})" if named else "")
            + f"; the parameters are as after step {self.state.step}, and the checkpoints intact"
        )

    def _split(self) -> Split:
        """Which images train, which are held out; checks that they suit the model and the batch."""
        c, n = self.config, len(self.images)
        holdout = c.holdout
        if holdout is None:
            holdout = 0 if c.heldout is not None else min(1000, n // 20)
        validate.integer(holdout, "holdout", low=0, high=n - 1)
        training, held = self.images.split(holdout, c.seed)
        heldout = self.images
        if c.heldout is not None:
            heldout = data.open_images(c.heldout)
            held = np.arange(len(heldout))
        for name, images in (("data", self.images), ("heldout", heldout)):
            validate.images(torch.empty(1, *images.shape), c.model, name)
        if len(training) < c.batch:
            raise ValueError(
                f"batch: {c.batch} images, but only {len(training)} to train on "
                f"({n}, of which {holdout} are held out)"
            )
        if c.batch % self.world.size:
            raise ValueError(
                f"batch: {c.batch} images cannot be divided among {self.world.size} processes"
            )
        return Split(self.images, training, heldout, held)

    def _environment(self) -> dict[str, Any]:
        """What the bits depend on beside the settings."""
        return {
            "device": self.device.type,
            "engine": self.engine,
            "bf16": self.amp,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processes": self.world.size,
        }

    def _evaluate(self) -> dict[float, float]:
        """PSNR of the held-out images, in float32 whatever the training's precision."""
        batch = min(64, self.config.micro_batch or 64)
        return psnr(
            self.model,
            self.split.heldout,
            self.config.evaluation_sigmas(),
            indices=self.split.held,
            seed=self.config.seed,
            batch=batch,
        )
