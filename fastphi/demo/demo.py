"""`make demo`: photographs, denoised; φ of their patches, neighbours in it, and new images made from it.

The denoiser is the one that comes with fastphi, which has seen neither of the photographs; `--train`
trains a smaller one on them instead, on smaller patches, so that one can wait for it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastphi
from fastphi import targets
from fastphi.analysis.neighbours import distinct
from fastphi.demo import patches, report
from fastphi.support.html import Report

SIGMA = 0.2  # noise level at which φ is compared
COPIES = 8  # samples of each target: a panel
SIZE, TRAINED_SIZE = 64, 32  # pixels of a patch: with the network that ships, with one trained here
# One resolution fewer and a short decoder: in the same minutes a deeper network's middle block stays
# nearly the same for all images, and matching it says nothing.
NETWORK = fastphi.UNetConfig(channels=(16, 32, 64), dec_layers=(3, 3))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastphi.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write")
    parser.add_argument(
        "--data", type=Path, help="a folder of photographs (default: scikit-learn's)"
    )
    parser.add_argument(
        "--train",
        type=int,
        default=0,
        metavar="STEPS",
        help="train a small network on the photographs for so many steps of 16 patches, 4500 for "
        "instance, some minutes (default: use natural64-small, which comes with fastphi)",
    )
    parser.add_argument("--targets", type=int, default=4, help="patches to reconstruct")
    parser.add_argument("--levels", type=int, default=40, help="noise levels of a reconstruction")
    arguments = parser.parse_args()
    try:
        run(
            arguments.out,
            arguments.data,
            train=arguments.train,
            count=arguments.targets,
            levels=arguments.levels,
        )
    except (ValueError, TypeError, OSError) as error:
        print(f"fastphi demo: error: {error}", file=sys.stderr)
        sys.exit(2)


def run(
    out: Path, folder: Path | None, *, train: int = 0, count: int = 4, levels: int = 40
) -> None:
    """The whole demo, into `out`. train: steps, 0 for the network that ships; count: targets."""
    started = time.perf_counter()
    with _step("pack", "cutting photographs into patches", "5 s"):
        if train:
            seen, images, name = patches.apart(out, folder, TRAINED_SIZE)
        else:
            images, name = patches.whole(out, folder, SIZE)
    if train:
        with _step("train", f"{train} steps of 16 patches on {name}", "3 min for 4500 steps"):
            model = _train(out, train, seen, images)
    else:
        model = fastphi.load_pretrained("natural64-small")
    with _step("extract", f"φ of {len(images)} patches, all blocks", "10 s"):
        store = fastphi.extract(
            model, images, out / "phi", sigmas=[SIGMA], draws=4, blocks="all", progress=True
        )
    clean = images.batch(_targets(images, store.array(SIGMA), count))
    with _step("reconstruct", f"{COPIES} samples for each of {count} targets", "90 s"):
        result = fastphi.reconstruct(
            model,
            targets.from_images(model, clean, draws=10, copies=COPIES),
            sigmas=(1.0, 0.03, levels),
            progress=True,
            save=out / "reconstruction.npz",
        )
    with _step("report", "drawing", "5 s"):
        page = Report("fastphi demo", _introduction(model, name, train))
        if train:
            report.training(page, out / "model" / "log.jsonl")
        report.pictures(page, model, images, store, SIGMA)
        report.reconstructions(page, model, clean, result)
        minutes = (time.perf_counter() - started) / 60
        page.write(out / "report.html", f"fastphi {fastphi.__version__}, {minutes:.1f} minutes.")
    print(f"\nDone in {minutes:.1f} min. Open {out / 'report.html'}")


def _introduction(model: fastphi.UNet, name: str, train: int) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    if train:
        return (
            f"A blind denoiser of {parameters:,} parameters, trained for {train} steps on patches of "
            f"{name}; everything below is on a strip of the photographs that it has not seen. The "
            "paper's network has eighty times as many parameters, and its training took thousands of "
            "times as long: read this as the path, not as the result."
        )
    return (
        f"natural64-small, a blind denoiser of {parameters:,} parameters trained with fastphi on 20,000 "
        f"small natural images, applied to patches of {name}, which it has never seen. It was taught to "
        "remove noise and nothing else: no labels, no text. The paper's network is 36 times as large."
    )


@contextmanager
def _step(name: str, what: str, duration: str) -> Iterator[None]:
    print(f"\n== {name}: {what} (about {duration} on two cores)", flush=True)
    start = time.perf_counter()
    yield
    print(f"   done in {time.perf_counter() - start:.0f} s", flush=True)


def _train(out: Path, steps: int, seen: Any, heldout: Any) -> fastphi.UNet:
    from fastphi.train import TrainConfig, Trainer

    config = TrainConfig(
        data=seen.path,
        heldout=heldout.path,
        out=out / "model",
        model=NETWORK,
        amp="off",  # the compiled engine is as fast in float32
        max_steps=steps,
        batch=16,  # many small steps: what a few minutes allow
        lr=2e-3,
        lr_halve_every=2,
        evaluate_every=max(steps // 5, 1),
        checkpoint_every=max(steps // 5, 1),
    )
    return Trainer(config).run(progress=True)


def _targets(images: Any, phi: np.ndarray, n: int) -> np.ndarray:
    """n patches far apart in φ, of the half with more contrast: a bare sky shows nothing."""
    contrast = images.batch(np.arange(len(images))).std(dim=(1, 2, 3))
    rich = torch.argsort(contrast, descending=True)[: max(len(images) // 2, n)].sort()[0].numpy()
    return rich[distinct(phi[rich], n)]
