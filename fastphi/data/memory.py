"""Images that are no pack: tensors and arrays in memory, data sets that are decoded on demand; and
`open_images`, which tells which is which.
"""

from __future__ import annotations

import functools
import hashlib
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastphi.data import datasets
from fastphi.data.images import ByteImages, Images, PackedImages, npy_header
from fastphi.data.source import log, numbered
from fastphi.support import reading, validate


class MemoryImages(Images):
    """Images in memory: a float tensor or array (N, C, H, W) in [0, 1], kept as float32 on CPU."""

    def __init__(self, x: Tensor | np.ndarray, labels: Any = None) -> None:
        x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        x = validate.clean_images(x, name="images")
        self._x = x.detach().to("cpu", torch.float32).contiguous()
        self.shape = (self._x.shape[1], self._x.shape[2], self._x.shape[3])
        self.mean = tuple(self._x.mean(dim=(0, 2, 3), dtype=torch.float64).tolist())
        if labels is not None:
            self.labels = np.asarray(labels, np.int64)
            if self.labels.shape != (len(self),):
                raise ValueError(
                    f"labels: expected one per image ({len(self)}), got shape {self.labels.shape}"
                )

    def __len__(self) -> int:
        return self._x.shape[0]

    @property
    def images(self) -> np.ndarray:
        """A view as (N, H, W, C): float32 in [0, 1], where a pack's is uint8."""
        return self._x.permute(0, 2, 3, 1).numpy()

    @functools.cached_property
    def sha256(self) -> str:  # type: ignore[override]
        digest = hashlib.sha256(repr(tuple(self._x.shape)).encode())
        digest.update(self._x.numpy().data)
        return digest.hexdigest()

    def _read(self, indices: np.ndarray) -> Tensor:
        return self._x[torch.from_numpy(indices)]


class LevelImages(ByteImages):
    """An array or tensor of uint8 in memory, (N, C, H, W) or (N, H, W, C) with C = 1 or 3: its values are
    levels of 255. Its SHA-256 is that of a pack of the same pixels; nothing is copied."""

    def __init__(self, x: Tensor | np.ndarray) -> None:
        x = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"images: expected (N, C, H, W) or (N, H, W, C), none of them 0; got {x.shape}"
            )
        try:
            self.images = datasets.channels_last(x)
        except ValueError as error:
            raise ValueError(f"images: {error}") from None
        _, height, width, channels = self.images.shape
        self.shape = channels, height, width

    @functools.cached_property
    def sha256(self) -> str:  # type: ignore[override]
        digest = hashlib.sha256(npy_header(self.images.shape))
        for image in self.images:
            digest.update(np.ascontiguousarray(image).data)
        return digest.hexdigest()

    @functools.cached_property
    def mean(self) -> tuple[float, ...]:  # type: ignore[override]
        sums = sum(image.sum(axis=(0, 1), dtype=np.int64) for image in self.images)
        return tuple((sums / (self.images[..., 0].size * 255)).tolist())


