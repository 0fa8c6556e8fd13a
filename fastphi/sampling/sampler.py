"""Algorithm 1: images from noise, by denoising, with or without the guidance of a target φ.

Two forms of one loop: a schedule of noise levels, and steps adapted to each image's own noise level
(Kadkhodaie & Simoncelli 2021). The noise of step k is a function of (seed, sample id, k), so an
image never depends on which others are made with it. `sample` is the loop without a target.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastphi import engine, noise
from fastphi.engine import ops
from fastphi.sampling import guidance
from fastphi.sampling.guidance import MatchResult
from fastphi.sampling.plan import Plan, make_plan
from fastphi.sampling.record import (
    Record,
    State,
    StepInfo,
    check_run_options,
    earlier_run,
    finished_run,
    progress_bar,
    run_settings,
)
from fastphi.sampling.result import Reconstruction
from fastphi.support import files, validate
from fastphi.support.transfer import to_device, to_host
from fastphi.targets import Targets

if TYPE_CHECKING:
    from fastphi.unet import UNet

log = logging.getLogger("fastphi")

# Images through the network at once, unless told: bounds memory, changes no result.
_BATCH = 64


def sample(
    model: UNet,
    n: int,
    *,
    size: int | tuple[int, int],
    form: str = "adaptive",
    seed: int = 0,
    samples: Sequence[int] | None = None,
    sigmas: tuple[float, float, int] | None = None,
    h0: float = 0.01,
    beta: float = 0.01,
    sigma_0: float | None = None,
    sigma_last: float | None = None,
    fixed_h: bool = False,
    max_steps: int = 10_000,
    batch: int | None = None,
    callback: Callable[[StepInfo], object] | None = None,
    store_progress: bool | int = False,
    progress: bool = False,
    save: str | os.PathLike[str] | None = None,
    save_every: int = 10,
    resume: bool = True,
) -> Reconstruction:
    """n images of the denoiser's prior: the loop of `reconstruct` without matching.

    size: height and width in pixels, one number or two. All other arguments, what is returned and
    what is raised are as in `reconstruct`.
    """
    plan = make_plan(
        model,
        n,
        form=form,
        seed=seed,
        samples=samples,
        size=size,
        sigmas=sigmas,
        h0=h0,
        beta=beta,
        sigma_0=sigma_0,
        sigma_last=sigma_last,
        fixed_h=fixed_h,
        max_steps=max_steps,
        store_progress=store_progress,
    )
    sampler = Sampler(model, None, plan, batch)
    return run(
        sampler,
        callback=callback,
        progress=progress,
        save=save,
        save_every=save_every,
        resume=resume,
    )


class Sampler:
    """Algorithm 1 in both forms: `start`, then `step` until `done`, then `finish`."""

    def __init__(self, model: UNet, targets: Targets | None, plan: Plan, batch: int | None) -> None:
        self.model, self.targets, self.plan = model, targets, plan
        self.batch = _BATCH if batch is None else validate.integer(batch, "batch", low=1)
        self.samples = np.array(plan.samples, np.int64)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def start(self) -> State:
        n, (_, h, w) = len(self.samples), self.plan.shape
        mean = torch.tensor(self.plan.mean, dtype=self.dtype, device=self.device)
        x = mean[None, :, None, None].repeat(n, 1, h, w)
        sigma = np.full(n, self.plan.first)
        if self.plan.form == "adaptive":
            x = x + self.plan.first * self.z(0, np.arange(n))
        return State(0, x, sigma)

    def step(self, state: State) -> tuple[State, StepInfo]:
        return (self._schedule if self.plan.form == "schedule" else self._adaptive)(state)

    def _schedule(self, state: State) -> tuple[State, StepInfo]:
        """x_σ = x + σz; match φ(x_σ) to φ*_σ; x ← denoised(x_σ)."""
        k, rows = state.step, np.arange(len(self.samples))
        level = self.plan.sigmas[k]
        sigma = np.full(len(rows), level)
        noisy = state.x + level * self.z(k, rows)
        match = self.match(noisy, sigma, rows)
        x = self.denoise(match.x)
        info = StepInfo(k + 1, rows, self.samples, sigma, noisy, match, x, sigma)
        return State(k + 1, x, sigma), info

    def _adaptive(self, state: State) -> tuple[State, StepInfo]:
        """Match at σ̂; f = x − denoised(x); σ̂ = ‖f‖/√n; x ← x − h f + γz with
        γ² = ((1−βh)² − (1−h)²) σ̂²; an image with σ̂ < σ_L stops at denoised(x)."""
        plan, t = self.plan, state.step + 1
        rows = self.running(state)
        noisy, sigma = state.x[to_device(rows, self.device)], state.sigma[rows]
        match = self.match(noisy, sigma, rows)
        x, denoised = match.x, self.denoise(match.x)
        f = x - denoised
        sigma_hat = _rms(f)
        h = plan.h0 if plan.fixed_h else plan.h0 * t / (1 + plan.h0 * (t - 1))
        gamma = max((1 - plan.beta * h) ** 2 - (1 - h) ** 2, 0.0) ** 0.5 * sigma_hat
        x = x - h * f + self._column(gamma) * self.z(t, rows)
        stopped = to_device(sigma_hat < plan.last, x.device)[:, None, None, None]
        x = torch.where(stopped, denoised, x)
        info = StepInfo(t, rows, self.samples[rows], sigma, noisy, match, x, sigma_hat)
        return State(t, _put(state.x, rows, x), _put(state.sigma, rows, sigma_hat)), info

    def done(self, state: State) -> bool:
        return state.step == self.plan.steps or not len(self.running(state))

    def running(self, state: State) -> np.ndarray:
        """The rows that have not stopped."""
        if self.plan.form == "schedule":
            return np.arange(len(self.samples))
        return np.flatnonzero(state.sigma >= self.plan.last)

    def finish(self, state: State) -> State:
        """The adaptive form gives denoised(x), also of the images that ran out of steps."""
        rows = self.running(state)
        if self.plan.form == "schedule" or not len(rows):
            return state
        log.warning(
            f"{len(rows)} of {len(self.samples)} images had not reached σ̂ < {self.plan.last:g} in "
            f"max_steps = {self.plan.steps} steps; they are returned denoised from where they were "
            f"(largest σ̂ {state.sigma[rows].max():.3g})"
        )
        x = self.denoise(state.x[to_device(rows, self.device)])
        return State(state.step, _put(state.x, rows, x), state.sigma)

    def z(self, k: int, rows: np.ndarray) -> Tensor:
        """The noise of step k."""
        stream = noise.stream("step", k)
        ids, shape = self.samples[rows], self.plan.shape
        return noise.normal(
            self.plan.seed, ids, stream, 0, shape, device=self.device, dtype=self.dtype
        )

    def denoise(self, x: Tensor) -> Tensor:
        prepared = engine.runner(self.model, x)
        return torch.cat(
            [prepared.denoise(x[chunk].contiguous()) for chunk in self._chunks(len(x))]
        )

    def match(self, x: Tensor, sigma: np.ndarray, rows: np.ndarray) -> MatchResult:
        """Algorithm 2 at each image's own noise level."""
        if self.targets is None:
            none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            return MatchResult(x, torch.full_like(x[:, 0, 0, 0], torch.nan)[None], none, none > 0)
        targets, plan = self.targets, self.plan
        if targets.sigma_range is not None:  # covers the plan; σ̂ may begin a little above σ_0
            sigma = np.clip(sigma, *targets.sigma_range)
        phi = targets.phi(sigma, rows)
        options = (plan.lr, plan.max_iter, plan.tolerance, targets.channels, targets.zero_elsewhere)
        parts = [
            guidance.match(self.model, x[chunk], phi[chunk], *options)
            for chunk in self._chunks(len(x))
        ]
        names = ("losses", "updates", "converged")
        x = torch.cat([part.x for part in parts])
        return MatchResult(x, *(torch.cat([getattr(p, v) for p in parts], -1) for v in names))

    def _chunks(self, n: int) -> Iterator[slice]:
        return (slice(i, i + self.batch) for i in range(0, n, self.batch))

    def _column(self, values: np.ndarray) -> Tensor:
        return to_device(values, self.device, self.dtype)[:, None, None, None]


