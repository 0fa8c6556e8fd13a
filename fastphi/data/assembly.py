"""Finished shards to one pack: which images are kept, the files, and last the manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from fastphi.data import shards
from fastphi.data.images import FORMAT, OUTPUTS, VERSION, npy_header
from fastphi.data.pixels import Options
from fastphi.data.source import Source, numbered
from fastphi.support import files, reading

REASONS = ("unreadable", "truncated", "too small", "duplicate")


def assemble(source: Source, out: Path, options: Options, settings: dict[str, Any]) -> None:
    """Write the files of a pack whose shards are all there; ValueError where no image is left."""
    starts = range(0, len(source), shards.SHARD)
    chosen, items, skipped = _choose(source, out / ".parts", starts)
    if not items:
        raise ValueError(f"source: no usable image in {source.where}; the first: {skipped[0][1]}")
    shape = (len(items), options.size, options.size, 3 if options.color else 1)
    sums = _write_pixels(out, shape, starts, chosen)
    labels, class_names = source.labels, source.class_names
    if source.dataset is not None:
        labels, class_names = numbered(_labels(source, out / ".parts", starts), class_names)
    if labels is not None:
        with files.atomic_write(out / "labels.npy") as temporary, open(temporary, "wb") as f:
            np.save(f, labels[items])
    of = [None] * len(source) if labels is None else labels.tolist()
    _write_lines(out / "items.jsonl", ({"name": source.names[i], "label": of[i]} for i in items))
    left = [*((source.names[i], why) for i, why in skipped), *source.lost]
    _write_lines(out / "skipped.jsonl", ({"name": name, "reason": why} for name, why in left))
    counts = {r: sum(why.startswith(r) for _, why in left) for r in REASONS}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "n": len(items),
        "size": options.size,
        "channels": shape[3],
        "class_names": class_names,
        "mean": (sums / (shape[0] * shape[1] * shape[2] * 255)).tolist(),
        "sha256": files.sha256(out / "images.npy"),
        "source": source.where,
        "settings": settings,
        "skipped": counts,
        "decoder": f"Pillow {PIL.__version__}",
        "files": {n: (out / n).stat().st_size for n in OUTPUTS if (out / n).is_file()},
    }
    # the commit: from here on the pack is finished
    files.write_json(out / "manifest.json", manifest)


def _write_pixels(
    out: Path, shape: tuple[int, int, int, int], starts: range, chosen: list[np.ndarray]
) -> np.ndarray:
    """images.npy, of each shard the chosen rows; returns the sum over pixels, (C,) int64."""
    sums = np.zeros(shape[3], np.int64)
    with files.atomic_write(out / "images.npy") as temporary, open(temporary, "wb") as f:
        f.write(npy_header(shape))
        for start, rows in zip(starts, chosen, strict=True):
            pixels = shards.read(out / ".parts", start, "pixels")[0][rows]
            sums += pixels.sum(axis=(0, 1, 2), dtype=np.int64)
            f.write(pixels.tobytes())
    return sums


def _choose(
    source: Source, parts: Path, starts: range
) -> tuple[list[np.ndarray], list[int], list[tuple[int, str]]]:
    """Rows of each shard to keep, their source indices, and (index, reason) of the others."""
    first: dict[bytes, int] = {}
    chosen: list[np.ndarray] = []
    items: list[int] = []
    skipped: list[tuple[int, str]] = []
    for start in starts:
        kept, digests, left, reasons = shards.read(
            parts, start, "kept", "digests", "skipped", "reasons"
        )
        why = reading.json_value(reasons.tobytes())
        skipped += zip((start + left).tolist(), why, strict=True)
        rows = []
        for row, (position, digest) in enumerate(zip(kept.tolist(), digests, strict=True)):
            earlier = first.setdefault(digest.tobytes(), start + position)
            if earlier == start + position:
                rows.append(row)
                items.append(earlier)
            else:
                skipped.append((start + position, f"duplicate of {source.names[earlier]}"))
        chosen.append(np.array(rows, np.int64))
    return chosen, items, sorted(skipped)


def _labels(source: Source, parts: Path, starts: range) -> list[int | str | None]:
    """Of each image of a data set; None where it is unknown or the image was left out."""
    labels: list[int | str | None] = [None] * len(source)
    for start in starts:
        kept, found = shards.read(parts, start, "kept", "labels")
        for position, label in zip(kept.tolist(), reading.json_value(found.tobytes()), strict=True):
            labels[start + position] = label
    return labels


def _write_lines(path: Path, lines: Any) -> None:
    with files.atomic_write(path) as temporary, open(temporary, "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
