"""K-means on φ (Fig. 6), in memory or out of core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastphi.analysis.common import Result
from fastphi.analysis.rows import Rows, chunks, finite, matrix, taken
from fastphi.support import validate

_BATCH = 8192  # rows of a mini-batch
_BATCHES = 100  # mini-batches at most, of one start
_MINI_BATCH_FROM = 200_000  # rows from which K-means sees a mini-batch at a time


@dataclass(frozen=True)
class KMeans(Result):
    """labels: (N,) int64; centroids: (k, d); inertia: mean squared distance to the own centroid."""

    labels: np.ndarray
    centroids: np.ndarray
    inertia: float

    def numbers(self) -> dict[str, Any]:
        return {"k": len(self.centroids), "inertia": self.inertia, "n": len(self.labels)}

    def members(self, cluster: int, n: int, seed: int = 0) -> np.ndarray:
        """Up to n random rows of a cluster (Fig. 6, right)."""
        own = np.flatnonzero(self.labels == cluster)
        return np.random.default_rng(seed).permutation(own)[:n]


def kmeans(
    phi: Any, k: int, *, starts: int = 10, seed: int = 0, init: ArrayLike | None = None
) -> KMeans:
    """K-means on φ (N, d): k-means++ and the best of `starts`, or from the centroids `init` (k, d).

    scikit-learn's; from 200,000 rows on its mini-batch form, for which φ may be a memory map larger than
    memory: batches are drawn at random, and labels found a chunk of rows at a time.
    """
    from sklearn.cluster import KMeans as Lloyd

    rows = matrix(phi)
    validate.integer(k, "k", low=1, high=len(rows))
    if len(rows) >= _MINI_BATCH_FROM:
        return mini_batch_kmeans(rows, k, starts=starts, seed=seed, init=init)
    options: dict[str, Any] = {"n_clusters": k, "random_state": seed}
    if init is not None:
        options |= {"init": np.asarray(init, np.float64), "n_init": 1}
    else:
        options |= {"init": "k-means++", "n_init": starts}
    fitted: Any = Lloyd(**options).fit(finite(rows))
    labels = fitted.labels_.astype(np.int64)
    return KMeans(labels, fitted.cluster_centers_, float(fitted.inertia_) / len(rows))


def mini_batch_kmeans(
    rows: Rows, k: int, *, starts: int = 10, seed: int = 0, init: ArrayLike | None = None
) -> KMeans:
    """`kmeans` of rows (N, d) that need not fit in memory: `_BATCH` of them are held at a time, besides
    numbers and labels of all, 16 bytes a row. The best start is the one nearest to a random batch.

    Raises ValueError where a row read has NaN or Inf.
    """
    from sklearn.cluster import MiniBatchKMeans

    n = len(rows)
    validate.integer(k, "k", low=1, high=min(n, _BATCH))
    rng = np.random.default_rng(seed)
    trial = _some(rows, rng.permutation(n)[:_BATCH])
    best, least = None, np.inf
    for start in range(1 if init is not None else starts):
        given = "k-means++" if init is None else np.asarray(init, np.float64)
        fitted: Any = MiniBatchKMeans(k, init=given, n_init=1, random_state=seed + start)
        order = rng.permutation(n)
        for at in range(0, min(n, _BATCHES * _BATCH), _BATCH):
            if len(batch := order[at : at + _BATCH]) >= k:
                fitted.partial_fit(_some(rows, batch))
        if (distance := _nearest_centroid(trial, fitted.cluster_centers_)[1].mean()) < least:
            best, least = fitted.cluster_centers_, distance
    assert best is not None
    labels, total = np.empty(n, np.int64), 0.0
    for part, x in chunks(rows, beside=k):
        labels[part], distance = _nearest_centroid(x, best)
        total += float(distance.sum())
    return KMeans(labels, best, total / n)


def _some(rows: Rows, numbers: np.ndarray) -> np.ndarray:
    return taken(rows, np.sort(numbers))  # in order: a memory map reads forwards


def _nearest_centroid(x: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the nearest centroid of each row (n,), and the squared distance to it (n,)."""
    square = ((x**2).sum(axis=1)[:, None] - 2 * x @ centroids.T) + (centroids**2).sum(axis=1)
    label = square.argmin(axis=1)
    return label, np.clip(square[np.arange(len(x)), label], 0, None)
