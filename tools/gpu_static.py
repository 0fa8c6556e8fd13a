"""What can be checked of the GPU engine without a GPU: make gpu-static.

    python tools/gpu_static.py [--parts kernels threads link triton] [--cache ~/.cache/fastphi]

kernels  every csrc/cuda/*.cu through nvcc for sm_80 and sm_90a, warnings as errors; a table of
         registers, shared memory and spills (benchmarks/results/gpu_static_cuda.md). Fails on any
         spill, and where the noise has a fused multiply-add, which would change its bits.
threads  the same kernels as C++ on the CPU's threads, against the CPU's operators, to the bit
         (tools/gpu_static_threads.py).
link     csrc/cuda compiled and linked against a torch with CUDA: the wheel's headers and libraries,
         fetched into the cache (0.5 GB) and unpacked there (1 GB), once; and csrc/graph, imported.
triton   tools/gpu_static_triton.py under each of the Triton versions, fetched into the cache (1.6 GB).

Nothing is run on a GPU, so nothing here says anything about speed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_static_cuda.md"
ARCHS = ("sm_80", "sm_90a")
TORCH, PYTHON = "2.11.0", "3.12"  # those of the machine that the kernels are first run on
TRITONS = ("3.6.0", "3.9.0")  # that machine's, and the newest
LIBRARIES = ("c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda")
GIB = 1 << 30


def from_setup(name: str) -> Any:
    """A constant of setup.py, which cannot be imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise KeyError(f"setup.py has no {name}")


def run(*command: Any, **options: Any) -> str:
    """The output of a program; where it fails, its words and ours."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"failed: {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def nvcc() -> tuple[str, Path]:
    """The compiler and the folder of its toolkit."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if found is None:
        sys.exit("nvcc was not found: put it on the PATH or set CUDA_HOME")
    # It says itself where it is: the one on the PATH may be a script.
    top = re.search(r"^#\$ TOP=(.*)$", run(found, "--dryrun", "-v", "-E", "none.cu"), re.MULTILINE)
    return found, Path(home or (top[1] if top else Path(found).parents[1])).resolve()


def kernel_name(symbol: str) -> str:
    """fastphi::(anonymous namespace)::f<..>(..) without namespaces and arguments."""
    name = re.sub(r"fastphi::|\(anonymous namespace\)::|^void ", "", symbol)
    return re.sub(r"\(.*", "", name).replace("unsigned char", "uint8").replace("Bf16", "bf16")


def compile_kernels(compiler: str, source: Path, arch: str, folder: Path) -> list[dict[str, Any]]:
    """One file for one architecture: a row per kernel."""
    flags = [*from_setup("NVCC_FLAGS"), f"-arch={arch}", "-Werror", "all-warnings"]
    said = run(
        compiler, *flags, "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v", "-cubin", source,
        "-o", folder / "out.cubin",
    )  # fmt: skip
    said = run("c++filt", input=said)
    rows = []
    for entry in re.split(r"Compiling entry function '", said)[1:]:
        spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        symbol = re.search(r"Function properties for (.*)", entry)
        assert registers and symbol and len(spills) == 3, f"ptxas -v speaks another way:\n{entry}"
        rows.append(
            {
                "file": source.name,
                "kernel": kernel_name(symbol[1]),
                "arch": arch,
                "registers": int(registers[1]),
                "shared": int(shared[1]) if shared else 0,
                "spill_bytes": sum(map(int, spills)),
            }
        )
    return rows


def fused_operations(compiler: str, source: Path, folder: Path) -> list[str]:
    """Kernels with fused multiply-adds in their PTX, but for those of the decoding of bytes (h)."""
    out = folder / "out.ptx"
    run(compiler, *from_setup("NVCC_FLAGS"), f"-arch={ARCHS[-1]}", "-ptx", source, "-o", out)
    entries = re.split(r"\.entry ", out.read_text())[1:]
    fused = [e.split("(")[0] for e in entries if "fma.rn.f32" in e]
    return [name for name in fused if not re.search(r"kernelI\w*?h(?:f|NS)", name)]


def check_kernels(compiler: str) -> list[str]:
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as name:
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            for arch in ARCHS:
                rows += compile_kernels(compiler, source, arch, Path(name))
            fused = fused_operations(compiler, source, Path(name))
            wrong += [f"{source.name}: fused multiply-adds in {kernel}" for kernel in fused]
            print(f"  {source.name}: {sum(r['file'] == source.name for r in rows)} kernels")
    wrong += [
        f"{r['file']}: {r['kernel']}, {r['arch']}: {r['spill_bytes']} bytes of stack and spills"
        for r in rows
        if r["spill_bytes"]
    ]
    version = re.search(r"release [\d.]+, V([\d.]+)", run(compiler, "--version"))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(markdown(rows, version[1] if version else "?"))
    RESULTS.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"  wrote {RESULTS.relative_to(ROOT)}")
    return wrong


def markdown(rows: list[dict[str, Any]], version: str) -> str:
    columns = ("kernel", "arch", "registers", "shared", "spill_bytes")
    lines = [
        f"# CUDA kernels, compiled by nvcc {version} without a GPU",
        "",
        "Registers per thread; static shared memory per block, in bytes; stack and spills per thread, in"
        " bytes. Nothing here was run. Written by tools/gpu_static.py.",
    ]
    for file in dict.fromkeys(row["file"] for row in rows):
        lines += ["", f"## {file}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [
            f"| {' | '.join(str(row[c]) for c in columns)} |" for row in rows if row["file"] == file
        ]
    return "\n".join(lines) + "\n"


