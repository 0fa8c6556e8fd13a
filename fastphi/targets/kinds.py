"""The kinds of target: what yields φ*(σ). Made by the functions of `fastphi.targets`."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastphi.support import validate
from fastphi.support.transfer import to_device, to_host


class Targets:
    """N targets. Sub-classes supply `_phi`, `_state` and the attributes.

    width: C, the channels of φ. count: N. shape: (C, H, W) of the images that the targets come
    from, None where unknown. sigma_range: noise levels that φ* is known at, None where at all.
    channels, zero_elsewhere: the subset to match, see `match_phi`.
    """

    width: int
    count: int
    shape: tuple[int, int, int] | None = None
    sigma_range: tuple[float, float] | None = None
    channels: tuple[int, ...] | None = None
    zero_elsewhere: bool = False

    def __len__(self) -> int:
        """How many images it makes."""
        return self.count

    def phi(self, sigma: Any, rows: Any = None) -> Tensor:
        """φ*(σ): (n, C), zero outside of `channels` where `zero_elsewhere`.

        sigma: a noise level >= 0, or one per row, in units of images in [0, 1].
        rows: which of the targets, n numbers in [0, N) (default: all).
        Raises ValueError for rows or levels that are not there.
        """
        rows = row_numbers(rows, len(self))
        phi = self._phi(_levels(sigma, len(rows)), rows)
        return restrict(phi, self.channels) if self.zero_elsewhere else phi

    def state(self) -> dict[str, Any]:
        """Plain values that identify the targets: what an interrupted reconstruction compares."""
        channels = None if self.channels is None else list(self.channels)
        return self._state() | {"channels": channels, "zero_elsewhere": self.zero_elsewhere}

    def with_channels(self, channels: Sequence[int], zero_elsewhere: bool = False) -> Targets:
        """The same targets, of which only `channels` are matched; see `match_phi`."""
        chosen = copy.copy(self)
        chosen.channels = validate.channel_subset(channels, self.width)
        chosen.zero_elsewhere = zero_elsewhere
        check_subset(chosen.channels, zero_elsewhere)
        return chosen

    def select(self, rows: Any) -> Targets:
        """Some of the targets, in any order, repeated where a number is."""
        return Selected(self, row_numbers(rows, len(self)))

    def repeat(self, copies: int) -> Targets:
        """`copies` of each: one target → many samples. Copies of one target stand together."""
        validate.integer(copies, "copies", low=1)
        return self if copies == 1 else self.select(np.repeat(np.arange(len(self)), copies))

    def combined(self, how: str) -> Targets:
        """One target from all of them: the mean or the maximum of each channel, at each σ."""
        return Combined(self, how)

    def at(self, sigma: float) -> Targets:
        """φ* at this one noise level, whatever level is asked for."""
        value = validate.sigma(sigma)
        held = Table(None, self._phi(np.full(len(self), value), np.arange(len(self)))[None])
        return held._like(self)

    def _like(self, other: Targets) -> Targets:
        self.shape, self.channels = other.shape, other.channels
        self.zero_elsewhere = other.zero_elsewhere
        return self

    def _phi(self, sigma: np.ndarray, rows: np.ndarray) -> Tensor:
        """sigma: (n,) float64; rows: (n,) int64. Each row depends on its own two entries only."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        raise NotImplementedError


class Table(Targets):
    """φ (K, N, C) at K ascending levels; levels None: K = 1, at every level."""

    def __init__(self, levels: np.ndarray | None, phi: Tensor, clip: bool = False) -> None:
        if phi.dim() != 3 or 0 in phi.shape or not phi.is_floating_point():
            shape = tuple(phi.shape[1:] if levels is None else phi.shape)
            raise ValueError(
                "phi: expected a floating point φ (N, C), N and C at least 1, got "
                f"{phi.dtype} {shape}"
            )
        self.values = validate.finite(phi.detach(), "phi")
        self.levels = levels
        self.clip = clip
        self.count, self.width = phi.shape[1], phi.shape[2]
        if levels is not None and not clip:
            self.sigma_range = (float(levels[0]), float(levels[-1]))

    def _phi(self, sigma: np.ndarray, rows: np.ndarray) -> Tensor:
        place = self.values.device
        index = to_device(rows, place)
        if self.sigma_range is not None:
            check_range(sigma, self.sigma_range)
        if self.levels is None or len(self.levels) == 1:
            return self.values[0][index]
        sigma = np.clip(sigma, self.levels[0], self.levels[-1])
        k = np.clip(np.searchsorted(self.levels, sigma, side="right") - 1, 0, len(self.levels) - 2)
        w = (sigma - self.levels[k]) / (self.levels[k + 1] - self.levels[k])
        below, weight = to_device(k, place), to_device(w, place, self.values.dtype)[:, None]
        return (1 - weight) * self.values[below, index] + weight * self.values[below + 1, index]

    def _state(self) -> dict[str, Any]:
        levels = None if self.levels is None else self.levels.tolist()
        return {"kind": "table", "sigmas": levels, "phi": digest_of(self.values), "clip": self.clip}


class Selected(Targets):
    def __init__(self, base: Targets, index: np.ndarray) -> None:
        self.base, self.index = base, index
        self.count, self.width = len(index), base.width
        self.sigma_range = base.sigma_range
        self._like(base)

    def _phi(self, sigma: np.ndarray, rows: np.ndarray) -> Tensor:
        return self.base._phi(sigma, self.index[rows])

    def _state(self) -> dict[str, Any]:
        return {"kind": "rows", "rows": self.index.tolist(), "of": self.base._state()}


