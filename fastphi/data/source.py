"""What every kind of source says of its images, without reading their pixels; and classes, from names."""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageFile

log = logging.getLogger("fastphi")

# Kept beside images and never one: counted in the log. Any other file is tried.
BESIDE = frozenset(
    """.txt .md .rst .json .jsonl .csv .tsv .xml .yaml .yml .toml .html .pdf .log .ini .db .lnk .url
    .py .ipynb .sh .npy .npz .mat .pkl .pt .pth .safetensors .parquet .arrow .tfrecord .lmdb
    .zip .tar .gz .tgz .xz .bz2 .zst .7z .rar .md5 .sha256 .lock .part .tmp""".split()
)


@runtime_checkable
class Encoded(Protocol):
    """Where the bytes of an encoded image lie; small, and read by the process that decodes."""

    def read(self) -> bytes: ...


# What is needed to decode an image, in whatever process: its path, its bytes, where they lie, its pixels.
Pixels = str | bytes | Encoded | np.ndarray | Image.Image
Payload = Pixels | int  # or its number in the source's data set


@dataclasses.dataclass(frozen=True)
class Source:
    """N named images in a fixed order.

    kind: "folder", "tar", …, settled with the pack. where: for a person. labels: (N,) int64 with -1
    where unknown, or None. fingerprint: changes when the images do. payloads: (start, stop) -> one
    per image. lost: (name, reason) of what should have been an image and has no payload. dataset: what
    payloads that are numbers index, sent once to each process; labels are then found with the images.
    """

    kind: str
    where: str
    names: Sequence[str]
    labels: np.ndarray | None
    class_names: list[str] | None
    fingerprint: str
    payloads: Callable[[int, int], Sequence[Payload]]
    lost: Sequence[tuple[str, str]] = ()
    dataset: Any = None

    def __len__(self) -> int:
        return len(self.names)


@functools.cache
def suffixes() -> frozenset[str]:
    """Of the files that this Pillow can decode."""
    names = Image.registered_extensions()
    can = {kind for kind, (factory, _) in Image.OPEN.items() if not _stub(factory)} - {"MPEG"}
    return frozenset(suffix for suffix, kind in names.items() if kind in can)


def _stub(factory: Any) -> bool:  # known by its first bytes, not to be decoded
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


def beside(name: str) -> str | None:
    """As what a file is passed over ("hidden" or its suffix); None where it is tried as an image."""
    file = name.rpartition("/")[2]
    if file.startswith("."):
        return "hidden"
    suffix = os.path.splitext(file)[1].lower()
    return suffix if suffix in BESIDE else None


def tell(passed_over: Counter[str], where: str) -> None:
    if passed_over:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(passed_over.items()))
        log.info("source: %s: passed over as no images: %s", where, kinds)


def folder_classes(names: Sequence[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels (N,) and names of the classes, which are the first folders of the names; None: no folders."""
    classes = [name.split("/")[0] if "/" in name else None for name in names]
    class_names = sorted({c for c in classes if c is not None})
    if not class_names:
        return None, None
    number: dict[str | None, int] = {c: i for i, c in enumerate(class_names)}
    return np.array([number.get(c, -1) for c in classes], np.int64), class_names


def label(value: Any) -> int | str | None:
    """A class by number or name; None where the value is neither, or says that it is unknown."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value.strip() or None
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor of many numbers has errors of its own
        return None
    return number if number is not None and 0 <= number < 2**63 else None


def numbered(
    labels: Iterable[int | str | None], class_names: list[str] | None = None
) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels (N,) int64, -1 where unknown, and the classes' names; None where all are unknown.

    labels: as `label` gives them. Words that are not all numbers are classes in sorted order.
    """
    labels = list(labels)
    known = set(labels) - {None}
    if not known:
        return None, class_names
    if all(isinstance(v, int) or (v.isdecimal() and len(v) < 19) for v in known if v is not None):
        found = np.array([-1 if v is None else int(v) for v in labels], np.int64)
        if class_names is not None and found.max() >= len(class_names):
            raise ValueError(
                f"source: a label is {found.max()}, but there are {len(class_names)} class names"
            )
        return found, class_names
    class_names = sorted({str(v) for v in known})
    number = {name: i for i, name in enumerate(class_names)}
    return np.array([-1 if v is None else number[str(v)] for v in labels], np.int64), class_names
