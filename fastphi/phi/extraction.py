"""φ of many images: E_z[ā(x + σz)] by image, noise level and block (§2.2), out of core.

Every number is a function of (model, image, its index in the data set, σ, draws, seed): batch size,
order, processes and interruptions do not change a bit of it. Nor do threads, but where plain PyTorch
serves (`backend="reference"`, or no engine can): its library shares out a sum among them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastphi import __version__, checkpoint, data, engine
from fastphi.phi.chunk import MAX_DRAWS, Job, Means, average, checked, means_of, plain, read
from fastphi.phi.store import (
    FORMAT,
    VERSION,
    Chunk,
    PhiStore,
    Writer,
    done_file,
    finished,
    phi_file,
    row_numbers,
)
from fastphi.support import files, processes, validate
from fastphi.support.world import World
from fastphi.unet import UNet

__all__ = ["AUTHORS_SIGMAS", "PhiStore", "extract"]

log = logging.getLogger("fastphi")

# The noise levels of the authors' analyses, in units of images in [0, 1].
_AUTHORS_LEVELS = "0 10 30 50 70 80 90 100 110 120 150 170 190 220 255 300 400 510 650 765"
AUTHORS_SIGMAS = tuple(int(level) / 255 for level in _AUTHORS_LEVELS.split())

_MAX_SIGMA = 1e6


def extract(
    model: UNet,
    images: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    sigmas: Sequence[float] | None = None,
    draws: int = 20,
    blocks: Sequence[str] | str = ("mid",),
    seed: int = 0,
    batch: int = 64,
    workers: int = 1,
    indices: Any = None,
    progress: bool = False,
    dtype: torch.dtype | None = None,
    shard: tuple[int, int] | None = None,
    ranks: bool = False,
) -> PhiStore:
    """φ of every image at every noise level: the mean of ā(x + σz) over noise draws (§2.2).

    images: a pack (or its path), a tensor or array, float in [0, 1] or uint8, or a data set
        (torchvision's, Hugging Face's, a list, …): what `fastphi.data.open_images` takes. A data set
        is read once at the start for its SHA-256, and again at each level.
    out: the folder of the store; None keeps it in memory. An interrupted extraction goes on where
        it stopped, to the same bits; a finished one returns at once; `sigmas` may be added later.
    sigmas: noise levels, in units of the images; default: AUTHORS_SIGMAS up to the top of the
        model's training range. One outside of it is allowed, with a warning.
    draws: noise draws per image and level; one at σ = 0.
    blocks: names from `model.config.block_names`, or "all". The network stops after the last one.
    batch: images at a time; bounds memory. workers: processes, for a model on the CPU (a script
        then needs the usual `if __name__ == "__main__":`); its threads are divided among them.
    indices: only these images, one row each, in this order; default: all.
    dtype: to compute in: the model's own (default), or torch.bfloat16, what GPUs (and CPUs with
        AMX) are fast in; on other CPUs float32 serves. φ is float32 all the same.
    shard: (i, n): only the i-th of n equal runs of rows, 0 <= i < n, for as many jobs on as many
        machines as there are, in any order or at once, into one store `out` on a shared file
        system. The store is whole when all are done; their bits are those of one extraction, which
        also goes on where shards have left off.
    ranks: whether the processes that torchrun or srun started, each with the model on a device of its
        own, share the work; all return when it is done. As many as there are go on from what any
        number have left.

    Raises ValueError or TypeError before any work for bad input, or a store in `out` that is of
    another model, data set or setting; FloatingPointError where φ has NaN or Inf,
    support.world.Gone where another rank is gone.
    """
    validate.integer(draws, "draws", low=1, high=MAX_DRAWS)
    validate.seed(seed)
    validate.integer(batch, "batch", low=1)
    job = _job(model, images, indices, blocks, draws, seed, dtype)
    _check_workers(model, workers)
    levels = _levels(sigmas, model)
    part = _part(shard, len(job), out)
    if ranks and out is None:
        raise ValueError("ranks: what they compute comes together in a store on disk; give out")
    with engine.frozen(model):  # the weights that the manifest names are those that are used
        manifest = _manifest(job, levels)
        if out is None:
            return _extract_in_memory(job, manifest, levels, batch, workers, progress)
        place = Path(out).absolute()
        world = World.here() if ranks else World()
        with world.job():
            world.agree(manifest, "ranks")
            part = world.first(lambda: _shares(place, manifest, part, world.size))[world.rank]
            progress = progress and world.rank == 0
            _extract_to(place, job, manifest, levels, part, batch, workers, progress, world)
        return PhiStore(place)


def _extract_to(
    out: Path,
    job: Job,
    manifest: dict[str, Any],
    levels: Sequence[float],
    part: range,
    batch: int,
    workers: int,
    progress: bool,
    world: World,
) -> None:
    if finished(out, manifest, part):
        return

    def begin() -> Writer:
        return Writer(out, manifest, job.indices, part)

    with files.claimed(out, "out", part, begin, mark="manifest.json") as begun, begun as writer:
        work = _run(job, PhiStore(out), levels, part, batch, workers, progress)
        with contextlib.closing(work) as chunks:
            for sigma, rows, means in chunks:
                writer.write(sigma, rows, means)
                world.check()


def _shares(out: Path, manifest: dict[str, Any], part: range, size: int) -> list[range]:
    """Runs of `part`'s rows, one for each rank, of which each lacks about as much as any other."""
    finished(out, manifest, part)  # ValueError where another store is there
    lacking = np.full(len(part), len(manifest["sigmas"]))
    if (out / "manifest.json").exists():
        store = PhiStore(out)
        there = [s for s in manifest["sigmas"] if s in store.sigmas]
        lacking -= sum(store.there(s, part) for s in there)
    before = np.cumsum(lacking)
    ends = np.searchsorted(before, before[-1] * np.arange(1, size) / size, side="right")
    cuts = [part.start, *(part.start + ends).tolist(), part.stop]
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def _extract_in_memory(
    job: Job,
    manifest: dict[str, Any],
    levels: tuple[float, ...],
    batch: int,
    workers: int,
    progress: bool,
) -> PhiStore:
    n = len(job)
    arrays: dict[str, np.ndarray] = {}
    if job.indices is not None:
        arrays["indices.npy"] = job.indices
    for sigma in levels:
        arrays[done_file(sigma)] = np.zeros(n, np.uint8)
        for block, width in manifest["blocks"].items():
            arrays[phi_file(sigma, block)] = np.zeros((n, width), np.float32)
    store = PhiStore.in_memory(manifest, arrays)
    for sigma, rows, means in _run(job, store, levels, range(len(job)), batch, workers, progress):
        for block, values in means.items():
            arrays[phi_file(sigma, block)][rows] = values
        arrays[done_file(sigma)][rows] = 1
    return store


