"""The page of a study: figures in the paper's order, each with its definition, numbers and verdicts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastphi import __version__
from fastphi.analysis.channels import STATISTICS
from fastphi.analysis.neighbours import nearest
from fastphi.analysis.rows import Rows
from fastphi.analysis.selectivity import exciting, pictured, top_channels
from fastphi.analysis.subspaces import components
from fastphi.study.claims import judge
from fastphi.study.material import Material
from fastphi.study.stages import clusters_of, groups_of
from fastphi.support import files, plots
from fastphi.support.html import Report

_COLUMNS = ["claim of the paper, with its value where it gives one", "found here", "verdict"]


def write(study: Material, results: Mapping[str, Any]) -> Path:
    """report.html, figures/*.png and *.pdf, numbers.json in the study's folder; returns the page."""
    verdicts = judge(results)
    numbers = {name: result.numbers() for name, result in results.items()}
    files.write_json(study.out / "numbers.json", {"verdicts": verdicts, "results": numbers})
    report = Report("fastphi analyze", _introduction(study), study.out / "figures")
    report.table(
        "Verdicts",
        "Each claim of the paper with what was found here. The rules were fixed beforehand "
        "(docs/reproduction.md): reproduced, weaker (the effect has the paper's direction, but a control "
        "or a threshold is missed), or not reproduced.",
        _COLUMNS,
        [[v["claim"], v["found"], v["verdict"]] for v in verdicts],
        words=True,
    )
    for heading, needs, draw in _SECTIONS:
        if needs not in results:
            continue
        result = results[needs]
        draw(report, heading, study, result, _definition(result))
        rows = [[v["claim"], v["found"], v["verdict"]] for v in judge({needs: result})]
        if rows:
            report.table("", "", _COLUMNS, rows, words=True)
    page = study.out / "report.html"
    report.write(page, f"fastphi {__version__}; every number is in numbers.json.")
    return page


def _introduction(study: Material) -> str:
    count = sum(p.numel() for p in study.model.parameters())
    info, s = study.model.training_info, study.settings
    return (
        f"A denoiser of {count:,} parameters ({info.steps:,} steps on {info.data or 'unnamed data'}), on "
        f"{len(study.rows):,} images of {study.images.shape[1]} × {study.images.shape[2]} pixels "
        f"({len(study.few)} of them where every block is needed). φ is the middle block's mean at "
        f"σ = {s.sigma:g}, {s.draws} draws of noise, unless said otherwise. Figure numbers are those of "
        "arXiv 2506.01912."
    )


def _definition(result: Any) -> str:
    """The words of the result's class, where it is calculated, without the shapes of arrays."""
    text = re.sub(r"\s+", " ", inspect.getdoc(result) or "").replace("`", "")
    text = re.sub(r"[:,]? ?\{[^{}]*(\{[^{}]*\})?[^{}]*\}", "", text)
    return re.sub(r"[:,]? ?\(\w*,( ?[\w+ ]+)?\)|[:,]? ?\(\w·\w,\)", "", text)


# --- figures --------------------------------------------------------------------------------------

Draw = Callable[[Report, str, Material, Any, str], None]


def _plain(size: tuple[float, float] = (7.5, 3.8)) -> Draw:
    def draw(report: Report, heading: str, study: Material, result: Any, text: str) -> None:
        with report.figure(heading, text, size=size) as (ax,):
            result.plot(ax)

    return draw


def _selectivity(report: Report, heading: str, study: Material, result: Any, text: str) -> None:
    with report.figure(heading, text, size=(7.5, 3.6)) as (ax,):
        result.plot(ax)
    few, many = pictured(study.phi)[:6], result.common()[:6]
    about = "Each row: a channel, not nearly dead, and the ten images that excite it most."
    with report.figure("Most exciting images", about, columns=2, size=(10, 3.8)) as axes:
        for ax, name, chosen in zip(axes, ("specialised", "common"), (few, many), strict=True):
            rows = [study.images.batch(study.rows[exciting(study.phi, int(c), 10)]) for c in chosen]
            plots.images(ax, rows, [str(c) for c in chosen])
            ax.set_title(f"{name} channels")
    about = "First column: an image. Beside it, for each of its four strongest specialised channels, the "
    about += "three images that excite the channel most (Fig. 4)."
    with report.figure("An image by its channels", about, size=(9, 3.2)) as (ax,):
        rows, among = [], pictured(study.phi)
        for row in study.target_rows[:4]:
            strongest = top_channels(study.phi, int(row), among, 4)
            shown = [exciting(study.phi, int(c), 3) for c in strongest]
            rows.append(study.images.batch(study.rows[np.concatenate([[row], *shown])]))
        plots.images(ax, rows)


def _channels(report: Report, heading: str, study: Material, result: Any, text: str) -> None:
    measured = [name for name in STATISTICS if len(getattr(result, name))]
    half = (len(measured) + 1) // 2
    for part, names in enumerate((measured[:half], measured[half:])):
        title, about = (heading, text) if part == 0 else (f"{heading}, continued", "")
        with report.figure(title, about, len(names), size=(10, 3.2)) as axes:
            for ax, name in zip(axes, names, strict=True):
                result.plot(ax, name)


def _subspaces(report: Report, heading: str, study: Material, result: Any, text: str) -> None:
    queries = study.target_rows[:2]
    chosen, sets = components(study.phi, queries, min(50, len(study.phi) // 4))
    with report.figure(heading, text, columns=2, size=(9, 3.6)) as (left, right):
        for k, points in enumerate(sets):
            left.plot(points[:, 0], points[:, 1], ".", color=f"C{k}", label=f"round image {k + 1}")
        left.set(xlabel=f"φ[{chosen[0]}]", ylabel=f"φ[{chosen[1]}]")
        left.legend(frameon=False)
        result.plot(right)


def _neighbour_pictures(
    report: Report, heading: str, study: Material, result: Any, text: str
) -> None:
    queries = study.target_rows[:6]
    about = (
        "First column: the query. Left: its nearest in φ (cosine). Right: its nearest in pixels."
    )
    with report.figure("Nearest neighbours (Fig. 14)", about, columns=2, size=(10, 4.6)) as axes:
        spaces: dict[str, Rows] = {"in φ": study.phi, "in pixels": study.pixels}
        for ax, (title, rows) in zip(axes, spaces.items(), strict=True):
            index, _ = nearest(rows[queries], rows, k=7)
            plots.images(ax, [study.images.batch(study.rows[row]) for row in index])
            ax.set_title(title)


def _map(report: Report, heading: str, study: Material, result: Any, text: str) -> None:
    own = clusters_of(study)
    biggest = np.argsort(-np.bincount(own))[:10]
    with report.figure(heading, text, columns=2, size=(11, 5)) as (left, right):
        for k, cluster in enumerate(biggest):
            at = result.places[own == cluster]
            left.plot(at[:, 0], at[:, 1], ".", ms=4, color=f"C{k}")
        left.set(xticks=[], yticks=[], title="t-SNE of the ten largest clusters")
        rng = np.random.default_rng(0)
        rows = [
            study.images.batch(study.rows[rng.permutation(np.flatnonzero(own == c))[:10]])
            for c in biggest[:8]
        ]
        plots.images(right, rows)
        right.set_title("random members, one cluster per row")


def _likeness(report: Report, heading: str, study: Material, result: Any, text: str) -> None:
    count = min(4, len(study.targets))
    about = "In the frame, the target; round it, eight samples with its φ (Algorithms 1 and 2)."
    if study.settings.copies == 8:
        size = (2.6 * count, 2.8)
        with report.figure("Reconstructions (Fig. 7)", about, count, size=size) as axes:
            for ax, target, eight in zip(axes, study.targets, study.samples, strict=False):
                plots.reconstruction_panel(ax, target, eight)
    _plain()(report, heading, study, result, text)


_MADE_OF = {
    "clusters": "Members of two clusters, and samples from their centroid in φ",
    "classes": "Images of two labelled classes, and samples from their centroid in φ",
    "pairs": "Two images, and samples from the union of their features (the larger of the two, "
    "channel by channel)",
}


def _generation(report: Report, heading: str, study: Material, result: Any, text: str) -> None:
    _plain((7.5, 3.6))(report, heading, study, result, text)
    about = "Images from noise by the denoiser alone, without a target."
    with report.figure("Unconditional samples", about, size=(9, 2.6)) as (ax,):
        plots.images(ax, [result.prior[:8], result.prior[8:]])
    groups = groups_of(study)
    for kind, samples in result.samples.items():
        rows, labels = [], []
        for members, made in zip(groups[kind], samples, strict=True):
            rows += [study.images.batch(study.rows[members[:8]]), made]
            labels += ["images", "samples"]
        size = (9.0, 1.1 * len(rows) + 0.3)
        with report.figure(f"Samples from {kind}", _MADE_OF[kind] + ".", size=size) as (ax,):
            plots.images(ax, rows, labels)


def _memorisation(report: Report, heading: str, study: Material, result: Any, text: str) -> None:
    _plain()(report, heading, study, result, text)
    about = "Above, one sample of each target; below, the training image nearest to it."
    copies = study.settings.copies
    with report.figure("Nearest training images", about, size=(9, 2.6)) as (ax,):
        nearest_ones = study.training.batch(result.index[::copies])  # type: ignore[union-attr]
        plots.images(ax, [study.samples[:, 0], nearest_ones], ["sample", "nearest"])


_SECTIONS: tuple[tuple[str, str, Draw], ...] = (
    ("Sparsity of channel averages (Fig. 1)", "sparsity", _plain()),
    ("Stability across noise levels (Fig. 2)", "stability", _plain((7.5, 4.2))),
    ("Selectivity of channels (Fig. 3)", "selectivity", _selectivity),
    ("Union of subspaces (Fig. 5)", "subspaces", _subspaces),
    ("Clusters (Fig. 6)", "clusters", _plain()),
    ("Map of φ (Fig. 6)", "map", _map),
    ("Likeness of reconstructions (Fig. 7)", "likeness", _likeness),
    ("Samples from more than one image (Fig. 17-19)", "generation", _generation),
    ("Divergence of conditional densities (Fig. 8)", "divergence", _plain((6, 4))),
    ("Specialised channels (Fig. 13)", "channels", _channels),
    ("Neighbours", "map", _neighbour_pictures),
    ("Labels of neighbours (Fig. 14)", "neighbours", _plain((6.5, 3.4))),
    ("Clusters found again (Fig. 15, 16)", "agreement", _plain((6.5, 3.4))),
    ("Memorisation (Fig. 17-19)", "memorisation", _memorisation),
    ("Shifts (Fig. 18)", "shifts", _plain((6.5, 3.6))),
    ("Decoding position (Fig. 18)", "decoding", _plain((6.5, 3.4))),
    ("Noise level before and after matching (Fig. 20)", "noise_level", _plain((6, 3.6))),
    ("Linear probe", "probe", _plain((6.5, 3.4))),
)
