"""A run that is divided: its parts, each some of the images in a file of its own, cut anew for as many
ranks as there are, and joined in the end."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastphi.sampling.plan import Plan
from fastphi.sampling.record import earlier_run
from fastphi.sampling.result import TABLES, Reconstruction, frames_file

Source = tuple[range, Path, Reconstruction]


def folder(path: Path) -> Path:
    """Of the parts of the run at `path`, beside it."""
    return path.with_name(f".{path.name}.parts")


def file(path: Path, part: range) -> Path:
    return folder(path) / f"{part.start}-{part.stop}.npz"


def settings_of(settings: dict[str, Any], part: range) -> dict[str, Any]:
    """What identifies a part: the run, and which rows of it."""
    return settings | {"part": [part.start, part.stop]}


def cut(
    path: Path, settings: dict[str, Any], plan: Plan, size: int, resume: bool
) -> list[list[range]]:
    """The parts of each of `size` ranks, whose files say how far each is; all have about as much to do.

    What is there, parts or a run by one process, is gone on from, row by row where it is furthest.
    """
    if not resume:
        shutil.rmtree(folder(path), ignore_errors=True)
    folder(path).mkdir(parents=True, exist_ok=True)
    sources = [*_sources(path, settings, len(plan.samples))] if resume else []
    steps, source = _furthest(sources, len(plan.samples))
    left = _left(steps, source, sources, plan)
    before = np.cumsum(left)
    ends = np.searchsorted(before, before[-1] * np.arange(1, size) / size, "right").tolist()
    ends = [0, *ends, len(left)]
    breaks = np.flatnonzero(np.diff(source)) + 1
    shares = []
    for a, b in itertools.pairwise(ends):
        at = [a, *breaks[(breaks > a) & (breaks < b)].tolist(), b]
        shares.append([range(*ab) for ab in itertools.pairwise(at) if ab[0] < ab[1]])
    _rewrite(path, settings, [part for share in shares for part in share], source, sources)
    return shares


def _sources(path: Path, settings: dict[str, Any], n: int) -> Iterator[Source]:
    """What there is of the run. ValueError for a file of another one."""
    if (whole := earlier_run(path, settings)) is not None:
        yield range(n), path, whole
    for found in sorted(folder(path).glob("*-*.npz")):
        part = range(*map(int, found.stem.split("-")))
        earlier = earlier_run(found, settings_of(settings, part))
        assert earlier is not None
        yield part, found, earlier


def _furthest(sources: list[Source], n: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the steps that each row has behind it, and in which source; -1: in none."""
    steps, source = np.full(n, -1), np.full(n, -1)
    for i, (part, _, run) in enumerate(sources):
        at = slice(part.start, part.stop)
        done = len(run.sigma) + int(run.finished)
        source[at] = np.where(done > steps[at], i, source[at])
        steps[at] = np.maximum(steps[at], done)
    return steps, source


def _left(steps: np.ndarray, source: np.ndarray, sources: list[Source], plan: Plan) -> np.ndarray:
    """(N,) what each row has left to do: its steps, where the schedule tells how many."""
    if plan.form == "schedule":
        left = np.maximum(plan.steps - np.maximum(steps, 0), 0)
    else:
        left = np.array([int(i < 0 or not sources[i][2].finished) for i in source])
    return left if left.any() else np.ones_like(left)


def _rewrite(
    path: Path,
    settings: dict[str, Any],
    wanted: list[range],
    source: np.ndarray,
    sources: list[Source],
) -> None:
    """The files of the wanted parts, cut from what there is; then those that are no longer needed go."""
    for part in wanted:
        i = int(source[part.start])
        if i >= 0 and sources[i][0] != part or (i >= 0 and sources[i][1] == path):
            (theirs, _, run) = sources[i]
            rows = slice(part.start - theirs.start, part.stop - theirs.start)
            slice_of(run, rows, settings_of(settings, part)).save(file(path, part))
    kept = {file(path, part) for part in wanted}
    for _, old, _ in sources:
        if old != path and old not in kept:
            old.unlink()
            frames_file(old).unlink(missing_ok=True)


def slice_of(run: Reconstruction, rows: slice, settings: dict[str, Any]) -> Reconstruction:
    """Some images of a run, and what its tables say of them."""
    tables = {name: getattr(run, name)[:, rows] for name in TABLES}
    return replace(
        run,
        images=run.images[rows],
        samples=run.samples[rows],
        sigma_hat=run.sigma_hat[rows],
        settings=settings,
        progress=None if run.progress is None else run.progress[:, rows],
        **tables,
    )


def join(path: Path, settings: dict[str, Any], wanted: list[range]) -> None:
    """The result, of these parts in order, at `path`; then all parts go (there may be one that a rank of an
    earlier job has put back)."""
    runs = []
    for part in wanted:
        run = earlier_run(file(path, part), settings_of(settings, part))
        assert run is not None and run.finished
        runs.append(run)
    joined(runs, settings).save(path)
    frames_file(path).unlink(missing_ok=True)  # of one process that began
    shutil.rmtree(folder(path))


def joined(runs: list[Reconstruction], settings: dict[str, Any]) -> Reconstruction:
    """One run of all the images, in order. An image that had stopped while others ran has no entries in
    the tables, and is in their progress what it was when it stopped."""
    steps = max(len(run.sigma) for run in runs)
    values: dict[str, Any] = {"settings": settings}
    for field in fields(Reconstruction):
        pieces = [getattr(run, field.name) for run in runs]
        if field.name in TABLES:
            empty = torch.nan if pieces[0].is_floating_point() else 0
            values[field.name] = torch.cat([_longer(p, steps, empty) for p in pieces], 1)
        elif field.name in ("images", "samples", "sigma_hat"):
            values[field.name] = torch.cat(pieces)
    if any(run.progress is not None for run in runs):
        kept = max(0 if run.progress is None else len(run.progress) for run in runs)
        values["progress"] = torch.cat([_progress(run, kept) for run in runs], 1)
    return Reconstruction(**values)


def _longer(table: Tensor, steps: int, value: float) -> Tensor:
    return torch.cat([table, table.new_full((steps - len(table), *table.shape[1:]), value)])


def _progress(run: Reconstruction, kept: int) -> Tensor:
    there = [] if run.progress is None else [*run.progress]
    return torch.stack(there + [run.images] * (kept - len(there)))
