"""Making a pack: shards by several processes, then one array.

Every file is whole or absent, and the manifest comes last: a folder with one is finished. Until
then `.parts/` holds the settings and the finished shards, so that a pack killed at any moment goes
on there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import features

from fastphi.data import shards, sources
from fastphi.data.images import FORMAT, OUTPUTS, VERSION, PackedImages
from fastphi.support import files, reading, validate

REASONS = ("unreadable", "truncated", "too small", "duplicate")

logger = logging.getLogger("fastphi")


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: int = 64,
    color: bool = True,
    split: str = "train",
    key: str | None = None,
    workers: int = 0,
    allow_upscale: bool = False,
    progress: bool = True,
) -> PackedImages:
    """Turn images into a pack: centre crop to a square, area resampling to size x size, uint8.

    source: a folder (each first-level sub-folder is a class, whatever lies deeper belongs to it; no
        sub-folders: no labels; hidden files and other file types are passed over), an .npy or .npz
        of images (uint8, or float in [0, 1]; (N, H, W) or (N, H, W, C), C = 1, 3 or 4; in an .npz
        optionally `labels` and `class_names`), or an .npz of encoded images (`{split}_jpeg` or
        `{split}_webp`: one uint8 buffer; `{split}_off`: N + 1 offsets; optionally `{split}_label`,
        `{split}_file` and `class_names`).
    out: the folder to make. An unfinished pack there is resumed, a finished one with the same
        settings and source is returned at once, and anything else is an error.
    size: height and width in pixels. color: three channels, else one (grey, ITU-R 601-2 luma).
    split: which images of an encoded .npz. key: which array of an .npz holds the images.
    workers: processes that decode (0: this one). Scripts that ask for more need the usual
        `if __name__ == "__main__":`. The result has the same bits for any number.
    allow_upscale: enlarge (bicubic) images smaller than `size`, which are skipped otherwise.
    progress: show a bar.

    EXIF orientation is applied, alpha is composed over white, 16-bit grey is rounded to 8, colour
    profiles are ignored, and of animations the first frame is taken. Unreadable, truncated and too
    small images, and those whose packed pixels equal an earlier image's, are skipped and listed.
    Images are in the order of their sorted paths, or of the array. Takes twice the pack's size on
    disk while it works. May be killed at any moment and run again: finished shards are kept.

    Raises ValueError (FileNotFoundError where the source is missing) before any work for a source
    or option that cannot be, or an `out` held by another process, begun with other settings or
    holding other files; OSError where the disk is full.
    """
    options = shards.Options(
        validate.integer(size, "size", low=1, high=4096), bool(color), bool(allow_upscale)
    )
    workers = validate.integer(workers, "workers", low=0)
    opened = sources.open_source(source, split, key)
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; give a folder")
    settings = {
        **options._asdict(),
        "split": split if opened.kind == "encoded" else None,
        "key": key,
        "kind": opened.kind,
        "items": len(opened),
        "fingerprint": opened.fingerprint,
    }
    parts = out / ".parts"
    if not _finished(out, settings) or parts.is_dir():
        with files.locked(out, "out", mark="manifest.json"):
            if not _finished(out, settings):  # by whoever held the lock a moment ago
                with _explained(out):
                    _begin(out, settings)
                    shards.make_all(opened, parts, options, workers, progress)
                    _assemble(opened, out, options, settings)
            shutil.rmtree(parts, ignore_errors=True)
    return PackedImages(out)


def _finished(out: Path, settings: dict[str, Any]) -> bool:
    """A pack with the same settings is there whole; ValueError where it is one with others."""
    if not (out / "manifest.json").is_file():
        return False
    _compare(out, PackedImages(out).manifest["settings"], settings, "a finished pack")
    return True


def _begin(out: Path, settings: dict[str, Any]) -> None:
    # Shards of two decoder versions must not meet in one pack: their last bits may differ.
    jpeg, webp = features.version("jpg"), features.version("webp")
    settings = {
        **settings,
        "shard": shards.SHARD,
        "decoder": f"Pillow {PIL.__version__} {jpeg} {webp}",
    }
    begun = out / ".parts" / "settings.json"
    if begun.is_file():
        _compare(out, reading.json(begun, "out"), settings, "an unfinished pack")
    else:
        foreign = [p.name for p in out.iterdir() if not p.name.startswith(".")]
        if foreign:
            raise ValueError(
                f"out: {out} is not empty and holds no pack ({', '.join(sorted(foreign)[:3])}); "
                "give a new folder"
            )
        files.write_json(begun, settings)
    for folder in (out, out / ".parts"):
        for leftover in folder.glob(".*.tmp"):  # of a run that was killed
            leftover.unlink(missing_ok=True)


def _compare(out: Path, there: dict[str, Any], now: dict[str, Any], what: str) -> None:
    words = {"items": "number of source images", "fingerprint": "source"}
    differ = []
    for name in sorted(now):
        if name in there and there[name] != now[name]:
            change = f"{there[name]} there, {now[name]} now"
            if name == "fingerprint":
                change = "its images' names, sizes, dates or contents have changed"
            differ.append(f"{words.get(name, name)}: {change}")
    if differ:
        raise ValueError(
            f"out: {out} holds {what} that differs: {'; '.join(differ)}. Give another folder, or "
            "delete this one to start over"
        )


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"no space left while packing into {out}; finished shards are kept: make room and run "
            "it again",
        ) from error
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"a worker process died while packing into {out} (was it killed for memory? does the "
            'script lack `if __name__ == "__main__":`?); finished shards are kept: run it again'
        ) from error
    except KeyboardInterrupt:
        logger.warning("interrupted; finished shards are kept in %s: run it again to go on", out)
        raise


def _assemble(
    source: sources.Source, out: Path, options: shards.Options, settings: dict[str, Any]
) -> None:
    starts = range(0, len(source), shards.SHARD)
    chosen, items, skipped = _choose(source, out / ".parts", starts)
    if not items:
        raise ValueError(f"source: no usable image in {source.path}; the first: {skipped[0][1]}")
    shape = (len(items), options.size, options.size, 3 if options.color else 1)
    sums = np.zeros(shape[3], np.int64)
    with files.atomic_write(out / "images.npy") as temporary, open(temporary, "wb") as f:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(f, header)
        for start, rows in zip(starts, chosen, strict=True):
            pixels = shards.read(out / ".parts", start, "pixels")[0][rows]
            sums += pixels.sum(axis=(0, 1, 2), dtype=np.int64)
            f.write(pixels.tobytes())
    labels = source.labels
    if labels is not None:
        with files.atomic_write(out / "labels.npy") as temporary, open(temporary, "wb") as f:
            np.save(f, labels[items])
    of = [None] * len(source) if labels is None else labels.tolist()
    _write_lines(out / "items.jsonl", ({"name": source.names[i], "label": of[i]} for i in items))
    reasons = ({"name": source.names[i], "reason": why} for i, why in skipped)
    _write_lines(out / "skipped.jsonl", reasons)
    counts = {r: sum(why.startswith(r) for _, why in skipped) for r in REASONS}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "n": len(items),
        "size": options.size,
        "channels": shape[3],
        "class_names": source.class_names,
        "mean": (sums / (shape[0] * shape[1] * shape[2] * 255)).tolist(),
        "sha256": files.sha256(out / "images.npy"),
        "source": str(source.path),
        "settings": settings,
        "skipped": counts,
        "decoder": f"Pillow {PIL.__version__}",
        "files": {n: (out / n).stat().st_size for n in OUTPUTS if (out / n).is_file()},
    }
    files.write_json(
        out / "manifest.json", manifest
    )  # the commit: from here on the pack is finished


def _choose(
    source: sources.Source, parts: Path, starts: range
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


def _write_lines(path: Path, lines: Any) -> None:
    with files.atomic_write(path) as temporary, open(temporary, "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
