"""The GPU tests on a pretended GPU (tools/pretend_gpu): make gpu-pretend.

Needs nvcc and the headers of CUDA 13, and g++. Makes, in --cache, an environment with a torch that has CUDA
(5 GB); builds the extensions for it and the two pretended libraries in --out; runs every test marked gpu.
What is left over on the command line goes to pytest. --program FILE ARGUMENT... runs that with the
environment's Python instead, whatever pytest it starts on the pretended GPU too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tools" / "pretend_gpu"
PYTHON = "python3.12"  # these are of the machine that the engine is first run on
PACKAGES = [
    "torch==2.11.0",
    "triton==3.6.0",
    "numpy<2.4",
    "setuptools<80",
    "wheel",
    "ninja",
    "pybind11",
]
PACKAGES += ["pytest", "pytest-timeout", "pytest-benchmark", "hypothesis"]
PACKAGES += ["pillow", "safetensors", "tqdm", "tyro", "scikit-learn", "matplotlib"]
LIBRARIES = {
    "libcuda.so.1": ("driver.cpp", "state.cpp", "order.cpp"),
    "libcudart.so.13": ("runtime.cpp", "memory.cpp", "graphs.cpp"),
}


def run(*command: object, **environment: str) -> None:
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=os.environ | environment)
    if done.returncode:
        sys.exit(done.returncode)


def environment(cache: Path) -> Path:
    """Its Python; made where it is not there, again where it was not finished."""
    venv = cache / "gpu-pretend" / "venv"
    if not (venv / "done").exists():
        if shutil.which(PYTHON) is None:
            sys.exit(f"gpu-pretend: no {PYTHON} on the PATH")
        # pyenv's stand-in of that name is on the PATH, but runs only where it is asked for
        run(PYTHON, "-m", "venv", "--clear", venv, PYENV_VERSION=PYTHON.removeprefix("python"))
        run(venv / "bin/pip", "install", "-q", *PACKAGES)
        (venv / "done").touch()
    return venv / "bin"


def libraries(out: Path, include: Path) -> Path:
    """The two pretended ones."""
    folder = out / "libraries"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O2", "-g", "-fPIC", "-shared", "-Wall", f"-I{include}"]
    for name, sources in LIBRARIES.items():
        more: list[object] = []
        if name.startswith("libcudart"):
            more = [f"-Wl,--version-script={HERE / 'cudart.map'}", folder / "libcuda.so.1"]
        files = [HERE / source for source in sources]
        run("g++", *flags, f"-Wl,-soname,{name}", *files, *more, "-o", folder / name, "-ldl")
    link = folder / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to("libcuda.so.1")
    return folder


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Where things are: of every command that runs on the pretended GPU."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "fastphi")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-pretend")
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    parser.add_argument("--toolkit", type=Path, default=toolkit)
    return parser


def ready(options: argparse.Namespace) -> tuple[Path, dict[str, str]]:
    """(the folder of its programs, the variables that they need): all made that is missing."""
    binaries, out = environment(options.cache), options.out.resolve()
    # before the libraries are in anybody's way: a build under them hangs
    build = ["setup.py", "-q", "build", "--build-base", out, "--build-lib", out / "lib"]
    wanted = {
        "FASTPHI_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "9.0a",
        "CUDA_HOME": str(options.toolkit),
    }
    run(binaries / "python", *build, **wanted)
    pretended = libraries(out, options.toolkit / "include")
    return binaries, {
        "PYTHONPATH": str(out / "lib"),
        "LD_LIBRARY_PATH": str(pretended),
        "LD_PRELOAD": str(pretended / "libcudart.so.13"),
        "TRITON_LIBCUDA_PATH": str(pretended),
        "OMP_NUM_THREADS": "1",
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--program", nargs=argparse.REMAINDER, help="run this instead of pytest")
    options, rest = parser.parse_known_args()
    binaries, variables = ready(options)
    paths = (variables["PYTHONPATH"], HERE, ROOT / "tests" / "engine" / "gpu")
    variables["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    if options.program:
        run(binaries / "python", *options.program, PYTEST_PLUGINS="plugin", **variables)
        return
    plain = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "plugin", "-m", "gpu", "--timeout", "300"]
    run(binaries / "pytest", *plain, *(rest or ["tests"]), **variables)


if __name__ == "__main__":
    main()