def run(
    sampler: Sampler,
    *,
    callback: Callable[[StepInfo], object] | None,
    progress: bool,
    save: str | os.PathLike[str] | None,
    save_every: int,
    resume: bool,
) -> Reconstruction:
    """Take the steps and keep their record; store the state, and go on from a stored one."""
    check_run_options(callback, save, save_every)
    path = None if save is None else Path(save).absolute()
    with contextlib.ExitStack() as stack:
        stack.enter_context(engine.plain_mode(sampler.model, sampler.device))
        settings = run_settings(sampler.model, sampler.targets, sampler.plan)
        record = Record(sampler.plan, sampler.device, settings, path)
        if resume and (done := finished_run(path, settings)):
            return record.result(record.restore(done), finished=True)
        if path is not None and not files.is_stream(path):
            stack.enter_context(files.owned(path, "save"))
        earlier = earlier_run(path, settings) if resume else None
        state = sampler.start() if earlier is None else record.restore(earlier)
        if earlier is not None and earlier.finished:  # by whoever held the file a moment ago
            return record.result(state, finished=True)
        record.store(state)  # a path that cannot be written is found now, not after the first steps
        with progress_bar(sampler.plan, state.step, progress) as show:
            try:
                while not sampler.done(state):
                    after, info = sampler.step(state)
                    _check_finite(info)
                    record.add(info, after)
                    state = after
                    if callback is not None:
                        callback(info)
                    show(info)
                    if state.step % save_every == 0:
                        record.store(state)
                return record.finish(sampler.finish(state))
            except BaseException:  # Ctrl-C too: keep all whole steps
                record.rescue(state)
                raise


def _check_finite(info: StepInfo) -> None:
    bad = ~torch.isfinite(info.x).flatten(1).all(1)
    bad |= info.match.last.isnan() & ~info.match.first.isnan()
    if bad.any():
        i = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"step {info.step}: NaN or Inf in the image of sample {info.samples[i]} (row "
            f"{info.rows[i]}) at σ = {info.sigma[i]:g}"
        )


def _rms(f: Tensor) -> np.ndarray:
    """‖f‖/√n of each image: (n, C, H, W) -> (n,) float64. One image at a time and in one thread (on a
    GPU in a fixed tree), so that the order of the sum depends on the image's size only."""
    if f.is_cuda and ops.missing("cuda") is None:  # a few numbers go to the host, not the images
        squares = f.float().square().permute(0, 2, 3, 1).contiguous()
        return np.sqrt(_numpy(ops.spatial_mean(squares)).mean(axis=1))
    return np.array(
        [np.sqrt(np.mean(np.square(row.ravel(), dtype=np.float64))) for row in _numpy(f)]
    )


def _numpy(x: Tensor) -> np.ndarray:
    return to_host(x.double()).contiguous().numpy()


def _put(whole: Any, rows: np.ndarray, part: Any) -> Any:
    """A copy of `whole` with these rows replaced."""
    if isinstance(whole, np.ndarray):
        whole = whole.copy()
        whole[rows] = part
        return whole
    return whole.index_copy(0, to_device(rows, whole.device), part)
