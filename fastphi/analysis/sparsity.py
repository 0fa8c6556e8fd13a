"""Sparsity of channel averages (Fig. 1, 10)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def participation_ratio(means: ArrayLike) -> np.ndarray:
    """PR(ā) = ‖ā‖₁² / (d ‖ā‖₂²) of each row: the fraction of channels that take part, in (0, 1].

    means: (N, d), finite. Returns (N,) float64; rows of zeros give NaN.
    """
    a = np.asarray(means, np.float64)
    if a.ndim != 2 or 0 in a.shape:
        raise ValueError(f"means: expected a non-empty array (N, d), got shape {a.shape}")
    if not np.isfinite(a).all():
        raise ValueError("means: expected finite values, got NaN or Inf")
    a = np.abs(a)
    scale = a.max(axis=1, keepdims=True)  # so that squares neither overflow nor vanish
    with np.errstate(invalid="ignore"):
        a = a / scale
    return a.sum(axis=1) ** 2 / (a.shape[1] * (a**2).sum(axis=1))
