"""What is installed, what was compiled, and which engine serves what (`fastphi doctor`)."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from typing import Any, Literal

import torch

import fastphi
from fastphi import engine
from fastphi.config import UNetConfig
from fastphi.engine import ops
from fastphi.engine.gpu import library, loop

_PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "safetensors",
    "pillow",
    "scikit-learn",
    "matplotlib",
    "tyro",
)
_SOUND_PTXAS = (13, 1, 80)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def report() -> dict[str, Any]:
    """Versions, build and engines as plain values: what `fastphi doctor --json` prints."""
    return {
        "fastphi": fastphi.__version__,
        "python": sys.version.split()[0],
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "processor": _processor(),
        "gpu": _gpu(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "compiled": {"cpu": _compiled("cpu"), "cuda": _compiled("cuda")},
        "triton_kernels": _triton_kernels(),
        "cudnn": library.text(),
        "match_loop": loop.text(),
        "engines": [row for device in _devices() for row in _engines(device)],
    }


def text(found: dict[str, Any]) -> str:
    """The report as a page of text."""
    lines = [f"fastphi {found['fastphi']} on Python {found['python']}, {found['machine']}"]
    lines += [f"  processor  {found['processor']}", f"  GPU        {found['gpu']}", "", "Packages"]
    lines += [f"  {name:<13} {version}" for name, version in found["packages"].items()]
    lines += ["", "Compiled"]
    for name, build in found["compiled"].items():
        if isinstance(build, dict):
            build = ", ".join(f"{key} {value}" for key, value in build.items())
        lines.append(f"  {name:<6} {build}")
    lines.append(f"  triton {found['triton_kernels']}")
    lines.append(f"  cuDNN  makes the convolutions of {found['cudnn']}")
    lines.append(f"  match  on a GPU is repeated by: {found['match_loop']}")
    lines += ["", "Engines (default network; a gradient needed: ops, otherwise: runner)"]
    for row in found["engines"]:
        lines.append(f"  {row['device']:<5} {row['dtype']:<9} -> {row['engine']}")
        lines += [f"  {'':<18}not {name}: {reason}" for name, reason in row["refused"].items()]
        if row["remark"]:
            lines.append(f"  {'':<18}{row['remark']}")
        if row["with gradient"] != row["engine"]:
            lines.append(f"  {'':<18}with a gradient -> {row['with gradient']}")
            refused = row["with gradient refused"].items()
            lines += [f"  {'':<18}not {name}: {reason}" for name, reason in refused]
    return "\n".join(lines)


def _engines(device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for dtype in _DTYPES:
        (runner, refused), (ops, ops_refused) = (_serving(device, dtype, g) for g in (False, True))
        remark = runner.remark(UNetConfig(), dtype)
        rows.append(
            {
                "device": device.type,
                "dtype": str(dtype).removeprefix("torch."),
                "engine": _name(runner),
                "refused": refused,
                "remark": remark,
                "with gradient": _name(ops),
                "with gradient refused": ops_refused,
            }
        )
    return rows


def _serving(
    device: torch.device, dtype: torch.dtype, gradient: bool
) -> tuple[engine.Engine, dict[str, str]]:
    """The engine of the default network, and why those before it cannot serve."""
    refused: dict[str, str] = {}
    for candidate in (e for e in engine.ENGINES if e.made_for(device)):
        reason = candidate.reason(UNetConfig(), device, dtype, gradient)
        if reason is None:
            break
        refused[candidate.name] = reason
    return candidate, refused


def _name(engine: engine.Engine) -> str:
    return f"{engine.name} ({engine.what})"


def _devices() -> list[torch.device]:
    return [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


def _compiled(library: Literal["cpu", "cuda"]) -> Any:
    if (reason := ops.missing(library)) is not None:
        return reason
    build = torch.ops.fastphi.build_info if library == "cpu" else torch.ops.fastphi.cuda_build_info
    return json.loads(build())


def _triton_kernels() -> str:
    try:
        from fastphi import triton_kernels
    except ImportError:
        return "not installed with this fastphi: pip install --no-build-isolation -e ."
    if (reason := triton_kernels.missing()) is not None:
        return reason
    said = "compiled at first use, for sm_80 and later"
    if (found := triton_kernels.ptxas()) is None:
        return f"{said}; no ptxas was found to assemble them"
    path, version = found
    said += f", by ptxas {version} ({path})"
    if tuple(map(int, version.split("."))) < _SOUND_PTXAS:
        wanted = ".".join(map(str, _SOUND_PTXAS))
        said += (
            f"; before {wanted} others had wrong numbers on sm_90: TRITON_PTXAS_PATH names another"
        )
    return said


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        return f"{names[0]} x {len(names)}, torch uses {torch.backends.cpu.get_cpu_capability()}"
    except (OSError, IndexError):
        return platform.processor() or "unknown"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none visible" if torch.version.cuda else "none: this torch is a CPU build"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}"
