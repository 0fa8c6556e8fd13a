"""Rows (N, C) that need not fit in memory: gone over a chunk at a time, in float64.

An analysis of a φ store holds a chunk, 8 MiB, and what it finds, not the rows. Sums are taken chunk by
chunk in float64 and merged (Chan, Golub & LeVeque 1979), so results are those of the whole array to its
rounding, whatever the chunk: in the tests 1e-12 of a sum, 1e-9 of what an analysis makes of sums.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from fastphi import data

_VALUES = 1 << 20  # of a chunk: 8 MiB of float64, 2048 rows of 512 channels
_HELD = 10**8  # values of rows that an analysis makes itself and keeps in memory


class Pixels:
    """Images as rows (N, C·H·W) of float32 in [0, 1], decoded when they are asked for.

    source: a pack or images; rows: which of them (default: all). `pixels[2:5]`, `pixels[[7, 3]]`.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, source: Any, rows: Any = None) -> None:
        self._images = data.open_images(source)
        self._rows = np.arange(len(self._images)) if rows is None else np.asarray(rows)
        self.shape = len(self._rows), int(np.prod(self._images.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: Any) -> np.ndarray:
        return self._images.batch(self._rows[which]).flatten(1).numpy()


Rows: TypeAlias = "np.ndarray | Pixels"


def matrix(rows: Any, name: str = "phi") -> Rows:
    """(N, C), non-empty; a tensor or array, a memory map stays one. ValueError for anything else."""
    if isinstance(rows, Pixels):
        return rows
    array = rows.detach().cpu().numpy() if isinstance(rows, torch.Tensor) else np.asanyarray(rows)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name}: expected a non-empty array (N, C), got shape {array.shape}")
    if not np.issubdtype(array.dtype, np.number):
        raise ValueError(f"{name}: expected numbers, got {array.dtype}")
    return array


def finite(
    rows: Any, name: str = "phi", numbers: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """`matrix` in float64, all finite: for a few rows. numbers: of the rows, for errors."""
    array = np.asarray(matrix(rows, name)[:], np.float64)
    good = np.isfinite(array)
    if not good.all():
        row = int(good.all(axis=1).argmin())
        row = row if numbers is None else int(numbers[row])
        raise ValueError(f"{name}: expected finite values, got NaN or Inf in row {row}")
    return array


def taken(rows: Rows, at: np.ndarray) -> np.ndarray:
    """`finite` of φ's rows at `at`, row numbers (n,)."""
    return finite(rows[at], "phi", at)


def parts(n: int, width: int, step: int | None = None) -> Iterator[slice]:
    """The numbers 0 ... n − 1 in order, as slices of `step`: as many as make a chunk at `width` values
    each, where it is not given."""
    step = step or max(_VALUES // width, 1)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def chunks(rows: Any, name: str = "phi", beside: int = 0) -> Iterator[tuple[slice, np.ndarray]]:
    """Which rows, and these in float64 (n, C), all finite, until all were there.

    beside: values that the caller holds for each row besides. ValueError names what is not finite.
    """
    rows = matrix(rows, name)
    for part in parts(len(rows), rows.shape[1] + beside):
        yield part, finite(rows[part], name, range(part.start, part.stop))


def some(n: int, most: int, seed: int = 0) -> np.ndarray:
    """Row numbers of n rows in order: all of them, or `most` at random where there are more."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).permutation(n)[:most])


@dataclass(frozen=True)
class Moments:
    """Of n rows: mean (C,); scatter, the sum over rows of products of deviations from it, (C, C), or of
    squares, (C,); constant: (C,) bool, channels that are the same in every row."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray
    constant: np.ndarray


def moments(
    rows: Any, name: str = "phi", *, products: bool = False, only: np.ndarray | None = None
) -> Moments:
    """Moments of the rows (of those where `only`, (N,) bool, says so) in one pass."""
    n, mean, scatter, constant, first = 0, 0.0, 0.0, True, None
    for part, x in chunks(rows, name):
        if only is not None:
            x = x[only[part]]
        if not len(x):
            continue
        first = x[0] if first is None else first
        constant = constant & (x == first).all(axis=0)
        own = x.mean(axis=0)
        x = x - own
        step, total = own - mean, n + len(x)
        between = np.outer(step, step) if products else step**2
        scatter = scatter + (x.T @ x if products else (x**2).sum(axis=0))
        scatter = scatter + between * (n * len(x) / total)
        mean, n = mean + step * (len(x) / total), total
    return Moments(n, np.asarray(mean), np.asarray(scatter), np.asarray(constant))


def strongest(rows: Any, name: str = "phi") -> np.ndarray:
    """(C,): the largest absolute value of each channel."""
    most: Any = 0.0
    for _, x in chunks(rows, name):
        most = np.maximum(most, np.abs(x).max(axis=0))
    return most


def add_to_groups(total: np.ndarray, x: np.ndarray, groups: np.ndarray) -> None:
    """Adds the rows x (n, C) to total (k, C), each to its group's; groups: (n,), numbers below k."""
    there, own = np.unique(groups, return_inverse=True)
    total[there] += one_hot(own, len(there)).T @ x


def one_hot(groups: np.ndarray, k: int) -> Any:
    """(n, k), sparse: 1 at each row's group."""
    from scipy.sparse import csr_matrix

    each = np.arange(len(groups) + 1)
    return csr_matrix((np.ones(len(groups)), groups, each), (len(groups), k))


def centroids(rows: Rows, groups: np.ndarray, k: int, name: str = "phi") -> np.ndarray:
    """(k, C): mean of the rows of each group; groups: (N,), numbers below k, each of them there."""
    total = np.zeros((k, rows.shape[1]))
    for part, x in chunks(rows, name):
        add_to_groups(total, x, groups[part])
    return total / np.bincount(groups, minlength=k)[:, None]


def gathered(
    shape: tuple[int, int], made: Iterable[np.ndarray], dtype: Any = np.float64
) -> np.ndarray:
    """The rows that come a few at a time, as one array of that shape.

    More than 10⁸ values go to a file in the system's folder for temporary ones (TMPDIR), as float32, and
    come back as its memory map; it has no name, and goes with the array.
    """
    if shape[0] * shape[1] <= _HELD:
        array, at = np.empty(shape, dtype), 0
        for x in made:
            array[at : at + len(x)] = x
            at += len(x)
        return array
    with tempfile.TemporaryFile() as file:
        for x in made:
            file.write(np.ascontiguousarray(x, np.float32).data)
        file.flush()
        return np.memmap(file, np.float32, "r", shape=shape)
