"""What is to be run where a GPU is, in parts of less than nine minutes: make gpu-suite PART="build tests".

    python tools/gpu_suite.py [--out out/gpu] PART...

build      the package and its CUDA kernels, into the Python that runs this, without a network
tests      kernels and engine
kernels    every Triton kernel and operator against float64 and the CPU's bits, in bf16, fp16, tf32, fp32
engine     the runner at full size: values, graphs, streams, threads, extraction; bf16 on trained weights
sanitizer  the CUDA kernels under compute-sanitizer
layers     every layer: ours, cuDNN's bare convolution, cuDNN's with our epilogue
phi, denoise, extract, memory   benchmarks/bench_gpu_*.py; torch.compile, the slowest peer, comes last
match, reconstruct, train       the same of guidance (an iteration, a match, updates in bf16 and fp32), of
                                reconstruction (and 10,000 replays in flat memory), of training steps

A part writes OUT/<part>.json as it goes, so that what was measured survives a timeout, and prints its
table at the end. Whatever comes before a part's measurements (building, values) comes first. Ends
with 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_tables

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 510  # seconds of a part, with the build that it needs first
Part = Callable[[Path, float], str]  # (its file, seconds) -> what is wrong
DOCTOR = "from fastphi.cli import doctor; print(doctor.text(doctor.report()))"
READY = "from fastphi.engine import gpu; import sys; sys.exit(gpu.missing())"
GPU = "import torch; print(torch.cuda.is_available())"
MACHINE = "import json, support; print(json.dumps(support.machine()))"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
OPERATORS = (
    "engine/gpu/test_ops.py",
    "engine/gpu/test_images.py",
    "engine/gpu/test_ops_arguments.py",
)
# Under a sanitizer: nothing that captures (no cached memory there) or traces.
SANITIZED = "not graph and not opcheck and not errors and not named"


def run(command: list[str], seconds: float, **environment: str) -> tuple[str, bool]:
    """A program in a process group of its own, its output as it comes: ("" or what is wrong, finished)."""
    paths = [str(ROOT / "tools"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **settings, **environment}, start_new_session=True
    )
    try:
        code = process.wait(timeout=max(1.0, seconds))
        return ("" if code == 0 else f"{Path(command[0]).name} ended with {code}"), True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {seconds:.0f} s", False


def said(code: str) -> str:
    """What a line of Python prints, in a process of its own."""
    paths = os.pathsep.join(map(str, (ROOT / "benchmarks", os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    return (done.stdout if done.returncode == 0 else done.stderr).strip()


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def machine() -> dict[str, Any]:
    words = said(MACHINE)
    return json.loads(words) if words.startswith("{") else {"unknown": words[-300:]}


# --- parts: each leaves its file and returns what is wrong ---------------------------------------------


def build(path: Path, limit: float) -> str:
    start = time.monotonic()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    wrong, _ = run([*command, "--no-index", "-e", str(ROOT)], limit, FASTPHI_CUDA="1")
    doctor = said(DOCTOR)
    seconds = round(time.monotonic() - start, 1)
    write(path, {"machine": machine(), "said": doctor, "seconds": seconds, "ended": wrong})
    return wrong or said(READY)


def ready() -> bool:
    """Built, and not before a source changed."""
    built = list((ROOT / "fastphi").glob("_cuda*.so"))
    sources = [ROOT / "setup.py", *(f for f in (ROOT / "csrc").rglob("*") if f.is_file())]
    if not built or built[0].stat().st_mtime < max(f.stat().st_mtime for f in sources):
        return False
    done = subprocess.run([sys.executable, "-c", READY], cwd=ROOT, capture_output=True)
    return done.returncode == 0


def tests(*patterns: str, distribution: str = "load") -> Part:
    """Tests, by several processes where pytest-xdist is: most of their time is Triton's compiler's."""

    def part(path: Path, limit: float) -> str:
        files = [str(f) for p in patterns for f in sorted((ROOT / "tests").glob(p))]
        # a warning of torch's or Triton's is no failure here: their versions are the machine's
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_report", "-p", "no:benchmark"]
        command += ["-p", "no:cacheprovider", "-W", "default"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", distribution]
        wrong, _ = run([*command, *files], limit, FASTPHI_REPORT=str(path))
        write(path, read(path) | {"machine": machine(), "ended": wrong})
        return wrong

    return part


def sanitizer(path: Path, limit: float) -> str:
    """The operators' tests under each of compute-sanitizer's tools, in memory that is not cached."""
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", os.environ.get("PATH", "")]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(homes))
    found: dict[str, Any] = {"machine": machine(), "tools": {}}
    for tool in SANITIZERS:
        if program is None:
            found["tools"][tool] = {"said": "compute-sanitizer was not found", "seconds": 0}
            continue
        start = time.monotonic()
        # initcheck would name what torch copies of its own buffers
        fails = [] if tool == "initcheck" else ["--error-exitcode", "9"]
        wrong, _ = run(
            [program, "--tool", tool, *fails, sys.executable, "-m", "pytest", "-q", "-m", "gpu",
             "-p", "no:xdist", "-p", "no:benchmark", "-p", "no:cacheprovider", "-W", "default",
             "-k", SANITIZED, *(str(ROOT / "tests" / file) for file in OPERATORS)],
            limit / len(SANITIZERS),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        seconds = round(time.monotonic() - start, 1)
        found["tools"][tool] = {"said": wrong or "nothing wrong", "seconds": seconds}
        write(path, found)
    write(path, found)
    bad = [tool for tool, result in found["tools"].items() if "ended with" in result["said"]]
    return f"compute-sanitizer: {', '.join(bad)}" if bad else ""


def benchmarks(file: str, *options: str) -> Part:
    def part(path: Path, limit: float) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
        command += [f"benchmarks/{file}", "--results", str(path), *options]
        if importlib.util.find_spec("pytest_benchmark") is not None:
            command += ["--benchmark-columns=median,rounds", "--benchmark-disable-gc"]
        wrong, _ = run(command, limit)
        if not read(path).get("cases"):
            wrong = wrong or "nothing was measured"
        write(path, read(path) | {"ended": wrong})
        return wrong

    return part


NETWORK = "bench_gpu_network.py"
PARTS: dict[str, Part] = {
    "build": build,
    "kernels": tests(*OPERATORS, "triton_kernels/test_*.py", "engine/gpu/test_interpreted_*.py"),
    "engine": tests(
        "engine/gpu/test_runner.py",
        "engine/gpu/test_precision.py",
        "engine/gpu/test_match*.py",  # guidance
        "engine/gpu/test_training.py",
        distribution="loadfile",
    ),
    "sanitizer": sanitizer,
    "layers": benchmarks("bench_gpu_layers.py"),
    "phi": benchmarks(NETWORK, "-k", "phi"),
    "denoise": benchmarks(NETWORK, "-k", "denoise"),
    "extract": benchmarks("bench_gpu_extract.py"),
    "memory": benchmarks("bench_gpu_memory.py"),
    "match": benchmarks("bench_gpu_match.py", "-k", "not reconstruction and not replays"),
    "reconstruct": benchmarks("bench_gpu_match.py", "-k", "reconstruction or replays"),
    "train": benchmarks("bench_gpu_train.py"),
}
SEVERAL = {"tests": ("kernels", "engine")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", metavar="PART", choices=[*PARTS, *SEVERAL])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = [p for given in options.parts for p in SEVERAL.get(given, (given,))]
    if "build" not in parts and not ready():
        parts.insert(0, "build")
    if said(GPU) != "True":
        print("No GPU is visible: whatever needs one is skipped.")
    bad: dict[str, str] = {}
    start = time.monotonic()
    for part in parts:
        path = out / f"{part}.json"
        path.unlink(missing_ok=True)  # of an earlier run
        print(f"== {part}", flush=True)
        if wrong := PARTS[part](path, LIMIT - (time.monotonic() - start)):
            bad[part] = wrong
        if part != "build":
            start = time.monotonic()
        print(f"\n{gpu_tables.text(part, read(path))}", flush=True)
        if part == "build" and part in bad:
            break
    if bad:
        sys.exit("\n".join(f"{part}: {wrong}" for part, wrong in bad.items()))


if __name__ == "__main__":
    main()
