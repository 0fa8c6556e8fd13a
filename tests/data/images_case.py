"""Images, files of them, and packs, for the tests of this room."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image

from fastphi.data import pack

SIZE = 16


def quiet_pack(source, out, **options):
    return pack(source, out, **{"size": SIZE, "progress": False, **options})


def pixels(seed, height=SIZE, width=SIZE, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), np.uint8).squeeze()


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def encoded(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, **options)
    return buffer.getvalue()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def reasons(out):
    return {line["name"]: line["reason"] for line in lines(out / "skipped.jsonl")}
