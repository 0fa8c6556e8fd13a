"""Arrays of images in an .npy or an .npz, decoded or encoded, read by memory map where they can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastphi.data.source import Payload, Source
from fastphi.support import reading


def npy(path: Path) -> Source:
    array = reading.array(path, "source")
    found = path.stat()
    return _array_source("npy", path, array, None, None, f"{found.st_size} {found.st_mtime_ns}")


def _array_source(
    kind: str,
    path: Path,
    array: np.ndarray,
    labels: np.ndarray | None,
    class_names: list[str] | None,
    fingerprint: str,
) -> Source:
    if array.ndim == 4 and array.shape[3] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        raise ValueError(
            f"source: {path} is {array.shape}, channels first; expected (N, H, W, C): transpose it"
        )
    if (
        array.ndim not in (3, 4)
        or 0 in array.shape
        or array.shape[3:] not in ((), (1,), (3,), (4,))
    ):
        raise ValueError(
            f"source: {path} has shape {array.shape}; expected (N, H, W) or (N, H, W, C), "
            "C = 1, 3 or 4"
        )
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"source: {path} is {array.dtype}; expected uint8, or float in [0, 1]")
    n = len(array)
    _as_bytes(array[:: max(1, n // 64)], 0, path)  # a wrong range is found now, not after an hour

    def payloads(start: int, stop: int) -> list[Payload]:
        return list(_as_bytes(array[start:stop], start, path))

    names = [str(i) for i in range(n)]
    return Source(kind, str(path), names, labels, class_names, fingerprint, payloads)


def _as_bytes(array: np.ndarray, start: int, path: Path) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.asarray(array)
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # so that NaN is refused too
        raise ValueError(
            f"source: {path} has float values in [{low:g}, {high:g}] from image {start} on; "
            "expected [0, 1]"
        )
    return np.rint(np.asarray(array, np.float64) * 255).astype(np.uint8)


def npz(path: Path, split: str, key: str | None) -> Source:
    archive = reading.Archive(path, "source")
    encodings = [k for k in archive.names if k.endswith(("_jpeg", "_webp"))]
    if key is None and not encodings:
        key = _image_key(archive)
    if key is None:
        return _encoded(path, archive, split, encodings)
    if key not in archive.names:
        raise ValueError(
            f"key: no array {key!r} in {path}; it has {', '.join(sorted(archive.names))}"
        )
    used = [k for k in (key, "labels", "class_names") if k in archive.names]
    array = archive.array(key, mapped=True)
    labels, class_names = _labels(archive, "labels", len(array) if array.ndim else 0)
    return _array_source("npz", path, array, labels, class_names, archive.checksum(used))


def _encoded(path: Path, archive: reading.Archive, split: str, encodings: list[str]) -> Source:
    found = [k for k in encodings if k in (f"{split}_jpeg", f"{split}_webp")]
    if len(found) != 1:
        splits = ", ".join(sorted({k.rsplit("_", 1)[0] for k in encodings}))
        raise ValueError(f"split: expected one of {splits} for {path}, got {split!r}")
    file = f"{split}_file"
    if f"{split}_off" not in archive.names:
        raise ValueError(f"source: {path} has {found[0]} but no {split}_off")
    offsets, buffer = archive.array(f"{split}_off"), archive.array(found[0], mapped=True)
    whole = offsets.ndim == 1 and offsets.dtype.kind in "iu" and buffer.ndim == 1
    n = len(offsets) - 1 if whole else 0
    if n < 1 or (np.diff(offsets) < 0).any() or offsets[0] < 0 or offsets[-1] > len(buffer):
        raise ValueError(
            f"source: {path}: {split}_off must hold N + 1 ascending offsets into the bytes of "
            f"{found[0]}, {buffer.dtype} {buffer.shape}; it is {offsets.dtype} {offsets.shape}"
        )
    labels, class_names = _labels(archive, f"{split}_label", n)
    names = [str(i) for i in range(n)]
    if file in archive.names:
        names = archive.texts(file)
    if len(names) != n:
        raise ValueError(f"source: {path}: {file} has {len(names)} names for {n} images")

    def payloads(start: int, stop: int) -> list[Payload]:
        return [buffer[offsets[i] : offsets[i + 1]].tobytes() for i in range(start, stop)]

    used = [found[0], f"{split}_off", f"{split}_label", file, "class_names"]
    fingerprint = archive.checksum([k for k in used if k in archive.names])
    return Source("encoded", str(path), names, labels, class_names, fingerprint, payloads)


def _image_key(archive: reading.Archive) -> str:
    arrays = archive.headers()
    found = [
        key
        for key, (shape, dtype) in arrays.items()
        if len(shape) in (3, 4) and (dtype == np.uint8 or dtype.kind == "f")
    ]
    if len(found) != 1:
        listing = ", ".join(f"{key} {dtype}{shape}" for key, (shape, dtype) in arrays.items())
        raise ValueError(
            f"key: expected one array of images in {archive.path}, found {len(found)}; name one of: "
            f"{listing}"
        )
    return found[0]


def _labels(
    archive: reading.Archive, key: str, n: int
) -> tuple[np.ndarray | None, list[str] | None]:
    names = archive.texts("class_names") if "class_names" in archive.names else None
    if key not in archive.names:
        return None, names
    labels = archive.array(key)
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"source: {key} is {labels.dtype} {labels.shape}, expected {n} whole numbers"
        )
    labels = labels.astype(np.int64)
    highest = np.iinfo(np.int64).max if names is None else len(names) - 1
    if n and (labels.min() < -1 or labels.max() > highest):
        raise ValueError(
            f"source: {key} has values {labels.min()} ... {labels.max()}, expected -1 (unknown) or "
            + ("a class number" if names is None else f"one of the {len(names)} class_names")
        )
    return labels, names
