"""A GPU's first minutes with fastphi: values, tests, times; each result a synced line of results.jsonl.

    python3 tools/gpu_first.py --seconds 450
    python3 tools/gpu_first.py --seconds 200 --again out/gpu/results.jsonl

Each step is a process of its own with a limit, each test too: what hangs or crashes costs only itself. The
second form runs what failed, with the first error in full, what is missing, and the forms of a match's
loop. With the folder of `make gpu-bundle`, .dev, nothing is compiled; else the package is built first,
into OUT, and that time is not counted. tools/gpu_report.py makes tables of the lines. No network is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpu_lines
import gpu_report

ROOT = Path(__file__).resolve().parents[1]
# Triton's caches have absolute paths in them: gpu_bundle.py makes them where they are unpacked.
HOME = Path("/tmp/fastphi-gpu-first")
CACHES = HOME / "triton"
MANIFEST, LIBRARIES, PTXAS, COMPRESSED = "manifest.json", "libraries", "ptxas", ".tar.xz"
LATEST = 5.0  # seconds that a step needs to begin; and for the report at the end
SHARED = 0.45  # of the time: steps that share the GPU end by then, whatever is left of them
OUTPUT = 200_000  # bytes of a step's output that the log keeps
PYTEST = ["-m", "pytest", "-q", "-rN", "-p", "gpu_lines", "-p", "no:cacheprovider"]
PYTEST += ["-p", "no:benchmark", "-W", "default"]


@dataclass(frozen=True)
class Step:
    name: str
    limit: float  # seconds
    files: tuple[str, ...] = ()  # for pytest; without, `--within NAME` of this file
    options: tuple[str, ...] = ()
    each: float = 60.0  # seconds of one test
    newer: bool = False  # by the newer ptxas
    shared: bool = False  # beside others: it times nothing
    again: bool = False  # only in the second call
    sanitizer: bool = False


def steps() -> list[Step]:
    """All, in the order of what one wants to know first."""
    kernels = sorted((ROOT / "tests/triton_kernels").glob("test_*.py"))
    kernels = [f for f in kernels if f.stem not in ("test_interpreter", "test_tiles")]
    engine = [f for f in sorted((ROOT / "tests/engine/gpu").glob("test_*.py"))]
    others = ("test_emulated", "test_rounding", "test_pretended", "test_launches")  # of no GPU
    engine = [f for f in engine if f.stem not in others]
    engine.append(ROOT / "tests/train/test_captured.py")

    def of(folder: str, files: Iterable[Path], limit: float, newer: bool = False) -> list[Step]:
        end = ", newer ptxas" if newer else ""
        names = [(f.stem.removeprefix("test_"), str(f.relative_to(ROOT))) for f in files]
        return [
            Step(f"{folder} {name}{end}", limit, (file,), newer=newer, shared=True)
            for name, file in names
        ]

    values = Step("values", 60, ("benchmarks/bench_gpu_values.py",), shared=True)
    network, match = "benchmarks/bench_gpu_network.py", "benchmarks/bench_gpu_match.py"
    plain = ("--way", "ours", "--way", "eager", "--way", "authors")

    def batches(*counts: int) -> tuple[str, ...]:
        return tuple(word for n in counts for word in ("--batch", str(n)))

    return [
        Step("load", 60),
        values,
        replace(values, name="values, newer ptxas", newer=True),
        *of("kernels", kernels, 90),
        *of("engine", engine, 120),
        *of("kernels", kernels, 60, newer=True),
        Step("peaks", 30, ("benchmarks/bench_gpu_peaks.py",)),
        Step("layers 256", 60, ("benchmarks/bench_gpu_layers.py",), batches(256)),
        Step("network", 60, (network,), (*batches(256, 64, 1), *plain)),
        Step("layers 64", 40, ("benchmarks/bench_gpu_layers.py",), batches(64)),
        Step("guidance", 40, (match,), ("-k", "test_iteration", *batches(64), *plain)),
        Step(
            "training",
            50,
            ("benchmarks/bench_gpu_train.py",),
            ("--way", "ours", "--way", "eager"),
        ),
        Step("extract", 40, ("benchmarks/bench_gpu_extract.py",), batches(256)),
        Step("loops", 60, (match,), ("-k", "to_1_percent and not reconstruction"), again=True),
        Step("compiled", 120, (network,), (*batches(256, 64, 1), "--way", "torch.compile"), 90),
        Step("memory", 40, ("benchmarks/bench_gpu_memory.py",), again=True),
        Step(
            "memcheck",
            180,
            ("tests/engine/gpu/test_ops.py", "tests/engine/gpu/test_images.py", *map(str, kernels)),
            ("-k", "not graph and not opcheck and not errors and not named"),
            sanitizer=True,
        ),
    ]


# --- one step -----------------------------------------------------------------------------------------

_running: set[subprocess.Popen[bytes]] = set()
_log_lock = threading.Lock()


def end_all() -> None:
    for process in list(_running):
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def watch(
    command: list[str], env: dict[str, str], end: float, each: float, output: Path
) -> tuple[str, int | None]:
    """Runs a program until it ends, or time.monotonic() is `end`, or one of its tests takes longer than
    `each` seconds: ("" or why it was stopped, its exit code)."""
    now = Path(env["FASTPHI_NOW"])
    now.write_text("")
    with output.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=HOME, env=env, stdout=file, stderr=file, start_new_session=True
        )
    _running.add(process)
    began, test, why = time.monotonic(), "", ""
    try:
        while not why:
            try:
                process.wait(timeout=0.1)
                break
            except subprocess.TimeoutExpired:
                pass
            current = now.read_text()
            if current != test:
                test, began = current, time.monotonic()
            if time.monotonic() > end:
                why = "no time was left"
            elif test and time.monotonic() - began > each:
                why = f"stopped after {each:.0f} s"
    finally:
        kill(process)  # what it started, too
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for ever
            process.wait(timeout=10)
        _running.discard(process)
    return why, process.returncode


def tail(path: Path, size: int) -> str:
    return path.read_bytes()[-size:].decode(errors="replace") if path.exists() else ""


def environment(step: Step, out: Out, pick: str) -> dict[str, str]:
    paths = [str(out.library), *(str(ROOT / f) for f in ("tools", "benchmarks"))]
    paths.append(str(ROOT / "tests/engine/gpu"))
    paths += filter(None, [os.environ.get("PYTHONPATH", "")])
    name = f"{step.name} {pick}".strip().replace(" ", "-").replace(",", "")
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(CACHES / ("newer" if step.newer else "own")),
        "TORCHINDUCTOR_CACHE_DIR": str(HOME / "inductor"),
        "FASTPHI_LINES": str(out.lines),
        "FASTPHI_STEP": step.name,
        "FASTPHI_NOW": str(HOME / f"{name}.now"),
        "FASTPHI_PICK": pick,
        "FASTPHI_AGAIN": str(out.again or ""),
    }
    if step.shared:
        env.setdefault("OMP_NUM_THREADS", "2")
    if step.newer:
        env["TRITON_PTXAS_PATH"] = str(HOME / PTXAS)
    if step.sanitizer:  # each allocation by itself, whose ends it knows
        env |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FASTPHI_ONE_EACH": "1"}
    return env


def absent(step: Step) -> str:
    """Why it cannot be run here, or nothing."""
    if step.newer and not (HOME / PTXAS).exists():
        return "there is no newer ptxas here: make gpu-bundle brings one"
    if step.sanitizer and sanitizer() is None:
        return "compute-sanitizer was not found"
    return ""


def sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", os.environ.get("PATH", "")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(homes))


def run(step: Step, out: Out, deadline: float, pick: str = "") -> None:
    """The step to its end or its limit; after a test that hangs or kills its process, with the others."""
    start = time.monotonic()
    end = min(start + step.limit, deadline)
    env = environment(step, out, pick)
    output = HOME / (Path(env["FASTPHI_NOW"]).stem + ".out")
    output.unlink(missing_ok=True)
    said = absent(step) or ("" if end - start >= LATEST else "not begun: no time was left")
    command = [sys.executable, __file__, "--within", step.name]
    if step.files:
        config = ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
        files = [str(ROOT / file) for file in step.files]
        command = [sys.executable, *PYTEST, *config, *step.options, *files]
    if step.sanitizer:
        command = [str(sanitizer()), "--tool", "memcheck", "--error-exitcode", "9", *command]
    while not said:
        why, code = watch(command, env, end, step.each, output)
        if not why and code in (
            (0, 1, 5) if step.files else (0,)
        ):  # 1: a test failed; 5: there is none
            said = "done"
        elif test := Path(env["FASTPHI_NOW"]).read_text():
            outcome = "stopped" if why else "died"
            why = why or f"the process ended with {code}"
            if code != gpu_lines.BROKEN:
                found = {"test": test, "outcome": outcome, "why": f"{why}\n{tail(output, 1500)}"}
                out.append("test", step.name, **found)
        if not said and time.monotonic() > end - LATEST:
            said = why or "no time was left"
        elif not said and code != gpu_lines.BROKEN and not test:
            said = f"ended with {code}"
    found = {"said": said, "seconds": round(time.monotonic() - start, 1)}
    if said != "done":
        found["tail"] = tail(output, 1500)
    out.append("step", step.name, **found)
    out.log(step.name, found, tail(output, OUTPUT))


class Out:
    """The files that come back."""

    def __init__(self, folder: Path, again: Path | None, library: Path) -> None:
        folder, again = folder.resolve(), again and again.resolve()  # steps run elsewhere
        folder.mkdir(parents=True, exist_ok=True)
        first = "again-" if again is not None else ""
        self.lines, self.text = folder / f"{first}results.jsonl", folder / f"{first}log.txt"
        self.report, self.again, self.library = folder / f"{first}report.md", again, library
        for path in (self.lines, self.text, self.report):
            path.unlink(missing_ok=True)  # of an earlier run
        os.environ["FASTPHI_LINES"] = str(self.lines)

    def append(self, kind: str, step: str, **found: Any) -> None:
        gpu_lines.append(kind, **({"step": step} | found))

    def log(self, name: str, found: dict[str, Any], output: str) -> None:
        line = f"== {name}: {found['said']}, {found['seconds']} s"
        with _log_lock, self.text.open("a") as file:
            print(line, flush=True)
            file.write(f"{line}\n{output}\n")


# --- what is there to run -----------------------------------------------------------------------------


def sources() -> dict[str, str]:
    """A digest of what the compiled libraries, and what Triton's kernels, are made of."""

    def digest(*folders: str) -> str:
        found = hashlib.sha256()
        for path in sorted(p for folder in folders for p in (ROOT / folder).rglob("*")):
            if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py"):
                found.update(path.name.encode() + path.read_bytes())
        return found.hexdigest()

    return {"csrc": digest("csrc"), "triton_kernels": digest("triton_kernels")}


