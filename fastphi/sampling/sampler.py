"""Algorithm 1: images from noise, by denoising, with or without the guidance of a target φ.

Two forms of one loop: a schedule of noise levels, and steps adapted to each image's own noise level
(Kadkhodaie & Simoncelli 2021). The noise of step k is a function of (seed, sample id, k), so an
image never depends on which others are made with it. `sample` is the loop without a target.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastphi import engine, noise
from fastphi.engine import ops
from fastphi.sampling import guidance
from fastphi.sampling.guidance import MatchResult
from fastphi.sampling.plan import Plan
from fastphi.sampling.record import (
    State,
    StepInfo,
)
from fastphi.support import validate
from fastphi.support.transfer import to_device, to_host
from fastphi.targets import Targets

if TYPE_CHECKING:
    from fastphi.unet import UNet

log = logging.getLogger("fastphi")

# Images through the network at once, unless told: bounds memory, changes no result.
_BATCH = 64


class Sampler:
    """Algorithm 1 in both forms: `start`, then `step` until `done`, then `finish`."""

    def __init__(self, model: UNet, targets: Targets | None, plan: Plan, batch: int | None) -> None:
        self.model, self.targets, self.plan = model, targets, plan
        self.batch = _BATCH if batch is None else validate.integer(batch, "batch", low=1)
        self.part = range(len(plan.samples))  # the rows that it makes
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def of(self, part: range) -> Sampler:
        """The same of some of the images; its own rows count from 0."""
        sampler = copy.copy(self)
        sampler.part = part
        return sampler

    @property
    def samples(self) -> np.ndarray:
        return np.array(self.plan.samples[self.part.start : self.part.stop], np.int64)

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
        phi = targets.phi(sigma, rows + self.part.start)
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
