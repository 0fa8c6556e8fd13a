"""What makes φ informative soonest: recipes of training at equal compute (issue 24).

    python benchmarks/recipe_study.py --queue      # every recipe in turn; the same command goes on
    python benchmarks/recipe_study.py --run muon   # one of them
    python benchmarks/recipe_study.py --table      # what there is so far, as Markdown

Each gets 30 minutes of one thread's CPU time on the processor where the study began (an AVX-512 Xeon);
on another, --budget says the time in which `base` makes as many steps there (a row keeps its budget: on
an AVX2 EPYC 4170 s, 2.3 times as much). Measured at 25, 50 and 100 % of it on natural64's 2,000
test images, and on 10,000 of its training images (their labels are not used in training), where the
standard error is far smaller. The packs: fastphi pack natural64.npz DATA/natural64-train (and -test,
with --split test). Results: a line per measurement in OUT/results.jsonl, all of them in RESULTS.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe_training import Recipe, Training

import fastphi
from fastphi import data
from fastphi.analysis.common import standard_error
from fastphi.analysis.neighbours import label_agreement
from fastphi.analysis.probe import probe
from fastphi.analysis.selectivity import faint_channels
from fastphi.analysis.sparsity import participation_ratio
from fastphi.analysis.stability import stability
from fastphi.checkpoint import save
from fastphi.phi.chunk import Job, Means, means_of
from fastphi.support import files, reading
from fastphi.train import psnr
from fastphi.unet import UNet

BUDGET = 1800.0  # seconds of CPU time
SHARES = (0.25, 0.5, 1.0)
FAILED = -1.0  # the share of a run whose loss was not finite
LOWEST = 1 / 255  # σ, where it cannot be 0

RECIPES = {
    "base": Recipe(),
    "paper-gains": Recipe(gain=None),
    "muon": Recipe(optimizer="muon"),
    "crops-first": Recipe(first="crops"),
    "weighted": Recipe(weighted=True, sigma_min=LOWEST),
    "narrow": Recipe(channels=(8, 16, 32, 64)),
    "three-levels": Recipe(channels=(16, 32, 64)),
    "wide": Recipe(channels=(32, 64, 128, 256)),
    "base-seed-1": Recipe(seed=1),
    "log-uniform": Recipe(density="log-uniform", sigma_min=LOWEST),
    "muon-0.05": Recipe(optimizer="muon", muon_lr=0.05),
    "lr-3e-3": Recipe(lr=3e-3),
    "decoder-shallow": Recipe(dec_layers=(2, 1, 1)),  # the last block has no fewer
    "batch-64": Recipe(batch=64),
    "means-first": Recipe(first="means"),
    "uniform": Recipe(density="uniform"),
}

# --- measuring -----------------------------------------------------------------------------------

SIGMAS = (0.03, 0.1, 0.2, 0.5, 1.0)  # of PSNR
SIGMA = 0.1  # of φ
LEVELS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)  # of stability, against 0.5
PSNR_IMAGES, STABILITY_IMAGES, TRAINING_IMAGES = 500, 100, 10_000
DRAWS, TRAINING_DRAWS, STABILITY_DRAWS = 8, 2, 20


def measure(model: UNet, training: data.Images, test: data.Images) -> dict[str, Any]:
    """All that the study compares, of a network in float32."""
    phi = means(model, test, len(test), SIGMA, DRAWS)["mid"]
    seen = means(model, training, TRAINING_IMAGES, SIGMA, TRAINING_DRAWS)["mid"]
    assert test.labels is not None and training.labels is not None
    labels = training.labels[:TRAINING_IMAGES]
    found = {
        "psnr": psnr(model, test, SIGMAS, indices=np.arange(PSNR_IMAGES)),
        "hits": hits(phi, test.labels),
        "training_hits": hits(seen, labels),
        "probe": probe(seen, labels).accuracy["φ"],
        "cosine": between(phi),
        "participation": float(np.nanmedian(participation_ratio(phi))),
        "dead": float((np.ptp(phi, axis=0) == 0).mean()),
        "faint": faint_channels(phi) / phi.shape[1],
        "phi_mean": float(phi.mean()),
    }
    return found | {"stability": stabilities(model, test)}


def means(
    model: UNet, images: data.Images, n: int, sigma: float, draws: int, *, every: bool = False
) -> Means:
    """E_z[ā] of the first n images: {block: (n, C)}, of the middle block or of every one."""
    blocks = model.config.block_names if every else ("mid",)
    job = Job(model, images, np.arange(n), blocks, draws, 0, torch.float32, False)
    parts = [means_of(job, sigma, rows) for rows in np.array_split(np.arange(n), -(-n // 100))]
    return {block: np.concatenate([part[block] for part in parts]) for block in blocks}


def hits(phi: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of same-class images among the ten nearest by cosine: of φ with each channel standardised,
    centred, and as it is; `se` of the first."""
    centred = phi - phi.mean(axis=0, dtype=np.float64)
    scale = centred.std(axis=0)
    spaces = {
        "standardised": centred / np.where(scale > 0, scale, 1),
        "centred": centred,
        "plain": phi,
    }
    shares = {name: _shares(rows, labels) for name, rows in spaces.items()}
    found = {name: float(np.nanmean(values)) for name, values in shares.items()}
    return found | {"se": standard_error(shares["standardised"])}