def unpack(bundle: Path) -> str:
    """The bundle's caches and ptxas to where they belong; why its libraries do not serve, or nothing."""
    if not (bundle / MANIFEST).exists():
        return f"there is no {bundle / MANIFEST}"
    manifest = json.loads((bundle / MANIFEST).read_text())
    for name, kept in manifest["files"].items():
        if hashlib.sha256((bundle / name).read_bytes()).hexdigest() != kept["sha256"]:
            sys.exit(f"gpu-first: {bundle / name} is not what {MANIFEST} says: make it again")
    here = (platform.machine(), sys.version_info[:2])
    if here != ("x86_64", (3, 12)):
        return f"the bundle is for Python 3.12 on x86_64, this is {here}"
    for path in bundle.glob(f"*{COMPRESSED}"):
        with tarfile.open(path) as archive:
            into = HOME if path.name.startswith(PTXAS) else CACHES
            archive.extractall(into, filter="data")
    shutil.copy(bundle / MANIFEST, HOME)
    if sources()["csrc"] != manifest["sources"]["csrc"]:
        return "csrc/ has changed since the bundle was made"
    code = "import torch; print(torch.version.cuda, *torch.cuda.get_device_capability())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    cuda, *capability = said.split() or [""]
    if not cuda.startswith("13.") or capability != ["9", "0"]:
        return f"the bundle is for CUDA 13 and capability 9.0, here are {said.strip() or 'none'}"
    return ""


