"""Nearest neighbours in φ and in pixels (Fig. 5, 14), exactly and out of core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastphi.analysis.common import Result, exceeds, labels_of, matrix, new_axes, standard_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NO_DIRECTION = -2.0  # stands for the cosine of a row of zeros: below every cosine


def nearest(
    queries: ArrayLike,
    rows: ArrayLike,
    k: int = 8,
    *,
    chunk: int = 65536,
    exclude: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows with the largest cosine to each query, exactly; rows may be a memory map.

    queries: (Q, d); rows: (N, d), read `chunk` at a time, so memory is bounded by chunk · (d + Q).
    exclude: (Q,) a row number per query that is left out, its own for instance. Returns indices
    (Q, k) int64 and cosines (Q, k) float64, the nearest first; equal cosines in order of index. A
    query that is itself among the rows finds itself. Rows of zeros have no direction: their cosine
    is NaN and they come last.
    """
    q, r = np.asarray(queries), np.asanyarray(rows)
    if q.ndim != 2 or r.ndim != 2 or q.shape[1] != r.shape[1]:
        raise ValueError(f"queries, rows: expected (Q, d) and (N, d), got {q.shape} and {r.shape}")
    most = len(r) - (exclude is not None)
    if not 1 <= k <= most:
        raise ValueError(f"k: expected 1 ... {most} (the number of rows), got {k}")
    left_out = None if exclude is None else np.asarray(exclude).reshape(len(q), 1)
    q = _unit(q)
    best_i = np.empty((len(q), 0), np.int64)
    best_c = np.empty((len(q), 0))
    for start in range(0, len(r), chunk):
        cosine = np.nan_to_num(q @ _unit(r[start : start + chunk]).T, nan=_NO_DIRECTION)
        index = np.arange(start, start + cosine.shape[1])
        if left_out is not None:
            cosine[left_out == index] = -np.inf
        near_i, near_c = _top(cosine, min(k, cosine.shape[1]))
        best_c, best_i = np.hstack([best_c, near_c]), np.hstack([best_i, start + near_i])
        order = np.argsort(-best_c, axis=1, kind="stable")[:, :k]
        best_c = np.take_along_axis(best_c, order, axis=1)
        best_i = np.take_along_axis(best_i, order, axis=1)
    return best_i, np.where(best_c == _NO_DIRECTION, np.nan, best_c)


def _top(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row, equal ones in order of index, without sorting the rest."""
    index = np.empty((len(values), k), np.int64)
    least = np.partition(values, values.shape[1] - k, axis=1)[:, values.shape[1] - k]
    for row, (v, limit) in enumerate(zip(values, least, strict=True)):
        candidates = np.flatnonzero(v >= limit)
        index[row] = candidates[np.argsort(-v[candidates], kind="stable")[:k]]
    return index, np.take_along_axis(values, index, axis=1)


def _unit(a: np.ndarray) -> np.ndarray:
    a = np.asarray(a, np.float64)
    with np.errstate(invalid="ignore"):
        return a / np.linalg.norm(a, axis=1, keepdims=True)


def distinct(phi: Any, n: int, seed: int = 0, among: int = 1000) -> np.ndarray:
    """Row numbers of n rows far apart in direction, greedily from the longest, of at most `among`
    random ones; rows of zeros are passed over."""
    phi = matrix(phi)
    rows = np.random.default_rng(seed).permutation(len(phi))[:among]
    some = np.asarray(phi[rows], np.float64)
    length = np.linalg.norm(some, axis=1)
    kept = length > 0
    rows, length = rows[kept], length[kept]
    if not 1 <= n <= len(rows):
        raise ValueError(f"n: expected 1 ... {len(rows)} (the rows that are not zero), got {n}")
    unit = some[kept] / length[:, None]
    chosen = [int(length.argmax())]
    near = unit @ unit[chosen[0]]
    while len(chosen) < n:
        chosen.append(int(near.argmin()))
        near = np.maximum(near, unit @ unit[chosen[-1]])
    return rows[chosen]


@dataclass(frozen=True)
class LabelAgreement(Result):
    """Share of each query's k nearest neighbours that have its label: {space: (Q,)}, in [0, 1].

    chance: the same of random neighbours. The first space is the one under test, φ.
    shown (Fig. 14): φ's share exceeds every other space's, query by query, and chance, by more than
    three standard errors.
    """

    shares: Mapping[str, np.ndarray]
    chance: float
    k: int

    @property
    def shown(self) -> bool:
        phi, *others = self.shares.values()
        return all(exceeds(phi, other) for other in [*others, np.full(len(phi), self.chance)])

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        means = [float(np.nanmean(v)) for v in self.shares.values()]
        errors = [standard_error(v) for v in self.shares.values()]
        ax.bar(range(len(means)), means, yerr=errors, color=["C0"] + ["0.7"] * (len(means) - 1))
        ax.axhline(self.chance, color="k", ls=":", label="chance")
        ax.set_xticks(range(len(means)), list(self.shares))
        ax.set(ylabel=f"share of {self.k} neighbours with the label")
        ax.legend(frameon=False)
        return ax


def label_agreement(
    phi: Any,
    labels: ArrayLike,
    *,
    controls: Mapping[str, Any] | None = None,
    k: int = 10,
    queries: ArrayLike | None = None,
) -> LabelAgreement:
    """Do neighbours in φ share labels more than neighbours elsewhere do (Fig. 14)?

    phi: (N, C). labels: (N,). controls: name → (N, d) of the same images: pixels, their principal
    components, φ of an untrained network. queries: row numbers (default: all).
    """
    spaces = {"φ": matrix(phi), **{n: matrix(v, n) for n, v in (controls or {}).items()}}
    labels = labels_of(labels, len(spaces["φ"]))
    at = np.arange(len(labels)) if queries is None else np.asarray(queries)
    shares = {}
    for name, rows in spaces.items():
        index, cosine = nearest(rows[at], rows, k, exclude=at)
        share = (labels[index] == labels[at][:, None]).mean(axis=1)
        shares[name] = np.where(np.isfinite(cosine).all(axis=1), share, np.nan)
    count = np.bincount(labels - labels.min())
    chance = float((count[labels[at] - labels.min()] - 1).mean() / (len(labels) - 1))
    return LabelAgreement(shares, chance, k)
