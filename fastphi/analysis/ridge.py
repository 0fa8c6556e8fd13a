"""Ridge regression on rows that need not fit in memory: normal equations instead of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastphi.analysis.rows import chunks, moments


def ridge(
    rows: Any, targets: Any, kept: np.ndarray, strength: float, name: str = "phi"
) -> Callable[[np.ndarray], np.ndarray]:
    """Least squares of standardised rows (N, C) to targets (N, T), dense or sparse, in two passes.

    kept: (N,) bool, the rows that are learnt from. strength: of the penalty, relative to their number.
    Returns what turns rows (n, C) into guesses (n, T).
    """
    of = moments(rows, name, only=kept)
    scale = np.sqrt(of.scatter / of.n)
    scale = np.where(scale > 0, scale, 1)
    centre = np.asarray(targets[kept].mean(axis=0)).ravel()
    gram: Any = strength * of.n * np.eye(len(of.mean))
    cross: Any = 0.0
    for part, x in chunks(rows, name):
        x = (x[kept[part]] - of.mean) / scale
        gram = gram + x.T @ x
        # the deviations of targets from their centre, which would fill a sparse matrix
        cross = cross + (targets[part][kept[part]].T @ x) - np.outer(centre, x.sum(axis=0))
    weight = np.linalg.solve(gram, cross.T)
    return lambda x: centre + ((x - of.mean) / scale) @ weight
