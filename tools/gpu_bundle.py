"""What a machine with a GPU and without a network needs beside the repository: make gpu-bundle.

    python3 tools/gpu_bundle.py [--bundle .dev]

Made without a GPU, into one folder: the compiled libraries, for Python 3.12 and CUDA 13 (gpu_pretend.py's
build, sm_90a); what Triton compiles for the engine and its tests, twice, by its own ptxas and by a newer
one; that ptxas; and a manifest. tools/gpu_first.py takes it up. Triton's caches are made as a user's are,
by launching, under Triton 3.6 on the pretended GPU: kernels are compiled, their launches prepared and
dropped. They belong to the sources they were made of; a kernel that changed since compiles where it runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import gpu_pretend
from gpu_first import CACHES, COMPRESSED, LIBRARIES, MANIFEST, PTXAS, sources

ROOT = Path(__file__).resolve().parents[1]
NVCC = "nvidia-cuda-nvcc==13.5.37"  # the package of the newer ptxas: the newest there is
LIMIT = 25_000_000  # bytes of the folder
# Without assertions, which nothing here could pass, tests launch whatever they would.
TESTS = ["-O", "-m", "pytest", "-q", "--assert=plain", "--tb=no", "-W", "ignore"]
TESTS += ["-p", "no:cacheprovider", "-p", "gpu_bundle", "--timeout", "40"]
LAUNCHING = (
    "benchmarks/bench_gpu_values.py",
    "benchmarks/bench_gpu_peaks.py",
    "tests/triton_kernels",
    *(
        f"tests/engine/gpu/test_{name}.py"
        for name in (
            "runner",
            "match",
            "training",
            "interpreted_runner",
            "interpreted_match",
            "interpreted_training",
        )
    ),
)


def newer_ptxas(folder: Path) -> Path:
    """From the package index, and packed beside it, once."""
    program = folder / PTXAS
    packed = folder / f"{PTXAS}{COMPRESSED}"
    if not packed.exists():
        wheels = folder / "wheels"
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels]
        gpu_pretend.run(*pip, NVCC)
        with zipfile.ZipFile(next(wheels.glob("nvidia_cuda_nvcc*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith("/bin/ptxas"))
            program.write_bytes(wheel.read(name))
        program.chmod(0o755)
        pack(PTXAS, folder, folder / "part")
        (folder / "part").rename(packed)
    return program


def version(ptxas: Path) -> str:
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", said)
    assert found is not None, said
    return found[1]


def compiled(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*.cubin"))


def fill(cache: Path, program: list[Any], variables: dict[str, str]) -> str:
    """Runs a program whose kernels are wanted; what it says last."""
    variables = os.environ | variables | {
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_STORE_BINARY_ONLY": "1",
        "PRETEND_GPUS": "1",
        "PRETEND_NAME": "a GPU for all that tests know",  # which are smaller on a pretended one
    }  # fmt: skip
    paths = [ROOT / "tools", ROOT / "benchmarks", ROOT / "tests" / "engine" / "gpu"]
    variables["PYTHONPATH"] = os.pathsep.join([variables["PYTHONPATH"], *map(str, paths)])
    command = [str(part) for part in program]
    # not in the project's folder, whose package has no compiled libraries
    done = subprocess.run(command, env=variables, cwd=cache, capture_output=True, text=True)
    if "pytest" not in command and done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return (done.stdout.strip().splitlines() or ["nothing"])[-1]


def make_cache(cache: Path, python: Path, variables: dict[str, str], tests: bool) -> list[str]:
    """The engine's kernels, once a second run has compiled nothing."""
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    engine = [python, __file__, "--launch"]
    # by the newer one gpu_first.py runs no test of the engine
    files = [ROOT / f for f in LAUNCHING if cache.name == "own" or "tests/engine" not in f]
    found: list[list[str]] = []
    programs = {"engine": engine} | ({"tests": [python, *TESTS, *files]} if tests else {})
    for name, program in programs.items():
        start = time.monotonic()
        said = fill(cache, program, variables)
        found.append(compiled(cache))
        took = f"{time.monotonic() - start:.0f} s"
        print(f"{cache.name}: {name}, {took}, {len(found[-1])} kernels: {said}", flush=True)
    for source in cache.rglob("*.source"):  # more than half, and nobody reads it
        source.unlink()
    before = set(cache.rglob("*"))
    fill(cache, engine, variables)
    if new := {p.name for p in set(cache.rglob("*")) - before}:
        sys.exit(f"gpu-bundle: with the cache in place, the engine still compiled {sorted(new)}")
    return found[0]


