"""A shard of images to a file, and all shards by several processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from fastphi.data import datasets
from fastphi.data.depth import OutOfRange
from fastphi.data.pixels import Options, Skipped, convert, skipping, strict_decoding
from fastphi.data.source import Payload, Source
from fastphi.support import files, processes, reading

SHARD = 1024  # source images per shard: about a second of decoding, which is what a kill can cost


def make_all(source: Source, parts: Path, options: Options, workers: int, progress: bool) -> None:
    total = len(source)
    starts = [s for s in range(0, total, SHARD) if not _part(parts, s).is_file()]
    todo = sum(min(SHARD, total - s) for s in starts)
    with _bar(total, total - todo, progress) as advance:
        if workers == 0 or len(starts) < 2:
            for start in starts:
                payloads = source.payloads(start, min(start + SHARD, total))
                advance(make_shard(_part(parts, start), payloads, options, source.dataset))
            return
        with _pool(min(workers, len(starts)), source.dataset) as pool:
            running: set[Future[int]] = set()
            for start in starts:
                payloads = source.payloads(start, min(start + SHARD, total))
                running.add(pool.submit(_make_shard, _part(parts, start), payloads, options))
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
def _pool(workers: int, dataset: Any) -> Iterator[ProcessPoolExecutor]:
    # A forked copy of a process with threads (torch has them) may hang; a fork server has none, and
    # imports the package once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    sent = processes.pickled(dataset)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (sent,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_dataset: Any = None  # of a worker


def _make_shard(path: Path, payloads: Sequence[Payload], options: Options) -> int:
    return make_shard(path, payloads, options, _dataset)


def _start_worker(dataset: bytes) -> None:
    global _dataset
    _dataset = pickle.loads(dataset)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)  # a pool's workers outlive a parent that was killed, waiting for ever

        threading.Thread(target=follow, daemon=True).start()


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:09d}.npz"


def make_shard(
    path: Path, payloads: Sequence[Payload], options: Options, dataset: Any = None
) -> int:
    """Decode `payloads` into one file; returns how many there were.

    dataset: what payloads that are numbers index, and the images' name in its items.
    In the file: pixels, uint8 (K, H, W, C); kept, (K,) their positions among the payloads; digests,
    (K, 16) bytes; skipped, reasons, the other positions and why; labels, of a data set the (K,) labels.
    """
    pixels, kept, skipped, reasons, labels = [], [], [], [], []
    with strict_decoding():
        for i, payload in enumerate(payloads):
            try:
                found, label = _decoded(payload, options, dataset)
            except Skipped as reason:
                skipped.append(i)
                reasons.append(str(reason))
            else:
                pixels.append(found)
                kept.append(i)
                labels.append(label)
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
            labels=np.frombuffer(json.dumps(labels).encode(), np.uint8),
        )
    return len(payloads)


def _decoded(
    payload: Payload, options: Options, dataset: Any
) -> tuple[np.ndarray, int | str | None]:
    if isinstance(payload, int):
        with skipping():
            image, label = datasets.fetched(dataset[0], payload, dataset[1])
    else:
        image, label = payload, None
    try:
        return convert(image, *options), label
    except OutOfRange as error:
        place = payload if isinstance(payload, str | int) else getattr(payload, "path", "an array")
        raise OutOfRange(f"bits: {error} (in {place})") from None


def read(parts: Path, start: int, *names: str) -> list[np.ndarray]:
    """The named arrays of the shard that begins at source image `start`."""
    path = _part(parts, start)
    try:
        return list(reading.Archive(path, "out").arrays(names).values())
    except ValueError as error:
        path.unlink(missing_ok=True)
        raise ValueError(f"{error}: this shard was damaged and is removed; run it again") from None
