"""Does distance in φ predict the divergence of the conditional densities (Fig. 8, 14, 21; eq. 3, 4)?

d²(p₁, p₂) = ∫ (E_{p₁}‖∇log p₁ − ∇log p₂‖² + E_{p₂}‖∇log p₁ − ∇log p₂‖²) σ dσ, each expectation over
x_σ along the sampling paths of one of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastphi import data
from fastphi.analysis.common import Result, new_axes
from fastphi.sampling import guidance
from fastphi.support import validate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastphi.unet import UNet


@dataclass(frozen=True)
class Divergence(Result):
    """d² of pairs of conditional densities (P,), its Monte-Carlo standard error (P,), NaN of one path,
    and ‖φ₁ − φ₂‖² (P,) at `phi_sigma`; controls: {name: (P,)} other squared distances of the same pairs.

    sigmas: the levels of the quadrature. shown (Fig. 8): Spearman's ρ of d² with ‖φ₁ − φ₂‖² is at least
    0.5, with p < 0.01, and above every control's.
    """

    pairs: np.ndarray
    squared: np.ndarray
    error: np.ndarray
    distance: np.ndarray
    sigmas: np.ndarray
    phi_sigma: float
    controls: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def ratio(self) -> np.ndarray:
        """(P,): d²/‖φ₁ − φ₂‖², whose extremes are the paper's A and B."""
        return self.squared / self.distance

    @property
    def bounds(self) -> dict[str, float]:
        """A, B, B/A (2.9 in the paper), and the ratio of the 95th to the 5th percentile."""
        low, high = float(self.ratio.min()), float(self.ratio.max())
        q5, q95 = np.percentile(self.ratio, [5, 95])
        return {"A": low, "B": high, "B/A": high / low, "q95/q5": float(q95 / q5)}

    @property
    def correlations(self) -> dict[str, tuple[float, float]]:
        """{distance: (Spearman's ρ with d², p)}; the pairs share images, so p is a guide only."""
        from scipy.stats import spearmanr

        found = {"φ": self.distance, **self.controls}
        return {n: tuple(map(float, spearmanr(v, self.squared))) for n, v in found.items()}  # type: ignore

    @property
    def shown(self) -> bool:
        if len(self.squared) < 4:
            return False
        (rho, p), *others = self.correlations.values()
        return rho >= 0.5 and p < 0.01 and all(rho > other for other, _ in others)

    def numbers(self) -> dict[str, Any]:
        found = super().numbers() | {"bounds": self.bounds, "sigmas": self.sigmas.tolist()}
        found.pop("pairs")
        if len(self.squared) > 3:
            found["spearman"] = {n: {"rho": r, "p": p} for n, (r, p) in self.correlations.items()}
        return found | {"n_pairs": len(self.squared), "quadrature": "trapezoid in log sigma"}

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        ax.errorbar(
            self.distance, self.squared, yerr=np.nan_to_num(self.error), fmt="o", ms=4, lw=0.8
        )
        end = float(self.distance.max())
        for name in ("A", "B"):
            ax.plot([0, end], [0, self.bounds[name] * end], "--", color="0.7")
        ax.set(xlabel=f"‖φ₁ − φ₂‖² at σ = {self.phi_sigma:g}", ylabel="d²(p₁, p₂)")
        ax.set_title(f"B/A = {self.bounds['B/A']:.2g}", fontsize="small")
        return ax


