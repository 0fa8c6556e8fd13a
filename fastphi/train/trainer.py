"""Training of the blind denoiser (§2.1, Appendix A).

    Trainer(TrainConfig(data="pack", out="run")).run()

The order of the images, their noise levels and their noise are functions of (seed, image, epoch):
the same whatever the number of processes, and after a resume. Several processes, as torchrun or srun
start them (torchrun --nproc-per-node 4 -m fastphi train ..., srun fastphi train ...), divide the batch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import logging
import signal
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastphi import data, engine, noise
from fastphi.config import TrainingInfo
from fastphi.engine import ops
from fastphi.support import device, files, processes, transfer, validate
from fastphi.support.interrupts import Interrupts, raise_for
from fastphi.support.world import Gone, World
from fastphi.train import folder
from fastphi.train.captured import CapturedStep
from fastphi.train.config import TrainConfig
from fastphi.train.log import Callback, Writer
from fastphi.train.process import deterministic, join, mean_gradient
from fastphi.train.record import RunState, Split
from fastphi.train.step import Share, Step
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
        clean = transfer.to_device(opened.batch(part), device)
        for k, sigma in enumerate(sigmas):
            stream = noise.stream("evaluate", k)
            z = noise.normal(seed, part, stream, 0, opened.shape, device=device)
            with torch.no_grad():
                x = clean + sigma * z
                # by the ops, as they take a whole batch at a time in every engine
                denoised = model.walk(engine.pick(model, x, gradient=True).ops, x)
            mse = (denoised - clean).double().square().mean(dim=(1, 2, 3))
            total[k] += float(-10 * torch.log10(mse).sum())
    return {sigma: float(t) / len(indices) for sigma, t in zip(sigmas, total, strict=True)}


class Trainer:
    """A training run: `config.out` holds its state, and the same config goes on from there.

    images: what to train on, where `config.data` is not given: anything `fastphi.data.open_images`
    takes (a data set is read once at the start, for its SHA-256). Raises ValueError or TypeError,
    before any work, for what cannot be trained.
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
        self.device = device.find(config.device)
        self.amp = config.mixed_precision(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # this generator, no device's
            model = UNet(config.model, backend=config.backend)
        self.model = model.to(self.device, torch.float32)  # whatever torch's default is
        low, high = float(config.sigma_min or 0), config.sigma_max
        name = config.data.name if config.data else "images in memory"
        self.model.training_info = TrainingInfo(low, high, self.images.mean, name)
        # an engine that cannot serve says so now
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            x = torch.empty(0, dtype=torch.float32, device=self.device)
            self.engine = engine.pick(self.model, x, gradient=True).name
        if config.tensorboard:
            try:
                importlib.import_module("tensorboard")
            except ImportError:
                raise ValueError(
                    "tensorboard: the package is not installed (pip install tensorboard)"
                ) from None
        # fused: one pass over the parameters
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.lr, fused=True)
        self._order = functools.lru_cache(maxsize=2)(self._permutation)
        each = len(self.split.training) // config.batch
        steps = min(each * config.epochs, config.max_steps or 1 << 62)
        self.state = RunState(config, self.split, self.model, self.optimizer, each, steps)
        if config.ema != "none":
            self.state.average = copy.deepcopy(self.model)

    def run(self, callback: Callback | None = None, progress: bool = True) -> UNet:
        """Train to the end, or go on from the newest checkpoint in `config.out`. Returns the model; with
        `config.ema`, the network of the averaged weights (`model` then has the last step's).

        callback: called after every line of the log with that line (a dict), on the first process; on
        a GPU, steps with a line are then waited for.
        Raises ValueError where the folder holds a run of other settings, FloatingPointError where
        the loss or its gradient is NaN or Inf, OSError where a file cannot be written, Gone where
        another rank is gone. Ctrl-C, SIGTERM and SIGUSR1 write a checkpoint of the last completed step
        first (of several ranks one is enough to be told); the latter two then exit with code 75.
        """
        with self.world.job():
            return self._run(callback, progress)

    def _run(self, callback: Callback | None, progress: bool) -> UNet:
        join(self.world, self.device)
        self.world.agree(folder.identity(self.state), "config")
        if folder.finished_elsewhere(self.state, self.world):
            return self.state.product
        with contextlib.ExitStack() as stack:
            if self.world.rank == 0:
                stack.enter_context(files.locked(self.config.out, "out", mark="checkpoints"))
            stack.enter_context(deterministic())
            stack.enter_context(torch.enable_grad())
            self.state.environment = self._environment()
            folder.resume(self.state, self.world)
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            self._train(stack.enter_context(Interrupts()), callback, progress)
        return self.state.product

    # --- the algorithm ---

    def _train(self, interrupts: Interrupts, callback: Callback | None, progress: bool) -> None:
        """Steps from the state's on; when stopped, a checkpoint of the last completed one."""
        run, writer, step = self.state, None, self._step()
        if self.world.rank == 0:
            writer = Writer(run, self._evaluate, callback, progress)
        batches = processes.prefetched(step.draw, range(run.step, run.steps))

        def account(wait: bool) -> None:
            """For the steps whose loss is known; wait: for all."""
            for number, loss in step.losses(wait):
                run.seconds = time.perf_counter() - began
                if writer:
                    writer.trained(number, loss)

        try:
            with contextlib.closing(batches):
                if writer:
                    writer.begin()
                began = time.perf_counter() - run.seconds
                if self.world.size > 1:
                    interrupts.ask()  # all end after the same step
                for batch in batches:
                    if interrupts.asked:
                        step.asks.fill_(1)
                    with self.world.connected():
                        step.gradient(batch)
                    with interrupts.hold():  # parameters, step and log go together
                        step.update(batch)
                        run.step += 1
                        account(wait=writer is not None and writer.waits())
                    if writer:
                        writer.after_step()
                    if step.asked:
                        raise_for(interrupts.asked or signal.SIGTERM)
        except (KeyboardInterrupt, SystemExit, Gone):
            self.world.heed()
            if writer:
                with interrupts.hold():
                    account(wait=True)
                    writer.checkpoint()
                log.warning("stopped after step %d; the same command goes on from there", run.step)
            raise
        finally:
            step.close()
            if writer:
                writer.close()

    def _step(self) -> Step:
        denoiser: nn.Module = self.model
        if self.config.compile:
            denoiser = torch.compile(denoiser)  # type: ignore[assignment]
        if self.world.size > 1:
            denoiser = DistributedDataParallel(denoiser)
            # without annotations: torch takes none that are text
            denoiser.register_comm_hook(
                self.world, lambda world, bucket: mean_gradient(world, bucket)
            )
        kind: type[Step] = Step
        if self.device.type == "cuda":
            if (reason := ops.missing("cuda")) is None:
                kind = CapturedStep
            else:
                log.warning("the CPU makes the noise, and steps are not captured: %s", reason)
        return kind(self.state, denoiser, self._share, self.world, self.amp)

    def _share(self, step: int) -> Share:
        c, each = self.config, self.state.steps_per_epoch
        epoch, share = step // each, c.batch // self.world.size
        at = step % each * c.batch + self.world.rank * share
        indices = self.split.training[self._order(epoch)[at : at + share]]
        sigma = c.sigmas(noise.uniform(c.seed, indices, noise.stream("sigma"), epoch))
        return Share(indices, sigma, epoch)

    # --- around it ---

    def _permutation(self, epoch: int) -> np.ndarray:
        return noise.permutation(
            self.config.seed, len(self.split.training), noise.stream("order"), epoch
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
            self.state.product,
            self.split.heldout,
            self.config.evaluation_sigmas(),
            indices=self.split.held,
            seed=self.config.seed,
            batch=batch,
        )
