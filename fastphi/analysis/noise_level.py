"""Does matching change the noise level (Fig. 20)? σ̂ = ‖f‖/√n before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastphi import noise
from fastphi.analysis.common import Result, new_axes
from fastphi.sampling import guidance
from fastphi.support import validate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastphi.unet import UNet


@dataclass(frozen=True)
class NoiseLevel(Result):
    """σ̂ = ‖x − denoised(x)‖/√(CHW) of noisy images before and after matching: (levels, N).

    loss_ratio: (levels, N) the matching loss after over before. shown (Fig. 20): at every level the
    median of |after/before − 1| is at most 5 %, and matching did move φ (median loss ratio <= 0.5).
    controls: the same of other networks, each matching its own φ.
    """

    sigmas: tuple[float, ...]
    before: np.ndarray
    after: np.ndarray
    loss_ratio: np.ndarray
    controls: Mapping[str, NoiseLevel] = field(default_factory=dict)

    @property
    def change(self) -> np.ndarray:
        return np.abs(self.after / self.before - 1)

    @property
    def shown(self) -> bool:
        still = (np.median(self.change, axis=1) <= 0.05).all()
        return bool(still and np.nanmedian(self.loss_ratio) <= 0.5)

    def numbers(self) -> dict[str, Any]:
        return super().numbers() | {
            "sigmas": list(self.sigmas),
            "median_change_per_level": np.median(self.change, axis=1).tolist(),
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        for name, values in (("before", self.before), ("after", self.after)):
            ax.plot(
                self.sigmas, values.mean(axis=1), "o-" if name == "before" else "x--", label=name
            )
        for k, (name, control) in enumerate(self.controls.items()):
            for values, mark in ((control.before, "o-"), (control.after, "x--")):
                label = name if mark == "o-" else None
                ax.plot(
                    self.sigmas,
                    values.mean(axis=1),
                    mark,
                    color=f"C{k + 2}",
                    lw=0.8,
                    ms=3,
                    label=label,
                )
        ends = [min(self.sigmas), max(self.sigmas)]
        ax.plot(ends, ends, color="0.8", zorder=0)
        ax.set(xlabel="σ (images in [0, 1])", ylabel="σ̂ estimated", xscale="log", yscale="log")
        ax.set_xticks(self.sigmas, [f"{s:g}" for s in self.sigmas])
        ax.minorticks_off()
        ax.legend(frameon=False)
        return ax


def noise_level(
    model: UNet,
    images: Any,
    sigmas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8),
    *,
    seed: int = 0,
    max_iter: int = 100,
    target: Any = None,
    controls: Mapping[str, UNet] | None = None,
) -> NoiseLevel:
    """σ̂ of noisy images, and of the same after matching to other images' φ at that level.

    images: (N, C, H, W) in [0, 1], N >= 2; each is matched to the next one's φ, of one draw of
    noise, unless `target` (N, C) gives φ*. controls: name → another network, an untrained one for
    instance, of the same channels.
    """
    networks = [model, *(controls or {}).values()]
    own, *theirs = (
        _noise_level(network, images, sigmas, seed, max_iter, target) for network in networks
    )
    return replace(own, controls=dict(zip(controls or (), theirs, strict=True)))


def _noise_level(
    model: UNet, images: Any, sigmas: tuple[float, ...], seed: int, max_iter: int, target: Any
) -> NoiseLevel:
    parameter = next(model.parameters())
    x = torch.as_tensor(images).to(parameter)
    validate.images(x, model.config)
    rows: dict[str, list[np.ndarray]] = {"before": [], "after": [], "ratio": []}
    shape = (x.shape[1], x.shape[2], x.shape[3])
    with torch.no_grad():
        for k, sigma in enumerate(sigmas):
            z, other = (
                noise.normal(seed, range(len(x)), noise.stream("evaluate", k), d, shape).to(x)
                for d in (0, 1)
            )
            noisy = x + sigma * z
            wanted = model.phi(x + sigma * other).roll(-1, 0) if target is None else target
            match = guidance.match_phi(model, noisy, wanted, max_iter=max_iter)
            rows["before"].append(estimate(model, noisy))
            rows["after"].append(estimate(model, match.x))
            rows["ratio"].append((match.last / match.first).double().cpu().numpy())
    before, after, ratio = (np.array(v) for v in rows.values())
    return NoiseLevel(tuple(sigmas), before, after, ratio)


def estimate(model: UNet, x: torch.Tensor) -> np.ndarray:
    """(N,): σ̂ = ‖x − denoised(x)‖/√(CHW)."""
    with torch.no_grad():
        f = x - model(x)
    return f.square().flatten(1).mean(1).sqrt().double().cpu().numpy()
