"""The demo's images: patches of photographs, packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import fastphi
from fastphi.support import reading

MOST = 600  # patches of the whole photographs


def apart(out: Path, folder: Path | None, size: int) -> tuple[Any, Any, str]:
    """Packs of training and held-out patches that share no pixel: a strip of each photograph is kept."""
    photographs, name = _opened(folder)
    seen: dict[str, list[np.ndarray]] = {"train": [], "heldout": []}
    for photograph in photographs:
        for scaled in (photograph, _half(photograph)):
            cut = int(scaled.shape[1] * 0.8)
            seen["train"] += _grid(scaled[:, :cut], size, size // 4)
            seen["heldout"] += _grid(scaled[:, cut:], size, size // 2)
    return (
        _packed(out, "train", seen["train"], 20_000, size, name),
        _packed(out, "heldout", seen["heldout"], 256, size, name),
        name,
    )


def whole(out: Path, folder: Path | None, size: int) -> tuple[Any, str]:
    """A pack of patches of the whole photographs, for a network that was not trained on them."""
    photographs, name = _opened(folder)
    found = [
        patch
        for photograph in photographs
        for scaled in (photograph, _half(photograph))
        for patch in _grid(scaled, size, size // 2)
    ]
    return _packed(out, "patches", found, MOST, size, name), name


def _packed(
    out: Path, split: str, patches: list[np.ndarray], most: int, size: int, name: str
) -> Any:
    if len(patches) < 64:
        raise ValueError(
            f"data: {len(patches)} patches of {size} pixels for {split}, expected at least 64: give "
            f"more or larger photographs than are in {name}"
        )
    order = np.random.default_rng(0).permutation(len(patches))[:most]
    array = out / f"{split}.npy"
    array.parent.mkdir(parents=True, exist_ok=True)
    np.save(array, np.stack([patches[i] for i in order]))
    pack = fastphi.pack(array, out / f"{split}-pack", size=size, progress=False)
    array.unlink()
    print(f"   {split}: {len(pack)} patches of {size} x {size} pixels")
    return pack


def _opened(folder: Path | None) -> tuple[list[np.ndarray], str]:
    if folder is not None:
        return _photographs(folder), str(folder)
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images), "scikit-learn's two photographs"


def _photographs(folder: Path) -> list[np.ndarray]:
    """The first hundred photographs below a folder, each (H, W, 3) uint8, at most 1024 pixels wide."""
    from PIL import Image, ImageOps

    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else ():
        try:
            with reading.whole(path, "a picture", "data"), Image.open(path) as opened:
                photograph = ImageOps.exif_transpose(opened).convert("RGB")
        except (ValueError, OSError) as error:
            print(f"   passed over: {error}")
            continue
        photograph.thumbnail((1024, 1024))
        found.append(np.asarray(photograph))
        if len(found) == 100:
            break
    if not found:
        raise ValueError(f"data: {folder} is not a folder with a readable photograph in it")
    return found


def _half(photograph: np.ndarray) -> np.ndarray:
    h, w = (n // 2 * 2 for n in photograph.shape[:2])
    mean = photograph[:h, :w].reshape(h // 2, 2, w // 2, 2, -1).mean(axis=(1, 3))
    return np.round(mean).astype(np.uint8)


def _grid(photograph: np.ndarray, size: int, stride: int) -> list[np.ndarray]:
    h, w = photograph.shape[:2]
    return [
        photograph[y : y + size, x : x + size]
        for y in range(0, h - size + 1, stride)
        for x in range(0, w - size + 1, stride)
    ]
