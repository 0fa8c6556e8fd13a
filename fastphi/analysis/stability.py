"""Stability of ā across noise levels (Fig. 2, 11), and its collapse as σ → 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastphi.analysis.common import Result, blocks_of, exceeds, new_axes
from fastphi.analysis.rows import Rows, parts
from fastphi.phi import PhiStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Levels = Mapping[float, Mapping[str, Any]]


@dataclass(frozen=True)
class Stability(Result):
    """Cosine of ā at σ₂ with ā at σ₁ = `reference`, per block, level and image.

    sigmas: (S,) the levels σ₂, without the reference. same: {block: (S, N)}, an image with itself;
    other: {block: (S, N)}, an image with another one: what a cosine is worth that says nothing of
    the image. norms: {block: (S + 1,)} mean ‖ā‖ at `levels`, all of them. controls: {name: Stability}.
    shown (Fig. 2): averaged over the levels in [0.1, 1], the middle block's cosine exceeds every other
    block's, image by image, by more than three standard errors.
    """

    reference: float
    levels: tuple[float, ...]
    same: Mapping[str, np.ndarray]
    other: Mapping[str, np.ndarray]
    norms: Mapping[str, np.ndarray]
    controls: Mapping[str, Stability] = field(default_factory=dict)

    @property
    def sigmas(self) -> np.ndarray:
        return np.array([s for s in self.levels if s != self.reference])

    def over_levels(self, which: str = "same", low: float = 0.1, high: float = 1.0) -> dict:
        """{block: (N,)}: mean of the cosines over the levels in [low, high]."""
        inside = (self.sigmas >= low) & (self.sigmas <= high)
        return {b: v[inside].mean(axis=0) for b, v in getattr(self, which).items()}

    @property
    def shown(self) -> bool:
        mean = self.over_levels()
        others = [v for block, v in mean.items() if block != "mid"]
        return "mid" in mean and bool(others) and all(exceeds(mean["mid"], v) for v in others)

    @property
    def collapse(self) -> dict[str, float]:
        """Of each block: mean ‖ā‖ at the lowest level over that at the reference."""
        at = self.levels.index(self.reference)
        return {b: float(v[0] / v[at]) for b, v in self.norms.items()}

    def numbers(self) -> dict[str, Any]:
        def means(of: Mapping[str, np.ndarray]) -> dict[str, list[float | None]]:
            return {
                b: [float(np.nanmean(row)) if np.isfinite(row).any() else None for row in v]
                for b, v in of.items()
            }

        return {
            "reference": self.reference,
            "sigmas": self.sigmas.tolist(),
            "images": len(next(iter(self.same.values()))[0]),
            "same": means(self.same),
            "other": means(self.other),
            "norms": {b: v.tolist() for b, v in self.norms.items()},
            "norm_levels": list(self.levels),
            "collapse": self.collapse,
            "controls": {name: c.numbers() for name, c in self.controls.items()},
            "shown": self.shown,
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean over images against σ₂, with the 5-95 % range; thin dots: against another image."""
        ax = new_axes(ax)
        for k, (block, values) in enumerate(self.same.items()):
            some = np.isfinite(values).any(axis=1)  # none where φ has collapsed
            at, values, other = self.sigmas[some], values[some], self.other[block][some]
            low, high = np.nanpercentile(values, [5, 95], axis=1)
            wide = 2.5 if block == "mid" else 1.2
            ax.plot(at, np.nanmean(values, axis=1), color=f"C{k}", lw=wide, label=block)
            ax.fill_between(at, low, high, color=f"C{k}", alpha=0.1, lw=0)
            ax.plot(at, np.nanmean(other, axis=1), ":", color=f"C{k}", lw=1)
        for k, (name, control) in enumerate(self.controls.items()):
            if "mid" in control.same:
                some = np.isfinite(control.same["mid"]).any(axis=1)
                at, mean = control.sigmas[some], np.nanmean(control.same["mid"][some], axis=1)
                ax.plot(at, mean, "--", color="k", alpha=1 / (k + 1), label=f"mid, {name}")
        ax.set_title("dotted: with another image; bands: 5-95 % of images", fontsize="small")
        ax.axvline(self.reference, color="0.8", lw=0.8)
        ax.set(xlabel="σ (images in [0, 1])", ylabel=f"cosine with ā at σ = {self.reference:g}")
        ax.legend(frameon=False, ncols=2, fontsize="small")
        return ax


def stability(
    means: PhiStore | Levels,
    reference: float = 0.5,
    *,
    controls: Mapping[str, PhiStore | Levels] | None = None,
) -> Stability:
    """Fig. 2: cosine of E_z[ā(σ₂)] with E_z[ā(σ₁)], per block.

    means: {σ: {block: (N, C)}} or a φ store of several levels; ā at different levels must come from
    independent noise, as a store's does, with 20 draws or more. reference: σ₁, one of the levels.
    controls: name → the same of other networks on the same images. Rows of zeros (φ collapses as
    σ → 0) have no direction and give NaN. The cosines take 16 bytes an image, level and block.
    """
    levels, read = _levels(means)
    nearest = min(levels, key=lambda s: abs(s - reference))
    if abs(nearest - reference) > 1e-6:
        raise ValueError(f"reference: {reference:g} is not among the levels {levels}")
    start = read(nearest)
    names = list(start)
    norms: dict[str, list[float]] = {b: [] for b in names}
    same: dict[str, list[np.ndarray]] = {b: [] for b in names}
    other: dict[str, list[np.ndarray]] = {b: [] for b in names}
    for sigma in levels:
        here = read(sigma)
        for block in names:
            a, b = here[block], start[block]
            norms[block].append(_mean_norm(a))
            if sigma != nearest:
                same[block].append(cosine(a, b))
                other[block].append(cosine(a, b, shift=max(len(b) // 2, 1)))
    return Stability(
        nearest,
        levels,
        {b: np.array(v).reshape(len(levels) - 1, -1) for b, v in same.items()},
        {b: np.array(v).reshape(len(levels) - 1, -1) for b, v in other.items()},
        {b: np.array(v) for b, v in norms.items()},
        {name: stability(other, reference) for name, other in (controls or {}).items()},
    )


def cosine(a: Any, b: Any, shift: int = 0) -> np.ndarray:
    """Of paired rows (N, C): (N,) float64; NaN where a row is zero. shift: of each row of a with the row
    of b that is so many before it, round the end."""
    found = np.empty(len(a))
    for part in parts(len(a), a.shape[1]):
        x = np.asarray(a[part], np.float64)
        y = np.asarray(b[np.arange(part.start, part.stop) - shift], np.float64)  # −1: the last
        with np.errstate(invalid="ignore"):
            found[part] = (x * y).sum(axis=1)
            found[part] /= np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return found


def _mean_norm(rows: Rows) -> float:
    each = (np.linalg.norm(rows[part], axis=1) for part in parts(len(rows), rows.shape[1]))
    return float(np.concatenate([*each]).mean())


def _levels(means: Any) -> tuple[tuple[float, ...], Any]:
    levels = means.sigmas if isinstance(means, PhiStore) else tuple(sorted(means))
    if len(levels) < 2:
        raise ValueError(f"means: expected two noise levels or more, got {levels}")
    if isinstance(means, PhiStore):
        return levels, lambda s: blocks_of(means, s)
    return levels, lambda s: blocks_of(means[s])
