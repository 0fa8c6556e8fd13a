"""Location (§2.1, Fig. 18): what ā keeps of where things are, though it averages over space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastphi import data
from fastphi.analysis.common import Result, blocks_of, new_axes
from fastphi.analysis.ridge import ridge
from fastphi.analysis.rows import Rows, chunks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastphi.unet import UNet

_BATCH = 64


@dataclass(frozen=True)
class Shifts(Result):
    """Change of ā when an image is shifted, over its change from image to image: {block: (shifts,)}.

    shifts: pixels, wrapped round at the borders. 0: ā does not notice; 1: as much as another image.
    controls: {name: (shifts,)}, of the pixels, and of other networks' middle blocks.
    """

    shifts: tuple[int, ...]
    change: Mapping[str, np.ndarray]
    controls: Mapping[str, np.ndarray] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        return {
            "shifts": list(self.shifts),
            "change": {b: v.tolist() for b, v in self.change.items()},
            "controls": {name: v.tolist() for name, v in self.controls.items()},
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        for block, values in self.change.items():
            ax.plot(self.shifts, values, "o-", label=block, lw=2.5 if block == "mid" else 1.2)
        for name, values in self.controls.items():
            ax.plot(self.shifts, values, "x--", label=name, lw=1)
        ax.set(xlabel="shift (pixels)", ylabel="change of ā / change between images")
        ax.legend(frameon=False, fontsize="small")
        return ax


def shifts(
    model: UNet,
    images: Any,
    by: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
    *,
    controls: Mapping[str, UNet] | None = None,
) -> Shifts:
    """Change of every block's ā under circular shifts to the right, of clean images (N, C, H, W).

    controls: name → another network, an untrained one for instance. The pixels are always one.
    """
    opened = data.open_images(images)
    x = opened.batch(np.arange(len(opened)))
    by = tuple(s for s in by if s < opened.shape[2])
    moved = [x, *(x.roll(s, dims=3) for s in by)]
    found = {"pixels": _change([m.flatten(1).numpy() for m in moved])}
    for name, network in (controls or {}).items():
        found[name] = _change([_means(network, m)["mid"] for m in moved])
    each = [_means(model, m) for m in moved]
    return Shifts(by, {b: _change([means[b] for means in each]) for b in each[0]}, found)


def _change(rows: list[np.ndarray]) -> np.ndarray:
    """Mean distance of each of the later rows (N, C) from the first, over that between two images."""
    first, *later = rows
    other = np.linalg.norm(first - np.roll(first, max(len(first) // 2, 1), axis=0), axis=1).mean()
    own = [np.linalg.norm(m - first, axis=1).mean() for m in later]
    return np.array(own) / other if other > 0 else np.full(len(later), np.nan)


@dataclass(frozen=True)
class Decoding(Result):
    """R² of an object's position read off ā linearly, on held-out positions: {block: number}, at most 1.

    controls: {name: {block: R²}}; below 0 is worse than the mean position. shown (§2.1): the middle
    block's is above 0.5 and above every control's by 0.1.
    """

    r2: Mapping[str, float]
    controls: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def shown(self) -> bool:
        own = self.r2.get("mid", float("-inf"))
        best = max((max(c.values()) for c in self.controls.values()), default=float("-inf"))
        return own > 0.5 and own > best + 0.1

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        ax.bar(range(len(self.r2)), list(self.r2.values()), color="C0", label="trained")
        for k, (name, values) in enumerate(self.controls.items()):
            at = [list(self.r2).index(b) if b in self.r2 else len(self.r2) for b in values]
            ax.plot(at, list(values.values()), "x", color=f"C{k + 1}", label=name)
        ax.set_xticks(range(len(self.r2)), list(self.r2))
        ax.set(ylabel="R² of the position", ylim=(-0.2, 1.05))
        ax.legend(frameon=False)
        return ax


def decode_position(
    means: Any, positions: Any, *, controls: Mapping[str, Any] | None = None, seed: int = 0
) -> Decoding:
    """How well position is read off ā by a ridge regression, trained on half, tested on the rest.

    means: {block: (N, C)}. positions: (N, 2), in any unit. controls: name → the same of other networks,
    or of the mean colour.
    """
    positions = np.asarray(positions, np.float64)

    def each(blocks: Any) -> dict[str, float]:
        return {b: _r2(a, positions, seed) for b, a in blocks.items()}

    others = {name: each(blocks_of(value)) for name, value in (controls or {}).items()}
    return Decoding(each(blocks_of(means)), others)


def decode_objects(
    model: UNet, size: int, n: int = 600, *, control: UNet | None = None
) -> Decoding:
    """`decode_position` of a dot that lies anywhere on mid-grey, beside the mean colour's and the
    network `control`'s, an untrained one for instance."""
    x, positions = dots(size, n, model.config.image_channels)
    controls: dict[str, Any] = {"mean colour": x.mean((2, 3)).double().numpy()}
    if control is not None:
        controls["untrained"] = _means(control, x)
    return decode_position(_means(model, x), positions, controls=controls)


def dots(size: int, n: int, channels: int = 3, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """n images (n, C, size, size) of a dark round dot on grey, of random radius, and its place (n, 2)."""
    rng = np.random.default_rng(seed)
    radius = rng.uniform(size / 16, size / 8, n)
    margin = size / 6  # so that the dot is whole: its mean colour then says nothing of its place
    places = rng.uniform(margin, size - margin, (n, 2))
    y, x = np.mgrid[:size, :size]
    distance = np.hypot(y - places[:, :1, None], x - places[:, 1:, None])
    soft = 1 / (1 + np.exp(np.clip(2 * (distance - radius[:, None, None]), -50, 50)))
    images = torch.from_numpy(0.5 - 0.4 * soft).float()[:, None]
    return images.expand(-1, channels, -1, -1).contiguous(), places


def _means(model: UNet, x: Tensor) -> dict[str, np.ndarray]:
    parameter = next(model.parameters())
    parts = []
    with torch.no_grad():
        for chunk in x.split(_BATCH):
            parts.append(
                {b: m.double().cpu() for b, m in model.block_means(chunk.to(parameter)).items()}
            )
    return {b: torch.cat([p[b] for p in parts]).numpy() for b in parts[0]}


def _r2(a: Rows, y: np.ndarray, seed: int, strength: float = 1e-6) -> float:
    order = np.random.default_rng(seed).permutation(len(a))
    kept, held = np.zeros(len(a), bool), order[len(a) // 2 :]
    kept[order[: len(a) // 2]] = True
    guesses = ridge(a, y, kept, strength)
    guess = np.concatenate([guesses(x) for _, x in chunks(a)])[held]
    return float(1 - ((y[held] - guess) ** 2).sum() / ((y[held] - y[held].mean(axis=0)) ** 2).sum())
