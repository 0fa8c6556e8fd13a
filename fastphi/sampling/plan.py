"""What decides the result of sampling or reconstruction, checked before any work."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastphi import reference
from fastphi.sampling import guidance
from fastphi.support import validate
from fastphi.targets.kinds import Targets, sample_ids

if TYPE_CHECKING:
    from fastphi.config import TrainingInfo
    from fastphi.unet import UNet

log = logging.getLogger("fastphi")

# The schedule form of the authors' sampling program: linspace(first, last, steps).
SCHEDULE = (1.0, 0.03, 100)
# The adaptive form stops an image below this noise level.
SIGMA_LAST = 0.01
# A step is the index of its noise stream, which has 24 bits.
_MOST_STEPS = 2**24 - 1


@dataclass(frozen=True)
class Plan:
    """samples: N ids. shape: (C, H, W). mean: the colour to begin with, C numbers.

    sigmas: schedule form: the noise level of each step; adaptive form: (σ_0, σ_L).
    store_progress: keep the images of every so many steps, 0: of none.
    """

    form: str
    seed: int
    samples: tuple[int, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    sigmas: tuple[float, ...]
    h0: float
    beta: float
    fixed_h: bool
    max_steps: int
    store_progress: int
    lr: float
    max_iter: int
    tolerance: float

    @property
    def first(self) -> float:
        return self.sigmas[0]

    @property
    def last(self) -> float:
        return self.sigmas[-1]

    @property
    def steps(self) -> int:
        """At most this many."""
        return len(self.sigmas) if self.form == "schedule" else self.max_steps

    def settings(self, matching: bool) -> dict[str, Any]:
        """What of it decides the result: plain values, as JSON would give them back."""
        names = ["form", "seed", "samples", "shape", "mean", "sigmas", "store_progress"]
        if self.form == "adaptive":
            names += ["h0", "beta", "fixed_h", "max_steps"]
        if matching:
            names += ["lr", "max_iter", "tolerance"]
        values = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def make_plan(
    model: UNet,
    n: int,
    *,
    form: str,
    seed: int,
    samples: Sequence[int] | None,
    size: Any,
    sigmas: Any,
    h0: float,
    beta: float,
    sigma_0: float | None,
    sigma_last: float | None,
    fixed_h: bool,
    max_steps: int,
    store_progress: bool | int,
    lr: float = 0.01,
    max_iter: int = 100,
    tolerance: float = 0.01,
    targets: Targets | None = None,
) -> Plan:
    """The plan of `sample` (targets None) or `reconstruct`. Raises ValueError or TypeError."""
    validate.choice(form, "form", ("schedule", "adaptive"))
    n = validate.integer(n, "n", low=1, high=2**32)  # an id is one of 2^32
    if form == "schedule":
        for name, value in (("sigma_0", sigma_0), ("sigma_last", sigma_last)):
            if value is not None:
                raise ValueError(f"{name}: belongs to the adaptive form; a schedule has sigmas=")
        levels = _schedule(sigmas, model.training_info)
    else:
        if sigmas is not None:
            raise ValueError(
                "sigmas: belongs to the schedule; the adaptive form has sigma_0, sigma_last"
            )
        levels = _ends(sigma_0, sigma_last, model.training_info)
    guidance.check_options(lr, max_iter, tolerance)
    if not isinstance(fixed_h, bool):
        raise TypeError(f"fixed_h: expected True or False, got {fixed_h!r}")
    shape = _shape(model, size, targets)
    _check_memory(n, shape)
    plan = Plan(
        form=form,
        seed=validate.seed(seed),
        samples=tuple(sample_ids(samples, n).tolist()),
        shape=shape,
        mean=_mean(model),
        sigmas=levels,
        h0=validate.number(h0, "h0", low=0, high=1, open_low=True),
        beta=validate.number(beta, "beta", low=0, high=1),
        fixed_h=fixed_h,
        max_steps=validate.integer(max_steps, "max_steps", low=1, high=_MOST_STEPS),
        store_progress=validate.integer(int(store_progress), "store_progress", low=0),
        lr=float(lr),
        max_iter=int(max_iter),
        tolerance=float(tolerance),
    )
    if targets is not None:
        _check_targets(targets, plan, model.config.channels[-1])
    return plan


def _schedule(sigmas: Any, info: TrainingInfo) -> tuple[float, ...]:
    """linspace(first, last, steps); the default is clipped to the training range."""
    first, last, steps = SCHEDULE if sigmas is None else _triple(sigmas)
    if sigmas is None:
        first, last = min(first, info.sigma_max), max(last, info.sigma_min)
        if (first, last) != SCHEDULE[:2]:
            log.warning(f"schedule: σ from {first:g} to {last:g}, clipped to the training range")
    else:
        _tell_outside(info, first, last)
    levels = reference.schedule(first, last, steps)
    return (*levels[:-1], last) if steps > 1 else (first,)  # `last` itself, not last ± an ulp


def _triple(sigmas: Any) -> tuple[float, float, int]:
    if not isinstance(sigmas, (tuple, list)) or len(sigmas) != 3:
        raise ValueError(f"sigmas: expected (first, last, steps), got {sigmas!r}")
    steps = validate.integer(sigmas[2], "sigmas: steps", low=1, high=_MOST_STEPS)
    first = validate.sigma(sigmas[0], "sigmas: first", allow_zero=False)
    last = validate.sigma(sigmas[1], "sigmas: last")
    if last > first:
        raise ValueError(f"sigmas: expected levels that fall, got first {first:g}, last {last:g}")
    return first, last, steps


def _ends(sigma_0: Any, sigma_last: Any, info: TrainingInfo) -> tuple[float, ...]:
    """(σ_0, σ_L): by default the top of the training range, and 0.01."""
    first = (
        info.sigma_max if sigma_0 is None else validate.sigma(sigma_0, "sigma_0", allow_zero=False)
    )
    last = SIGMA_LAST if sigma_last is None else sigma_last
    last = validate.sigma(last, "sigma_last", allow_zero=False)
    if last >= first:
        raise ValueError(f"sigma_last: expected less than sigma_0 = {first:g}, got {last:g}")
    _tell_outside(info, first, first)
    return first, last


def _tell_outside(info: TrainingInfo, first: float, last: float) -> None:
    if first > info.sigma_max or last < info.sigma_min:
        log.warning(
            f"σ from {first:g} to {last:g} is beyond the training range "
            f"[{info.sigma_min:g}, {info.sigma_max:g}]"
        )


def _shape(model: UNet, size: Any, targets: Targets | None) -> tuple[int, int, int]:
    if size is None:
        if targets is None or targets.shape is None:
            raise ValueError("size: these targets come from no images; give the size in pixels")
        size = targets.shape[1:]
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"size: expected pixels, one number or (height, width), got {size!r}")
    h, w = (validate.integer(v, "size", low=1) for v in pair)
    validate.size((h, w), model.config)
    return model.config.image_channels, h, w


def _check_memory(n: int, shape: tuple[int, int, int]) -> None:
    """A result is held in memory: one that cannot be is refused before anything is made."""
    needed, there = (
        4 * n * math.prod(shape),
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
    if needed > there:
        raise ValueError(
            f"n: {n} images of {'x'.join(map(str, shape))} take {needed / 2**30:.1f} GiB, this machine has "
            f"{there / 2**30:.1f}; make them in parts, by samples="
        )


def _mean(model: UNet) -> tuple[float, ...]:
    """The data set's mean colour; 0.5 where unknown."""
    mean, count = model.training_info.mean, model.config.image_channels
    if mean is None:
        return (0.5,) * count
    if len(mean) != count:
        raise ValueError(f"training_info.mean: expected {count} numbers, got {tuple(mean)}")
    return tuple(float(v) for v in mean)


def _check_targets(targets: Targets, plan: Plan, width: int) -> None:
    if targets.width != width:
        raise ValueError(f"targets: φ* has {targets.width} channels, that of the model {width}")
    if targets.sigma_range is None:
        return
    low, high = targets.sigma_range
    if plan.last < low or plan.first > high:
        raise ValueError(
            f"targets: φ* is known at noise levels from {low:g} to {high:g}, the {plan.form} form "
            f"needs {plan.last:g} to {plan.first:g}; extract those too, narrow the form's levels, "
            "or take the nearest level on purpose with clip=True"
        )
