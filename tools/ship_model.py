#!/usr/bin/env python
"""Make a pretrained model of a training run: its weights and its card, in fastphi/checkpoint.

    python tools/ship_model.py RUN NAME --heldout PACK --terms TERMS.md --commit HASH

RUN is a folder of `fastphi train`. Every number of the card is read from the run or measured here, on
the held-out images, in some minutes. TERMS is a file of what may be done with the weights, and why.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import fastphi
from fastphi import checkpoint, data
from fastphi.analysis.clusters import Clusters, clusters
from fastphi.analysis.common import untrained
from fastphi.analysis.neighbours import LabelAgreement, label_agreement
from fastphi.analysis.sparsity import Sparsity, sparsity
from fastphi.analysis.stability import Stability, stability
from fastphi.support import files

MODELS = Path(fastphi.__file__).parent / "checkpoint"
LIMIT = 15_000_000  # bytes: the wheel must stay small
SIGMA, SIGMAS = 0.2, (0.0, 0.1, 0.2, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--heldout", type=Path, required=True, help="pack of images not trained on")
    parser.add_argument(
        "--terms", type=Path, required=True, help="text on the images and their terms"
    )
    parser.add_argument("--commit", required=True, help="of fastphi, that the run was trained with")
    parser.add_argument("--images", type=int, default=2000, help="held-out images to measure on")
    parser.add_argument("--out", type=Path, default=MODELS)
    a = parser.parse_args()
    model = fastphi.load(a.run)
    target = a.out / f"{a.name}.safetensors"
    fastphi.save(model, target)
    if (size := target.stat().st_size) > LIMIT:
        target.unlink()
        raise SystemExit(f"{a.name}: {size:,} bytes, at most {LIMIT:,} ship")
    text = card(a.name, model, a.run, a.heldout, a.terms.read_text(), a.commit, a.images)
    with files.atomic_write(target.with_suffix(".md")) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{target}: {size:,} bytes, and its card")


def card(
    name: str, model: Any, run: Path, heldout: Path, terms: str, commit: str, count: int
) -> str:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    config = json.loads((run / "config.json").read_text())
    info = model.training_info
    seconds = [line["seconds"] for line in log if "seconds" in line and line["step"] <= info.steps]
    images = data.open_images(heldout)
    psnr = denoising(model, images, log, config["config"])
    found = measure(model, images, min(count, len(images)))
    parameters = sum(p.numel() for p in model.parameters())
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A blind denoiser, {parameters:,} parameters, trained with fastphi for {info.steps:,} steps.",
            "",
            terms.strip(),
            "",
            "## Recipe",
            "",
            "```",
            command(config["config"] | {"max_steps": info.steps}),
            "```",
            "",
            f"Seed {config['config']['seed']}, commit {commit}, {config['images']:,} training images, "
            f"{seconds[-1] / 3600:.1f} h on {environment(config['environment'])}. "
            f"SHA-256 of the parameters: {checkpoint.fingerprint(model)}.",
            "",
            "## Denoising",
            "",
            "PSNR (dB) of held-out images against σ (images in [0, 1]):",
            "",
            *table(["σ", *psnr], [["noisy", *(f"{-20 * np.log10(float(s)):.2f}" for s in psnr)],
                                  ["denoised", *(f"{v:.2f}" for v in psnr.values())]]),
            "",
            "## Representation",
            "",
            f"On {found['n']} held-out images, the table on {found['few']} of them; φ at σ = {SIGMA}.",
            "",
            *representation(found),
            "",
        ]
    )  # fmt: skip


def denoising(
    model: Any, images: Any, log: list[dict[str, Any]], config: dict[str, Any]
) -> dict[str, float]:
    """PSNR at ten σ: of the log, or measured where the log has none of the last step."""
    found = {line["step"]: line["psnr"] for line in log if "psnr" in line}
    if model.training_info.steps in found:
        return found[model.training_info.steps]
    sigmas = [float(sigma) for sigma in list(found.values())[-1]]
    measured = fastphi.train.psnr(model, images, sigmas, seed=config["seed"])
    return {str(sigma): value for sigma, value in measured.items()}


def measure(model: Any, images: Any, n: int) -> dict[str, Any]:
    """On n images in φ; on 100 of them where every block at several levels is needed."""
    rows = np.arange(n)
    few = rows[:: max(n // 100, 1)]
    every: dict[str, Any] = {"blocks": "all", "indices": few, "draws": 8, "progress": True}
    middle: dict[str, Any] = {"sigmas": [SIGMA], "indices": rows, "draws": 4, "progress": True}
    store = fastphi.extract(model, images, sigmas=SIGMAS, **every)
    phi = fastphi.extract(model, images, **middle).array(SIGMA)
    labels = None if images.labels is None else images.labels[:n]
    found: dict[str, Any] = {
        "n": n,
        "few": len(few),
        "sparsity": sparsity(store, model, sigma=SIGMA),
        "stability": stability(store),
        "clusters": clusters(phi, min(50, n // 20), labels=labels, starts=5),
    }
    if labels is not None:
        pixels = images.batch(rows).flatten(1).numpy()
        control = fastphi.extract(untrained(model), images, **middle).array(SIGMA)
        others = {"pixels": pixels, "untrained": control}
        found["neighbours"] = label_agreement(phi, labels, controls=others)
    return found


def representation(found: dict[str, Any]) -> list[str]:
    spread: Sparsity = found["sparsity"]
    stable: Stability = found["stability"]
    groups: Clusters = found["clusters"]
    mean, other = stable.over_levels(), stable.over_levels("other")
    rows = [
        [
            block,
            f"{np.nanmedian(spread.inputs[block]):.3f}" if block in spread.inputs else "",
            f"{np.nanmedian(spread.outputs[block]):.3f}",
            f"{np.nanmean(mean[block]):.3f}",
            f"{np.nanmean(other[block]):.3f}",
        ]
        for block in spread.outputs
    ]
    lines = table(["block", "PR in", "PR out", "stability", "between images"], rows)
    lines += [
        "",
        "PR: participation ratio of ā, median over images. Stability: cosine of ā at σ in [0.1, 1] with ā "
        "at 0.5, mean; beside it the same between different images.",
        "",
        f"- {len(groups.clusters.centroids)} K-means clusters, separation in standard deviations: nearest "
        f"pairs {np.nanmedian(groups.nearest):.2f} (Gaussian of the same mean and covariance "
        f"{groups.gaussian_nearest.mean():.2f}), random pairs {np.nanmedian(groups.random):.2f} "
        f"({groups.gaussian_random.mean():.2f}).",
    ]
    if "neighbours" in found:
        near: LabelAgreement = found["neighbours"]
        listed = ", ".join(f"{space} {v.mean():.4f}" for space, v in near.shares.items())
        lines.append(
            f"- Share of 10 neighbours with the label: {listed}, chance {near.chance:.4f}."
        )
    return lines


def command(config: dict[str, Any]) -> str:
    """The line that trains it again; packs are named as the reader's own."""
    given = {"data": "PACK", "heldout": "HELDOUT_PACK", "out": "RUN"}
    words = ["fastphi train"]
    fields = fastphi.train.TrainConfig.__dataclass_fields__
    model_fields = fastphi.UNetConfig.__dataclass_fields__
    for name, value in {**config, **given}.items():
        if name != "model" and value != fields[name].default and value is not None:
            words.append(_option(name, value))
    for name, value in config["model"].items():
        default = model_fields[name].default
        if isinstance(value, list) and name != "channels" and len(set(value)) == 1:
            value = value[0]
        if value != default:
            words.append(_option(f"model.{name}", value))
    return " ".join(words)


def _option(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        first, _, last = flag.rpartition(".")
        return (
            f"--{first}.{'' if value else 'no-'}{last}"
            if first
            else f"--{'' if value else 'no-'}{last}"
        )
    return f"--{flag} " + (" ".join(map(str, value)) if isinstance(value, list) else str(value))


def environment(found: dict[str, Any]) -> str:
    bf16 = ", bfloat16 autocast" if found["bf16"] else ""
    return (
        f"{found['threads']} thread(s) of a {found['device'].upper()}{bf16}, torch {found['torch']}"
    )


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


if __name__ == "__main__":
    main()
