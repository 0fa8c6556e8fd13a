"""The φ explorer: one HTML page, no server and no network, to walk through φ image by image."""

from __future__ import annotations

import base64
import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fastphi.analysis.neighbours import nearest
from fastphi.analysis.selectivity import exciting, pictured, top_channels
from fastphi.study.material import Material
from fastphi.study.stages import clusters_of
from fastphi.support import files

MOST = 2000  # images on a page: it stays under 15 MB
_NEIGHBOURS, _CHANNELS, _EXCITING = 12, 4, 12


def write(study: Material, path: Path) -> Path:
    """The explorer of a study whose stages are done."""
    embedded: Any = study.results["map"]
    labels = study.labels
    names = study.images.class_names
    page = html(
        study.images.batch(study.rows[:MOST]).numpy(),
        np.asarray(study.phi)[:MOST],
        study.pixels[:MOST],
        embedded.places[:MOST],
        clusters_of(study)[:MOST],
        numbers=study.rows[:MOST],
        names=None if labels is None or not names else [names[i] for i in labels[:MOST]],
        title=f"φ of {len(study.rows[:MOST])} images at σ = {study.settings.sigma:g}",
    )
    with files.atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def html(
    images: np.ndarray,
    phi: np.ndarray,
    pixels: np.ndarray,
    places: np.ndarray,
    clusters: np.ndarray,
    *,
    numbers: np.ndarray | None = None,
    names: list[str] | None = None,
    title: str = "φ explorer",
) -> str:
    """The page. images: (N, C, H, W) in [0, 1]; phi: (N, C); pixels: (N, d); places: (N, 2) in [0, 1];
    clusters: (N,); numbers: (N,) what to call the images; names: their labels, in words."""
    n = len(images)
    each = np.arange(n)
    k = min(_NEIGHBOURS, n - 1)
    near, cosine = nearest(phi, phi, k, exclude=each)
    near_pixels, _ = nearest(pixels, pixels, k, exclude=each)
    specialised = pictured(phi)
    excite = {int(c): exciting(phi, int(c), min(_EXCITING, n)).tolist() for c in specialised}
    columns = int(np.ceil(n**0.5))
    content = {
        "title": title,
        "n": n,
        "columns": columns,
        "size": int(images.shape[2]),
        "places": np.round(places, 4).tolist(),
        "clusters": np.asarray(clusters).tolist(),
        "numbers": (each if numbers is None else numbers).tolist(),
        "names": names,
        "phi": near.tolist(),
        "cosine": np.round(np.nan_to_num(cosine), 3).tolist(),
        "pixels": near_pixels.tolist(),
        "channels": [top_channels(phi, i, specialised, _CHANNELS).tolist() for i in range(n)],
        "exciting": excite,
        "sprite": _sprite(images, columns),
    }
    text = json.dumps(content, separators=(",", ":")).replace("</", "<\\/")
    template = (resources.files("fastphi.study") / "explorer.html").read_text(encoding="utf-8")
    return template.replace("/*CONTENT*/null", text)


def _sprite(images: np.ndarray, columns: int) -> str:
    """All images in one JPEG, as a data URI."""
    from PIL import Image

    n, _, h, w = images.shape
    levels = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    sheet = np.full((-(-n // columns) * h, columns * w, 3), 255, np.uint8)
    for i, image in enumerate(levels):
        y, x = divmod(i, columns)
        sheet[y * h : y * h + h, x * w : x * w + w] = image
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="jpeg", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
