"""Data sets as people have them: any object with a length and numbered items (torchvision's, Hugging
Face's, a list), of PIL images, arrays or tensors, alone, first in a tuple, or under "image" in a dict.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from fastphi.data.pixels import eight_bit
from fastphi.data.source import Source, label, log

_IMAGES, _LABELS = ("image", "img"), ("label", "labels")
_LOOKED_AT = 64  # images that tell two data sets of the same kind and length apart, for `pack`


def dataset(found: Any, name: str) -> Any:
    """The data set, or that of a DataLoader; TypeError where it has no length or no numbered items."""
    if isinstance(found, DataLoader):
        if not isinstance(found.sampler, SequentialSampler):
            log.warning(
                "%s: of the DataLoader its data set is used, every item in its order; not its %s",
                name,
                type(found.sampler).__name__,
            )
        found = found.dataset
    kind = type(found).__name__
    if isinstance(found, Mapping):
        among = ", ".join(map(repr, list(found)[:5]))
        raise TypeError(f"{name}: expected a data set, got a {kind}; choose one of its {among}")
    if not hasattr(found, "__getitem__") or not hasattr(found, "__len__"):
        raise TypeError(
            f"{name}: expected images, or a data set with __len__ and __getitem__, got {kind}"
        )
    if not len(found):
        raise ValueError(f"{name}: the {kind} has no items")
    return found


def parts(item: Any, key: str | None = None) -> tuple[Any, int | str | None]:
    """Image and label of an item. key: the image's name where the item is a dict."""
    if isinstance(item, Mapping) and "bytes" not in item:
        known = _IMAGES if key is None else (key,)
        name = next((k for k in known if k in item), None)
        if name is None:
            among = ", ".join(map(str, item))
            raise ValueError(f"no {' or '.join(known)} in an item, which has {among}; see key")
        return item[name], label(next((item[k] for k in _LABELS if k in item), None))
    if isinstance(item, (tuple, list)):
        return item[0], label(item[1]) if len(item) > 1 else None
    return item, None


def pixels(image: Any) -> np.ndarray:
    """(H, W, C), C = 1 or 3: uint8, or float32 in [0, 1] where the image is a float array or tensor."""
    if isinstance(image, Mapping) and image.get("bytes") is not None:  # undecoded, of Hugging Face
        image = Image.open(io.BytesIO(image["bytes"]))
    if isinstance(image, Image.Image):
        mode = "L" if image.mode in ("1", "L") or image.mode.startswith("I") else "RGB"
        found = np.asarray(eight_bit(image, mode))
        return found.reshape(*found.shape[:2], -1)
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"expected a PIL image, an array or a tensor, got {type(image).__name__}")
    image = image[..., None] if image.ndim == 2 else channels_last(image)
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f":
        raise ValueError(f"expected uint8, or float in [0, 1], got {image.dtype}")
    if not (image.min() >= 0 and image.max() <= 1):  # so that NaN is refused too
        raise ValueError(f"expected floats in [0, 1], got [{image.min():g}, {image.max():g}]")
    return image.astype(np.float32)


def channels_last(x: np.ndarray) -> np.ndarray:
    """(..., C, H, W) or (..., H, W, C) as the latter; where both could be, it is the former, torch's."""
    if x.ndim >= 3 and x.shape[-3] in (1, 3):
        return np.moveaxis(x, -3, -1)
    if x.ndim >= 3 and x.shape[-1] in (1, 3):
        return x
    raise ValueError(
        f"expected (..., C, H, W) or (..., H, W, C) with 1 or 3 channels, got {x.shape}"
    )


def class_names(found: Any) -> list[str] | None:
    """Of torchvision's data sets, or of Hugging Face's."""
    features = getattr(found, "features", None)
    if isinstance(features, Mapping):
        names = next((n for f in _LABELS if (n := getattr(features.get(f), "names", None))), None)
    else:
        names = getattr(found, "classes", None)
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else None


# --- for `pack` ------------------------------------------------------------------------------------


def source(found: Any, key: str | None) -> Source:
    """A data set to pack. Labels come with the images."""
    found = dataset(found, "source")
    kind, n = type(found).__name__, len(found)
    try:
        parts(found[0], key)
    except ValueError as error:
        raise ValueError(f"{'source' if key is None else 'key'}: {kind}: {error}") from None
    digest = hashlib.sha256(repr((kind, n, getattr(found, "_fingerprint", None))).encode())
    for i in range(0, n, -(-n // _LOOKED_AT)):
        try:
            digest.update(fetched(found, i, key)[0].tobytes())
        except Exception as error:  # packing will tell
            digest.update(type(error).__name__.encode())
    names = [str(i) for i in range(n)]

    def payloads(start: int, stop: int) -> range:
        return range(start, stop)

    return Source(
        "data set", kind, names, None, class_names(found), digest.hexdigest(), payloads,
        dataset=(found, key),
    )  # fmt: skip


def fetched(found: Any, i: int, key: str | None) -> tuple[Any, int | str | None]:
    """What `pixels.convert` takes of an item, and its label."""
    image, its = parts(found[i], key)
    if isinstance(image, Image.Image):
        return image, its
    if isinstance(image, Mapping) and image.get("bytes") is not None:
        return image["bytes"], its
    values = pixels(image)
    if values.dtype != np.uint8:
        values = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    return np.ascontiguousarray(values), its
