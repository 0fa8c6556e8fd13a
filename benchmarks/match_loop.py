"""Matches φ over and over and watches the process's memory: python benchmarks/match_loop.py [--minutes 10]

Sizes, batches and dtypes take turns, as in use; the resident memory after each of ten parts of the time
goes into the JSON. Ends with 1 where the last part's is above the second's by more than `ALLOWED`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import support
import torch

import fastphi
from fastphi.config import UNetConfig

PARTS, ALLOWED = 10, 16  # MiB
CASES = list(itertools.product([(1, 64), (8, 64), (3, 80)], [torch.float32, torch.bfloat16]))


def resident() -> float:
    """MiB that the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/match_loop.json"))
    arguments = parser.parse_args()
    model = support.network(UNetConfig())
    start, matches, memory = time.monotonic(), 0, []
    for (images, size), dtype in itertools.cycle(CASES):
        x, target = (support.images(images, UNetConfig(), size, "cpu", seed) for seed in (1, 2))
        with torch.no_grad():
            phi = model.phi(target)
        fastphi.match_phi(model, x, phi, max_iter=20, tolerance=0.0, dtype=dtype)
        matches += 1
        # a whole turn of the cases, so that every part ends after the same one
        past = time.monotonic() - start
        if matches % len(CASES) == 0 and past >= (len(memory) + 1) * arguments.minutes * 6:
            memory.append(round(resident(), 1))
        if len(memory) == PARTS:
            break
    found = {"minutes": arguments.minutes, "matches": matches, "resident_mib": memory}
    text = json.dumps({"machine": support.machine(), **found}, indent=1, ensure_ascii=False)
    arguments.out.write_text(text + "\n")
    print(f"{matches} matches in {past / 60:.1f} minutes; MiB after each tenth: {memory}")
    sys.exit(memory[-1] > memory[1] + ALLOWED)


if __name__ == "__main__":
    main()
