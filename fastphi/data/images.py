"""Images by index behind one interface, and the packed uint8 array that is read at random.

A pack is a folder, made by `fastphi.data.pack`: `images.npy` (uint8, (N, H, W, C), readable by
`np.load(..., mmap_mode="r")`), `labels.npy` (int64, -1 where unknown; absent where there are none),
`manifest.json`, `items.jsonl` (name and label of every image) and `skipped.jsonl` (name and reason
of every one left out).

Measured on one of 2 cores of a shared AVX-512 Xeon virtual machine, 20,000 images of 64x64x3 in the
page cache, batches of 1024 random indices, medians of 40, in four runs: gathering the bytes 346,000
to 373,000 images/s; `batch`, which makes 50 MB of new float32 of them, 41,000 to 52,000.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastphi.support import files, reading, validate

FORMAT = "fastphi-images"
VERSION = 1
OUTPUTS = ("images.npy", "labels.npy", "items.jsonl", "skipped.jsonl")

_FIELDS: dict[str, validate.Check] = {
    "format": validate.text,
    "version": validate.count,
    "n": validate.count,
    "size": validate.count,
    "channels": validate.count,
    "class_names": validate.optional(validate.each(validate.text)),
    "mean": validate.each(validate.share),
    "sha256": validate.sha256,
    "source": validate.text,
    "settings": validate.mapping,
    "skipped": validate.mapping,
    "decoder": validate.text,
    "files": validate.table(validate.unsigned, OUTPUTS.__contains__),
}


class Images:
    """What extraction and training read: N images of one shape, by index.

    shape: (C, H, W). mean: the mean colour, C floats in [0, 1]. labels: (N,) int64, -1 where
    unknown, or None. class_names: a name per label, or None. sha256: of the pixels, in hex.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    labels: np.ndarray | None = None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        raise NotImplementedError

    def _read(self, indices: np.ndarray) -> Tensor:
        raise NotImplementedError

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """Height and width of square images, in pixels; ValueError where they are not square."""
        if self.shape[1] != self.shape[2]:
            raise ValueError(
                f"size: the images are {self.shape[1]}x{self.shape[2]}, not square; use .shape"
            )
        return self.shape[1]

    def batch(self, indices: Any) -> Tensor:
        """The images of `indices`: a contiguous float32 tensor (len(indices), C, H, W) in [0, 1].

        indices: whole numbers in [0, N), in any order, repeated or none at all; a sequence, array
        or tensor. TypeError where they are not whole numbers, ValueError where one is outside.
        """
        return self._read(_indices(indices, len(self)))

    def stored(self, indices: Any) -> Tensor:
        """The same images as they are kept, for a device that decodes them itself: uint8
        (n, H, W, C), levels of 255, of a pack; float32 (n, C, H, W) of images in memory."""
        return self._stored(_indices(indices, len(self)))

    def _stored(self, indices: np.ndarray) -> Tensor:
        return self._read(indices)

    def split(self, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(training, held-out) indices, int64, ascending, disjoint; a function of (N, seed) alone.

        holdout: how many to hold out, in [0, N).
        """
        from fastphi import noise  # it loads the compiled ops, which nothing else here needs

        holdout = validate.integer(holdout, "holdout", low=0, high=len(self) - 1)
        order = noise.permutation(validate.seed(seed), len(self), noise.stream("subset"))
        return np.sort(order[holdout:]), np.sort(order[:holdout])


class ByteImages(Images):
    """Images of 8 bits. images: uint8 (N, H, W, C), an array or a memory map."""

    images: np.ndarray

    def __len__(self) -> int:
        return self.images.shape[0]

    def _stored(self, indices: np.ndarray) -> Tensor:
        order = np.argsort(indices, kind="stable")  # ascending reads: each page is touched once
        pixels = np.empty((len(indices), *self.images.shape[1:]), np.uint8)
        images = np.asarray(self.images)  # a view: indexing a memmap itself is slow
        for i in order:
            pixels[i] = images[indices[i]]
        return torch.from_numpy(pixels)

    def _read(self, indices: np.ndarray) -> Tensor:
        pixels = self._stored(indices).numpy()
        x = np.empty((len(indices), *self.shape), np.float32)
        # NumPy, as this runs in a thread of its own, where torch would start a second set of them.
        np.divide(pixels.transpose(0, 3, 1, 2), np.float32(255), out=x, dtype=np.float32)
        return torch.from_numpy(x)


class PackedImages(ByteImages):
    """A pack on disk, read by memory map: opening it costs nothing and needs no memory.

    path: the folder `pack` made. images: the memory map, uint8 (N, H, W, C). manifest: a dict.
    Raises ValueError where the folder is not a finished pack or a file is missing, truncated or not
    the one the manifest describes (sizes and shapes; `verify` also reads every byte), and
    FileNotFoundError where there is no folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.manifest = _manifest(self.path)
        for name, nbytes in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                raise ValueError(
                    f"pack {self.path}: {name} is missing; pack again into a new folder"
                )
            if file.stat().st_size != nbytes:
                raise ValueError(
                    f"pack {self.path}: {name} has {file.stat().st_size} bytes, expected {nbytes}: "
                    "it was truncated or changed; pack again, elsewhere"
                )
        n, size, channels = (self.manifest[k] for k in ("n", "size", "channels"))
        shape = n, size, size, channels
        self.images = reading.array(self.path / "images.npy", "pack", like=(shape, np.uint8))
        self.shape = (channels, size, size)
        self.mean = tuple(self.manifest["mean"])
        self.class_names = self.manifest["class_names"]
        if "labels.npy" in self.manifest["files"]:
            labels = self.path / "labels.npy"
            self.labels = reading.array(labels, "pack", mode="read", like=((n,), np.int64))

    def __repr__(self) -> str:
        return f"PackedImages({str(self.path)!r}: {len(self)} images, C, H, W = {self.shape})"

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedImages, (self.path,)  # a memory map would travel with all its pixels

    @property
    def sha256(self) -> str:
        return self.manifest["sha256"]

    def verify(self) -> None:
        """Read images.npy whole; ValueError where its SHA-256 is not the manifest's."""
        found = files.sha256(self.path / "images.npy")
        if found != self.sha256:
            raise ValueError(
                f"pack {self.path}: images.npy has sha256 {found}, expected {self.sha256}"
            )


def npy_header(shape: tuple[int, ...]) -> bytes:
    """What an .npy of uint8 begins with."""
    f = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(f, header)
    return f.getvalue()


def _indices(indices: Any, n: int) -> np.ndarray:
    if isinstance(indices, Tensor):
        indices = indices.detach().cpu().numpy()
    array = np.asarray(indices)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"indices: expected a sequence of whole numbers, got {array.dtype} {array.shape}"
        )
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < n:
        raise ValueError(
            f"indices: expected numbers in [0, {n}), got {array.min()} ... {array.max()}"
        )
    return array.astype(np.int64)


def _manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FileNotFoundError(f"pack: no folder {path}; make one with fastphi pack")
    if not (path / "manifest.json").is_file():
        unfinished = (path / ".parts").is_dir()
        raise ValueError(
            f"pack {path}: manifest.json is missing; "
            + ("the pack is unfinished, run it again" if unfinished else "this is not a pack")
        )
    what = f"pack {path}"
    manifest = reading.json(path / "manifest.json", "pack")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{what}: manifest.json is not that of a {FORMAT} folder")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{what}: format version {manifest.get('version')}, this fastphi reads {VERSION}"
        )
    with reading.whole(path / "manifest.json", "that of a whole pack", "pack"):
        validate.record(manifest, "it", _FIELDS)
        if "images.npy" not in manifest["files"]:
            raise ValueError("files: lacks images.npy")
        if len(manifest["mean"]) != manifest["channels"]:
            raise ValueError(f"mean: expected {manifest['channels']}, got {manifest['mean']}")
    return manifest