def integrate(sigmas: Any, squares: Any) -> np.ndarray:
    """∫ f σ dσ by the trapezoidal rule in log σ, of f given at `sigmas` (S,): squares (S, ...) → (...)."""
    sigmas, squares = np.asarray(sigmas, np.float64), np.asarray(squares, np.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2 or len(squares) != len(sigmas) or (sigmas <= 0).any():
        raise ValueError(
            f"sigmas: expected two or more levels > 0, one per row of squares, got {sigmas.shape} and "
            f"{squares.shape}"
        )
    order = np.argsort(sigmas)
    column = (-1, *[1] * (squares.ndim - 1))
    heights = squares[order] * sigmas[order].reshape(column) ** 2
    widths = np.diff(np.log(sigmas[order])).reshape(column)
    return ((heights[1:] + heights[:-1]) / 2 * widths).sum(axis=0)


def divergence(
    sigmas: Any,
    squares: Any,
    distance: Any,
    *,
    pairs: Any = None,
    phi_sigma: float = 0.5,
    controls: Mapping[str, Any] | None = None,
) -> Divergence:
    """d² from score differences along paths (eq. 3), whatever they come from.

    squares: (S, P, 2, n): ‖s₁ − s₂‖² at level S for pair P, on n paths of its first density, then on n
    of its second. distance: (P,) ‖φ₁ − φ₂‖² at `phi_sigma`. pairs: (P, 2) their names.
    """
    squares, distance = np.asarray(squares, np.float64), np.asarray(distance, np.float64)
    if squares.ndim != 4 or squares.shape[2] != 2 or distance.shape != squares.shape[1:2]:
        raise ValueError(
            "squares, distance: expected (S, P, 2, n) and (P,), "
            f"got {squares.shape} and {distance.shape}"
        )
    each = integrate(sigmas, squares)  # (P, 2, n): paths are independent of each other
    n = each.shape[2]
    error = (
        np.sqrt(each.var(axis=2, ddof=1).sum(axis=1) / n) if n > 1 else np.full(len(each), np.nan)
    )
    count = len(distance)
    return Divergence(
        np.asarray(pairs) if pairs is not None else np.arange(2 * count).reshape(count, 2),
        each.mean(axis=2).sum(axis=1),
        error,
        distance,
        np.asarray(sigmas, np.float64),
        phi_sigma,
        {name: np.asarray(v, np.float64) for name, v in (controls or {}).items()},
    )


def conditional_divergence(
    model: UNet,
    images: Any,
    *,
    paths: int = 2,
    steps: int = 30,
    last: float = 0.03,
    draws: int = 10,
    max_iter: int = 100,
    phi_sigma: float = 0.5,
    seed: int = 0,
    progress: bool = False,
    controls: Mapping[str, UNet] | None = None,
) -> Divergence:
    """d² between the densities conditioned on φ of K images, all K(K−1)/2 pairs (Fig. 8, eq. 4).

    The score difference of conditions 1 and 2 at x_σ is (D(m₁(x_σ)) − D(m₂(x_σ)))/σ², D the denoiser,
    m_k the match to φ_k(σ). Paths follow the schedule form from the top of the training range, at most
    1, to `last` in `steps` levels, which are also those of the quadrature. images: (K, C, H, W) in
    [0, 1]; paths: per image. controls: name → another network, whose ‖φ₁ − φ₂‖² is one; the pixels'
    always is.
    """
    from fastphi.sampling import reconstruct
    from fastphi.targets import from_images

    opened = data.open_images(images)
    validate.integer(paths, "paths", low=1)
    x = opened.batch(np.arange(len(opened))).to(next(model.parameters()))
    base = from_images(model, x, draws, seed=seed)
    pairs = np.array(list(combinations(range(len(x)), 2)))
    levels: list[float] = []
    squares: list[np.ndarray] = []

    def observe(info: Any) -> None:
        sigma = float(info.sigma[0])
        table = _differences(model, info, base, len(x), paths, max_iter) / sigma**4
        levels.append(sigma)
        squares.append(np.array([[table[a, :, b], table[b, :, a]] for a, b in pairs]))

    top = min(1.0, model.training_info.sigma_max)
    reconstruct(
        model,
        base.repeat(paths),
        sigmas=(top, last, steps),
        max_iter=max_iter,
        seed=seed,
        callback=observe,
        progress=progress,
    )
    spaces = {"φ": base.phi(phi_sigma), "pixels": x.flatten(1)}
    for name, network in (controls or {}).items():
        spaces[name] = from_images(network, x, draws, seed=seed).phi(phi_sigma)
    apart = {
        name: (rows[pairs[:, 0]] - rows[pairs[:, 1]]).square().sum(1).cpu().numpy()
        for name, rows in ((name, rows.double()) for name, rows in spaces.items())
    }
    distance = apart.pop("φ")
    return divergence(
        levels, np.array(squares), distance, pairs=pairs, phi_sigma=phi_sigma, controls=apart
    )


def _differences(
    model: UNet, info: Any, base: Any, k: int, paths: int, max_iter: int
) -> np.ndarray:
    """(K, paths, K): ‖D(m_a(x_σ)) − D(m_b(x_σ))‖² on the paths of condition a, for every b."""
    sigma = np.full(k, float(info.sigma[0]))
    phi = base.phi(sigma)
    with torch.no_grad():
        own = model(info.matched)
        table = np.zeros((k, paths, k))
        for b in range(k):
            match = guidance.match_phi(model, info.noisy, phi[b], max_iter=max_iter)
            square = (model(match.x) - own).double().square().flatten(1).sum(1)
            table[:, :, b] = square.reshape(k, paths).cpu().numpy()
    return table