def cuda_torch(cache: Path) -> Path:
    """The folder of a torch with CUDA: headers and the libraries to link with, nothing to run."""
    folder = cache / f"torch-{TORCH}"
    if (folder / "complete").exists():
        return folder / "torch"
    cache.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(cache).free < 3 * GIB:
        sys.exit(f"{cache}: torch {TORCH} needs 3 GB here for a while, then 1; see --cache")
    print(f"  fetching torch {TORCH}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        run(
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
            "--python-version", PYTHON, "-d", name, f"torch=={TORCH}",
        )  # fmt: skip
        (wheel,) = Path(name).glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as packed:
            libraries = {f"torch/lib/lib{library}.so" for library in LIBRARIES}
            missing = libraries - set(packed.namelist())
            if missing:
                sys.exit(f"{wheel.name} is no torch with CUDA: it lacks {sorted(missing)}")
            wanted = [n for n in packed.namelist() if n.startswith("torch/include/")]
            packed.extractall(folder, [*wanted, *libraries])
    (folder / "complete").touch()
    return folder / "torch"


def check_graph(compiler: str, toolkit: Path) -> None:
    """fastphi/_graph, compiled and imported: without a driver it must say so in one clear error."""
    with tempfile.TemporaryDirectory() as name:
        objects = []
        pybind = run(sys.executable, "-m", "pybind11", "--includes").split()
        for source in map(Path, from_setup("GRAPH_SOURCES")):
            objects.append(Path(name, source.name + ".o"))
            if source.suffix == ".cu":
                flags = ["-O3", f"-arch={ARCHS[-1]}", "-Xcompiler", "-fPIC,-Wall,-Wextra"]
                flags += ["-Werror", "all-warnings"]
                run(compiler, *flags, "-c", ROOT / source, "-o", objects[-1])
            else:
                flags = [
                    "-O3",
                    "-Wall",
                    "-Werror",
                    "-fPIC",
                    *pybind,
                    "-isystem",
                    toolkit / "include",
                ]
                run("g++", *flags, "-c", ROOT / source, "-o", objects[-1])
        out = Path(name, "_graph.so")
        run("g++", "-shared", *objects, "-o", out, f"-L{toolkit / 'lib64'}", "-lcudart")
        code = "import _graph\ntry: _graph.WhileGraph(body=0, remaining=0)\n"
        code += "except RuntimeError as error: assert 'while_graph: ' in str(error), error"
        environment = {"PYTHONPATH": name, "LD_LIBRARY_PATH": str(toolkit / "lib64")}
        run(sys.executable, "-c", code, env={**os.environ, **environment})
        print("  fastphi/_graph compiles, links and imports")


def check_link(compiler: str, toolkit: Path, cache: Path) -> None:
    """fastphi/_cuda as setup.py builds it, against that torch; every symbol must be found."""
    torch = cuda_torch(cache)
    include = torch / "include"
    with tempfile.TemporaryDirectory() as name:
        objects = []
        for source in map(Path, from_setup("CUDA_SOURCES")):
            objects.append(Path(name, source.name + ".o"))
            if source.suffix == ".cu":
                flags = [*from_setup("NVCC_FLAGS"), f"-arch={ARCHS[-1]}", "-Xcompiler", "-fPIC"]
                run(compiler, *flags, "-c", ROOT / source, "-o", objects[-1])
            else:
                run(
                    "g++", *from_setup("FLAGS"), "-Wextra", "-Werror", "-fPIC", "-DUSE_CUDA",
                    "-isystem", include, "-isystem", include / "torch/csrc/api/include",
                    "-isystem", toolkit / "include", "-c", ROOT / source, "-o", objects[-1],
                )  # fmt: skip
        out = Path(name, "_cuda.abi3.so")
        run(
            "g++", "-shared", *objects, "-o", out, f"-L{torch / 'lib'}", f"-L{toolkit / 'lib64'}",
            *(f"-l{library}" for library in LIBRARIES), "-lcudart",
            "-Wl,-z,defs", "-Wl,--allow-shlib-undefined",
        )  # fmt: skip
        print(f"  linked against torch {TORCH}: {out.stat().st_size >> 10} KiB")


def check_triton(cache: Path) -> list[str]:
    script = ROOT / "tools" / "gpu_static_triton.py"
    wrong = []
    for version in TRITONS:
        folder = cache / f"triton-{version}"
        if not folder.exists():
            print(f"  fetching triton {version}", flush=True)
            with tempfile.TemporaryDirectory(dir=cache) as name:
                at = ("-q", "--no-deps", "--target", f"{name}/new", f"triton=={version}")
                run(sys.executable, "-m", "pip", "install", *at)
                Path(name, "new").rename(folder)
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        print(f"  Triton {version}", flush=True)
        done = subprocess.run([sys.executable, script], cwd=ROOT, env=environment)
        if done.returncode != 0:
            wrong.append(f"{script.name} under Triton {version}: see above")
    return wrong


def main() -> None:
    parts = ("kernels", "threads", "link", "triton")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/fastphi").expanduser())
    options = parser.parse_args()
    cache = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    wrong: list[str] = []
    for part in options.parts:
        print(f"{part}:", flush=True)
        if part == "triton":
            wrong += check_triton(cache)
            continue
        compiler, toolkit = nvcc()
        if part == "kernels":
            wrong += check_kernels(compiler)
        elif part == "threads":
            script = ROOT / "tools" / "gpu_static_threads.py"
            print(run(sys.executable, script, "--toolkit", toolkit), end="")
        else:
            check_link(compiler, toolkit, cache)
            check_graph(compiler, toolkit)
    if wrong:
        sys.exit("\n".join(["Not as it should be:", *wrong]))
    print("All as it should be.")


if __name__ == "__main__":
    main()