def prepare(bundle: Path, out: Path) -> tuple[Path, str]:
    """(a folder with the whole package, compiled libraries and all; where these are from)."""
    shutil.rmtree(HOME, ignore_errors=True)
    for folder in ("own", "newer"):
        (CACHES / folder).mkdir(parents=True)
    library = HOME / "library"
    reason = unpack(bundle)
    if not reason:
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / "fastphi", library / "fastphi", ignore=ignore)
        kernels = library / "fastphi" / "triton_kernels"  # as pyproject.toml maps it
        shutil.copytree(ROOT / "triton_kernels", kernels, ignore=ignore)
        for path in (bundle / LIBRARIES).glob("*.so"):
            shutil.copy2(path, library / "fastphi")
        return library, f"of {bundle}"
    print(f"== build: {reason}", flush=True)
    build = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(out.resolve() / "build"),
    ]
    done = subprocess.run(
        [*build, "--build-lib", str(library)], cwd=ROOT, env=os.environ | {"FASTPHI_CUDA": "1"}
    )
    if done.returncode:
        sys.exit(f"gpu-first: the build ended with {done.returncode}")
    return library, f"built here: {reason}"


# --- within a step's process --------------------------------------------------------------------------


def load() -> None:
    """What is here; and every kernel of the bundle, those of the engine first, loaded by the driver."""
    import support
    import torch

    from fastphi.cli import doctor

    gpu_lines.append("machine", **support.machine())
    gpu_lines.append("doctor", said=doctor.text(doctor.report()))
    gpu_lines.append("absent", what="layers", way="CUTLASS", why="it is not built")
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    driver = ctypes.CDLL("libcuda.so.1")
    manifest = json.loads(path.read_text()) if (path := HOME / MANIFEST).exists() else {}
    for name, first in manifest.get("load_first", {}).items():
        start, bad = time.monotonic(), {}
        ordered = [CACHES / name / cubin for cubin in first]
        ordered += sorted(set((CACHES / name).rglob("*.cubin")) - set(ordered))
        for cubin in ordered:
            module = ctypes.c_void_p()
            error: int | str = "it is not there"
            if cubin.exists():
                error = driver.cuModuleLoadData(ctypes.byref(module), cubin.read_bytes())
            if error:
                bad[str(cubin.relative_to(CACHES))] = error
            else:
                driver.cuModuleUnload(module)
        seconds = round(time.monotonic() - start, 2)
        gpu_lines.append(
            "loaded",
            assembler=name,
            version=manifest["assemblers"][name],
            kernels=len(ordered),
            failed=bad,
            seconds=seconds,
            fits=sources()["triton_kernels"] == manifest["sources"]["triton_kernels"],
        )


