"""Nearest neighbours in φ and in pixels (Fig. 14)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def nearest(
    queries: ArrayLike, rows: ArrayLike, k: int = 8, *, chunk: int = 65536
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows with the largest cosine to each query, exactly; rows may be a memory map.

    queries: (Q, d); rows: (N, d). Returns indices (Q, k) int64 and cosines (Q, k) float64, the nearest
    first; equal cosines in order of index. A query that is itself among the rows finds itself. Rows of
    zeros have no direction: their cosine is NaN and they come last.
    """
    q, r = np.asarray(queries), np.asanyarray(rows)
    if q.ndim != 2 or r.ndim != 2 or q.shape[1] != r.shape[1]:
        raise ValueError(f"queries, rows: expected (Q, d) and (N, d), got {q.shape} and {r.shape}")
    if not 1 <= k <= len(r):
        raise ValueError(f"k: expected 1 ... {len(r)} (the number of rows), got {k}")
    q = _unit(q)
    best_i = np.empty((len(q), 0), np.int64)
    best_c = np.empty((len(q), 0))
    for start in range(0, len(r), chunk):
        cosine = q @ _unit(r[start : start + chunk]).T
        index = np.broadcast_to(np.arange(start, start + cosine.shape[1]), cosine.shape)
        best_c, best_i = np.hstack([best_c, cosine]), np.hstack([best_i, index])
        order = np.argsort(-best_c, axis=1, kind="stable")[:, :k]  # NaN sorts last
        best_c = np.take_along_axis(best_c, order, axis=1)
        best_i = np.take_along_axis(best_i, order, axis=1)
    return best_i, best_c


def _unit(a: np.ndarray) -> np.ndarray:
    a = np.asarray(a, np.float64)
    with np.errstate(invalid="ignore"):
        return a / np.linalg.norm(a, axis=1, keepdims=True)
