"""Selectivity of channels (Fig. 3, 4, 12): how few images excite a channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastphi.analysis.common import Result, gaussian_like, new_axes
from fastphi.analysis.dip import dip, dip_p_value
from fastphi.analysis.rows import chunks, matrix, parts, strongest
from fastphi.support import validate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Selectivity(Result):
    """PR over the data set of every channel, (C,), in (0, 1]: small is selective; NaN: a dead channel.

    faint: how many channels never reach 1 % of what the strongest reaches: nearly dead, and selective in
    name only. dip, p: Hartigan's dip of the values and its probability under one mode.
    controls: {name: (C,)}: other representations of the same images, and a Gaussian of the same mean
    and covariance.
    shown (Fig. 3): more than one mode (p < 0.01), and a lowest quartile whose median is below 0.5
    (a Gaussian channel, whatever its mean, has 2/π or more); and no control has both.
    """

    ratios: np.ndarray
    dip: float
    p: float
    controls: Mapping[str, np.ndarray] = field(default_factory=dict)
    control_p: Mapping[str, float] = field(default_factory=dict)
    faint: int = 0

    @property
    def shown(self) -> bool:
        found = [(self.ratios, self.p), *((v, self.control_p[n]) for n, v in self.controls.items())]
        itself, *others = [p < 0.01 and _low(ratios) < 0.5 for ratios, p in found]
        return bool(itself and not any(others))

    def specialised(self, quantile: float = 0.25) -> np.ndarray:
        """Channel numbers of the lowest quantile of the living channels, the most selective first."""
        validate.number(quantile, "quantile", low=0, high=1, open_low=True)
        order = np.argsort(self.ratios, kind="stable")  # NaN last
        living = int(np.isfinite(self.ratios).sum())
        return order[: max(round(quantile * living), min(1, living))]

    def common(self, quantile: float = 0.25) -> np.ndarray:
        """Channel numbers of the highest quantile of the living channels, the least selective first."""
        living = int(np.isfinite(self.ratios).sum())
        order = np.argsort(self.ratios, kind="stable")[:living][::-1]
        return order[: max(round(quantile * living), min(1, living))]

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        bins = np.linspace(0, 1, 41).tolist()
        for name, values in self.controls.items():
            kept = values[np.isfinite(values)]
            ax.hist(kept, bins, histtype="step", density=True, label=name)
        kept = self.ratios[np.isfinite(self.ratios)]
        ax.hist(kept, bins, density=True, color="C0", alpha=0.6, label="φ")
        ax.set(xlabel="participation ratio over images", ylabel="density of channels")
        ax.set_title(f"dip {self.dip:.3f}, p = {self.p:.2g}", fontsize="small")
        ax.legend(frameon=False, fontsize="small")
        return ax


def selectivity(
    phi: Any, *, controls: Mapping[str, Any] | None = None, seed: int = 0, draws: int = 300
) -> Selectivity:
    """PR of each channel over the data set: c(i) = (φ(x_1)[i], ..., φ(x_n)[i]) at one σ (Fig. 3).

    phi: (N, C). controls: name → (N, C') of the same images. A Gaussian of φ's mean and covariance is
    always among the controls. draws: simulations behind the test of bimodality.
    """
    phi = matrix(phi)
    ratios = channel_ratios(phi)
    given = {"gaussian": gaussian_like(phi, seed), **(controls or {})}
    others = {name: channel_ratios(value, name) for name, value in given.items()}
    return Selectivity(
        ratios,
        *_bimodality(ratios, draws, seed),
        others,
        {name: _bimodality(values, draws, seed)[1] for name, values in others.items()},
        faint_channels(phi),
    )


def channel_ratios(phi: Any, name: str = "phi") -> np.ndarray:
    """(C,): participation ratio of every channel over the rows of φ (N, C), in two passes."""
    scale = strongest(phi, name)  # so that squares neither overflow nor vanish
    first, second = np.zeros(len(scale)), np.zeros(len(scale))
    with np.errstate(invalid="ignore"):
        for _, x in chunks(phi, name):
            x = np.abs(x) / scale
            first += x.sum(axis=0)
            second += (x**2).sum(axis=0)
    return first**2 / (len(phi) * second)


def faint_channels(phi: Any) -> int:
    """How many channels never reach 1 % of the largest φ (N, C) of all."""
    return int(faint(phi).sum())


def faint(phi: Any) -> np.ndarray:
    """(C,) bool: channels that never reach 1 % of the largest φ (N, C) of all, the dead ones included."""
    most = strongest(phi)
    return most < 0.01 * most.max() if most.any() else np.ones(len(most), bool)


def pictured(phi: Any, quantile: float = 0.25) -> np.ndarray:
    """Channel numbers of the lowest quantile of selectivity among those that are not `faint`, the most
    selective first: of a nearly dead channel there is nothing to be seen."""
    living = np.flatnonzero(~faint(phi))
    if not len(living):
        return living
    order = living[np.argsort(channel_ratios(phi)[living], kind="stable")]
    return order[: max(round(quantile * len(order)), 1)]


def exciting(phi: Any, channel: int, k: int = 8) -> np.ndarray:
    """Row numbers of the k images that excite a channel most, the strongest first (Fig. 3)."""
    phi = matrix(phi)
    validate.integer(channel, "channel", low=0, high=phi.shape[1] - 1)
    validate.integer(k, "k", low=1, high=len(phi))
    values = np.concatenate([phi[part][:, channel] for part in parts(*phi.shape)])
    return np.argsort(-values, kind="stable")[:k]


def top_channels(phi: Any, image: int, among: Any, k: int = 4) -> np.ndarray:
    """The k channels of `among` that an image excites most, each relative to its own mean over the
    data set (Fig. 4): a channel's scale says nothing of the image."""
    phi = matrix(phi)
    validate.integer(image, "image", low=0, high=len(phi) - 1)
    among = np.asarray(among)
    each = (np.abs(phi[part][:, among]).sum(axis=0, dtype=np.float64) for part in parts(*phi.shape))
    mean = sum(each) / len(phi)
    strength = phi[[image]][0, among] / np.where(mean > 0, mean, np.inf)
    return among[np.argsort(-strength, kind="stable")[:k]]


def _low(ratios: np.ndarray) -> float:
    """Median of the lowest quartile."""
    kept = ratios[np.isfinite(ratios)]
    return float(np.percentile(kept, 12.5)) if len(kept) else float("nan")


def _bimodality(ratios: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
    kept = ratios[np.isfinite(ratios)]
    if len(kept) < 4:
        return float("nan"), 1.0
    return dip(kept), dip_p_value(kept, draws, seed)
