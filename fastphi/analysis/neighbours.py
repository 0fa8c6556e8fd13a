"""Nearest neighbours in φ and in pixels (Fig. 5, 14), exactly and out of core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastphi.analysis.common import Result, exceeds, labels_of, new_axes, standard_error
from fastphi.analysis.rows import Pixels, matrix, parts, some
from fastphi.support.world import World

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NO_DIRECTION = -2.0  # stands for the cosine of a row of zeros: below every cosine


def nearest(
    queries: ArrayLike,
    rows: Any,
    k: int = 8,
    *,
    chunk: int | None = None,
    exclude: ArrayLike | None = None,
    ranks: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows with the largest cosine to each query, exactly; rows may be a memory map.

    queries: (Q, d); rows: (N, d), read `chunk` at a time (default: 8 MiB of float64), each chunk against
    a tile of queries after the other: memory is bounded by chunk · d + Q · (d + k), for any N.
    exclude: (Q,) a row number per query that is left out, its own for instance. Returns indices
    (Q, k) int64 and cosines (Q, k) float64, the nearest first; equal cosines in order of index. A
    query that is itself among the rows finds itself. Rows of zeros have no direction: their cosine
    is NaN and they come last. ranks: whether the processes that torchrun or srun started look through
    some of the chunks each; all return the same.
    """
    q = np.asarray(queries)
    r = rows if isinstance(rows, Pixels) else np.asanyarray(rows)
    if q.ndim != 2 or len(r.shape) != 2 or q.shape[1] != r.shape[1]:
        raise ValueError(f"queries, rows: expected (Q, d) and (N, d), got {q.shape} and {r.shape}")
    most = len(r) - (exclude is not None)
    if not 1 <= k <= most:
        raise ValueError(f"k: expected 1 ... {most} (the number of rows), got {k}")
    left_out = None if exclude is None else np.asarray(exclude).reshape(len(q), 1)
    q, lost = _directions(q)
    best_i, best_c = np.zeros((len(q), k), np.int64), np.full((len(q), k), -np.inf)
    world = World.here() if ranks else World()
    chunks = [*parts(len(r), r.shape[1], chunk)]
    for part in chunks[world.cut(len(chunks))]:
        unit, aimless = _directions(r[part])
        index = np.arange(part.start, part.stop)
        for tile in parts(len(q), 4 * len(index)):  # cosines, a copy of some, and its parting
            cosine = q[tile] @ unit.T
            cosine[:, aimless] = cosine[lost[tile]] = _NO_DIRECTION
            if left_out is not None:
                cosine[left_out[tile] == index] = -np.inf
            near = best_i[tile], best_c[tile]
            _take_nearer(*near, cosine, part.start)
        world.check()
    best_i, best_c = _nearest_of(world.gather((best_i, best_c)), k)
    return best_i, np.where(best_c == _NO_DIRECTION, np.nan, best_c)


def _nearest_of(
    found: list[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best (Q, k) of what was found, index and cosine, among some rows and among later ones."""
    index, values = (np.hstack(each) for each in zip(*found, strict=True))
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(index, order, axis=1), np.take_along_axis(values, order, axis=1)


def _take_nearer(best_i: np.ndarray, best_c: np.ndarray, cosine: np.ndarray, start: int) -> None:
    """Puts what is nearer among the rows from `start` on, cosines (Q, n), into the best so far (Q, k)."""
    k = best_c.shape[1]
    gains = np.flatnonzero(cosine.max(axis=1) > best_c[:, -1])
    near_i, near_c = _top(cosine[gains], min(k, cosine.shape[1]))
    before = best_i[gains], best_c[gains]
    best_i[gains], best_c[gains] = _nearest_of([before, (start + near_i, near_c)], k)


def _top(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row, equal ones in order of index, without sorting the rest."""
    index = np.empty((len(values), k), np.int64)
    least = np.partition(values, values.shape[1] - k, axis=1)[:, values.shape[1] - k]
    for row, (v, limit) in enumerate(zip(values, least, strict=True)):
        candidates = np.flatnonzero(v >= limit)
        index[row] = candidates[np.argsort(-v[candidates], kind="stable")[:k]]
    return index, np.take_along_axis(values, index, axis=1)


def _directions(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of length 1 (n, d), float64, and which have no direction (n,): zeros, NaN or Inf among them."""
    a = np.array(a, np.float64)
    norm = np.sqrt(np.einsum("nd,nd->n", a, a))  # without an array of squares
    aimless = ~((norm > 0) & (norm < np.inf))
    a[aimless] = 0
    a /= np.where(aimless, 1, norm)[:, None]
    return a, aimless


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
    queries: ArrayLike | int = 10_000,
) -> LabelAgreement:
    """Do neighbours in φ share labels more than neighbours elsewhere do (Fig. 14)?

    phi: (N, C). labels: (N,). controls: name → (N, d) of the same images: pixels, their principal
    components, φ of an untrained network. queries: row numbers, or how many images are asked for
    their neighbours, at random where there are more (of a share, 10,000 leave a standard error of 0.005 at
    most; all of a million would take their square of cosines). All rows can be neighbours.
    """
    spaces = {"φ": matrix(phi), **{n: matrix(v, n) for n, v in (controls or {}).items()}}
    labels = labels_of(labels, len(spaces["φ"]))
    at = some(len(labels), queries) if isinstance(queries, int) else np.asarray(queries)
    shares = {}
    for name, rows in spaces.items():
        index, cosine = nearest(rows[at], rows, k, exclude=at)
        share = (labels[index] == labels[at][:, None]).mean(axis=1)
        shares[name] = np.where(np.isfinite(cosine).all(axis=1), share, np.nan)
    count = np.bincount(labels - labels.min())
    chance = float((count[labels[at] - labels.min()] - 1).mean() / (len(labels) - 1))
    return LabelAgreement(shares, chance, k)
