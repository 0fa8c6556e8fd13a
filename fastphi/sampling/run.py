"""A run of Algorithm 1: its steps and their record, what is stored of it and how it goes on; by one
process, or by ranks, each of which makes some of the images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastphi import engine
from fastphi.sampling import parts
from fastphi.sampling.record import (
    Record,
    StepInfo,
    check_run_options,
    earlier_run,
    finished_run,
    progress_bar,
    run_settings,
)
from fastphi.sampling.result import Reconstruction
from fastphi.sampling.sampler import Sampler
from fastphi.support import files
from fastphi.support.world import World


def run(
    sampler: Sampler,
    *,
    callback: Callable[[StepInfo], object] | None,
    progress: bool,
    save: str | os.PathLike[str] | None,
    save_every: int,
    resume: bool,
    ranks: bool,
) -> Reconstruction:
    """Take the steps and keep their record; store the state, and go on from a stored one."""
    check_run_options(callback, save, save_every)
    path = None if save is None else Path(save).absolute()
    world = World.here() if ranks else World()
    if world.size > 1 and (path is None or files.is_stream(path)):
        raise ValueError(f"ranks: {world.size} bring their images together in a file; give save")
    how: dict[str, Any] = {"callback": callback, "progress": progress, "save_every": save_every}
    with engine.plain_mode(sampler.model, sampler.device), world.job():
        settings = run_settings(sampler.model, sampler.targets, sampler.plan)
        if world.size > 1 or (path is not None and parts.folder(path).is_dir()):
            assert path is not None
            return _shared(sampler, settings, path, resume, world, how)
        record = _record(sampler, settings, path)
        if resume and (done := finished_run(path, settings)):
            return record.result(record.restore(done), finished=True)
        with contextlib.ExitStack() as stack:
            if path is not None and not files.is_stream(path):
                stack.enter_context(files.owned(path, "save"))
            earlier = earlier_run(path, settings) if resume else None
            return _steps(sampler, record, earlier, world, **how)


def _record(sampler: Sampler, settings: dict[str, Any], path: Path | None) -> Record:
    every = sampler.plan.store_progress
    return Record(sampler.samples, every, sampler.device, settings, path)


def _steps(
    sampler: Sampler,
    record: Record,
    earlier: Reconstruction | None,
    world: World,
    *,
    callback: Callable[[StepInfo], object] | None,
    progress: bool,
    save_every: int,
) -> Reconstruction:
    """From the start, or where an earlier run has stopped, to the end."""
    state = sampler.start() if earlier is None else record.restore(earlier)
    if earlier is not None and earlier.finished:  # by whoever held the file a moment ago
        return record.result(state, finished=True)
    record.store(state)  # a path that cannot be written is found now, not after the first steps
    with progress_bar(sampler.plan, state.step, progress) as show:
        try:
            while not sampler.done(state):
                after, info = sampler.step(state)
                _check_finite(info)
                record.add(info, after)
                state = after
                if callback is not None:
                    callback(replace(info, rows=info.rows + sampler.part.start))
                show(info)
                if state.step % save_every == 0:
                    record.store(state)
                world.check()
            return record.finish(sampler.finish(state))
        except BaseException:  # Ctrl-C too: keep all whole steps
            world.heed()
            record.rescue(state)
            raise


def _shared(
    sampler: Sampler,
    settings: dict[str, Any],
    path: Path,
    resume: bool,
    world: World,
    how: dict[str, Any],
) -> Reconstruction:
    """Each rank makes parts of the images, in files of their own, which the first brings together."""
    world.agree(settings, "ranks")
    how |= {"progress": how["progress"] and world.rank == 0}
    with contextlib.ExitStack() as stack:

        def begin() -> list[list[range]]:
            if resume and finished_run(path, settings):
                return []
            stack.enter_context(files.owned(path, "save"))
            return parts.cut(path, settings, sampler.plan, world.size, resume)

        if shares := world.first(begin):
            for part in shares[world.rank]:
                _part(sampler.of(part), settings, path, world, how)
            world.gather(None)
            world.first(lambda: parts.join(path, settings, sum(shares, [])))
    done = finished_run(path, settings)
    assert done is not None
    return replace(done, images=done.images.to(sampler.device))


def _part(
    sampler: Sampler, settings: dict[str, Any], path: Path, world: World, how: dict[str, Any]
) -> None:
    own = parts.settings_of(settings, sampler.part)
    file = parts.file(path, sampler.part)
    record = _record(sampler, own, file)
    with files.owned(file, "save"):  # a rank of an earlier job may be on its way out
        _steps(sampler, record, earlier_run(file, own), world, **how)


def _check_finite(info: StepInfo) -> None:
    bad = ~torch.isfinite(info.x).flatten(1).all(1)
    bad |= info.match.last.isnan() & ~info.match.first.isnan()
    if bad.any():
        i = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"step {info.step}: NaN or Inf in the image of sample {info.samples[i]} (row "
            f"{info.rows[i]}) at σ = {info.sigma[i]:g}"
        )