# --- all chunks, here or in several processes -----------------------------------------------------


def _run(
    job: Job,
    store: PhiStore,
    levels: Sequence[float],
    part: range,
    batch: int,
    workers: int,
    progress: bool,
) -> Generator[tuple[float, np.ndarray, Means], None, None]:
    """(σ, rows, means) of every chunk of rows that the store lacks, in the order in which they are done."""
    total = sum(store.lacking(sigma, part) for sigma in levels)
    if not total:
        return
    chunks = store.chunks(levels, batch, part)
    bar = _bar(total, progress)
    try:
        done: Iterator[Any]
        if workers == 1:
            done = _here(job, chunks)
        else:
            done = processes.spread(means_of, job, chunks, workers)
        for (sigma, rows), means in done:
            yield sigma, rows, means
            bar(len(rows))
    finally:
        bar(None)


def _here(job: Job, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, Means]]:
    """Chunks in this process, whose images are read ahead. A GPU is never waited for: while it computes
    one chunk the next is queued, and the one before is written."""
    queued: deque[tuple[Chunk, dict[str, Tensor], torch.cuda.Event | None]] = deque()
    cuda = next(job.model.parameters()).is_cuda

    def finish() -> tuple[Chunk, Means]:
        (sigma, rows), average, there = queued.popleft()
        if there is not None:
            there.synchronize()
        return (sigma, rows), checked(average, job.images_of(rows), sigma)

    reader = processes.prefetched(lambda chunk: (chunk, read(job, chunk[1])), chunks)
    with contextlib.closing(reader):
        for chunk, x in reader:
            found, there = average(job, chunk[0], *x), None
            if cuda:
                stream = torch.cuda.current_stream(next(iter(found.values())).device)
                found = {block: v.to("cpu", non_blocking=True) for block, v in found.items()}
                there = stream.record_event()
            queued.append((chunk, found, there))
            if len(queued) > cuda:
                yield finish()
        while queued:
            yield finish()


def _bar(total: int, progress: bool) -> Callable[[int | None], None]:
    """A progress bar to tell how many rows are done; None closes it."""
    if not progress:
        return lambda n: None
    from tqdm.auto import tqdm

    bar = tqdm(total=total, unit="image", desc="φ")
    return lambda n: bar.close() if n is None else bar.update(n)


# --- checks, before any work ----------------------------------------------------------------------


