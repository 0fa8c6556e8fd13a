"""The figures of the demo's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastphi import noise
from fastphi.analysis.likeness import likeness
from fastphi.analysis.neighbours import distinct, nearest
from fastphi.analysis.rows import Pixels, Rows
from fastphi.analysis.selectivity import exciting, selectivity
from fastphi.analysis.sparsity import participation_ratio
from fastphi.support import plots, reading
from fastphi.support.html import Report


def training(report: Report, log_file: Path) -> None:
    """Loss and PSNR of a run, from its log."""
    log = [reading.json_value(line, nan=True) for line in reading.lines(log_file)]
    steps = [line for line in log if "loss" in line]
    psnr = {float(s): v for s, v in [x for x in log if "psnr" in x][-1]["psnr"].items()}
    text = (
        "Left: squared error per pixel, over noise levels drawn from the training density. Right: PSNR "
        "of held-out patches against the noise level; the distance to the dashed line is what the "
        "denoiser takes away."
    )
    with report.figure("Training", text, columns=2) as (left, right):
        plots.training_curve(left, [x["step"] for x in steps], [x["loss"] for x in steps])
        plots.psnr_against_sigma(right, psnr)


def pictures(report: Report, model: Any, images: Any, store: Any, sigma: float) -> None:
    """What the network does, and what its φ says of the images."""
    phi = store.array(sigma)
    _denoised(report, model, images)
    _neighbours(report, images, phi)
    _channels(report, images, phi)
    text = (
        f"PR of the channel means at σ = {sigma} (Fig. 1 of the paper): the fraction of channels that "
        "take part in one image's representation; median, quartiles, 5-95 % over patches."
    )
    with report.figure("Participation ratio per block", text, size=(7, 3.4)) as (ax,):
        blocks = {b: participation_ratio(store.array(sigma, b)) for b in store.blocks}
        plots.participation(ax, blocks)


def _denoised(report: Report, model: Any, images: Any) -> None:
    x = images.batch(np.arange(0, len(images), max(len(images) // 10, 1))[:10])
    rows, labels = [x], ["clean"]
    with torch.no_grad():
        for k, sigma in enumerate((0.1, 0.3, 0.6)):
            z = noise.normal(0, range(len(x)), noise.stream("evaluate", k), 1, x.shape[1:])
            noisy = x + sigma * z
            rows += [noisy, model(noisy)]
            labels += [f"σ = {sigma}", "denoised"]
    text = "Patches, with noise of three levels, and denoised. The network is not told σ."
    with report.figure("Denoising", text, size=(9, 6.5)) as (ax,):
        plots.images(ax, rows, labels)


def _neighbours(report: Report, images: Any, phi: np.ndarray) -> None:
    queries = distinct(phi, 5)
    text = (
        "First column: the query. Left: its nearest in φ (cosine). Right: its nearest in pixels. "
        "φ is expected to keep texture and colour, pixels the arrangement of light and dark."
    )
    with report.figure("Nearest neighbours", text, columns=2, size=(9, 4.2)) as axes:
        spaces: dict[str, Rows] = {"in φ": phi, "in pixels": Pixels(images)}
        for ax, (title, rows) in zip(axes, spaces.items(), strict=True):
            index, _ = nearest(rows[queries], rows, k=6)
            plots.images(ax, [images.batch(row) for row in index])
            ax.set_title(title)


def _channels(report: Report, images: Any, phi: np.ndarray) -> None:
    chosen = selectivity(phi, draws=1).specialised()
    strongest = chosen[np.argsort(-phi[:, chosen].max(axis=0), kind="stable")[:6]]
    rows = [images.batch(exciting(phi, int(c), 10)) for c in strongest]
    text = (
        "Each row: one of the most selective channels of φ (few patches excite it), and the ten patches "
        "that excite it most (Fig. 3)."
    )
    with report.figure("What excites a channel", text, size=(9, 5.2)) as (ax,):
        plots.images(ax, rows, [f"channel {c}" for c in strongest])


def reconstructions(report: Report, model: Any, clean: Tensor, result: Any) -> None:
    """Panels of targets and samples, and how alike they are."""
    samples = result.images.reshape(len(clean), -1, *result.images.shape[1:])
    text = (
        "In the frame, the target; round it, eight images sampled from noise so that their φ is the "
        "target's (Algorithms 1 and 2), each from its own noise: alike in colour, texture and rough "
        "layout, and never the same picture."
    )
    size = (2.6 * len(clean), 2.8)
    with report.figure("Images made from φ", text, len(clean), size=size) as axes:
        for ax, target, eight in zip(axes, clean, samples, strict=True):
            plots.reconstruction_panel(ax, target, eight)
    text = (
        "φ loss after matching over before (median over levels; matching stops at 0.01, near 1 it would "
        "have moved nothing); of the samples with their own target and with the other targets: cosine of "
        "φ and correlation of the pictures reduced to 8 × 8; and root mean square distance of pixels, "
        "in [0, 1]."
    )
    header = ["", "loss", "cosine of φ", "(others)", "layout", "(others)", "between samples"]
    report.table("Similar, not identical", text, header, _rows(model, clean, samples, result))


def _rows(model: Any, clean: Tensor, samples: Tensor, result: Any) -> list[list[str]]:
    alike, k = likeness(model, clean, samples), samples.shape[1]
    ratio = (result.losses_last / result.losses_first).double().reshape(-1, len(clean), k)
    rows = []
    for i in range(len(clean)):
        own = slice(k * i, k * i + k)
        compared = (alike.cosine, alike.cosine_other, alike.layout, alike.layout_other)
        loss = float(ratio[:, i].nanmedian())
        values = [loss, *(float(v[own].mean()) for v in compared), float(alike.between[i])]
        rows.append([f"target {i + 1}", *(f"{v:.3f}" for v in values)])
    return rows
