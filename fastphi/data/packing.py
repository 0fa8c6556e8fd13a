"""Making a pack: shards by several processes, then one array.

Every file is whole or absent, and the manifest comes last: a folder with one is finished. Until
then `.parts/` holds the settings and the finished shards, so that a pack killed at any moment goes
on there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import PIL
from PIL import features

from fastphi.data import assembly, shards, sources
from fastphi.data.images import PackedImages
from fastphi.data.pixels import Options
from fastphi.support import files, reading, validate

logger = logging.getLogger("fastphi")


def pack(
    source: Any,
    out: str | os.PathLike[str],
    *,
    size: int = 64,
    color: bool = True,
    split: str = "train",
    key: str | None = None,
    workers: int = 0,
    allow_upscale: bool = False,
    bits: int | None = None,
    progress: bool = True,
) -> PackedImages:
    """Turn images into a pack: centre crop to a square, area resampling to size x size, uint8.

    source: any of
        - a folder of image files: each first-level sub-folder is a class, whatever lies deeper belongs
          to it; no sub-folders: no labels. Every file is tried, whatever its name, but hidden ones and
          what is kept beside images (text, tables, archives, …), which are counted in the log.
        - WebDataset's .tar shards: one, a list, a folder of them, or a pattern, "s-{000..003}.tar" or
          "s-*.tar". Samples are consecutive members that share a name up to its first dot; the
          class is in .cls, or in "label", "cls" or "class" of .json, by number or name; where no
          sample has one, folders in the .tar are classes.
        - a .zip: of folders, as above, or with classes in dataset.json, as EDM2's tool writes it.
        - .parquet, one, a list, a folder or a pattern, with encoded images (binary, or a struct with
          bytes and path) and a column `label`, by number or name (needs pyarrow).
        - an .npy or .npz of images (uint8, or float in [0, 1]; (N, H, W) or (N, H, W, C), C = 1, 3 or
          4; in an .npz optionally `labels` and `class_names`), or an .npz of encoded images
          (`{split}_jpeg` or `{split}_webp`: one uint8 buffer; `{split}_off`: N + 1 offsets; optionally
          `{split}_label`, `{split}_file` and `class_names`).
        - a data set in memory: torchvision's, Hugging Face's, a list, anything with __len__ and
          __getitem__, or the DataLoader of one (its data set, in order); items as
          `data.open_images` takes them, of any size.
    out: the folder to make. An unfinished pack there is resumed, a finished one with the same
        settings and source is returned at once, and anything else is an error.
    size: height and width in pixels. color: three channels, else one (grey, ITU-R 601-2 luma).
    split: which images of an encoded .npz, or which .parquet of a folder (train-00000-of-00005.parquet).
    key: where the images are: which array of an .npz, column of a .parquet, field of a data set's
        items, extension of a .tar's members.
    workers: processes that read and decode (0: this one). Scripts that ask for more need the usual
        `if __name__ == "__main__":`, and a data set is sent to each. The same bits for any number.
    allow_upscale: enlarge (bicubic) images smaller than `size`, which are skipped otherwise.
    bits: 9 to 16: how many are in use in PNG and TIFF files of 16-bit grey; an image with a value
        beyond is an error. Default: what each file says (sBIT, BitsPerSample, MaxSampleValue), else 16.
    progress: show a bar.

    EXIF orientation is applied, alpha is composed over white, 16-bit grey is rounded to 8, colour
    profiles are ignored, and of animations the first frame is taken. Unreadable, truncated and too
    small images, samples without an image, and images whose packed pixels equal an earlier one's are
    skipped and listed. Images are in the order of their sorted paths, of the archive, or of the array.
    Takes twice the pack's size on disk while it works. May be killed at any moment and run again:
    finished shards are kept (archives are looked through again for where their images lie).

    Raises ValueError (FileNotFoundError where the source is missing) before any work for a source
    or option that cannot be, or an `out` held by another process, begun with other settings or
    holding other files; OSError where the disk is full.
    """
    options = Options(
        validate.integer(size, "size", low=1, high=4096),
        bool(color),
        bool(allow_upscale),
        None if bits is None else validate.integer(bits, "bits", low=9, high=16),
    )
    workers = validate.integer(workers, "workers", low=0)
    opened = sources.open_source(source, split, key)
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; give a folder")
    settings = {
        **options._asdict(),
        "split": split if opened.kind in ("encoded", "parquet") else None,
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
                    assembly.assemble(opened, out, options, settings)
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
