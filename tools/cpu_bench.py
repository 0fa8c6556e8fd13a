"""make bench: runs the CPU suites of benchmarks/ and prints their tables; `--table FILE` prints those of a
run that was kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SUITES = ("network", "layers", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", default=SUITES, help=f"of {', '.join(SUITES)}")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the JSON")
    parser.add_argument("--only", help="pytest's -k: the tests whose names fit")
    parser.add_argument(
        "--table", type=Path, nargs="+", help="print these files' tables, run nothing"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.suites) - set(SUITES):
        parser.error(f"suites: expected {', '.join(SUITES)}; got {', '.join(sorted(unknown))}")
    status, files = 0, arguments.table or []
    for suite in () if arguments.table else arguments.suites:
        files.append(arguments.out / f"cpu_{suite}.json")
        command = [sys.executable, "-m", "pytest", "-q", f"benchmarks/bench_cpu_{suite}.py"]
        command += ["--results", str(files[-1]), "-p", "no:cacheprovider"]
        command += ["--benchmark-json", str(arguments.out / f"cpu_{suite}_pytest.json")]
        command += ["-k", arguments.only] if arguments.only else []
        arguments.out.mkdir(parents=True, exist_ok=True)
        status |= subprocess.run(command, cwd=ROOT).returncode
    for path in files:
        print(text(json.loads(path.read_text())))
    sys.exit(status)


def text(found: dict[str, Any]) -> str:
    """The machine's line, then a row per measurement with a column per way."""
    lines = [", ".join(f"{k} {v}" for k, v in found["machine"].items()), processor(), ""]
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for case in found["cases"]:
        rows.setdefault((case["what"], case["images"], case["size"]), {})[case["way"]] = case
    ways = list(dict.fromkeys(case["way"] for case in found["cases"]))
    lines.append("| | images | size | " + " | ".join(ways) + " |")
    lines.append("|---" * (len(ways) + 3) + "|")
    for (what, images, size), row in rows.items():
        cells = [cell(row.get(way), row.get(beside(way))) for way in ways]
        lines.append(f"| {what} | {images} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def beside(way: str) -> str:
    """Which of our ways a way is compared with: what computes in bf16 with what does."""
    return "ours bf16" if way.endswith("bf16") else "ours"


def cell(case: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    """Milliseconds (median), then how many times ours (of the same kind); what is ours has its GFLOP/s
    and its error."""
    if case is None:
        return "–"
    if "absent" in case:
        return f"absent: {case['absent'][:40]}"
    if "megabytes" in case:
        return f"{case['megabytes']:.0f} MB"
    median = case["seconds"]["median"] / case.get("steps", 1)
    said = f"{1e3 * median:.4g} ms"
    if case is not ours and ours is not None:
        said += f", {case['seconds']['median'] / ours['seconds']['median']:.2f}×"
        if (
            min(case["seconds"]["min"], ours["seconds"]["min"]) > 0
        ):  # of a difference it may be anything
            said += f" ({case['seconds']['min'] / ours['seconds']['min']:.2f}×)"
    elif "flops" in case:
        said += f", {case['flops'] / median / 1e9:.0f} GFLOP/s"
    return said + (f", error {case['error']:.0e}" if "error" in case else "")


def processor() -> str:
    try:
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        return platform.processor()
    return f"{names[0]} x {len(names)}" if names else platform.processor()


if __name__ == "__main__":
    main()