def _job(
    model: UNet, images: Any, indices: Any, blocks: Any, draws: int, seed: int, dtype: Any
) -> Job:
    if not isinstance(model, UNet):
        raise TypeError(f"model: expected a fastphi.UNet, got {type(model).__name__}")
    opened = data.open_images(images)
    if opened.channels != model.config.image_channels:
        raise ValueError(
            f"images: {opened.channels} channel(s), the model takes {model.config.image_channels}"
        )
    validate.size(opened.shape[1:], model.config, "images")
    rows = None if indices is None else row_numbers(indices, len(opened))
    if rows is not None and not _distinct(rows, len(opened)):
        raise ValueError("indices: expected distinct image numbers")
    known = model.config.block_names
    wanted = known if blocks == "all" else (blocks,) if isinstance(blocks, str) else tuple(blocks)
    for block in wanted:
        validate.choice(block, "blocks", known)
    if not wanted:
        raise ValueError("blocks: expected at least one name")
    own = next(model.parameters()).dtype
    if dtype not in (None, own, torch.bfloat16):
        raise ValueError(f"dtype: expected the model's own ({own}) or torch.bfloat16, got {dtype}")
    names, dtype = tuple(b for b in known if b in wanted), dtype or own
    on_device = _serving(model, dtype) == "cuda"
    return Job(model, opened, rows, names, draws, seed, dtype, on_device)


def _part(shard: tuple[int, int] | None, rows: int, out: Any) -> range:
    """The rows of a shard; None: all."""
    if shard is None:
        return range(rows)
    if not isinstance(shard, Sequence) or len(shard) != 2:
        raise ValueError(f"shard: expected (i, n), which of how many, got {shard!r}")
    i, n = (validate.integer(value, "shard") for value in shard)
    if not 0 <= i < n:
        raise ValueError(f"shard: expected (i, n) with 0 <= i < n, got ({i}, {n})")
    if n > rows:
        raise ValueError(f"shard: {n} shards of {rows} row(s); expected at most as many as rows")
    if out is None:
        raise ValueError("shard: a shard is written into a store on disk; give out")
    return range(i * rows // n, (i + 1) * rows // n)


def _distinct(rows: np.ndarray, n: int) -> bool:
    """Of whole numbers in [0, n), without sorting millions of them."""
    seen = np.zeros(n, bool)
    seen[rows] = True
    return int(seen.sum()) == len(rows)


def _serving(model: UNet, dtype: torch.dtype) -> str:
    parameter = next(model.parameters())
    with plain(parameter.device, dtype):
        return engine.pick(model, parameter).name


def _check_workers(model: UNet, workers: int) -> None:
    validate.integer(workers, "workers", low=1)
    device = next(model.parameters()).device
    if workers > 1 and device.type != "cpu":
        raise ValueError(f"workers: {workers} processes need a model on the CPU, it is on {device}")


def _levels(sigmas: Sequence[float] | None, model: UNet) -> tuple[float, ...]:
    """Ascending noise levels, told apart in float32."""
    low, high = model.training_info.sigma_min, model.training_info.sigma_max
    if sigmas is None:
        kept = tuple(s for s in AUTHORS_SIGMAS if s <= high)
        if len(kept) < len(AUTHORS_SIGMAS):
            dropped = len(AUTHORS_SIGMAS) - len(kept)
            log.warning(
                f"sigmas: {dropped} levels above the training range's {high:g} are left out"
            )
        return kept
    levels = tuple(sorted(validate.sigmas(sigmas)))
    validate.number(levels[-1], "sigmas", high=_MAX_SIGMA)
    if len({float(np.float32(s)) for s in levels}) != len(levels):
        raise ValueError(f"sigmas: noise levels must differ in float32, got {levels}")
    if beyond := [s for s in levels if s > high or 0 < s < low]:
        listed = ", ".join(f"{s:g}" for s in beyond)
        log.warning(
            f"sigmas: {listed} outside of the range [{low:g}, {high:g}] the model trained on"
        )
    return levels


def _manifest(job: Job, levels: tuple[float, ...]) -> dict[str, Any]:
    config = job.model.config
    widths = dict(
        zip(config.block_names, (*config.channels, *config.channels[-2:0:-1]), strict=True)
    )
    path = getattr(job.images, "path", None)
    return {
        "format": FORMAT,
        "version": VERSION,
        "fastphi": __version__,
        "model": checkpoint.fingerprint(job.model),
        "engine": _serving(job.model, job.dtype),
        "dtype": str(job.dtype).removeprefix("torch."),
        "data": job.images.sha256,
        "data_name": path.name if path else "in memory",
        "rows": len(job),
        "indices": None if job.indices is None else hashlib.sha256(job.indices.data).hexdigest(),
        "sigmas": list(levels),
        "draws": job.draws,
        "blocks": {block: widths[block] for block in job.blocks},
        "seed": job.seed,
    }
