"""One image to uint8 pixels, a shard of images to a file, and all shards by several processes.

`convert` measured on one of 2 cores of a shared Xeon virtual machine, from encoded bytes, in four
runs: 8,000 to 9,100 JPEGs/s of 64x64 (2 kB; 2048 of them), 660 to 790 of 500x375 (76 kB; one, 300
times).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import signal
import struct
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from fastphi.data.sources import Payload, Source
from fastphi.support import files, reading

SHARD = 1024  # source images per shard: about a second of decoding, which is what a kill can cost


class Skipped(Exception):
    """An image that is left out, and why."""


class Options(NamedTuple):
    size: int
    color: bool
    allow_upscale: bool


def make_all(source: Source, parts: Path, options: Options, workers: int, progress: bool) -> None:
    total = len(source)
    starts = [s for s in range(0, total, SHARD) if not _part(parts, s).is_file()]
    todo = sum(min(SHARD, total - s) for s in starts)
    with _bar(total, total - todo, progress) as advance:
        if workers == 0 or len(starts) < 2:
            for start in starts:
                payloads = source.payloads(start, min(start + SHARD, total))
                advance(make_shard(_part(parts, start), payloads, options))
            return
        with _pool(min(workers, len(starts))) as pool:
            running: set[Future[int]] = set()
            for start in starts:
                payloads = source.payloads(start, min(start + SHARD, total))
                running.add(pool.submit(make_shard, _part(parts, start), payloads, options))
                if len(running) > workers:  # one ready for each that ends, and no more in memory
                    running = _collect(running, advance)
            while running:
                running = _collect(running, advance)


def _collect(running: set[Future[int]], advance: Any) -> set[Future[int]]:
    done, running = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        advance(future.result())
    return running


@contextlib.contextmanager
def _bar(total: int, done: int, progress: bool) -> Iterator[Any]:
    if not progress:
        yield lambda n: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=done, desc="pack", unit="image") as bar:
        yield bar.update


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    # A forked copy of a process with threads (torch has them) may hang; a fork server has none, and
    # imports the package once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)  # a pool's workers outlive a parent that was killed, waiting for ever

        threading.Thread(target=follow, daemon=True).start()


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:09d}.npz"


def make_shard(path: Path, payloads: list[Payload], options: Options) -> int:
    """Decode `payloads` into one file; returns how many there were.

    pixels: uint8 (K, H, W, C); kept: (K,) their positions among the payloads; digests: (K, 16)
    bytes; skipped, reasons: the other positions and why.
    """
    pixels, kept, skipped, reasons = [], [], [], []
    with _strict_decoding():
        for i, payload in enumerate(payloads):
            try:
                pixels.append(convert(payload, *options))
                kept.append(i)
            except Skipped as reason:
                skipped.append(i)
                reasons.append(str(reason))
    shape = (len(pixels), options.size, options.size, 3 if options.color else 1)
    digests = [hashlib.blake2b(p.tobytes(), digest_size=16).digest() for p in pixels]
    with files.atomic_write(path) as temporary, open(temporary, "wb") as f:
        np.savez(
            f,
            pixels=np.array(pixels, np.uint8).reshape(shape),
            kept=np.array(kept, np.int64),
            digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16),
            skipped=np.array(skipped, np.int64),
            reasons=np.frombuffer(json.dumps(reasons).encode(), np.uint8),
        )
    return len(payloads)


@contextlib.contextmanager
def _strict_decoding() -> Iterator[None]:
    # Pillow's setting is global, and a program may have asked for truncated files to pass.
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata; broken pixels raise
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def read(parts: Path, start: int, *names: str) -> list[np.ndarray]:
    """The named arrays of the shard that begins at source image `start`."""
    path = _part(parts, start)
    try:
        return list(reading.Archive(path, "out").arrays(names).values())
    except ValueError as error:
        path.unlink(missing_ok=True)
        raise ValueError(f"{error}: this shard was damaged and is removed; run it again") from None


def convert(payload: Payload, size: int, color: bool, allow_upscale: bool) -> np.ndarray:
    """One image as uint8 (size, size, C): upright, cropped to the centre square, area-resampled.

    Raises Skipped where it cannot be read, is cut short, or is too small.
    """
    try:
        with _open(payload) as image:
            width, height = image.size
            side = min(width, height)
            if side < size and not allow_upscale:
                raise Skipped(f"too small: {width}x{height}")
            image.load()
            with contextlib.suppress(SyntaxError, ValueError, KeyError, struct.error):
                ImageOps.exif_transpose(image, in_place=True)  # broken EXIF spoils no good pixels
            pixels = _eight_bit(image, "RGB" if color else "L")
    except (Skipped, MemoryError):
        raise
    except Exception as error:  # broken bytes make a decoder raise anything
        if reading.of_the_system(error) and not isinstance(error, PermissionError):
            raise  # the system's trouble (a lost disk, too many files), not the image's
        raise Skipped(_reason(error)) from None
    width, height = pixels.size
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) != (size, size):
        # Area resampling is exact for any factor >= 1; below it would only repeat pixels.
        how = Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC
        pixels = pixels.resize((size, size), how, box=(left, top, left + side, top + side))
    return np.asarray(pixels).reshape(size, size, -1)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unreadable: not an image"  # Pillow's text has a path or an address in it
    if isinstance(error, PermissionError):
        return "unreadable: permission denied"
    text = str(error) or type(error).__name__
    cut = isinstance(error, EOFError) or "truncated" in text.lower()
    return f"{'truncated' if cut else 'unreadable'}: {text}"


def _open(payload: Payload) -> Image.Image:
    if isinstance(payload, np.ndarray):
        return Image.fromarray(payload[..., 0] if payload.shape[2:] == (1,) else payload)
    return Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload)


def _eight_bit(image: Image.Image, mode: str) -> Image.Image:
    """Any Pillow mode to "RGB" or "L"."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"{image.mode} pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)