def pack(name: str, parent: Path, target: Path) -> None:
    """A folder or file as .tar.xz, alike beside alike, and neither time nor owner makes a difference."""
    files = [p for p in (parent / name).rglob("*") if p.is_file()] or [parent / name]
    names = [str(p.relative_to(parent)) for p in sorted(files, key=lambda p: (p.name, str(p)))]
    command = ["tar", "--mtime=@0", "--owner=0", "--group=0", "-C", parent, "-T", "-", "-cf", "-"]
    tar = subprocess.run(
        list(map(str, command)), input="\n".join(names).encode(), stdout=subprocess.PIPE, check=True
    )
    with target.open("wb") as file:
        xz = ["xz", "--x86", "--lzma2=preset=9", "-c"]
        subprocess.run(xz, input=tar.stdout, stdout=file, check=True)


def main() -> None:
    parser = gpu_pretend.arguments(__doc__)
    parser.add_argument("--bundle", type=Path, default=ROOT / ".dev")
    parser.add_argument(
        "--engine-only",
        action="store_true",
        help="no kernels that tests alone need: in half the time",
    )
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.launch:
        return launch()
    binaries, variables = gpu_pretend.ready(options)
    python = binaries / "python"
    own = subprocess.run(
        [python, "-c", "import triton; print(triton.knobs.nvidia.ptxas.path)"],
        capture_output=True, text=True, check=True, env=os.environ | variables,
    ).stdout.strip()  # fmt: skip
    newer = newer_ptxas(options.cache / "ptxas-newer")
    assemblers = {"own": Path(own), "newer": newer}
    found: dict[str, Any] = {
        "sources": sources(),
        "assemblers": {},
        "kernels": {},
        "load_first": {},
    }
    for name, ptxas in assemblers.items():
        chosen = {"TRITON_PTXAS_PATH": str(newer)} if ptxas is newer else {}
        found["assemblers"][name] = version(ptxas)
        found["load_first"][name] = make_cache(
            CACHES / name, python, variables | chosen, not options.engine_only
        )
        kernels = Counter(Path(path).stem for path in compiled(CACHES / name))
        found["kernels"][name] = dict(sorted(kernels.items()))

    part = options.bundle.with_name(options.bundle.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / LIBRARIES).mkdir(parents=True)
    for library in sorted((options.out / "lib" / "fastphi").glob("*.so")):
        shutil.copy2(library, part / LIBRARIES)
    for name in assemblers:
        pack(name, CACHES, part / f"{name}{COMPRESSED}")
    shutil.copy(newer.parent / f"{PTXAS}{COMPRESSED}", part)
    files = sorted(p for p in part.rglob("*") if p.is_file())
    found["files"] = {
        str(p.relative_to(part)): {
            "bytes": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in files
    }
    size = sum(p.stat().st_size for p in files)
    (part / MANIFEST).write_text(json.dumps(found, indent=1) + "\n")
    if size > LIMIT:
        sys.exit(f"gpu-bundle: {size:,} bytes, expected at most {LIMIT:,}: {part}")
    shutil.rmtree(options.bundle, ignore_errors=True)
    part.rename(options.bundle)
    print(f"{options.bundle}: {size / 1e6:.1f} MB, ptxas {found['assemblers']}")


# --- within the pretended GPU --------------------------------------------------------------------------


def launch() -> None:
    """The engine's work on the paper's network and the shipped one, in bfloat16 and float32."""
    import gpu_host
    import torch

    import fastphi
    from fastphi import engine
    from fastphi.engine.gpu import loop as gpu_loop

    _kept = [gpu_host.without_libraries(), gpu_host.without_values()]
    device, size = torch.device("cuda"), 64
    models = [
        fastphi.UNet(backend="cuda").to(device),
        fastphi.load_pretrained("natural64-small", device=device),
    ]
    for model in models:
        model.backend = "cuda"
        model.eval()
        # Triton makes variants for a 1 and for multiples of 16
        for products, n in (("bf16", 16), ("bf16", 1), ("bf16", 3), ("tf32", 16), ("ieee", 16)):
            x = torch.zeros(n, 3, size, size, device=device)
            width = model.config.channels[-1]
            target, weight = torch.ones(n, width, device=device), torch.ones(width, device=device)
            low = products == "bf16"
            torch.backends.cudnn.conv.fp32_precision = "tf32" if low else products
            with torch.autocast("cuda", torch.bfloat16, enabled=low):
                with torch.no_grad():
                    model(x), model.phi(x)
                    for form in gpu_loop.FORMS:
                        os.environ["FASTPHI_MATCH_LOOP"] = form
                        engine.runner(model, x).match(x, target, weight, 0.01, 2, 0.0)
                if n != 1:
                    model(x).float().square().sum().backward()
    torch.cuda.synchronize()


def pytest_configure(config: Any) -> None:
    """As a plugin: nothing looks at values, and what cuDNN would compute has the right shape."""
    import gpu_host

    config.stash_of_libraries = gpu_host.without_libraries()
    gpu_host.without_values()


if __name__ == "__main__":
    main()
