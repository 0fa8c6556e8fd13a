"""The map of φ (Fig. 6): t-SNE, for looking at, never for measuring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastphi.analysis.common import Result, finite, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Embedding(Result):
    """t-SNE of φ by cosine distance: a picture whose neighbourhoods mean something, its distances nothing.

    places: (N, 2), of no unit, in [0, 1]; labels: (N,) clusters, or empty.
    """

    places: np.ndarray
    labels: np.ndarray

    def numbers(self) -> dict[str, Any]:
        return {"n": len(self.places)}

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        colour = self.labels if len(self.labels) else None
        ax.scatter(self.places[:, 0], self.places[:, 1], c=colour, cmap="tab10", s=4)
        ax.set(xticks=[], yticks=[], title="t-SNE of φ")
        return ax


def embedding(phi: Any, *, labels: ArrayLike | None = None, seed: int = 0) -> Embedding:
    """t-SNE of φ (N, C) by cosine distance, from its principal components on.

    Rows that are all the same (a dead middle block's zeros) have no map: all lie in one place.
    """
    from sklearn.manifold import TSNE

    rows = finite(phi)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(
        norm > 0, norm, 1
    )  # Euclidean distance of unit rows orders as cosine does
    labels = np.empty(0) if labels is None else np.asarray(labels)
    if (rows == rows[0]).all():  # t-SNE would divide by their standard deviation, and crash on NaN
        return Embedding(np.full((len(rows), 2), 0.5), labels)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    places = TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(rows)
    low, high = places.min(axis=0), places.max(axis=0)
    places = (places - low) / np.where(high > low, high - low, 1)
    return Embedding(places, labels)