class DatasetImages(Images):
    """A data set, each image decoded when it is asked for; all have the size and kind of the first.

    Identity, mean colour and labels take a pass over all images, one at a time, when the first of them
    is wanted (`extract` and `Trainer` want them at the start). The SHA-256 is that of the pixels:
    the same as of a pack of them, or for floats of the same tensor in memory.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = datasets.dataset(dataset, "images")
        first, again = self._first(0)[0], self._first(0)[0]
        if not np.array_equal(first, again):
            log.warning(
                "images: the first item is another each time that it is read (a random transform?): so is "
                "the data's SHA-256, and nothing that is begun with it can be gone on with"
            )
        height, width, channels = first.shape
        self.shape, self._dtype = (channels, height, width), first.dtype

    def __len__(self) -> int:
        return len(self._dataset)

    def __repr__(self) -> str:
        kind = type(self._dataset).__name__
        return f"DatasetImages({kind}: {len(self)} images, C, H, W = {self.shape})"

    def _first(self, i: int) -> tuple[np.ndarray, int | str | None]:
        """An item: (H, W, C) and the label."""
        try:
            image, label = datasets.parts(self._dataset[i])
            return datasets.pixels(image), label
        except Exception as error:  # of the data set's own code, or of broken bytes
            if reading.of_the_system(error):
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"images: item {i} of {self._name}: {error}") from error

    def _item(self, i: int) -> tuple[np.ndarray, int | str | None]:
        """The same, of the shape and dtype that all have."""
        image, label = self._first(i)
        if image.shape[2] == 1 and self.shape[0] == 3:
            image = np.repeat(image, 3, axis=2)
        shape = (*self.shape[1:], self.shape[0])
        if image.shape != shape or image.dtype != self._dtype:
            raise ValueError(
                f"images: item {i} of {self._name} is {image.dtype} {image.shape}, the first "
                f"{self._dtype} {shape} (H, W, C), and a network takes one size: make a pack of them "
                "first (fastphi.pack)"
            )
        return image, label

    @functools.cached_property
    def _known(self) -> tuple[str, tuple[float, ...], np.ndarray | None, list[str] | None]:
        n, (channels, height, width) = len(self), self.shape
        log.info("images: %d images of %s are read once for their SHA-256", n, self._name)
        levels = self._dtype == np.uint8
        whole = (n, *self.shape)
        head = npy_header((n, height, width, channels)) if levels else repr(whole).encode()
        digest, sums, labels = hashlib.sha256(head), np.zeros(channels), []
        for i in range(n):
            image, label = self._item(i)
            labels.append(label)
            sums += image.sum(axis=(0, 1), dtype=np.int64 if levels else np.float64)
            image = image if levels else image.transpose(2, 0, 1)
            digest.update(np.ascontiguousarray(image).data)
        mean = sums / (n * height * width * (255 if levels else 1))
        names = datasets.class_names(self._dataset)
        return digest.hexdigest(), tuple(mean.tolist()), *numbered(labels, names)

    @property
    def _name(self) -> str:
        return f"a {type(self._dataset).__name__}"

    @property
    def sha256(self) -> str:
        return self._known[0]

    @property
    def mean(self) -> tuple[float, ...]:  # type: ignore[override]
        return self._known[1]

    @property
    def labels(self) -> np.ndarray | None:  # type: ignore[override]
        return self._known[2]

    @property
    def class_names(self) -> list[str] | None:  # type: ignore[override]
        return self._known[3]

    def _stored(self, indices: np.ndarray) -> Tensor:
        """uint8 (n, H, W, C), or float32 (n, C, H, W)."""
        if self._dtype != np.uint8:
            return self._read(indices)
        x = np.empty((len(indices), *self.shape[1:], self.shape[0]), np.uint8)
        for k, i in enumerate(indices.tolist()):
            x[k] = self._item(i)[0]
        return torch.from_numpy(x)

    def _read(self, indices: np.ndarray) -> Tensor:
        x = np.empty((len(indices), *self.shape), np.float32)
        for k, i in enumerate(indices.tolist()):
            x[k] = self._item(i)[0].transpose(2, 0, 1)
        if self._dtype == np.uint8:
            x /= np.float32(255)
        return torch.from_numpy(x)


def open_images(source: Any) -> Images:
    """Images from what people have.

    source: an `Images`; the path of a pack; a tensor or array, float (N, C, H, W) in [0, 1] or uint8
        (N, C, H, W) or (N, H, W, C); or a data set, which has __len__ and __getitem__: torchvision's,
        Hugging Face's, a list. Its items are PIL images, arrays or tensors of one size, alone, in
        (image, label), or under "image" or "img" in a dict. Of a DataLoader its data set is used, every
        item in the data set's order; not its sampler, batches, collate_fn and workers.

    A data set is decoded on demand, and read once more at the start, for its identity; what a random
    transform makes of its images is no identity: leave it out, or make a pack.

    Raises TypeError for anything else, ValueError for a path that is no pack or values outside [0, 1].
    """
    if isinstance(source, Images):
        return source
    if isinstance(source, (str, os.PathLike)):
        return PackedImages(source)
    if isinstance(source, (Tensor, np.ndarray)):
        return LevelImages(source) if _of_bytes(source) else MemoryImages(source)
    if isinstance(source, DataLoader) or hasattr(source, "__getitem__"):
        return DatasetImages(source)
    raise TypeError(
        "images: expected the path of a pack, PackedImages, a tensor or array (N, C, H, W), or a data set "
        f"with __len__ and __getitem__; got {type(source).__name__}"
    )


def _of_bytes(x: Tensor | np.ndarray) -> bool:
    return x.dtype in (torch.uint8, np.dtype(np.uint8))
