"""Counter-based noise: a function of (seed, sample, stream, draw, element) and of nothing else.

So a result never depends on batch size, order, threads, device or number of processes. The bits are
defined by `fastphi.reference.noise_normal` (Philox4x32-10 and one float transform of fixed operation
order); the compiled op gives the same ones, faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastphi import reference
from fastphi.engine import ops
from fastphi.support import validate
from fastphi.support.transfer import to_device

# A stream is a purpose (high byte) and an index within it (σ index, sampling step, ...), so draws for
# different purposes never share a counter.
_PURPOSES = ("order", "sigma", "train", "evaluate", "extract", "start", "step", "target", "subset")
_INDEX_BITS = 24
_MOST = 2**32 - 1  # a counter of Philox is a word of 32 bits


def stream(purpose: str, index: int = 0) -> int:
    """The 32-bit stream number of a purpose and an index in [0, 2^24)."""
    if not 0 <= index < 1 << _INDEX_BITS:
        raise ValueError(f"index: {index}; a noise stream has indices 0 ... 2^24 - 1")
    return _PURPOSES.index(purpose) << _INDEX_BITS | index


def normal(
    seed: int,
    sample: Sequence[int] | np.ndarray | Tensor,
    stream: int,
    draw: int | Sequence[int] | np.ndarray | Tensor,
    shape: tuple[int, int, int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise, one image per sample id.

    sample: N ids in [0, 2^32); draw: one number or N of them, in [0, 2^32); shape: (C, H, W).
    Returns (N, C, H, W): float32 values (then converted to `dtype`), |z| < 5.8.
    """
    validate.seed(seed)
    sample = torch.from_numpy(_ids(sample, "sample"))
    draw = torch.from_numpy(_ids(draw, "draw")).expand(sample.shape).contiguous()
    if torch.device(device).type == "cuda" and ops.missing("cuda") is None:
        place = torch.device(device)  # made there, to the same bits
        sample, draw = to_device(sample, place), to_device(draw, place)
    make = reference.noise_normal if ops.missing() else ops.noise_normal
    return make(seed, sample, stream, draw, *shape).to(device=device, dtype=dtype)


def uniform(seed: int, sample: np.ndarray, stream: int, draw: int = 0) -> np.ndarray:
    """(N,) float64 uniform numbers in (0, 1), one per sample id, with 52 random bits."""
    words = _words(seed, sample, stream, draw)
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def permutation(seed: int, n: int, stream: int = 0, draw: int = 0) -> np.ndarray:
    """A random permutation of range(n), int64: the order of n 64-bit random keys."""
    return np.argsort(_words(seed, np.arange(n), stream, draw), kind="stable").astype(np.int64)


def _words(seed: int, sample: np.ndarray, stream: int, draw: int) -> np.ndarray:
    validate.seed(seed)
    sample = _ids(sample, "sample")
    draw = validate.integer(draw, "draw", low=0, high=_MOST)
    words = reference.philox(
        seed, np.zeros_like(sample), np.full_like(sample, draw), stream, sample
    )
    return words[:, 0] << np.uint64(32) | words[:, 1]


def _ids(values: Any, name: str) -> np.ndarray:
    """Whole numbers in [0, 2^32), of any shape, as (n,) int64."""
    values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if values.size and values.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected whole numbers, got {values.dtype}")
    if values.size and not 0 <= int(values.min()) <= int(values.max()) <= _MOST:
        raise ValueError(f"{name}: ids must be in [0, 2^32), got {values.min()} ... {values.max()}")
    return values.astype(np.int64).reshape(-1)