def _shares(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,), some queries at a time: their cosines with all others are held at once."""
    parts = np.array_split(np.arange(len(rows)), -(-len(rows) // 1000))
    return np.concatenate(
        [label_agreement(rows, labels, queries=part).shares["φ"] for part in parts]
    )


def between(phi: np.ndarray) -> float:
    """Mean cosine over all pairs of different images; rows of zeros left out."""
    length = np.linalg.norm(phi.astype(np.float64), axis=1, keepdims=True)
    unit = (phi / np.where(length > 0, length, 1))[length[:, 0] > 0]
    n = len(unit)
    return float((np.square(unit.sum(axis=0)).sum() - n) / (n * (n - 1))) if n > 1 else float("nan")


def stabilities(model: UNet, test: data.Images) -> dict[str, Any]:
    """Mean cosine of ā at σ with ā at 0.5 per block, of an image with itself and with another."""
    levels = {
        sigma: means(model, test, STABILITY_IMAGES, sigma, STABILITY_DRAWS, every=True)
        for sigma in LEVELS
    }
    result = stability(levels)
    kinds = {
        kind: {b: float(np.nanmean(v)) for b, v in result.over_levels(kind).items()}
        for kind in ("same", "other")
    }
    return kinds | {"most_stable": result.shown}


# --- the queue -----------------------------------------------------------------------------------


class Study:
    """Runs in `out`, results there and, whole after every measurement, in the file `results`."""

    def __init__(self, packs: Path, out: Path, results: Path, budget: float) -> None:
        self.training = data.open_images(packs / "natural64-train")
        self.test = data.open_images(packs / "natural64-test")
        self.out, self.results, self.budget = out, results, budget
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.lines.exists() and results.exists():  # of a machine that is gone
            known = reading.json(results, "results")["rows"]
            self.lines.write_text("".join(json.dumps(row) + "\n" for row in known))

    @property
    def lines(self) -> Path:
        return self.out / "results.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        text = self.lines.read_text() if self.lines.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def _missing(self, name: str, share: float) -> bool:
        return all((row["run"], row["share"]) != (name, share) for row in self.rows())

    def _add(self, name: str, share: float, model: UNet, **facts: Any) -> None:
        began = time.process_time()
        measured = measure(model, self.training, self.test)
        size = sum(p.numel() for p in model.parameters())
        row = {"run": name, "share": share, "parameters": size, **facts, **measured}
        row["measuring_seconds"] = time.process_time() - began
        self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        with self.lines.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print(time.strftime("%H:%M"), json.dumps(row), flush=True)
        self.publish()

    def publish(self) -> None:
        facts = {"fastphi": fastphi.__version__, "torch": torch.__version__, "threads": 1}
        recipes = {name: asdict(recipe) for name, recipe in RECIPES.items()}
        about = {"machine": facts, "budget_seconds": BUDGET, "recipes": recipes}
        try:
            files.write_json(self.results, about | {"rows": self.rows()})
        except OSError as error:  # the tree may be away for a moment; the lines are safe
            print(f"{self.results} was not written: {error}", flush=True)

    def run(self, name: str) -> None:
        recipe, folder = RECIPES[name], self.out / name
        if not self._missing(name, SHARES[-1]) or not self._missing(name, FAILED):
            return
        training = Training(recipe, self.training, folder, self.budget)
        for share in SHARES:
            try:
                training.run(share)
            except FloatingPointError as error:
                self._append({"run": name, "share": FAILED, "failed": str(error)})
                return
            model = training.averaged()
            if self._missing(name, share):
                save(model, folder / f"model-{round(100 * share)}.safetensors")
                facts = {"seconds": training.seconds, "images": training.seen}
                facts["budget"] = self.budget
                losses = training.losses[-20:]
                self._add(name, share, model, steps=training.steps, losses=losses, **facts)

    def yardsticks(self) -> None:
        """Networks that were not trained here: fresh ones, and the one that comes with fastphi."""
        for name in ("base", "paper-gains", "wide"):
            if self._missing(f"untrained {name}", 0.0):
                fresh = RECIPES[name].network().eval().requires_grad_(False)
                self._add(f"untrained {name}", 0.0, fresh)
        if self._missing("natural64-small", 0.0):
            self._add("natural64-small", 0.0, fastphi.load_pretrained("natural64-small"))


# --- the table -----------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown, in order of measurement."""
    head = ["recipe", "compute", "images", *(f"PSNR {s:g}" for s in SIGMAS)]
    head += ["hits", "centred", "training hits", "probe", "cosine", "PR", "dead", "faint"]
    head += ["stability (other)", "most stable"]
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        if "failed" in row:
            yield f"| {row['run']} | {row['failed']} |"
            continue
        cells = [row["run"], f"{row['share']:.0%}", f"{row.get('images', 0):,}"]
        cells += [f"{v:.2f}" for v in row["psnr"].values()]
        h, t, s = row["hits"], row["training_hits"], row["stability"]
        cells += [f"{h['standardised']:.4f} ± {h['se']:.4f}", f"{h['centred']:.4f}"]
        cells += [f"{t['standardised']:.4f} ± {t['se']:.4f}", f"{row['probe']:.3f}"]
        cells += [f"{row['cosine']:.4f}", f"{row['participation']:.3f}"]
        cells += [f"{row['dead']:.0%}", f"{row['faint']:.0%}"]
        cells += [f"{s['same']['mid']:.3f} ({s['other']['mid']:.3f})"]
        cells += ["yes" if s["most_stable"] else "no"]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queue", action="store_true", help="yardsticks and every recipe, in turn")
    parser.add_argument("--run", choices=RECIPES, help="one recipe")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--data", type=Path, default=Path("/root/training/data"))
    parser.add_argument("--out", type=Path, default=Path("/root/training/runs"))
    results = Path("/work/main/benchmarks/results/recipe_study.json")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of CPU time")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table(reading.json(options.results, "results")["rows"])))
        return
    torch.set_num_threads(1)
    study = Study(options.data, options.out, options.results, options.budget)
    if options.queue:
        study.yardsticks()
    for name in RECIPES if options.queue else [options.run] if options.run else []:
        with files.locked(options.out / name, "out"):
            study.run(name)


if __name__ == "__main__":
    main()
