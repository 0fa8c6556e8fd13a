"""`make demo`: from photographs to a trained denoiser, φ, neighbours and reconstructions, in minutes.

A small network on small patches, so that two cores do it while one waits: it shows the path, not the
paper's quality. One resolution fewer and a short decoder: in the same minutes a deeper network's middle
block stays nearly the same for all images, and matching it says nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastphi
from fastphi import noise, plots, targets
from fastphi.analysis.neighbours import nearest
from fastphi.analysis.sparsity import participation_ratio
from fastphi.report import Report

SIZE = 32  # pixels: the network's receptive field sees all of it
SIGMA = 0.2  # noise level at which φ is compared
NETWORK = fastphi.UNetConfig(channels=(16, 32, 64), dec_layers=(3, 3))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastphi.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write")
    parser.add_argument(
        "--data", type=Path, help="a folder of photographs (default: scikit-learn's)"
    )
    parser.add_argument("--steps", type=int, default=4500, help="training steps of 16 patches")
    arguments = parser.parse_args()
    try:
        run(arguments.out, arguments.data, arguments.steps)
    except (ValueError, TypeError, OSError) as error:
        print(f"fastphi demo: error: {error}", file=sys.stderr)
        sys.exit(2)


def run(out: Path, folder: Path | None, steps: int) -> None:
    started = time.perf_counter()
    with _step("1/5 pack", "cutting photographs into patches", "5 s"):
        train, heldout, name = _patches(out, folder)
    with _step("2/5 train", f"{steps} steps of 16 patches on {name}", "3 min"):
        model = _train(out, steps, name)
    with _step("3/5 extract", f"phi of {len(heldout)} held-out patches, all blocks", "2 s"):
        store = fastphi.extract(
            model, heldout, out / "phi", sigmas=[SIGMA], draws=4, blocks="all", progress=True
        )
    with _step("4/5 reconstruct", "8 samples for each of 3 targets, schedule form", "1 min"):
        chosen = _distinct(store, 3)
        clean = heldout.batch(chosen)
        result = fastphi.reconstruct(
            model,
            targets.from_images(model, clean, draws=10, copies=8),
            size=SIZE,
            sigmas=(1.0, 0.03, 60),
            max_iter=100,
            progress=True,
            save=out / "reconstruction.npz",
        )
    with _step("5/5 report", "drawing", "5 s"):
        report = _report(out, model, heldout, store, clean, result, name)
        minutes = (time.perf_counter() - started) / 60
        report.write(out / "report.html", f"fastphi {fastphi.__version__}, {minutes:.1f} minutes.")
    print(f"\nDone in {minutes:.1f} min. Open {out / 'report.html'}")


@contextmanager
def _step(name: str, what: str, duration: str) -> Iterator[None]:
    print(f"\n== {name}: {what} (about {duration} on two cores)", flush=True)
    start = time.perf_counter()
    yield
    print(f"   done in {time.perf_counter() - start:.0f} s", flush=True)


def _patches(out: Path, folder: Path | None) -> tuple[Any, Any, str]:
    """Packs of training and held-out patches that share no pixel: a strip of each is kept."""
    if folder is not None:
        photographs, name = _photographs(folder), str(folder)
    else:
        from sklearn.datasets import load_sample_images

        photographs, name = list(load_sample_images().images), "scikit-learn's two photographs"
    rng = np.random.default_rng(0)
    seen: dict[str, list[np.ndarray]] = {"train": [], "heldout": []}
    for photograph in photographs:
        for scaled in (photograph, _half(photograph)):
            cut = int(scaled.shape[1] * 0.8)
            seen["train"] += _grid(scaled[:, :cut], SIZE // 4)
            seen["heldout"] += _grid(scaled[:, cut:], SIZE // 2)
    packs = {}
    for split, most in (("train", 20_000), ("heldout", 256)):
        if len(seen[split]) < 64:
            raise ValueError(
                f"data: {len(seen[split])} patches of {SIZE} pixels for {split}, expected at least "
                f"64: give more or larger photographs than are in {name}"
            )
        order = rng.permutation(len(seen[split]))[:most]
        array = out / f"{split}.npy"
        array.parent.mkdir(parents=True, exist_ok=True)
        np.save(array, np.stack([seen[split][i] for i in order]))
        packs[split] = fastphi.pack(array, out / f"{split}-pack", size=SIZE, progress=False)
        array.unlink()
        print(f"   {split}: {len(packs[split])} patches")
    return packs["train"], packs["heldout"], name


def _photographs(folder: Path) -> list[np.ndarray]:
    """The first hundred photographs below a folder, each (H, W, 3) uint8, at most 1024 pixels wide."""
    from PIL import Image, ImageOps

    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else ():
        try:
            with Image.open(path) as opened:
                photograph = ImageOps.exif_transpose(opened).convert("RGB")
        except OSError as error:
            print(f"   {path} passed over: {error}")
            continue
        photograph.thumbnail((1024, 1024))
        found.append(np.asarray(photograph))
        if len(found) == 100:
            break
    if not found:
        raise ValueError(f"data: {folder} is not a folder with a readable photograph in it")
    return found


def _half(photograph: np.ndarray) -> np.ndarray:
    h, w = (n // 2 * 2 for n in photograph.shape[:2])
    mean = photograph[:h, :w].reshape(h // 2, 2, w // 2, 2, -1).mean(axis=(1, 3))
    return np.round(mean).astype(np.uint8)


def _grid(photograph: np.ndarray, stride: int) -> list[np.ndarray]:
    h, w = photograph.shape[:2]
    return [
        photograph[y : y + SIZE, x : x + SIZE]
        for y in range(0, h - SIZE + 1, stride)
        for x in range(0, w - SIZE + 1, stride)
    ]


def _train(out: Path, steps: int, name: str) -> fastphi.UNet:
    from fastphi.train import TrainConfig, Trainer

    config = TrainConfig(
        data=out / "train-pack",
        heldout=out / "heldout-pack",
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


def _distinct(store: Any, n: int) -> np.ndarray:
    """n images far apart in φ, greedily: the first is the one with the largest φ."""
    phi = np.asarray(store.array(SIGMA), np.float64)
    unit = phi / np.linalg.norm(phi, axis=1, keepdims=True)
    chosen = [int(np.linalg.norm(phi, axis=1).argmax())]
    while len(chosen) < n:
        chosen.append(int((unit @ unit[chosen].T).max(axis=1).argmin()))
    return np.array(chosen)


def _report(
    out: Path, model: Any, heldout: Any, store: Any, clean: Any, result: Any, name: str
) -> Report:
    report = Report(
        "fastphi demo",
        f"A blind denoiser of {sum(p.numel() for p in model.parameters()):,} parameters, trained for a "
        f"few minutes on {SIZE} x {SIZE} patches of {name}; everything below is on a strip of the "
        "photographs that it has not seen. The paper's network has eighty times as many parameters, its "
        "training took thousands of times as long: read this as the path, not as the result.",
    )
    log = [json.loads(line) for line in (out / "model" / "log.jsonl").read_text().splitlines()]
    training = [line for line in log if "loss" in line]
    psnr = {float(s): v for s, v in [x for x in log if "psnr" in x][-1]["psnr"].items()}
    with report.figure(
        "Training",
        "Left: squared error per pixel, over noise levels drawn from the training density. Right: PSNR "
        "of held-out patches against the noise level; the distance to the dashed line is what the "
        "denoiser takes away.",
        columns=2,
    ) as (left, right):
        plots.training_curve(left, [x["step"] for x in training], [x["loss"] for x in training])
        plots.psnr_against_sigma(right, psnr)
    _denoised(report, model, heldout)
    _neighbours(report, heldout, store)
    _reconstructions(report, model, clean, result)
    with report.figure(
        "Participation ratio per block",
        f"PR of the channel means at sigma {SIGMA} (Fig. 1 of the paper): the fraction of channels that "
        "take part in one image's representation.",
        size=(7, 3.4),
    ) as (ax,):
        blocks = {b: participation_ratio(store.array(SIGMA, b)) for b in store.blocks}
        plots.participation(ax, blocks)
    return report


def _denoised(report: Report, model: Any, heldout: Any) -> None:
    images = heldout.batch(np.arange(0, len(heldout), max(len(heldout) // 10, 1))[:10])
    rows, labels = [images], ["clean"]
    with torch.no_grad():
        for k, sigma in enumerate((0.1, 0.3, 0.6)):
            z = noise.normal(
                0, range(len(images)), noise.stream("evaluate", k), 1, images.shape[1:]
            )
            noisy = images + sigma * z
            rows += [noisy, model(noisy)]
            labels += [f"σ = {sigma}", "denoised"]
    text = "Held-out patches, with noise of three levels, and denoised. The network is not told σ."
    with report.figure("Denoising", text, size=(9, 6.5)) as (ax,):
        plots.images(ax, rows, labels)


def _neighbours(report: Report, heldout: Any, store: Any) -> None:
    queries = _distinct(store, 5)
    pixels = heldout.batch(np.arange(len(heldout))).reshape(len(heldout), -1).numpy()
    phi = store.array(SIGMA)
    text = (
        "First column: the query. Left: its nearest in φ (cosine). Right: its nearest in pixels. "
        "φ is expected to keep texture and colour, pixels the arrangement of light and dark."
    )
    with report.figure("Nearest neighbours", text, columns=2, size=(9, 4.2)) as axes:
        for ax, rows, title in zip(axes, (phi, pixels), ("in φ", "in pixels"), strict=True):
            index, _ = nearest(rows[queries], rows, k=6)
            plots.images(ax, [heldout.batch(row) for row in index])
            ax.set_title(title)


def _reconstructions(report: Report, model: Any, clean: Any, result: Any) -> None:
    samples = result.images.reshape(len(clean), 8, *result.images.shape[1:])
    text = (
        "In the frame, the target; round it, eight images sampled with matching to the target's φ "
        "(Algorithms 1 and 2), each from its own noise: expect the target's kind of texture, contrast and "
        "brightness, elsewhere in the picture. The table tells how far matching got: a loss ratio of 0.01 "
        "is where it stops; near 1 it would have moved nothing."
    )
    with report.figure("Reconstruction from φ", text, len(clean), size=(9, 3.4)) as axes:
        for ax, target, eight in zip(axes, clean, samples, strict=True):
            plots.reconstruction_panel(ax, target, eight)
    rows = []
    for i, (target, eight) in enumerate(zip(clean, samples, strict=True)):
        with torch.no_grad():
            cosine = torch.cosine_similarity(model.phi(eight), model.phi(target[None]))
        pairs = [(eight[a] - eight[b]).abs().mean() for a in range(8) for b in range(a)]
        to_target = (eight - target).abs().mean()
        loss = result.losses_last[:, 8 * i : 8 * i + 8] / result.losses_first[:, 8 * i : 8 * i + 8]
        values = [float(cosine.mean()), float(torch.stack(pairs).mean()), float(to_target)]
        median = float(torch.as_tensor(loss).double().nanmedian())
        rows.append([f"target {i + 1}", f"{median:.3f}"] + [f"{v:.3f}" for v in values])
    report.table(
        "Similar, not identical",
        "φ loss after matching over before (median over steps), cosine of the samples' φ to the target's, "
        "and mean absolute pixel distances (0 to 1).",
        ["", "loss ratio", "cosine of φ", "between samples", "sample to target"],
        rows,
    )


if __name__ == "__main__":
    main()
