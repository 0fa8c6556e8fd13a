"""What the commands do beyond calling one function: choose targets, draw pictures."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastphi
from fastphi import data, targets
from fastphi.analysis.neighbours import nearest
from fastphi.analysis.rows import Pixels, Rows
from fastphi.cli.start import load, say
from fastphi.support import files, plots, reading, validate
from fastphi.support.world import World


def neighbours_command(
    store: Path,
    queries: tuple[int, ...],
    sigma: float | None,
    k: int,
    block: str,
    images: Path | None,
    picture: Path | None,
) -> dict[str, Any]:
    """Neighbours of each query in φ, and in pixels where `images` is given, as plain values."""
    check_picture(picture)
    if picture is not None and images is None:
        raise ValueError("picture: drawing neighbours needs --images, the pack of the store")
    opened = fastphi.PhiStore(store)
    if sigma is None:
        sigma = min(opened.sigmas, key=lambda s: abs(s - 0.5))
    phi = opened.array(sigma, block)
    for i, query in enumerate(queries):
        validate.integer(query, f"queries[{i}]", low=0, high=len(phi) - 1)
    found: dict[str, Any] = {"sigma": sigma, "block": block, "queries": list(queries)}
    found["phi"], found["phi_cosine"] = _others(phi, queries, k)
    if images is not None:
        packed = data.open_images(images)
        if len(packed) != len(phi):
            raise ValueError(
                f"images: the pack has {len(packed)} images, the store {len(phi)} rows"
            )
        found["pixels"], found["pixel_cosine"] = _others(Pixels(packed), queries, k)
        if picture is not None:
            _neighbour_picture(packed, found, picture)
    return found


def _others(rows: Rows, queries: tuple[int, ...], k: int) -> tuple[list, list]:
    """nearest() without the query itself."""
    index, cosine = nearest(rows[list(queries)], rows, min(k + 1, len(rows)), ranks=True)
    kept = [
        [(i, c) for i, c in zip(row, values, strict=True) if i != query][:k]
        for query, row, values in zip(queries, index.tolist(), cosine.tolist(), strict=True)
    ]
    return [[i for i, _ in row] for row in kept], [[c for _, c in row] for row in kept]


def _neighbour_picture(packed: Any, found: dict[str, Any], picture: Path) -> None:
    rows, labels = [], []
    for query, phi, pixels in zip(found["queries"], found["phi"], found["pixels"], strict=True):
        for name, index in (("φ", phi), ("pixels", pixels)):
            rows.append(packed.batch(np.array([query, *index])))
            labels.append(f"{query}: {name}")
    _save_grid(picture, rows, labels)


def reconstruct_command(
    model: Path,
    out: Path,
    *,
    images: Path | None,
    indices: tuple[int, ...],
    phi: Path | None,
    store: Path | None,
    combine: str,
    copies: int,
    target_sigma: float | None,
    channels: tuple[int, ...] | None,
    zero_elsewhere: bool,
    picture: Path | None,
    device: str,
    backend: str,
    **options: Any,
) -> None:
    """Build the target that was asked for, reconstruct, draw."""
    check_picture(picture)
    if sum(source is not None for source in (images, phi, store)) != 1:
        raise ValueError("target: give exactly one of --images, --store and --phi")
    if zero_elsewhere and channels is None:
        raise ValueError("zero_elsewhere: needs --channels")
    loaded = load(model, device, backend)
    how = None if combine == "none" else combine
    common: dict[str, Any] = {"copies": copies, "sigma": target_sigma}
    clean = None
    if images is not None:
        if not indices:
            raise ValueError("indices: name at least one image of the pack")
        clean = data.open_images(images).batch(indices).to(next(loaded.parameters()).device)
        if how:
            target = targets.centroid(loaded, clean, how, **common)
        else:
            target = targets.from_images(loaded, clean, **common)
    elif store is not None:
        target = targets.from_store(store, indices or None, how=how, **common)
    else:
        if how or indices or target_sigma is not None:
            raise ValueError("phi: --combine, --indices and --target-sigma do not go with --phi")
        assert phi is not None
        values = reading.array(phi, "phi", mode="read")
        if values.dtype.kind not in "fiu":
            raise ValueError(f"phi: {phi} is {values.dtype}, expected real numbers")
        wanted = torch.from_numpy(values.astype(float)).to(next(loaded.parameters()))
        target = targets.fixed(wanted, copies=copies)
    if channels is not None:
        target = target.with_channels(channels, zero_elsewhere=zero_elsewhere)
    result = fastphi.reconstruct(
        loaded, target, save=out, progress=True, ranks=True, **_ends(options)
    )
    ratio = float((result.losses_last / result.losses_first).nanmedian())
    say(f"{out}: {len(result)} images, phi loss after over before matching {ratio:.2g} (median)")
    if picture is not None:
        rows = [row.cpu() for row in result.images.split(copies)]
        if clean is not None and how is None:
            rows = [torch.cat([c[None].cpu(), r]) for c, r in zip(clean, rows, strict=True)]
        _save_grid(picture, rows, [])


def analyze_command(
    model: Path,
    images: Path,
    out: Path,
    *,
    quick: bool,
    training: Path | None,
    stages: tuple[str, ...] | None,
    device: str,
    backend: str,
    options: dict[str, Any],
) -> None:
    """Run every stage, write the report and the explorer."""
    from fastphi.study import QUICK, Settings, Study, explorer, report

    loaded = load(model, device, backend)
    given = {name: value for name, value in options.items() if value is not None}
    settings = replace(QUICK if quick else Settings(), **given)
    world = World.here()
    with world.job(), contextlib.ExitStack() as stack:
        world.first(lambda: stack.enter_context(files.locked(out, "out", mark="study.json")))
        study = Study(loaded, images, out, settings, training=training, progress=True, ranks=True)
        results = study.run(stages)
        if world.rank:
            return
        page = report.write(study, results)
        say(f"{page}: {len(results)} analyses")
        if "map" in results:
            picked = explorer.write(study, out / "explorer.html")
            say(f"{picked}: the explorer of {min(len(study.rows), explorer.MOST)} images")


def sample_command(
    model: Path,
    out: Path,
    n: int,
    picture: Path | None,
    device: str,
    backend: str,
    **options: Any,
) -> None:
    """Sample, draw."""
    check_picture(picture)
    loaded = load(model, device, backend)
    result = fastphi.sample(loaded, n, save=out, progress=True, ranks=True, **_ends(options))
    say(f"{out}: {len(result)} images")
    if picture is not None:
        _save_grid(picture, list(result.images.cpu().split(8)), [])


def _ends(options: dict[str, Any]) -> dict[str, Any]:
    """First and last noise level as the form takes them; None leaves the form's own."""
    first, last, steps = (options.pop(name) for name in ("first_sigma", "last_sigma", "steps"))
    if options["form"] == "schedule":
        given = (1.0 if first is None else first, 0.03 if last is None else last, steps)
        return options | ({"sigmas": given} if (first, last, steps) != (None, None, 100) else {})
    return options | {"sigma_0": first, "sigma_last": last}


def check_picture(picture: Path | None) -> None:
    """ValueError where matplotlib writes no such file: before the work, not after it."""
    if picture is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if _suffix(picture) not in known:
        raise ValueError(f"picture: expected one of .{', .'.join(sorted(known))}; got {picture}")


def _suffix(picture: str | os.PathLike[str]) -> str:
    return Path(picture).suffix.lstrip(".").lower() or "png"


def _save_grid(picture: str | os.PathLike[str], rows: list[Any], labels: list[str]) -> None:
    if World.here().rank:
        return
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1 + columns, len(rows)), layout="constrained")
    plots.images(figure.subplots(), rows, labels)
    with files.atomic_write(picture) as temporary:
        figure.savefig(temporary, dpi=150, format=_suffix(picture))
