"""Targets that come from images: φ computed when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastphi import engine, noise
from fastphi.support import validate
from fastphi.support.transfer import to_device
from fastphi.targets.kinds import Targets, digest_of, sample_ids

if TYPE_CHECKING:
    from fastphi.unet import UNet

# How many images go through the network at once: bounds memory, changes no result.
_CHUNK = 64


class Images(Targets):
    def __init__(self, model: UNet, images: Any, draws: int, seed: int, ids: Any) -> None:
        if not isinstance(images, Tensor):
            from fastphi import data

            images = data.open_images(images)
            images = images.batch(np.arange(len(images)))
        self.images = validate.clean_images(images, model.config, "images").detach()
        self.model = model
        self.count, self.width = len(images), model.config.channels[-1]
        self.shape = tuple(images.shape[1:])  # type: ignore[assignment]
        self.draws = validate.integer(draws, "draws", low=1)
        self.seed = validate.seed(seed)
        self.ids = sample_ids(ids, self.count, "ids")

    def _phi(self, sigma: np.ndarray, rows: np.ndarray) -> Tensor:
        # Copies of one image at one level share their φ*: each pair is computed once.
        pairs, back = np.unique(np.stack([rows, sigma], 1), axis=0, return_inverse=True)
        rows, sigma = pairs[:, 0].astype(np.int64), pairs[:, 1]
        parts = []
        for i in range(0, len(rows), _CHUNK):
            chosen = rows[i : i + _CHUNK]
            x = self.images[to_device(chosen, self.images.device)]
            level = sigma[i : i + _CHUNK]
            parts.append(mean_phi(self.model, x, level, self.ids[chosen], self.seed, self.draws))
        phi = torch.cat(parts)
        return phi[to_device(back.reshape(-1), phi.device)]

    def _state(self) -> dict[str, Any]:
        from fastphi.checkpoint import fingerprint

        return {
            "kind": "images",
            "model": fingerprint(self.model),
            "images": digest_of(self.images),
            "draws": self.draws,
            "seed": self.seed,
            "ids": self.ids.tolist(),
        }


def mean_phi(
    model: UNet, x: Tensor, sigma: np.ndarray, ids: np.ndarray, seed: int, draws: int
) -> Tensor:
    """φ = E_z[ā_mid(x + σz)]: (n, C), over `draws` draws, summed in their order in float64.

    x: (n, C, H, W), converted to the model's dtype and device; sigma: (n,) float64; ids: (n,), the
    noise of image i is a function of (seed, ids[i], σ_i).
    """
    # The draw's number is the stream's index, and σ's bits the draw's: any two levels have
    # independent noise, and the noise of one does not depend on which others are asked for.
    bits = np.abs(sigma).astype(np.float32).view(np.uint32).astype(np.int64)
    parameter = next(model.parameters())
    with engine.plain_mode(model, parameter.device):
        x = x.detach().to(parameter).clone()
        s = to_device(sigma, x.device, x.dtype)[:, None, None, None]
        prepared = engine.runner(model, x)
        total = torch.zeros(len(x), model.config.channels[-1], dtype=torch.float64, device=x.device)
        # a GPU is given as many draws of few images as fill it
        together = max(1, _CHUNK // len(x)) if x.is_cuda else 1

        def noisy(d: int) -> Tensor:
            stream, shape = noise.stream("target", d), (x.shape[1], x.shape[2], x.shape[3])
            return x + s * noise.normal(
                seed, ids, stream, bits, shape, device=x.device, dtype=x.dtype
            )

        for first in range(0, draws, together):
            batch = torch.cat([noisy(d) for d in range(first, min(first + together, draws))])
            for phi in prepared.block_means(batch, "mid")["mid"].split(len(x)):
                total = total + phi.double()
        return (total / draws).to(x.dtype)
