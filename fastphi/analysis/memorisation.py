"""Memorisation: is a generated image a copy of one it was trained on (Fig. 17-19)?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastphi import data
from fastphi.analysis.common import Result, new_axes
from fastphi.analysis.rows import parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Memorisation(Result):
    """Root mean square distance per pixel, in [0, 1], of images to their nearest training image.

    samples: (n,) of the generated images; index: (n,) which training image; heldout: (m,) the same
    for real images that were not trained on. copies: share of samples nearer than the nearest 1 % of
    the held-out images.
    shown (the paper's "not copies"): at most 5 % of the samples are, and held-out images were given.
    """

    samples: np.ndarray
    index: np.ndarray
    heldout: np.ndarray

    @property
    def copies(self) -> float:
        if not len(self.heldout):
            return float("nan")
        return float((self.samples < np.percentile(self.heldout, 1)).mean())

    @property
    def shown(self) -> bool:
        return bool(self.copies <= 0.05)

    def numbers(self) -> dict[str, Any]:
        found = super().numbers() | {"copies": None if not len(self.heldout) else self.copies}
        found.pop("index")
        return found

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        top = float(max(self.samples.max(), self.heldout.max() if len(self.heldout) else 0))
        bins = np.linspace(0, top * 1.05 or 1, 30).tolist()
        ax.hist(self.samples, bins, density=True, alpha=0.6, label="samples")
        if len(self.heldout):
            ax.hist(self.heldout, bins, density=True, alpha=0.4, label="held-out images")
        ax.set(xlabel="distance to the nearest training image (rms, per pixel)", ylabel="density")
        ax.legend(frameon=False)
        return ax


def memorisation(samples: Any, training: Any, heldout: Any = None) -> Memorisation:
    """Nearest training image of every sample, beside that of images that were held out.

    samples, heldout: images (n, C, H, W) in [0, 1], or packs. training: the pack, of any size, read
    a chunk at a time. A copy would be far nearer than a held-out image is.
    """
    train = data.open_images(training)
    distance, index = nearest_image(samples, train)
    held = np.empty(0) if heldout is None else nearest_image(heldout, train)[0]
    return Memorisation(distance, index, held)


def nearest_image(images: Any, training: Any, chunk: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square pixel distance (n,) to the nearest image of `training`, and its number (n,).

    chunk: how many of either are in memory at a time.
    """
    train, own = data.open_images(training), data.open_images(images)
    if train.shape != own.shape:
        raise ValueError(f"images: {own.shape} pixels, the training images have {train.shape}")
    found = [
        _nearest_image(own.batch(np.arange(tile.start, tile.stop)).flatten(1), train, chunk)
        for tile in parts(len(own), 1, chunk)
    ]
    distance, index = (np.concatenate(of) for of in zip(*found, strict=True))
    return distance, index


def _nearest_image(x: Tensor, train: data.Images, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    norm = x.square().sum(1, keepdim=True)
    best = torch.full((len(x),), torch.inf)
    index = torch.zeros(len(x), dtype=torch.int64)
    for start in range(0, len(train), chunk):
        rows = train.batch(np.arange(start, min(start + chunk, len(train)))).flatten(1)
        square, at = (norm + rows.square().sum(1) - 2 * x @ rows.T).min(dim=1)
        nearer = square < best
        best, index = torch.where(nearer, square, best), torch.where(nearer, start + at, index)
    exact = torch.stack(  # the difference of large numbers above is no measure of a small distance
        [
            (a - train.batch([int(i)])[0].flatten()).square().mean()
            for a, i in zip(x, index, strict=True)
        ]
    )
    return exact.sqrt().double().numpy(), index.numpy()
