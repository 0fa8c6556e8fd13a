"""Hartigan's dip: how far a sample is from every unimodal distribution (Hartigan & Hartigan 1985)."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike


def dip(values: ArrayLike) -> float:
    """The dip of a sample: the least sup-distance of its distribution to a unimodal one.

    values: (n,), finite, n >= 2. Between 1/(2n) (evenly spaced) and 1/4 (two far points of equal
    mass); 0 where all values are equal.
    """
    x = np.sort(np.asarray(values, np.float64).ravel())
    n = len(x)
    if n < 2 or not np.isfinite(x).all():
        raise ValueError(f"values: expected at least two finite numbers, got {n} values")
    if x[0] == x[-1]:
        return 0.0
    low, high, worst = 0, n - 1, 1.0
    while True:
        # In counts: the empirical distribution steps from i to i + 1 at x[i]. Its greatest convex
        # minorant touches the feet of the steps, its least concave majorant their tops.
        convex, concave = _hull(x, low, high, 1), _hull(x, low, high, -1)
        inside = np.arange(low, high + 1)
        minorant = np.interp(x[inside], x[convex], convex)
        majorant = np.interp(x[inside], x[concave], concave + 1)
        gap = majorant - minorant
        touching = np.union1d(convex, concave) - low
        at = touching[gap[touching].argmax()]
        widest = gap[at]
        if widest <= worst:
            return worst / (2 * n)
        new_low = convex[convex <= at + low][-1]
        new_high = concave[concave >= at + low][0]
        left = slice(0, new_low - low + 1)
        right = slice(new_high - low, None)
        # Outside of the modal interval the distribution is compared with its own hull.
        worst = max(
            worst,
            (inside[left] + 1 - minorant[left]).max(),
            (majorant[right] - inside[right]).max(),
        )
        if (new_low, new_high) == (low, high):
            return worst / (2 * n)
        low, high = int(new_low), int(new_high)


def _hull(x: np.ndarray, low: int, high: int, sign: int) -> np.ndarray:
    """Indices of the lower (sign 1) or upper (−1) hull of the points (x[i], i), low <= i <= high."""
    kept: list[int] = []
    for i in range(low, high + 1):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            turn = (b - a) * (x[i] - x[b]) - (i - b) * (x[b] - x[a])
            if sign * turn < 0:
                break
            kept.pop()
        if kept and x[kept[-1]] == x[i]:  # of equal values the lowest foot, or the highest top
            if sign > 0:
                continue
            kept.pop()
        kept.append(i)
    return np.array(kept)


def dip_p_value(values: ArrayLike, draws: int = 300, seed: int = 0) -> float:
    """Probability of a dip as large from a uniform sample of the same size, by `draws` simulations.

    The uniform distribution is the hardest unimodal one; the least value is 1/(draws + 1).
    """
    null = _null(len(np.ravel(values)), draws, seed)
    return float((1 + (null >= dip(values)).sum()) / (1 + draws))


@functools.lru_cache(maxsize=32)
def _null(n: int, draws: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([dip(rng.random(n)) for _ in range(draws)])
