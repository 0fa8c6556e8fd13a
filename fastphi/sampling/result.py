"""What sampling and reconstruction give: images, how they came about, and a file that can go on."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastphi.support import files, reading, validate
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
        plain: dict[str, Any] = {name: to_numpy(value) for name, value in arrays.items()}
        plain["header"] = np.array(json.dumps(header))
        with files.atomic_write(path) as temporary, open(temporary, "wb") as f:
            np.savez(f, **plain)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Reconstruction:
        """Read what `save` wrote, onto the CPU. ValueError where the file is not such a one."""
        return read(path, "path")


def read(path: str | os.PathLike[str], name: str) -> Reconstruction:
    """`Reconstruction.load` of a path that came as the argument `name`."""
    expected = f"a whole {FORMAT} file"
    archive = reading.Archive(path, name, expected)
    with reading.whole(path, expected, name):
        header, arrays = _parts(archive.arrays())
        count = len(arrays["sigma"]) // (header["settings"].get("store_progress") or 1 << 62)
        if count and not header["finished"] and "progress" not in arrays:
            images = arrays["images"]
            stored = frames(frames_file(Path(path)), count, to_numpy(images))
            arrays["progress"] = stored.to(images.dtype)
        return Reconstruction(settings=header["settings"], finished=header["finished"], **arrays)


def frames_file(path: Path) -> Path:
    """Of the images after every k-th step of a run that is not finished, beside its state."""
    return path.with_name(f".{path.name}.progress")


def frames(path: Path, count: int, like: np.ndarray) -> Tensor:
    """The first `count` of them, each as `like` (N, C, H, W). ValueError where some are missing."""
    if not path.exists() or path.stat().st_size < count * like.nbytes:
        raise ValueError(f"{path.name} beside it lacks images of {count} steps")
    values = np.fromfile(path, like.dtype, count * like.size)
    return torch.from_numpy(values.reshape(count, *like.shape))


_FIELDS: dict[str, validate.Check] = {
    "format": validate.text,
    "version": validate.count,
    "finished": validate.flag,
    "settings": validate.mapping,
}
_DTYPES = ("float64", "float32", "bfloat16", "float16")


def _parts(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the arrays as tensors, each of the kind and shape that `Reconstruction` says."""
    header = reading.json_object(str(arrays.pop("header")))
    if header.get("format") != FORMAT:
        raise ValueError("another format")
    if header.get("version") != VERSION:
        raise ValueError(f"format version {header.get('version')}, this fastphi reads {VERSION}")
    validate.record(header, "its header", _FIELDS)
    dtype = getattr(torch, validate.choice(header["settings"].get("dtype"), "dtype", _DTYPES))
    n, (steps, *_) = len(arrays["images"]), arrays["sigma"].shape
    shapes = {name: (steps, n) for name in TABLES} | {"samples": (n,), "sigma_hat": (n,)}
    kinds = {"updates": np.int64, "converged": np.bool_, "samples": np.int64}
    for name, shape in shapes.items():
        got, kind = arrays[name], kinds.get(name, np.float64)
        if got.shape != shape or got.dtype != kind:
            raise ValueError(
                f"{name} is {got.dtype} {got.shape}, expected {np.dtype(kind)} {shape}"
            )
    pictures = {name: arrays[name] for name in ("images", "progress") if name in arrays}
    for name, values in pictures.items():
        image = arrays["images"].shape
        if values.dtype.kind != "f" or len(image) != 4 or values.shape[-4:] != image:
            raise ValueError(f"{name} is {values.dtype} {values.shape} beside images {image}")
    if unknown := arrays.keys() - shapes.keys() - pictures.keys():
        raise ValueError(f"unknown arrays {', '.join(sorted(unknown))}")
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    return header, tensors | {name: tensors[name].to(dtype) for name in pictures}


def to_numpy(x: Tensor) -> np.ndarray:
    """numpy has no bfloat16; float32 holds its values exactly."""
    x = x.detach().cpu().contiguous()
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
