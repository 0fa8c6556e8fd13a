"""φ as a union of subspaces (Fig. 5): neighbours use the same few channels, other images others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastphi.analysis.common import Result, exceeds, gaussian_like, new_axes
from fastphi.analysis.neighbours import nearest
from fastphi.analysis.rows import Rows, matrix, parts, taken
from fastphi.analysis.sparsity import participation_ratio
from fastphi.support import validate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Subspaces(Result):
    """Local dimension of φ round its images, as a fraction of d, and the channels neighbours share.

    dimension: (Q,) PR of the neighbourhood's mean φ, the fraction of channels its subspace spans (the
    paper: 0.2-0.3). spread: (Q,) PR of the eigenvalues of the neighbourhood's covariance, over d, at
    most (k − 1)/d. shared, shared_random: (Q,) Jaccard overlap of an image's active channels (the PR·d
    strongest) with its neighbours' and with random images'. gaussian_*: the same for a Gaussian of φ's
    mean and covariance.
    shown (Fig. 5): shared − shared_random exceeds the Gaussian's, image by image, by more than three
    standard errors, and the mean local dimension is below 0.5.
    """

    dimension: np.ndarray
    spread: np.ndarray
    shared: np.ndarray
    shared_random: np.ndarray
    gaussian_dimension: np.ndarray
    gaussian_spread: np.ndarray
    gaussian_shared: np.ndarray
    gaussian_shared_random: np.ndarray
    k: int

    @property
    def shown(self) -> bool:
        gain = self.shared - self.shared_random
        control = self.gaussian_shared - self.gaussian_shared_random
        return exceeds(gain, control) and bool(np.nanmean(self.dimension) < 0.5)

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        for name, values in (("φ", self.dimension), ("Gaussian", self.gaussian_dimension)):
            kept = values[np.isfinite(values)]
            ax.hist(kept, np.linspace(0, 1, 51).tolist(), density=True, alpha=0.5, label=name)
        ax.axvspan(0.2, 0.3, color="0.9", zorder=0, label="paper")
        ax.set(xlabel="local dimension / d", ylabel="density of neighbourhoods")
        ax.legend(frameon=False)
        return ax


def subspaces(phi: Any, k: int = 50, *, queries: int = 200, seed: int = 0) -> Subspaces:
    """Local dimension and shared channels round `queries` random images (N, d), k neighbours each."""
    phi = matrix(phi)
    validate.integer(k, "k", low=2, high=len(phi) - 1)
    rng = np.random.default_rng(seed)
    at = rng.permutation(len(phi))[: min(queries, len(phi))]
    found, control = (_local(rows, at, k, seed) for rows in (phi, gaussian_like(phi, seed)))
    return Subspaces(*found, *control, k=k)


def components(phi: Any, queries: ArrayLike, k: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Fig. 5, left: two images' neighbourhoods in the three components that tell them apart best.

    queries: two row numbers. Returns the three channel numbers and φ of both sets, (2, k, 3).
    """
    phi, queries = matrix(phi), np.asarray(queries)
    if queries.shape != (2,):
        raise ValueError(f"queries: expected two row numbers, got shape {queries.shape}")
    index, _ = nearest(phi[queries], phi, k)
    sets = _around(phi, index)
    means = sets.mean(axis=1)
    low = means.min(axis=0)
    difference = means[0] - means[1]
    chosen = [int(difference.argmax()), int(difference.argmin())]
    low[chosen] = -np.inf
    channels = np.array([*chosen, int(low.argmax())])  # one for each set, and one that both use
    return channels, sets[:, :, channels]


_Local = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _local(phi: Rows, at: np.ndarray, k: int, seed: int) -> _Local:
    index, _ = nearest(phi[at], phi, k, exclude=at)
    random = np.random.default_rng(seed).integers(0, len(phi), index.shape)
    # a neighbourhood in float64, and what is made of it
    tiles = parts(len(at), 4 * k * phi.shape[1])
    found = [_neighbourhoods(phi, at[tile], index[tile], random[tile]) for tile in tiles]
    dimension, spread, shared, shared_random = (
        np.concatenate(of) for of in zip(*found, strict=True)
    )
    return dimension, spread, shared, shared_random


def _neighbourhoods(phi: Rows, at: np.ndarray, index: np.ndarray, random: np.ndarray) -> _Local:
    """Dimension, spread and overlaps round the rows `at` (Q,), of neighbours `index` (Q, k)."""
    around = _around(phi, index)
    d = phi.shape[1]
    dimension = participation_ratio(around.mean(axis=1))
    centred = around - around.mean(axis=1, keepdims=True)
    products = centred @ centred.swapaxes(1, 2)  # (Q, k, k), of the covariance's eigenvalues
    total = np.trace(products, axis1=1, axis2=2)
    with np.errstate(invalid="ignore"):
        spread = total**2 / (products**2).sum(axis=(1, 2)) / d
    own = _active(taken(phi, at))[:, None]
    overlap, by_chance = (_overlap(own, _around(phi, of)) for of in (index, random))
    return dimension, spread, overlap, by_chance


def _around(phi: Rows, index: np.ndarray) -> np.ndarray:
    """(Q, k, d): the rows index (Q, k)."""
    return taken(phi, index.ravel()).reshape(*index.shape, -1)


def _active(rows: np.ndarray) -> np.ndarray:
    """(..., d) bool: each image's PR·d strongest channels."""
    flat = rows.reshape(-1, rows.shape[-1])
    count = np.maximum(np.round(np.nan_to_num(participation_ratio(flat)) * flat.shape[1]), 1)
    rank = np.argsort(np.argsort(-np.abs(flat), axis=1, kind="stable"), axis=1, kind="stable")
    return (rank < count[:, None]).reshape(rows.shape)


def _overlap(own: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(Q,): mean Jaccard overlap of active channels (Q, 1, d) with those of rows (Q, k, d)."""
    others = _active(rows)
    return ((own & others).sum(axis=2) / (own | others).sum(axis=2)).mean(axis=1)
