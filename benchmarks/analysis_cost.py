"""Time and memory of every analysis that reads φ, on made-up stores of up to a million rows.

    python benchmarks/analysis_cost.py FOLDER [--rows 10000 100000 1280000] [--only NAMES] [--out FILE]

A store of one noise level, 512 channels: 1,000 classes of sparse φ, each on a fifth of the channels; and
labels. Each analysis runs in a process of its own that may allocate --limit GB (RLIMIT_DATA: allocated,
touched or not; a map of the store is no part of it, and the system may keep the store in memory besides).
seconds: of the call; cpu: of all its threads together, which others on the machine change less; anonymous:
the most that the process held of its own, imports (250 MB) included (RssAnon, looked at every 20 ms);
resident: ru_maxrss, with the pages of the store that are mapped. K-means is of 50 clusters, and has fewer
starts than a study's, so that 100,000 rows come to an end: 3, and 1 in clusters (2 Gaussians) and in
agreement (2 seeds, none from the classes). FOLDER takes 2.6 GB for a million rows, TMPDIR as much for a
Gaussian. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastphi
from fastphi.phi.store import FORMAT, VERSION, Writer

WIDTH, CLASSES, K = 512, 1000, 50


def make(folder: Path, n: int) -> None:
    """The store and labels.npy in `folder`."""
    rng = np.random.default_rng(0)
    centre = rng.gamma(1, 0.1, (CLASSES, WIDTH)) * (rng.random((CLASSES, WIDTH)) < 0.2)
    labels = rng.integers(0, CLASSES, n)
    fields = {"rows": n, "indices": None, "sigmas": [0.5], "draws": 1, "blocks": {"mid": WIDTH}}
    known = {"format": FORMAT, "version": VERSION, "seed": 0, "model": "m", "data": "d"}
    with Writer(folder, fields | known, None, range(n)) as writer:
        for start in range(0, n, 20_000):
            at = np.arange(start, min(start + 20_000, n))
            some = rng.random((len(at), WIDTH), np.float32) ** 8  # few channels of each image alone
            writer.write(0.5, at, {"mid": (centre[labels[at]] + 0.2 * some).astype(np.float32)})
    np.save(folder / "labels.npy", labels)


def calls(phi: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    from fastphi.analysis.channels import channels
    from fastphi.analysis.clusters import agreement, clusters
    from fastphi.analysis.common import gaussian_like, principal
    from fastphi.analysis.embedding import embedding
    from fastphi.analysis.kmeans import kmeans
    from fastphi.analysis.neighbours import distinct, label_agreement, nearest
    from fastphi.analysis.probe import probe
    from fastphi.analysis.selectivity import exciting, selectivity
    from fastphi.analysis.sparsity import sparsity
    from fastphi.analysis.stability import stability
    from fastphi.analysis.subspaces import subspaces

    levels = {0.2: phi, 0.5: phi}
    return {
        "sparsity": lambda: sparsity(phi),
        "stability, 2 levels": lambda: stability({s: {"mid": x} for s, x in levels.items()}),
        "selectivity": lambda: selectivity(phi),
        "exciting": lambda: exciting(phi, 3),
        "channels": lambda: channels(phi, others={0.2: phi}),
        "gaussian_like": lambda: gaussian_like(phi),
        "subspaces": lambda: subspaces(phi, 50),
        "distinct": lambda: distinct(phi, 6),
        "nearest, 8 queries": lambda: nearest(phi[:8], phi, 9),
        "label_agreement, 2,000 queries": lambda: label_agreement(phi, labels, queries=2000),
        "kmeans": lambda: kmeans(phi, K, starts=3),
        "clusters": lambda: clusters(phi, K, labels=labels, draws=2, starts=1),
        "agreement": lambda: agreement(phi, K, seeds=2, starts=1),
        "probe": lambda: probe(phi, labels),
        "principal": lambda: principal(phi, 50),
        "embedding": lambda: embedding(phi),
    }


def measure(folder: Path, name: str, limit: float) -> None:
    """In a process of its own: prints JSON."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9),) * 2)
    phi, labels = fastphi.PhiStore(folder).array(0.5), np.load(folder / "labels.npy")
    call, most, done = calls(phi, labels)[name], 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while True:
            status = Path("/proc/self/status").read_text()
            most = max(most, int(status.split("RssAnon:")[1].split()[0]))
            if done.wait(0.02):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, busy = time.perf_counter(), time.process_time()
    try:
        call()
        found = {"seconds": round(time.perf_counter() - start, 2)}
        found["cpu"] = round(time.process_time() - busy, 2)
    except MemoryError:
        found = {"failed": f"more than {limit:g} GB"}
    done.set()
    watcher.join()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(found | {"anonymous MB": most // 1024, "resident MB": resident // 1024}))


def run(folder: Path, name: str, limit: float) -> dict[str, Any]:
    words = [sys.executable, __file__, str(folder), "--measure", name, "--limit", str(limit)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode or not done.stdout.startswith("{"):
        return {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return json.loads(done.stdout)


def short(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per analysis, seconds, of all threads in brackets, and anonymous MB."""
    sizes = list(found)
    lines = ["| analysis | " + " | ".join(f"{int(n):,} rows" for n in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for name in dict.fromkeys(name for each in found.values() for name in each):
        cells = [found[n].get(name, {}) for n in sizes]
        words = [
            c.get("failed")
            or f"{short(c['seconds'])} s ({short(c['cpu'])}), {c['anonymous MB']} MB"
            if c
            else ""
            for c in cells
        ]
        lines.append(f"| {name} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_280_000])
    parser.add_argument("--only", nargs="+", help="of the analyses")
    parser.add_argument("--limit", type=float, default=4.0, help="GB")
    parser.add_argument("--out", type=Path, help="JSON; what is in it of other analyses stays")
    parser.add_argument("--note", default="", help="of the machine's state")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        return measure(a.folder, a.measure, a.limit)
    known = json.loads(a.out.read_text()) if a.out and a.out.exists() else {}
    found: dict[str, dict[str, Any]] = known.get("rows", {})
    machine = f"{platform.machine()}, {os.cpu_count()} cores; {a.note}"
    names = list(calls(np.empty((1, 1)), np.empty(1)))
    for n in a.rows:
        with tempfile.TemporaryDirectory(dir=a.folder) as folder:
            make(Path(folder), n)
            for name in (name for name in names if not a.only or name in a.only):
                found.setdefault(str(n), {})[name] = one = run(Path(folder), name, a.limit)
                print(n, name, one, file=sys.stderr, flush=True)
                if a.out:
                    whole = {"machine": machine, "limit GB": a.limit, "by": "RLIMIT_DATA"}
                    a.out.write_text(json.dumps(whole | {"rows": found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
