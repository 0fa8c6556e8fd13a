"""Images from more than one image's φ (§2.3): from the centroid of a cluster or a class, from the union
of two images' features, and, for comparison, from nothing but noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastphi import targets
from fastphi.analysis.common import Result, exceeds, new_axes
from fastphi.analysis.likeness import phi_of
from fastphi.analysis.stability import cosine
from fastphi.sampling import reconstruct, sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastphi.unet import UNet

Groups = Mapping[str, Sequence[Tensor]]
_PRIOR_STEPS = 300  # at most; about 200 are needed
_DRAWS = 4  # of noise, for φ of what was made


@dataclass(frozen=True)
class Generation(Result):
    """Samples whose φ is that of several images together, compared with it in φ.

    samples: of each kind of target, k images for each of T targets, {kind: (T, k, C, H, W)};
    prior: images from noise alone, (n, C, H, W). cosine: of φ(sample) with its target's φ,
    {kind: (T·k,)}; cosine_other: the mean over the other targets of the kind, NaN where there is one
    only; cosine_prior: of the same target with the prior's images, mean.
    shown: for every kind the cosine exceeds those of the prior and of the other targets, sample by
    sample, by more than three standard errors.
    """

    samples: Mapping[str, np.ndarray]
    prior: np.ndarray
    cosine: Mapping[str, np.ndarray]
    cosine_other: Mapping[str, np.ndarray]
    cosine_prior: Mapping[str, np.ndarray]

    @property
    def shown(self) -> bool:
        found = []
        for kind, own in self.cosine.items():
            found.append(exceeds(own, self.cosine_prior[kind]))
            if np.isfinite(self.cosine_other[kind]).any():
                found.append(exceeds(own, self.cosine_other[kind]))
        return bool(found) and all(found)

    def numbers(self) -> dict[str, Any]:
        found = super().numbers()
        return {name: v for name, v in found.items() if name not in ("samples", "prior")}

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        at = np.arange(len(self.cosine))
        rows = (
            ("own target", self.cosine),
            ("other targets", self.cosine_other),
            ("images from noise alone, same target", self.cosine_prior),
        )
        for k, (name, values) in enumerate(rows):
            mean = [np.nanmean(v) if np.isfinite(v).any() else np.nan for v in values.values()]
            ax.bar(at + 0.27 * (k - 1), mean, 0.25, label=name, color=("C0", "0.6", "0.8")[k])
        ax.set_xticks(at, list(self.cosine))
        ax.set(ylabel="cosine of φ", ylim=(0, 1.35))
        ax.legend(frameon=False, fontsize="small", ncols=3, loc="upper center")
        return ax


def generation(
    model: UNet,
    groups: Groups,
    *,
    how: Mapping[str, str] | None = None,
    copies: int = 8,
    prior: int = 16,
    sigma: float = 0.2,
    sigmas: tuple[float, float, int] = (1.0, 0.03, 100),
    draws: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> Generation:
    """Samples (Algorithms 1 and 2) from φ of whole groups of images, and `prior` unconditional ones.

    groups: {kind: one (m, C, H, W) per target} in [0, 1], for instance members of clusters. how: of a
    kind, "mean" (the centroid, default) or "max" (the union of features). copies: samples per target.
    sigma: where φ is compared. sigmas: first, last and number of noise levels. draws: of noise for φ*.
    """
    sizes = {tuple(x.shape[1:]) for members in groups.values() for x in members}
    if len(sizes) != 1 or len(size := next(iter(sizes))) != 3:
        raise ValueError(f"groups: expected images (m, C, H, W) of one size, got {sorted(sizes)}")
    parameter, how, pixels = next(model.parameters()), dict(how or {}), (size[1], size[2])
    run = sample(  # adaptive: on the schedule the denoiser alone ends near the mean image
        model, prior, size=pixels, seed=seed, max_steps=_PRIOR_STEPS, progress=progress
    )
    unconditional = run.images.float().cpu()
    base = phi_of(model, unconditional.to(parameter), sigma, _DRAWS)
    made: dict[str, np.ndarray] = {}
    tables: list[dict[str, np.ndarray]] = [{}, {}, {}]
    for kind, members in groups.items():
        combined = how.get(kind, "mean")
        images, wanted = [], []
        for k, x in enumerate(members):
            x = x.to(parameter)
            target = _target(model, x, combined, sigmas, draws, seed).repeat(copies)
            one = reconstruct(
                model, target, sigmas=sigmas, size=pixels, seed=seed + 1 + k, progress=progress
            )
            images.append(one.images.float().cpu())
            phi = phi_of(model, x, sigma, _DRAWS)
            wanted.append(phi.mean(axis=0) if combined == "mean" else phi.max(axis=0))
        made[kind] = torch.stack(images).numpy()
        found = [phi_of(model, x.to(parameter), sigma, _DRAWS) for x in images]
        for table, values in zip(tables, _cosines(found, wanted, base), strict=True):
            table[kind] = values
    return Generation(made, unconditional.numpy(), *tables)


def _target(
    model: UNet, x: Tensor, how: str, sigmas: tuple[float, float, int], draws: int, seed: int
) -> targets.Targets:
    """φ* of all images together at every level of the schedule, found once for all samples."""
    each = targets.centroid(model, x, how, draws, seed=seed)
    levels = np.linspace(*sigmas)
    return targets.table(levels.tolist(), torch.stack([each.phi(s) for s in levels]))


def _cosines(
    found: list[np.ndarray], wanted: list[np.ndarray], base: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(T·k,) each, of every sample: with its own target, with the others, and its target's with `base`."""
    own, others, control = [], [], []
    for t, phi in enumerate(found):
        table = np.stack([cosine(phi, np.broadcast_to(w, phi.shape)) for w in wanted])
        own.append(table[t])
        rest = np.delete(table, t, axis=0)
        others.append(rest.mean(axis=0) if len(rest) else np.full(len(phi), np.nan))
        mean = cosine(base, np.broadcast_to(wanted[t], base.shape)).mean()
        control.append(np.full(len(phi), mean))
    return np.concatenate(own), np.concatenate(others), np.concatenate(control)
