"""What the GPU engine asks of the host: nodes of its graphs; launches, copies, synchronisations and the
host's own time of each call. Counted on the pretended GPU (tools/pretend_gpu).

    python3 tools/gpu_host.py --label after    # into benchmarks/results/gpu_host.json, beside the others

The paper's network in bfloat16, at batch 1, 8 and 64. nodes: of all graphs that a call replays, three of
them those that sum up the weights (`fastphi.frozen` spares them). Triton really compiles, and launches
are really prepared and then dropped, so values mean nothing here, and the microseconds are the host's
alone, those of the pretended libraries among them. What cuDNN and cuBLAS make is one launch each.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_host.json"
BATCHES = (1, 8, 64)
CALLS = 200  # whose median the microseconds are


def table(found: dict[str, Any]) -> list[str]:
    """Markdown: a row for each call and batch, the runs side by side."""
    runs = list(found)
    rows = [(name, n) for name in found[runs[-1]]["calls"] for n in found[runs[-1]]["calls"][name]]
    columns = ("nodes", "launches", "copies", "pageable", "waits", "us")
    lines = [f"| call | batch | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, n in rows:
        cells = []
        for column in columns:
            each = (found[run]["calls"].get(name, {}).get(n, {}).get(column) for run in runs)
            cells.append(" → ".join("–" if value is None else f"{value:g}" for value in each))
        lines.append(f"| {name} | {n} | {' | '.join(cells)} |")
    return [f"{' → '.join(runs)}; us: the host's, of one call", "", *lines]


# --- within the pretended GPU --------------------------------------------------------------------------


class Counts:
    """Of what was asked since the last look."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._driver.pretend_counts.restype = ctypes.c_char_p

    def read(self) -> dict[str, int]:
        return json.loads(self._driver.pretend_counts(1).decode())

    def summary(self, calls: float = 1) -> dict[str, float]:
        found = self.read()

        def each(*kinds: str) -> float:
            total = sum(n for what, n in found.items() if what.startswith(kinds))
            return round(total / calls, 2)

        kernels = sum(found.get(kind, 0) for kind in ("kernel", "emulated"))
        launches = (kernels + found.get("graph launch", 0)) / calls
        pageable = sum(n for k, n in found.items() if k.startswith("copy") and "pageable" in k)
        return {
            "nodes": each("replayed nodes"),
            "launches": round(launches, 2),
            "copies": each("copy", "memset"),
            "pageable": round(pageable / calls, 2),
            "waits": each("synchron"),
        }


def measure(counts: Counts, call: Callable[[], Any]) -> dict[str, float]:
    """Of a call that was made before."""
    call()
    counts.read()
    call()
    found = counts.summary()
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return found | {"us": round(1e6 * statistics.median(times), 1)}


def per_step(counts: Counts, run: Callable[[int], Any]) -> dict[str, float]:
    """Of a step of a job: run(steps) of many less run(steps) of few, so that what is done once is out."""
    few, many, times, found = 4, 12, [], []
    run(few)
    for steps in (few, many):
        counts.read()
        began = time.perf_counter()
        run(steps)
        times.append(time.perf_counter() - began)
        found.append(counts.summary())
    each = {k: round((found[1][k] - found[0][k]) / (many - few), 2) for k in found[0]}
    return each | {"us": round(1e6 * (times[1] - times[0]) / (many - few), 1)}


def calls(counts: Counts) -> dict[str, dict[str, dict[str, float]]]:
    import torch

    import fastphi
    from fastphi.sampling import guidance

    device = torch.device("cuda")
    model = fastphi.UNet(backend="cuda").eval().requires_grad_(False).to(device)
    width = model.config.channels[-1]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for n in BATCHES:
        x = torch.zeros(n, 3, 64, 64, device=device)
        phi = torch.ones(n, width, device=device)

        def low(call: Callable[[], Any]) -> Callable[[], Any]:
            def done() -> Any:
                with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                    return call()

            return done

        def match(x: Any = x, phi: Any = phi) -> Any:
            return guidance.match(model, x, phi, 0.01, 100, 0.01, low=True)

        φ = low(lambda x=x: model.phi(x))
        for name, call in (("denoise", low(lambda x=x: model(x))), ("φ", φ), ("match", match)):
            found.setdefault(name, {})[str(n)] = measure(counts, call)
        with fastphi.frozen(model):
            found.setdefault("φ, frozen", {})[str(n)] = measure(counts, φ)

        targets = fastphi.targets.fixed(phi)

        def reconstruct(steps: int, targets: Any = targets) -> Any:
            with torch.autocast("cuda", torch.bfloat16):
                return fastphi.reconstruct(model, targets, size=64, sigmas=(1.0, 0.1, steps))

        found.setdefault("reconstruction step", {})[str(n)] = per_step(counts, reconstruct)
        with training_step(n) as step:
            found.setdefault("training step", {})[str(n)] = measure(counts, step)
    return found


@contextlib.contextmanager
def training_step(n: int) -> Iterator[Callable[[], None]]:
    """Of the paper's network on n images of a pack, drawn beforehand, as a thread does while it trains."""
    import numpy as np

    import fastphi
    from fastphi.train import TrainConfig, Trainer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pixels = np.random.default_rng(0).integers(0, 256, (n, 64, 64, 3), np.uint8)
        np.save(folder / "pixels.npy", pixels)
        images = fastphi.pack(folder / "pixels.npy", folder / "pack", size=64, progress=False)
        settings = TrainConfig(out=folder / "run", batch=n, holdout=0, device="cuda")
        trainer = Trainer(settings, images)
        step = trainer._step()
        batch = step.draw(0)

        def done() -> None:
            step.gradient(batch)
            step.update(batch)
            trainer.state.step += 1
            for _ in step.losses(wait=False):
                pass

        yield done
        step.close()


def without_values() -> None:
    """Nothing looks at values, which mean nothing here; and the weights' sums are the same each time."""
    from fastphi.engine.gpu import pack
    from fastphi.sampling import guidance, run
    from fastphi.support import validate
    from fastphi.train.step import Step

    content = pack.Content.sums

    def zero(self: Any) -> Any:
        sums = content(self)
        ctypes.memset(sums.data_ptr(), 0, sums.nbytes)  # the host's memory: no launch
        return sums

    pack.Content.sums = zero
    validate.finite = lambda x, name: x
    run._check_finite = lambda info: None
    guidance._told_idle.append(True)
    Step._checked = lambda self, *args: 0.0


def without_libraries() -> list[Any]:
    """As `tools/pretend_gpu/launches.py` has it."""
    import sys

    sys.path.append(str(ROOT / "tools" / "pretend_gpu"))
    import launches

    return launches.without_libraries()


def child() -> None:
    _kept = without_libraries()
    without_values()
    print(json.dumps(calls(Counts())))


def main() -> None:
    import gpu_pretend

    parser = gpu_pretend.arguments(__doc__)
    parser.add_argument("--label", help="under which it is kept (default: it is only printed)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child()
    binaries, variables = gpu_pretend.ready(options)
    command = [binaries / "python", __file__, "--child"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    processor = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    found = {"processor": processor, "calls": json.loads(done.stdout.splitlines()[-1])}
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[options.label or "now"] = found
    print("\n".join(table(kept)))
    if options.label:
        RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
