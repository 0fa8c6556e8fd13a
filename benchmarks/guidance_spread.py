"""How far guidance iterations spread over images and noise levels, and what to do about it.

    python benchmarks/guidance_spread.py MODEL PACK OUT [--images 32] [--levels 10]

Reconstructs images by the schedule form, each to its own φ (10 draws), and counts the updates of every
match. For batches of 8 and 64 (bootstrap over the images of a level) it then calculates what a match
costs, in units of the least there is, on a GPU of 132 multiprocessors with the tiles of
triton_kernels/tiles.py, a level of resolution taking as many waves of programs as its active images
fill:
    slowest   every image is computed until the slowest has stopped (the authors' way)
    left out  images that have stopped are left out (what fastphi does)
    refilled  their places are taken at once by others (no tail at all: a bound, not an algorithm)
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

import fastphi
from fastphi import data, noise, targets
from fastphi.support import files

SMS = 132
# Of the default network at 64×64: (share of an iteration's products, programs per image); a program
# is 256 pixels by 64 or 128 channels (tiles.CONV, sm_90), 8×8 pixels of four images.
LEVELS = ((0.23, 16), (0.23, 4), (0.23, 2), (0.31, 1))


def cost(active: np.ndarray) -> float:
    """Of iterations with so many active images each; 1 is an iteration of one image of a full GPU."""
    waves = (share * SMS / per * np.ceil(active * per / SMS) for share, per in LEVELS)
    return float(sum(waves).sum())  # type: ignore[union-attr]


def matches(updates: np.ndarray) -> dict[str, float]:
    """updates: (B,), of the images of one match; evaluations are one more."""
    evaluations = updates + 1
    b, most = len(updates), int(evaluations.max())
    active = (evaluations[None, :] > np.arange(most)[:, None]).sum(axis=1)
    return {
        "slowest": cost(np.full(most, b)),
        "left out": cost(active),
        "refilled": cost(np.full(1, b)) * evaluations.mean(),
        "max over mean": most / evaluations.mean(),
    }


def batches(updates: np.ndarray, size: int, draws: int = 200) -> dict[str, float]:
    """Means over batches drawn at each level; updates: (levels, images)."""
    generator = np.random.default_rng(0)
    found = [matches(generator.choice(row, size)) for row in updates for _ in range(draws)]
    return {name: float(np.mean([match[name] for match in found])) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument("out", type=Path, help="a .json file")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--levels", type=int, default=10)
    parser.add_argument("--tolerance", type=float, default=0.01)
    options = parser.parse_args()
    model, packed = fastphi.load(options.model), data.open_images(options.pack)
    clean = packed.batch(noise.permutation(7, len(packed))[: options.images])
    result = fastphi.reconstruct(
        model,
        targets.from_images(model, clean, draws=10),
        sigmas=(1.0, 0.03, options.levels),
        size=packed.size,
        tolerance=options.tolerance,
    )
    updates = result.updates.numpy()
    rows = [
        {
            "sigma": float(result.sigma[k].median()),
            "mean": float(row.mean()),
            "cv": float(row.std() / row.mean()) if row.mean() else math.nan,
            "max": int(row.max()),
            "converged": float(result.converged[k].double().mean()),
        }
        for k, row in enumerate(updates)
    ]
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" for k, v in row.items()))
    sizes = {str(size): batches(updates, size) for size in (8, 64, 256)}
    for size, values in sizes.items():
        print(f"batch {size}:", "  ".join(f"{k} {v:.4g}" for k, v in values.items()))
    files.write_json(options.out, {"levels": rows, "batches": sizes, "updates": updates.tolist()})


if __name__ == "__main__":
    main()
