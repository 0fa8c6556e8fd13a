"""How alike and how different reconstructions from φ are: numbers and a panel for ten targets.

    python benchmarks/reconstruction_numbers.py MODEL PACK OUT [--targets 10] [--form schedule]

For each target, eight samples (schedule form, the authors' settings): φ loss after matching over before
(median over noise levels), cosine of φ(sample) to φ(target), mean absolute pixel distance between the
samples and to the target, and to a random other image for scale.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import fastphi
from fastphi import data, noise, targets
from fastphi.support import files, plots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument("out", type=Path, help="folder for result.npz, panels.png, numbers.json")
    parser.add_argument("--targets", type=int, default=10)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--form", default="schedule", choices=("schedule", "adaptive"))
    arguments = parser.parse_args()
    model, packed = fastphi.load(arguments.model), data.open_images(arguments.pack)
    index = noise.permutation(7, len(packed))[: arguments.targets]
    clean, n = packed.batch(index), arguments.samples
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = fastphi.reconstruct(
        model,
        targets.from_images(model, clean, draws=10, copies=n),
        form=arguments.form,
        size=packed.size,
        progress=True,
        save=arguments.out / "result.npz",
    )
    rows = []
    with torch.no_grad():
        phi_clean = model.phi(clean)
        for i, target in enumerate(clean):
            mine = result.images[n * i : n * i + n]
            ratio = (
                result.losses_last[:, n * i : n * i + n] / result.losses_first[:, n * i : n * i + n]
            )
            pairs = [(mine[a] - mine[b]).abs().mean() for a in range(n) for b in range(a)]
            other = clean[(i + 1) % len(clean)]
            rows.append(
                {
                    "image": int(index[i]),
                    "loss_ratio": float(torch.as_tensor(ratio).double().nanmedian()),
                    "phi_cosine": float(
                        torch.cosine_similarity(model.phi(mine), phi_clean[i : i + 1]).mean()
                    ),
                    "phi_cosine_other": float(
                        torch.cosine_similarity(phi_clean[i : i + 1], model.phi(other[None])).mean()
                    ),
                    "between_samples": float(torch.stack(pairs).mean()),
                    "to_target": float((mine - target).abs().mean()),
                    "to_other": float((mine - other).abs().mean()),
                }
            )
            print("  ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
    mean = {k: float(np.mean([row[k] for row in rows])) for k in rows[0] if k != "image"}
    print("mean:", "  ".join(f"{k} {v:.4g}" for k, v in mean.items()))
    files.write_json(arguments.out / "numbers.json", {"rows": rows, "mean": mean})
    if n == 8:
        figure = Figure(figsize=(15, 3.2 * ((len(clean) + 4) // 5)), layout="constrained")
        axes = figure.subplots((len(clean) + 4) // 5, 5, squeeze=False).flat
        for i, target in enumerate(clean):
            plots.reconstruction_panel(axes[i], target, result.images[8 * i : 8 * i + 8])
        figure.savefig(arguments.out / "panels.png", dpi=110)


if __name__ == "__main__":
    main()