class Combined(Targets):
    count = 1

    def __init__(self, base: Targets, how: str) -> None:
        self.base, self.how = base, validate.choice(how, "how", ("mean", "max"))
        self.width, self.sigma_range = base.width, base.sigma_range
        self._like(base)

    def _phi(self, sigma: np.ndarray, rows: np.ndarray) -> Tensor:
        levels, back = np.unique(sigma, return_inverse=True)
        everyone = np.arange(len(self.base))
        phi = [
            combine(self.base._phi(np.full(len(everyone), level), everyone), self.how)
            for level in levels
        ]
        return torch.stack(phi)[to_device(back.reshape(-1), phi[0].device)]

    def _state(self) -> dict[str, Any]:
        return {"kind": self.how, "of": self.base._state()}


class Mix(Targets):
    def __init__(self, a: Targets, b: Targets, weight: Any) -> None:
        for name, part in (("a", a), ("b", b)):
            if not isinstance(part, Targets):
                raise TypeError(f"{name}: expected targets, got {type(part).__name__}")
            if part.channels is not None:
                raise ValueError(
                    f"{name}: has channels of its own; use mix(a, b).with_channels(...)"
                )
        if a.width != b.width:
            raise ValueError(f"b: φ has {b.width} channels, that of a has {a.width}")
        if len(a) != len(b) and 1 not in (len(a), len(b)):
            raise ValueError(f"b: {len(b)} targets, a has {len(a)}; expected as many, or one")
        self.a, self.b = a, b
        self.count, self.width = max(len(a), len(b)), a.width
        self.shape = a.shape or b.shape
        ranges = [r for r in (a.sigma_range, b.sigma_range) if r is not None]
        if ranges:
            self.sigma_range = (max(r[0] for r in ranges), min(r[1] for r in ranges))
        weights = np.asarray(weight, np.float64)
        if weights.shape not in ((), (self.count,)) or not ((weights >= 0) & (weights <= 1)).all():
            raise ValueError(
                f"weight: expected a number in [0, 1] or {self.count} of them, got {weight!r}"
            )
        self.weights = np.broadcast_to(weights, (self.count,))

    def _phi(self, sigma: np.ndarray, rows: np.ndarray) -> Tensor:
        a, b = (part._phi(sigma, rows if len(part) > 1 else 0 * rows) for part in (self.a, self.b))
        weight = to_device(self.weights[rows], a.device, a.dtype)[:, None]
        return (1 - weight) * a + weight * b.to(a)

    def _state(self) -> dict[str, Any]:
        return {
            "kind": "mix",
            "a": self.a._state(),
            "b": self.b._state(),
            "weight": self.weights.tolist(),
        }


def sample_ids(ids: Any, n: int, name: str = "samples") -> np.ndarray:
    """n whole numbers in [0, 2^32) as int64, by default 0 ... n - 1."""
    if ids is None:
        return np.arange(n)
    checked = [
        validate.integer(v, f"{name}[{i}]", low=0, high=2**32 - 1) for i, v in enumerate(ids)
    ]
    if len(checked) != n:
        raise ValueError(f"{name}: expected {n} ids, one per image, got {len(checked)}")
    return np.array(checked, np.int64)


def row_numbers(rows: Any, n: int, name: str = "rows") -> np.ndarray:
    if rows is None:
        return np.arange(n)
    found = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected whole numbers in [0, {n}), at least one; got {rows!r}")
    if found.min() < 0 or found.max() >= n:
        raise ValueError(
            f"{name}: expected numbers in [0, {n}), got {found.min()} ... {found.max()}"
        )
    return found.astype(np.int64)


def _levels(sigma: Any, n: int) -> np.ndarray:
    """One noise level per row: (n,) float64."""
    values = np.asarray(sigma.detach().cpu() if isinstance(sigma, Tensor) else sigma)
    if values.dtype.kind not in "fiu":
        raise TypeError(f"sigma: expected a noise level or one per row, got {sigma!r}")
    if values.shape not in ((), (1,), (n,)):
        raise ValueError(
            f"sigma: expected one level or one per row ({n}), got shape {values.shape}"
        )
    if not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(f"sigma: expected finite noise levels >= 0, got {sigma}")
    return np.broadcast_to(values.astype(np.float64), (n,))


def check_range(sigma: np.ndarray, known: tuple[float, float]) -> None:
    """ValueError where a level is outside of those that φ* is known at."""
    outside = (sigma < known[0]) | (sigma > known[1])
    if outside.any():
        raise ValueError(
            f"sigma: φ* is known at noise levels from {known[0]:g} to {known[1]:g}, "
            f"{sigma[outside][0]:g} is asked for; extract more levels, or take the nearest one on "
            "purpose with clip=True"
        )


def check_subset(channels: tuple[int, ...] | None, zero_elsewhere: bool) -> None:
    """zero_elsewhere says what lies outside of a subset, so there must be one."""
    if zero_elsewhere and channels is None:
        raise ValueError(
            "zero_elsewhere: expected `channels` with it, the ones that are not zeroed"
        )


def restrict(phi: Tensor, channels: tuple[int, ...] | None) -> Tensor:
    """φ (N, C) with zeros outside of `channels`."""
    if channels is None:
        return phi
    kept = torch.zeros_like(phi)
    chosen = to_device(np.array(channels), phi.device)
    kept[:, chosen] = phi[:, chosen]
    return kept


def combine(phi: Tensor, how: str) -> Tensor:
    """(n, C) -> (C,), in float64 and in the order of the rows."""
    values = to_host(phi.double()).numpy()
    combined = values.mean(axis=0) if how == "mean" else values.max(axis=0)
    return to_device(combined, phi.device, phi.dtype)


def digest_of(x: Tensor) -> str:
    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
