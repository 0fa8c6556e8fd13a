"""What sets specialised channels apart (Fig. 13): statistics of a channel against its selectivity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastphi import data
from fastphi.analysis.common import Result, gaussian_like, new_axes
from fastphi.analysis.rows import chunks, finite, matrix, moments
from fastphi.analysis.selectivity import channel_ratios
from fastphi.analysis.sparsity import participation_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastphi.unet import UNet

_BATCH = 32
# Of each statistic: which way the paper says it goes with PR over images (small: specialised).
EXPECTED = {
    "kurtosis": -1,  # specialised channels have heavy tails,
    "spatial": 1,  # are active in few places,
    "dimension": 1,  # with maps that span few dimensions,
    "frequency": 1,  # respond to few frequencies
    "orientation": 1,  # and orientations,
}
STATISTICS = (*EXPECTED, "noise")


@dataclass(frozen=True)
class Channels(Result):
    """Statistics of each channel of a block, (C,); NaN for a dead channel.

    selectivity: PR of φ_c over images. kurtosis: excess, of φ_c over images. spatial: PR of its map
    over places, mean over images. dimension: PR of the eigenvalues of its maps' covariance, over the
    number of places. frequency, orientation: PR of its response to gratings, over frequencies (at the
    best orientation) and over orientations (at the best frequency). noise: correlation over images of
    φ_c(σ) with φ_c of `phi`, told without a verdict. What was not measured is empty. controls: the same
    of other networks, and of the Gaussian with φ's mean and covariance.
    shown: of the statistics measured, each one's rank correlation with selectivity goes the way of
    `EXPECTED`, with p < 0.01; and the specialised channels' median kurtosis is above 1 (in a sample of
    any distribution, chance makes some correlation of kurtosis with PR).
    """

    selectivity: np.ndarray
    kurtosis: np.ndarray
    spatial: np.ndarray
    dimension: np.ndarray
    frequency: np.ndarray
    orientation: np.ndarray
    noise: np.ndarray
    controls: Mapping[str, Channels] = field(default_factory=dict)

    @property
    def correlations(self) -> dict[str, tuple[float, float]]:
        """{statistic: (Spearman's ρ with selectivity, p)}."""
        from scipy.stats import spearmanr

        found = {}
        for name in STATISTICS:
            values = getattr(self, name)
            if not len(values):
                continue
            both = np.isfinite(values) & np.isfinite(self.selectivity)
            varied = both.sum() > 3 and np.ptp(values[both]) > 0
            rho, p = spearmanr(values[both], self.selectivity[both]) if varied else (0.0, 1.0)
            found[name] = (float(rho), float(p))
        return found

    expected: ClassVar[Mapping[str, int]] = EXPECTED

    @property
    def as_expected(self) -> dict[str, bool]:
        found = self.correlations
        agree = {
            n: found[n][1] < 0.01 and found[n][0] * sign > 0
            for n, sign in EXPECTED.items()
            if n in found
        }
        return agree | {"kurtosis": agree["kurtosis"] and self.specialised_kurtosis > 1}

    @property
    def specialised_kurtosis(self) -> float:
        """Median excess kurtosis of the lowest quartile of selectivity."""
        low = self.selectivity <= np.nanpercentile(self.selectivity, 25)
        return float(np.nanmedian(self.kurtosis[low]))

    @property
    def shown(self) -> bool:
        return bool(self.as_expected) and all(self.as_expected.values())

    def numbers(self) -> dict[str, Any]:
        return super().numbers() | {
            "spearman": {n: {"rho": rho, "p": p} for n, (rho, p) in self.correlations.items()},
            "as_expected": self.as_expected,
        }

    def plot(self, ax: Axes | None = None, which: str = "kurtosis") -> Axes:
        ax = new_axes(ax)
        rho, p = self.correlations[which]
        for k, (name, control) in enumerate(self.controls.items()):
            if len(values := getattr(control, which)):
                ax.plot(
                    control.selectivity, values, "x", ms=3, color=f"C{k + 1}", alpha=0.5, label=name
                )
        ax.plot(self.selectivity, getattr(self, which), ".", ms=4, color="C0", label="φ")
        if len(ax.lines) > 1:
            ax.legend(frameon=False, fontsize="x-small")
        ax.set(xlabel="PR over images (small: specialised)", ylabel=which)
        ax.set_title(f"Spearman ρ = {rho:.2f}, p = {p:.1g}", fontsize="small")
        if which == "kurtosis":
            ax.set_yscale("symlog")
        return ax


def channels(
    phi: Any,
    *,
    model: UNet | None = None,
    images: Any = None,
    others: Mapping[float, Any] | None = None,
    block: str = "mid",
    sigma: float = 0.0,
    size: int | None = None,
    untrained: tuple[Any, UNet] | None = None,
    seed: int = 0,
) -> Channels:
    """The statistics of Fig. 13 of every channel, and of the controls'.

    phi: (N, C) at one σ. model, images: for spatial statistics, of `block`'s maps of the noisy images
    (`sigma`, one draw), and for the tuning. others: {σ: (N, C)} φ of the same images at other levels,
    whose mean correlation with `phi` is `noise`. size: of the gratings, in pixels (default: the
    images', or 64). untrained: φ (N, C) of the same images by an untrained network, and the network. The
    Gaussian of φ's mean and covariance (`seed`) has selectivity and kurtosis alone.
    """
    own = _measured(phi, model, images, others, block, sigma, size)
    controls = {"Gaussian": _measured(gaussian_like(phi, seed))}
    if untrained is not None:
        theirs, network = untrained
        controls["untrained"] = _measured(theirs, network, images, None, block, sigma, size)
    return replace(own, controls=controls)


def _measured(
    phi: Any,
    model: UNet | None = None,
    images: Any = None,
    others: Mapping[float, Any] | None = None,
    block: str = "mid",
    sigma: float = 0.0,
    size: int | None = None,
) -> Channels:
    phi = matrix(phi)
    empty = np.empty(0)
    spatial = dimension = frequency = orientation = noisy = empty
    if model is not None and images is not None:
        opened = data.open_images(images)
        size = size or opened.size
        spatial, dimension = map_statistics(model, opened, block, sigma)
    if model is not None:
        frequency, orientation = tuning(model, size or 64, block)
    if others:
        noisy = np.mean([_correlation(phi, o) for o in others.values()], axis=0)
    return Channels(
        channel_ratios(phi), kurtosis(phi), spatial, dimension, frequency, orientation, noisy
    )


def kurtosis(phi: Any) -> np.ndarray:
    """(C,): excess kurtosis of each channel over the rows of φ; 0 for a Gaussian, NaN for a constant."""
    of = moments(phi)
    fourth = sum(
        (((x - of.mean) ** 2) ** 2).sum(axis=0) for _, x in chunks(phi)
    )  # pow(x, 4) is slow
    with np.errstate(invalid="ignore", divide="ignore"):
        return of.n * fourth / of.scatter**2 - 3


def map_statistics(
    model: UNet, images: Any, block: str = "mid", sigma: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Spatial PR (C,) and PR of the eigenvalues of the maps' covariance over their size (C,)."""
    from fastphi import noise

    opened = data.open_images(images)
    parameter = next(model.parameters())
    ratio: Any = 0
    seen: Any = 0
    first: Any = 0
    second: Any = 0
    for start in range(0, len(opened), _BATCH):
        ids = np.arange(start, min(start + _BATCH, len(opened)))
        x = opened.batch(ids).to(parameter)
        if sigma > 0:
            z = noise.normal(seed, ids, noise.stream("extract"), 0, opened.shape, device=x.device)
            x = x + sigma * z.to(x)
        maps = model.block_maps(x, block).flatten(2).double()  # (n, C, places)
        power = maps.square().sum(2)
        share = maps.abs().sum(2).square() / (maps.shape[2] * power)
        ratio, seen = ratio + share.nan_to_num(0).sum(0), seen + (power > 0).sum(0)
        first = first + maps.sum(0)
        second = second + torch.einsum("ncp,ncq->cpq", maps, maps)
    mean = first / len(opened)
    covariance = second / len(opened) - mean[:, :, None] * mean[:, None, :]
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1)
    dimension = trace.square() / covariance.square().sum((1, 2)) / covariance.shape[1]
    return (ratio / seen).cpu().numpy(), dimension.cpu().numpy()


def tuning(
    model: UNet, size: int, block: str = "mid", phases: int = 4, contrast: float = 0.25
) -> tuple[np.ndarray, np.ndarray]:
    """PR of each channel's tuning (C,): over frequencies and over orientations; 1/n is one of n.

    Gratings of `contrast` round mid-grey, in cycles per image from 1 to half of the size by powers of
    √2, at 12 orientations, responses to `phases` phases averaged.
    """
    frequencies = 2 ** np.arange(0, np.log2(size / 2) + 1e-9, 0.5)
    angles = np.arange(12) * np.pi / 12
    parameter = next(model.parameters())
    responses = []
    for frequency in frequencies:
        x = gratings(size, float(frequency), angles, phases, contrast).to(parameter)
        x = x.expand(-1, model.config.image_channels, -1, -1).contiguous()
        with torch.no_grad():
            means = model.block_means(x, until=block)[block]
        responses.append(means.double().cpu().numpy().reshape(len(angles), phases, -1).mean(axis=1))
    table = np.array(responses)  # (frequencies, angles, C)
    table = table - table.min(axis=(0, 1))  # what every grating evokes is no tuning
    best_frequency, best_angle = table.max(axis=1), table.max(axis=0)
    return participation_ratio(best_frequency.T), participation_ratio(best_angle.T)


def gratings(
    size: int, frequency: float, angles: np.ndarray, phases: int, contrast: float
) -> Tensor:
    """(angles · phases, 1, size, size) in [0, 1]: cosines of `frequency` cycles per image."""
    along = np.arange(size) / size
    y, x = np.meshgrid(along, along, indexing="ij")
    waves = [
        np.cos(2 * np.pi * (frequency * (x * np.cos(a) + y * np.sin(a)) + p / phases))
        for a in angles
        for p in range(phases)
    ]
    return torch.from_numpy(0.5 + contrast * np.stack(waves))[:, None]


def _correlation(a: Any, b: Any) -> np.ndarray:
    """(C,): correlation over rows, channel by channel; NaN where one is constant."""
    b = matrix(b, "others")
    of, other = moments(a), moments(b, "others")
    both = sum(
        (
            (x - of.mean) * (finite(b[part], "others", range(part.start, part.stop)) - other.mean)
        ).sum(axis=0)
        for part, x in chunks(a, beside=b.shape[1])
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return both / np.sqrt(of.scatter * other.scatter)