# --- the calls ----------------------------------------------------------------------------------------


def plan(again: Path | None, only: list[str]) -> list[tuple[Step, str]]:
    """(step, which of its tests: all "", those that "failed", those "missing")."""
    chosen = [s for s in steps() if not only or any(s.name.startswith(name) for name in only)]
    if again is None:
        return [(s, "") for s in chosen if not s.again or only]
    lines = gpu_lines.read(again)
    bad = {
        step
        for (step, _), outcome in gpu_lines.outcomes(lines).items()
        if outcome in gpu_lines.FAILED
    }
    whole = {line["step"] for line in gpu_lines.of_kind(lines, "step") if line["said"] == "done"}
    failed = [(s, "failed") for s in chosen if s.files and s.name in bad]
    missing = [(s, "missing") for s in chosen if s.name not in whole or s.name == "load"]

    def order(item: tuple[Step, str]) -> tuple[bool, ...]:
        step, pick = item
        return step.name != "load", not step.shared, step.name != "loops", pick != "failed"

    return sorted(failed + missing, key=order)


def call(planned: list[tuple[Step, str]], out: Out, seconds: float, jobs: int) -> None:
    """The first step, then what shares the GPU, then the rest alone."""
    start = time.monotonic()
    deadline = start + seconds - LATEST
    (first, pick), *rest = planned
    run(first, out, deadline, pick)
    alone = [item for item in rest if not item[0].shared]
    beside = [item for item in rest if item[0].shared]
    until = start + SHARED * seconds if alone else deadline
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda item: run(item[0], out, until, item[1]), beside):
            pass
    for step, pick in alone:
        run(step, out, deadline, pick)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=450, help="of all steps together")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="three files")
    parser.add_argument("--again", type=Path, help="an earlier call's results.jsonl")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="STEP", help="whose names begin so"
    )
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1),
                        help="steps that share the GPU, at once")  # fmt: skip
    parser.add_argument("--bundle", type=Path, default=ROOT / ".dev")
    parser.add_argument("--list", action="store_true", help="print the steps, run nothing")
    parser.add_argument("--within", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.within:
        return load()
    if options.again is not None and not options.again.exists():
        parser.error(f"--again: there is no {options.again}")
    planned = plan(options.again, options.only)
    if not planned:
        names = ", ".join(s.name for s in steps())
        parser.error(f"--only: expected the beginning of one of {names}; got {options.only}")
    if options.list:
        print("\n".join(f"{s.name}: {s.limit:.0f} s{pick and ', ' + pick}" for s, pick in planned))
        return
    library, libraries = prepare(options.bundle, options.out)
    out = Out(options.out, options.again, library)
    signal.signal(signal.SIGTERM, lambda *_: (end_all(), os._exit(1)))
    start = time.monotonic()
    out.append("call", "", libraries=libraries, seconds=options.seconds, again=bool(options.again))
    call(planned, out, options.seconds, options.jobs)
    earlier = gpu_lines.read(options.again) if options.again else []
    out.append("end", "", seconds=round(time.monotonic() - start, 1))
    out.report.write_text(gpu_report.text(earlier + gpu_lines.read(out.lines)))
    print(f"{out.report}, {out.lines}")


if __name__ == "__main__":
    main()
