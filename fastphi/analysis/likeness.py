"""Samples with a target's φ (Fig. 7): alike in φ and in layout, and yet not the same picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastphi.analysis.common import Result, exceeds, new_axes
from fastphi.analysis.stability import cosine
from fastphi.targets.images import mean_phi

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastphi.unet import UNet


@dataclass(frozen=True)
class Likeness(Result):
    """k samples of each of T targets, compared with their own target and with the others: (T·k,) each.

    cosine, cosine_other: of φ(sample) with φ(own target), and the mean over the other targets.
    layout, layout_other: correlation of the pictures reduced to 8 × 8. nearest: 1 where the own target
    is the nearest in φ of all T. between: (T,) root mean square pixel distance between samples of one
    target; targets: the same between targets; distance: of samples to their own target.
    shown (Fig. 7): layout exceeds layout_other, sample by sample, by more than three standard errors;
    the own target is nearest in more than chance by three standard errors; and samples of one target
    differ by at least a fifth of what targets differ by.
    """

    cosine: np.ndarray
    cosine_other: np.ndarray
    layout: np.ndarray
    layout_other: np.ndarray
    nearest: np.ndarray
    between: np.ndarray
    targets: np.ndarray
    distance: np.ndarray

    @property
    def keeps_layout(self) -> bool:
        return exceeds(self.layout, self.layout_other)

    @property
    def keeps_phi(self) -> bool:
        return exceeds(self.nearest, np.full(len(self.nearest), 1 / len(self.between)))

    @property
    def varied(self) -> bool:
        return bool(self.between.mean() >= 0.2 * self.targets.mean())

    @property
    def shown(self) -> bool:
        return self.keeps_layout and self.keeps_phi and self.varied

    def numbers(self) -> dict[str, Any]:
        names = ("keeps_layout", "keeps_phi", "varied")
        return super().numbers() | {name: getattr(self, name) for name in names}

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        groups = {"own": self.layout, "others": self.layout_other}
        ax.boxplot(list(groups.values()), whis=(5, 95), showfliers=False)
        ax.set_xticks([1, 2], ["own target", "other targets"])
        ax.set(ylabel="correlation of layouts (8 × 8)")
        return ax


def likeness(
    model: UNet, targets: Tensor, samples: Tensor, *, sigma: float = 0.2, draws: int = 4
) -> Likeness:
    """targets: (T, C, H, W), T >= 2; samples: (T, k, C, H, W), k >= 2; φ at `sigma`, `draws` draws."""
    t, k = samples.shape[:2]
    if t < 2 or k < 2 or targets.shape != (t, *samples.shape[2:]):
        raise ValueError(
            "targets, samples: expected (T, C, H, W) and (T, k, C, H, W), T and k at least 2, got "
            f"{tuple(targets.shape)} and {tuple(samples.shape)}"
        )
    parameter = next(model.parameters())
    targets, flat = targets.to(parameter), samples.flatten(0, 1).to(parameter)
    wanted = phi_of(model, targets, sigma, draws)
    found = phi_of(model, flat, sigma, draws)
    own = np.repeat(np.arange(t), k)
    table = np.stack([cosine(found, np.broadcast_to(w, found.shape)) for w in wanted], axis=1)
    distance = np.linalg.norm(found[:, None] - wanted[None], axis=2)
    layout = _standard(flat) @ _standard(targets).T
    return Likeness(
        *_own_and_others(table, own),
        *_own_and_others(layout, own),
        (distance.argmin(axis=1) == own).astype(np.float64),
        np.array([_rms_between(s) for s in samples]),
        np.array([_rms_between(targets)]),
        (flat - targets[own]).square().flatten(1).mean(1).sqrt().double().cpu().numpy(),
    )


def phi_of(model: UNet, x: Tensor, sigma: float, draws: int) -> np.ndarray:
    """(N, C) float64: φ of images x (N, C, H, W) at σ, mean over noise draws."""
    levels, ids = np.full(len(x), sigma), np.arange(len(x))
    return mean_phi(model, x, levels, ids, 0, draws).double().cpu().numpy()


def _standard(x: Tensor) -> np.ndarray:
    """Pictures as 8 × 8 unit vectors without mean, so that products are correlations."""
    small = F.adaptive_avg_pool2d(x.double(), 8).flatten(1).cpu().numpy()
    small = small - small.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(small, axis=1, keepdims=True)
    return np.divide(small, norm, out=np.zeros_like(small), where=norm > 0)


def _own_and_others(table: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.arange(len(own))
    others = table.copy()
    others[at, own] = np.nan
    return table[at, own], np.nanmean(others, axis=1)


def _rms_between(x: Tensor) -> float:
    """Root mean square pixel distance of all pairs of images (n, C, H, W)."""
    pairs = torch.pdist(x.double().flatten(1).cpu())
    return float((pairs / x[0].numel() ** 0.5).mean())
