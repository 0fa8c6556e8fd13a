"""What sampling and reconstruction give: images, how they came about, and a file that can go on."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastphi.support import files, validate
from fastphi.targets import Targets
from fastphi.targets.images import mean_phi

if TYPE_CHECKING:
    from fastphi.unet import UNet

FORMAT = "fastphi reconstruction"
VERSION = 1

TABLES = ("sigma", "losses_first", "losses_last", "updates", "converged")


@dataclass(frozen=True)
class Reconstruction:
    """N images and the record of the steps that made them.

    images: (N, C, H, W), in the model's dtype; not clipped to [0, 1].
    samples: (N,) int64, their ids.
    sigma: (steps, N) float64, the noise level of each step, NaN after an image stopped.
    losses_first, losses_last: (steps, N) float64, Algorithm 2's L before and after matching; NaN
        where an image had stopped or nothing was matched.
    updates: (steps, N) int64. converged: (steps, N) bool, whether L fell to the tolerance.
    sigma_hat: (N,) float64, the noise level of each image when it was last measured.
    settings: all that decides the result, as plain values. finished: False for a run that was
        interrupted (its images are then those of the last stored step).
    progress: (k, N, C, H, W), the images after every `store_progress`-th step, or None.
    """

    images: Tensor
    samples: Tensor
    sigma: Tensor
    losses_first: Tensor
    losses_last: Tensor
    updates: Tensor
    converged: Tensor
    sigma_hat: Tensor
    settings: dict[str, Any]
    finished: bool = True
    progress: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def steps(self) -> Tensor:
        """(N,) int64: how many steps each image took."""
        return (~self.sigma.isnan()).sum(0)

    def phi_cosine(
        self, model: UNet, targets: Targets, sigma: float = 0.5, draws: int = 10, seed: int = 0
    ) -> Tensor:
        """(N,): cosine of φ(image, σ), the mean of `draws` noise draws, with φ*(σ).

        Over the targets' channels where they are a subset. NaN where a φ is zero.
        """
        validate.images(self.images, model.config, "images")
        if len(targets) != len(self):
            raise ValueError(f"targets: expected {len(self)}, one per image, got {len(targets)}")
        ids, level = self.samples.numpy(), np.full(len(self), validate.sigma(sigma))
        validate.integer(draws, "draws", low=1)
        phi = mean_phi(model, self.images, level, ids, validate.seed(seed), draws).double()
        wanted = targets.phi(sigma).to(phi)
        if targets.channels is not None:
            phi, wanted = phi[:, list(targets.channels)], wanted[:, list(targets.channels)]
        return F.normalize(phi, dim=1, eps=0).mul(F.normalize(wanted, dim=1, eps=0)).sum(1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .npz, whole or not at all."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "finished": self.finished,
            "settings": self.settings,
        }
        arrays = {name: getattr(self, name) for name in (*TABLES, "samples", "sigma_hat", "images")}
        if self.progress is not None:
            arrays["progress"] = self.progress
        plain: dict[str, Any] = {name: _to_numpy(value) for name, value in arrays.items()}
        plain["header"] = np.array(json.dumps(header))
        with files.atomic_write(path) as temporary, open(temporary, "wb") as f:
            np.savez(f, **plain)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Reconstruction:
        """Read what `save` wrote, onto the CPU. ValueError where the file is not such a one."""
        try:
            header, arrays = _read(path)
        except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: not a whole {FORMAT} file ({error})") from None
        if header["version"] != VERSION:
            raise ValueError(
                f"{os.fspath(path)}: format version {header['version']}, this fastphi reads "
                f"{VERSION}"
            )
        dtype = getattr(torch, header["settings"]["dtype"])
        for name in ("images", "progress"):
            if name in arrays:
                arrays[name] = arrays[name].to(dtype)
        return Reconstruction(settings=header["settings"], finished=header["finished"], **arrays)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with open(path, "rb") as f:
        archive = np.load(f, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("an array, not an .npz")
        header = json.loads(str(archive["header"]))
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError("another format")
        arrays = {
            name: torch.from_numpy(archive[name]) for name in archive.files if name != "header"
        }
    n = len(arrays["images"])
    for name in (*TABLES, "samples", "sigma_hat"):
        if arrays[name].shape[-1] != n or (name in TABLES and arrays[name].dim() != 2):
            raise ValueError(f"{name} has shape {tuple(arrays[name].shape)} for {n} images")
    return header, arrays


def _to_numpy(x: Tensor) -> np.ndarray:
    """numpy has no bfloat16; float32 holds its values exactly."""
    x = x.detach().cpu()
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
