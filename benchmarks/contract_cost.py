"""What the fast path's contract costs (docs/contract.md): plain calls beside frozen ones, in turn.

    python benchmarks/contract_cost.py

Prints milliseconds, medians: φ and denoise in a plain call and within `fastphi.frozen`, the look at the
model and the image (`contract.reason`), and the sum of all weights.
"""

from __future__ import annotations

import statistics
import time

import torch

import fastphi
from fastphi.engine import contract
from fastphi.engine.cpu import pack


def timed(found: list[float], call) -> None:
    start = time.perf_counter()
    call()
    found.append(1e3 * (time.perf_counter() - start))


def row(model: fastphi.UNet, images: int, rounds: int) -> dict[str, float]:
    x = torch.rand(images, 3, 64, 64)
    calls = {"φ": lambda: model.phi(x), "denoise": lambda: model(x)}
    weights = list(model.parameters())
    extra = {
        "looks": lambda: contract.reason(model, x),
        "sum of weights": lambda: pack.checksum(weights),
    }
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, call in (calls | extra).items():
            timed(found.setdefault(name, []), call)
        with fastphi.frozen(model):
            model(x)  # looked at
            for name, call in calls.items():
                timed(found.setdefault(f"{name}, frozen", []), call)
    return {name: round(statistics.median(times), 3) for name, times in found.items()}


def main() -> None:
    networks = {"full": fastphi.UNet(), "natural64-small": fastphi.load_pretrained()}
    with torch.no_grad():
        for name, model in networks.items():
            for images, rounds in ((1, 25), (8, 15), (64, 7)):
                print(name, images, row(model, images, rounds), flush=True)


if __name__ == "__main__":
    main()
