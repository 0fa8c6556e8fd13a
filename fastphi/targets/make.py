"""The functions that make targets, checked before any work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastphi.support import validate
from fastphi.targets.images import Images
from fastphi.targets.kinds import Mix, Table, Targets, check_range, combine, row_numbers

if TYPE_CHECKING:
    from fastphi.unet import UNet

# Rows read from a store at once: bounds memory.
_ROWS = 4096


def from_images(
    model: UNet,
    images: Any,
    draws: int = 10,
    *,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    sigma: float | None = None,
    copies: int = 1,
) -> Targets:
    """φ*(σ) = φ(image, σ) = E_z[ā_mid(image + σz)], computed when asked for.

    images: clean images in [0, 1], a float tensor (N, C, H, W) or what `data.open_images` takes.
    draws: noise draws of the mean. Their noise is independent of that of sampling, whatever the
        seeds, and draws at different σ are independent of each other.
    seed, ids: the noise of image i is a function of (seed, ids[i]); ids default to 0 ... N - 1.
    sigma: take φ* at this one noise level. copies: samples to make of each image.
    """
    return _maybe_at(Images(model, images, draws, seed, ids), sigma).repeat(copies)


def centroid(
    model: UNet,
    images: Any,
    how: str = "mean",
    draws: int = 10,
    *,
    seed: int = 0,
    sigma: float | None = None,
    copies: int = 1,
) -> Targets:
    """One target: the mean, or the maximum, of φ over all `images` (see `from_images`).

    Every level asked for costs `draws` passes over all the images: for more than a few hundred take
    `sigma=`, or extract them first and use `from_store(..., how=)`.
    """
    one = Images(model, images, draws, seed, None).combined(how)
    return _maybe_at(one, sigma).repeat(copies)


def fixed(phi: Any, copies: int = 1) -> Targets:
    """A given φ*, (N, C) or (C,) real numbers, at every noise level."""
    phi = torch.as_tensor(phi)
    return Table(None, (phi[None] if phi.dim() == 1 else phi)[None]).repeat(copies)


def table(sigmas: Sequence[float], phi: Any, *, clip: bool = False) -> Targets:
    """φ* given at several levels: phi (len(sigmas), N, C), linear in σ between neighbouring levels.

    clip: outside of the levels' range take the nearest level's, instead of a ValueError.
    """
    levels = validate.sigmas(sigmas)
    phi = torch.as_tensor(phi)
    if phi.dim() != 3 or len(phi) != len(levels):
        raise ValueError(
            f"phi: expected ({len(levels)}, N, C) for {len(levels)} levels, got {tuple(phi.shape)}"
        )
    order = np.argsort(levels)
    return Table(np.asarray(levels)[order], phi[torch.from_numpy(order)], clip)


def from_store(
    store: Any,
    indices: Sequence[int] | None = None,
    *,
    how: str | None = None,
    sigma: float | None = None,
    copies: int = 1,
    clip: bool = False,
) -> Targets:
    """Targets from a φ store: row i of its middle block is one; linear in σ between its levels.

    store: a PhiStore, or its path. indices: rows of the store (default: all).
    how: "mean" or "max": one target from all the rows, combined at each stored level.
    sigma, copies: as in `from_images`. clip: outside of the store's levels take the nearest one's,
    instead of a ValueError.
    """
    if isinstance(store, (str, os.PathLike)):
        from fastphi.phi import PhiStore

        store = PhiStore(store)
    rows = row_numbers(indices, len(store), "indices")
    levels = store.sigmas
    if sigma is not None:  # only the levels round it need be read
        if not clip:
            check_range(np.array([validate.sigma(sigma)]), (levels[0], levels[-1]))
        levels = _around(levels, validate.sigma(sigma))
    phi = torch.stack([_read(store, level, rows, how) for level in levels])
    return _maybe_at(table(levels, phi, clip=clip), sigma).repeat(copies)


def mix(a: Targets, b: Targets, weight: Any = 0.5) -> Targets:
    """φ* = (1 − weight) φ*_a + weight φ*_b, row by row; a single one serves all.

    weight: a number in [0, 1], or one per row.
    """
    return Mix(a, b, weight)


def _maybe_at(targets: Targets, sigma: float | None) -> Targets:
    return targets if sigma is None else targets.at(sigma)


def _around(levels: Sequence[float], sigma: float) -> tuple[float, ...]:
    """The one or two stored levels that φ at σ follows from."""
    if sigma in levels:
        return (sigma,)
    below, above = [v for v in levels if v < sigma], [v for v in levels if v > sigma]
    return (*below[-1:], *above[:1])


def _read(store: Any, level: float, rows: np.ndarray, how: str | None) -> Tensor:
    """φ of the rows at one stored level: (n, C), or (1, C) where they are combined."""
    parts = [store.phi(level, rows[i : i + _ROWS]) for i in range(0, len(rows), _ROWS)]
    phi = torch.cat(parts)
    return phi if how is None else combine(phi, validate.choice(how, "how", ("mean", "max")))[None]
