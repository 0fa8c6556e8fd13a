"""The map of φ (Fig. 6): t-SNE, for looking at, never for measuring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastphi.analysis.common import Result, new_axes
from fastphi.analysis.rows import Rows, matrix, parts, some, taken

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Embedding(Result):
    """t-SNE of φ by cosine distance: a picture whose neighbourhoods mean something, its distances nothing.

    places: (N, 2), of no unit, in [0, 1]; labels: (N,) clusters, or empty. sample: how many rows t-SNE
    made the map of, where not of all; the others were placed on it.
    """

    places: np.ndarray
    labels: np.ndarray
    sample: int | None = None

    def numbers(self) -> dict[str, Any]:
        n = len(self.places)
        return {"n": n, "sample": self.sample or n}

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        colour = self.labels if len(self.labels) else None
        ax.scatter(self.places[:, 0], self.places[:, 1], c=colour, cmap="tab10", s=4)
        ax.set(xticks=[], yticks=[], title="t-SNE of φ")
        return ax


_TOGETHER = 20_000  # rows that are placed on a map at a time: 300 MB


def embedding(
    phi: Any, *, labels: ArrayLike | None = None, seed: int = 0, sample: int = 10_000
) -> Embedding:
    """t-SNE of φ (N, C) by cosine distance, from its principal components on.

    sample: of more rows than this, as many at random make the map (t-SNE's time grows with N log N, its
    map of a million points shows no more), and openTSNE places each other row among its nearest there.
    Rows that are all the same (a dead middle block's zeros) have no map: all lie in one place.
    ModuleNotFoundError where there are more rows than `sample` and openTSNE is not installed.
    """
    phi = matrix(phi)
    labels = np.empty(0) if labels is None else np.asarray(labels)
    at = some(len(phi), sample, seed)
    whole, rows = len(at) == len(phi), _unit(phi, at)
    if (rows == rows[0]).all():  # t-SNE would divide by their standard deviation, and crash on NaN
        return Embedding(np.full((len(phi), 2), 0.5), labels, None if whole else len(at))
    places = _map(rows, seed) if whole else _placed(phi, at, rows, seed)
    low, high = places.min(axis=0), places.max(axis=0)
    places = (places - low) / np.where(high > low, high - low, 1)
    return Embedding(places, labels, None if whole else len(at))


def _unit(phi: Rows, at: np.ndarray) -> np.ndarray:
    """The rows `at`, of length 1: their Euclidean distance orders as cosine does."""
    rows = taken(phi, at)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1)


def _map(unit: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(unit) - 1) / 3)
    return TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(unit)


def _placed(phi: Rows, at: np.ndarray, unit: np.ndarray, seed: int) -> np.ndarray:
    """(N, 2): the rows `at`, `unit` (n, C), by t-SNE, the others where the map of these puts them."""
    import openTSNE

    perplexity = min(30.0, (len(unit) - 1) / 3)
    options: Any = {"perplexity": perplexity, "random_state": seed, "n_jobs": -1}
    made: Any = openTSNE.TSNE(2, initialization="pca", **options).fit(unit)
    places = np.empty((len(phi), 2))
    places[at] = made
    others = np.setdiff1d(np.arange(len(phi)), at)
    for part in parts(len(others), 1, _TOGETHER):
        places[others[part]] = made.transform(_unit(phi, others[part]))
    return places
