"""Compile every Triton kernel in every configuration that the network uses, without a GPU.

    python tools/gpu_static_triton.py [--out benchmarks/results/gpu_static_triton_<version>.md]

The launchers run on CPU tensors with the kernel replaced by a recorder, so that what is compiled is
what they launch. Fails on register spills, on more shared memory than a block can have, on
serialised wgmma, and where a kernel that should feed the tensor cores by the copy engine does not.
Writes a table (markdown, and the same as JSON beside it).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from fastphi.triton_kernels import (
    conv_bwd,
    epilogue,
    first_layer,
    fused_layer,
    last_layer,
    norm_bwd,
    pack_taps,
    upsample,
)
from fastphi.triton_kernels.scalars import Parts
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

MODULES = (epilogue, first_layer, fused_layer, last_layer, upsample, conv_bwd, norm_bwd, pack_taps)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block can have
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
}
BATCH = 5  # nothing of the size of the batch is compiled in
CHANNELS = (64, 128, 256, 512)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")


def parts(c: int, size: int, dtype: torch.dtype, n: int, gradient: bool = False) -> Parts:
    """Scalars as the layer before leaves them, of c channels."""
    slots = fused_layer.partials_per_image((c,), c, size, size, dtype, CPU)
    vectors = (torch.empty(n) for _ in range(3 if gradient else 1))
    return Parts(torch.empty(n, slots, 3), 1e-5, *vectors)


def layer(
    c_in: tuple[int, ...], c_out: int, size: int, dtype=BF16, last=False, n=BATCH, **options
) -> None:
    """A fused layer; `last`: of its block, with the pooled result and the sums."""
    r = [torch.empty(n, size, size, c, dtype=dtype) for c in c_in]
    weight = torch.empty(c_out, sum(c_in), 3, 3)
    boxes = fused_layer.sums_per_image(c_in, c_out, size, size, dtype, CPU)
    slots = fused_layer.partials_per_image(c_in, c_out, size, size, dtype, CPU)
    if last:
        options["sums"] = torch.empty(n, boxes, c_out)
        if size % 2 == 0:
            options["pooled"] = torch.empty(n, size // 2, size // 2, c_out, dtype=dtype)
    if len(r) == 2:
        options |= dict(r2=r[1], s2=torch.empty(n))
    fused_layer.fused_layer_fwd(
        r[0],
        parts(c_in[0], size, dtype, n, gradient="z_out" in options),
        fused_layer.pack_weight(weight, c_in[0] if len(c_in) == 2 else None, dtype),
        torch.empty(c_out),
        torch.empty(c_out),
        r_out=torch.empty(n, size, size, c_out, dtype=dtype),
        partials=torch.empty(n, slots, 3),
        **options,
    )


def up(c: int, c_out: int, size: int, dtype=BF16, bias: bool = False) -> None:
    upsample.upsample_fwd(
        torch.empty(BATCH, size, size, c, dtype=dtype),
        parts(c, size, dtype, BATCH) if bias else None,
        upsample.pack_upsample_weight(torch.empty(c, c_out, 2, 2), dtype),
        torch.empty(c_out) if bias else None,
        torch.empty(BATCH, 2 * size, 2 * size, c_out, dtype=dtype),
    )


def first(c: int, c_out: int, size: int, dtype=BF16, pooled: bool = False, **options) -> None:
    boxes = first_layer.sums_per_image(c_out, size, size, dtype, CPU)
    half = (BATCH, size // 2, size // 2, c_out)
    first_layer.first_layer_fwd(
        torch.empty(BATCH, size, size, c, dtype=dtype),
        first_layer.pack_first_weight(torch.empty(c_out, c, 3, 3), dtype),
        torch.empty(c_out),
        torch.empty(BATCH, size, size, c_out, dtype=dtype),
        pooled=torch.empty(half, dtype=dtype) if pooled else None,
        sums=torch.empty(BATCH, boxes, c_out) if pooled else None,
        **options,
    )


def last(c: int, c_out: int, size: int, dtype=BF16) -> None:
    last_layer.last_layer_fwd(
        torch.empty(BATCH, size, size, c, dtype=dtype),
        parts(c, size, dtype, BATCH),
        fused_layer.pack_weight(torch.empty(c_out, c, 3, 3), None, dtype),
        torch.empty(c_out),
        torch.empty(BATCH, c_out, size, size),
    )


# The gradients, and the forward layers as guidance launches them: with z, and with images left out.


def active() -> torch.Tensor:
    return torch.empty(BATCH, dtype=torch.int32)


def packing(c: int, c_out: int, dtype=BF16, **options) -> None:
    rows, k = (c, c_out) if options.get("transposed") else (c_out, c)
    packed = torch.empty(rows, 9 * k, dtype=dtype)
    pack_taps.pack_taps(torch.empty(c_out, c, 3, 3), packed, **options)


def guided(c: int, c_out: int, size: int, dtype=BF16, pool: bool = False) -> None:
    z = torch.empty(BATCH, size, size, c_out, dtype=dtype)
    layer((c,), c_out, size, dtype, last=pool, z_out=z, active=active())


def conv_gradient(
    c: int, c_in: int, size: int, dtype=BF16, masked: bool = False, **options
) -> None:
    """c, c_in: channels of d_z and d_r."""
    slots = conv_bwd.d_s_per_image(c, c_in, size, size, dtype, CPU)
    conv_bwd.conv_bwd(
        torch.empty(BATCH, size, size, c, dtype=dtype),
        conv_bwd.pack_transposed_weight(torch.empty(c, c_in, 3, 3), dtype),
        torch.empty(BATCH, size, size, c_in, dtype=dtype),
        r=torch.empty(BATCH, size, size, c_in, dtype=dtype),
        s=torch.empty(BATCH),
        d_s=None if masked else torch.empty(BATCH, slots),
        masked=masked,
        **options,
    )


def norm_gradient(
    c: int, size: int, form: str, dtype=BF16, norm: bool = True, train: bool = False
) -> None:
    shape = {"full": (size, size, c), "pooled": (size // 2, size // 2, c), "means": (c,)}[form]
    x = torch.empty(BATCH, size, size, c, dtype=dtype)
    per_image = torch.empty(BATCH) if norm else None
    slots = conv_bwd.d_s_per_image(c, c, size, size, dtype, CPU) if form == "full" else 1
    parts = norm_bwd.sums_per_image(c, size, size)
    norm_bwd.norm_bwd(
        torch.empty(BATCH, *shape, dtype=FP32 if form == "means" else dtype),
        x,
        torch.empty(c) if norm else None,
        torch.empty_like(x),
        form=form,
        s_in=torch.empty(BATCH),
        s=per_image,
        mean=per_image,
        std=per_image,
        d_s=torch.empty(BATCH, slots) if norm else None,
        sums=torch.empty(BATCH, parts, 2, c) if train else None,
        active=None if train else active(),
    )


def image_gradient(c: int, size: int, dtype=BF16) -> None:
    last_layer.last_layer_fwd(
        torch.empty(BATCH, size, size, c, dtype=dtype),
        None,
        conv_bwd.pack_transposed_weight(torch.empty(c, 3, 3, 3), dtype),
        None,
        torch.empty(BATCH, 3, size, size),
        active=active(),
    )


def after_library(sources: int, c: int, size: int, dtype=BF16) -> None:
    """The epilogue of a convolution that cuDNN made."""
    image, half = (BATCH, size, size, c), (BATCH, size // 2, size // 2, c)
    slots = epilogue.partials_per_image(c, size, size, dtype, CPU)
    boxes = epilogue.sums_per_image(c, size, size, dtype, CPU)
    two = dict(c2=torch.empty(image, dtype=dtype), s2=torch.empty(BATCH)) if sources == 2 else {}
    epilogue.epilogue_fwd(
        torch.empty(image, dtype=dtype),
        parts(c, size, dtype, BATCH),
        torch.empty(c),
        torch.empty(c),
        r_out=torch.empty(image, dtype=dtype),
        pooled=torch.empty(half, dtype=dtype),
        partials=torch.empty(BATCH, slots, 3),
        sums=torch.empty(BATCH, boxes, c),
        **two,
    )


Case = tuple[str, Callable[[], None]]


def guidance(size: int) -> Iterator[Case]:
    """A guidance iteration's layers, forward and backward, in bf16."""
    c0, top = CHANNELS[0], CHANNELS[-1]
    yield f"first 3→{c0} @{size}, guided", lambda: first(3, c0, size, active=active())
    yield (
        f"{c0}→{c0} @{size}, under a ReLU",
        lambda: conv_gradient(c0, c0, size, masked=True, active=active()),
    )
    yield f"image gradient {c0}→3 @{size}", lambda: image_gradient(c0, size)
    before = c0
    for depth, c in enumerate(CHANNELS):
        at = size >> depth
        if c != before:
            yield f"{before}→{c} @{at}, z", lambda b=before, c=c, at=at: guided(b, c, at)
            yield (
                f"{c}→{before} @{at}",
                lambda b=before, c=c, at=at: conv_gradient(c, b, at, active=active()),
            )
            yield f"{c} @{at}", lambda c=c, at=at: norm_gradient(c, at, "full")
            yield f"{c}→{c} @{at}", lambda c=c, at=at: conv_gradient(c, c, at, active=active())
        yield f"{c}→{c} @{at}, z, sums, pool", lambda c=c, at=at: guided(c, c, at, pool=True)
        form = "means" if c == top else "pooled"
        yield f"{c} @{at}, {form}", lambda c=c, at=at, form=form: norm_gradient(c, at, form)
        before = c


def network(size: int) -> Iterator[Case]:
    """Every distinct layer of the full network on size×size images, in bf16."""
    c0 = CHANNELS[0]
    yield f"first 3→{c0} @{size}", lambda: first(3, c0, size)
    before = c0
    for depth, c in enumerate(CHANNELS):
        at = size >> depth
        if c != before:
            yield f"{before}→{c} @{at}", lambda b=before, c=c, at=at: layer((b,), c, at)
        yield f"{c}→{c} @{at}, sums, pool", lambda c=c, at=at: layer((c,), c, at, last=True)
        if c != CHANNELS[-1]:
            yield f"{c}→{c} @{at}", lambda c=c, at=at: layer((c,), c, at)
            yield f"{c}+{c}→{c} @{at}", lambda c=c, at=at: layer((c, c), c, at)
            yield f"up {2 * c}→{c} @{at // 2}", lambda c=c, at=at: up(2 * c, c, at // 2)
        before = c
    yield f"up {2 * c0}→{c0} with bias", lambda: up(2 * c0, c0, size // 2, bias=True)
    yield f"last {c0}→3 @{size}", lambda: last(c0, 3, size)


def others() -> Iterator[Case]:
    """The other rows of the tables: few channels, odd channels, fp16, fp32."""
    for c in (16, 32):
        yield f"{c}→{c} @32", lambda c=c: layer((c,), c, 32, last=True)
    for c in (16, 20):
        yield f"{c}→{c}, one image of one pixel", lambda c=c: layer((c,), c, 1, n=1)
    yield "fp16 128→128 @32", lambda: layer((128,), 128, 32, FP16)
    for c_in, c_out in (((12,), 20), ((20,), 36), ((36,), 52), ((52, 52), 132)):
        name = "+".join(map(str, c_in)) + f"→{c_out} @20"
        yield name, lambda i=c_in, o=c_out: layer(i, o, 20, last=True)
    yield "up 36→20 @10", lambda: up(36, 20, 10)
    yield "first 1→20 @20, pool", lambda: first(1, 20, 20, pooled=True)
    yield "first 4→64 @64, pool", lambda: first(4, 64, 64, pooled=True)
    yield "last 20→1 @20", lambda: last(20, 1, 20)
    for precision in ("ieee", "tf32"):
        for c in (32, 64):
            yield (
                f"fp32 {precision} {c}+{c}→{c} @32",
                lambda c=c, p=precision: layer((c, c), c, 32, FP32, last=True, precision=p),
            )
    for sources, c, size in ((1, 64, 64), (2, 64, 64), (1, 512, 8), (1, 20, 20)):
        name = f"after cuDNN: {c} @{size}, {sources} of them"
        yield name, lambda n=sources, c=c, size=size: after_library(n, c, size)
    yield "fp32 up 64→32", lambda: up(64, 32, 16, FP32)
    yield "fp32 first 3→64", lambda: first(3, 64, 64, FP32, pooled=True)
    yield "fp32 last 64→3", lambda: last(64, 3, 64, FP32)
    yield "64→128", lambda: packing(64, 128)
    yield "64+64→64", lambda: packing(128, 64, split=64)
    yield "64→128, transposed", lambda: packing(64, 128, transposed=True)
    yield "fp32 64→128", lambda: packing(64, 128, FP32)
    yield "64 @64, training", lambda: norm_gradient(64, 64, "full", train=True)
    yield "64 @64, no norm, training", lambda: norm_gradient(64, 64, "full", norm=False, train=True)
    yield "64+64→64 @64, to the second", lambda: conv_gradient(64, 64, 64, s_z=torch.empty(BATCH))
    for c in (20, 36):
        yield f"{c}→{c} @20", lambda c=c: conv_gradient(c, c, 20, active=active())
        yield f"{c} @20", lambda c=c: norm_gradient(c, 20, "full")
        yield f"{c}→{c} @20, z", lambda c=c: guided(c, c, 20, pool=True)
    for precision in ("ieee", "tf32"):
        yield (
            f"fp32 {precision} 64→64 @32",
            lambda p=precision: conv_gradient(64, 64, 32, FP32, precision=p, active=active()),
        )
    yield "fp32 64→64 @32, z", lambda: guided(64, 64, 32, FP32, pool=True)
    yield "fp32 64 @32", lambda: norm_gradient(64, 32, "full", FP32)
    yield "fp32 image gradient 64→3", lambda: image_gradient(64, 64, FP32)


class Recorder:
    """Stands for a kernel: keeps what it would be launched with."""

    def __init__(self, kernel) -> None:
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid):
        def called(*args, **named) -> None:
            order = [p.name for p in self.kernel.params if not p.is_constexpr]
            args += tuple(named.pop(name) for name in order[len(args) :])
            self.calls.append((self.kernel, args, named))

        return called


def record(launch: Callable[[], None], capability: int):
    """(kernel, arguments, compile-time arguments) of the one kernel that `launch` launches."""
    recorders = []
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            name = f"{module.OP}_kernel"
            recorders.append(Recorder(getattr(module, name)))
            changes = {name: recorders[-1], "check_can_run": lambda *a: None}
            if hasattr(module, "capability"):
                changes["capability"] = lambda device: capability
            stack.enter_context(mock.patch.multiple(module, **changes))
        launch()
    (call,) = [call for recorder in recorders for call in recorder.calls]
    return call


def source(kernel, args, constants) -> tuple[ASTSource, dict]:
    """What Triton's launcher would compile for these arguments, and its options."""
    constants = dict(constants)
    options = {
        name: constants.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")
    }
    signature, attributes = {}, {}
    order = [(p.num, p.name) for p in kernel.params if not p.is_constexpr]
    for (i, name), value in zip(order, args, strict=True):
        if name in kernel.do_not_specialize:
            signature[name] = "i32"
        elif value is None or (isinstance(value, int) and value == 1):  # as Triton's launcher does
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
    for name in kernel.arg_names:
        signature.setdefault(name, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes), options


def inspect(name: str, call, capability: int) -> dict:
    """Compile one launch and read its code."""
    kernel, _, constants = call
    src, options = source(*call)
    compiled = triton.compile(src, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin, text = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        text.write_text(ptx)
        arch = "sm_90a" if capability == 90 else f"sm_{capability}"
        usage = _run(BIN / "cuobjdump", "-res-usage", cubin)
        verbose = _run(
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={arch}",
            text,
            "-o",
            Path(folder, "again"),
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", verbose)))
    t = constants
    if "TN" in t:
        tile = (
            f"{t['TN']}×{t['TH']}×{t['TW']} × {t['BLOCK_N']}, k {t.get('BLOCK_K', t.get('K', 0))}"
        )
    else:
        tile = f"{t.get('BLOCK_P', t.get('BLOCK_R'))} × {t['BLOCK_C']}"
    return {
        "kernel": kernel.__name__,
        "case": name,
        "arch": arch,
        "tile": tile,
        "warps": options["num_warps"],
        "stages": options["num_stages"],
        "registers": registers,
        "spill_bytes": spills + stack,
        "shared": compiled.metadata.shared,
        "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\S*?\.(m64n\d+)k", ptx))),
        "serialised": "wgmma" in verbose and "serialized" in verbose,
        "mma": ptx.count("mma.sync"),
        "tma_loads": len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        "tma_stores": len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.global", ptx)),
        "descriptors": bool(t.get("DESCRIPTORS")),
    }


def _run(program: str | Path, *args) -> str:
    done = subprocess.run([program, *map(str, args)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{program} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def faults(row: dict) -> list[str]:
    """What is wrong with a kernel's code."""
    found = []
    limit = SHARED_LIMIT[90 if row["arch"] == "sm_90a" else 80]
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    if row["shared"] > limit:
        found.append(f"{row['shared']} bytes of shared memory, at most {limit}")
    if row["serialised"]:
        found.append("serialised wgmma")
    wide = row["descriptors"] and int(row["tile"].split("× ")[1].split(",")[0]) >= 64
    if wide and not row["wgmma"] and row["kernel"] != "epilogue_fwd_kernel":
        found.append("no wgmma")
    if row["descriptors"] and row["tma_loads"] + row["tma_stores"] == 0:
        found.append("no tensor copies")
    return [f"{row['kernel']}, {row['case']}, {row['arch']}: {what}" for what in found]


def collect() -> list[dict]:
    """A row per distinct kernel; cases that compile to the same one are named together."""
    rows: dict[str, dict] = {}
    cases = [*network(64), *network(80), *guidance(64), *guidance(80), *others()]
    for capability in (90, 80):
        for name, launch in cases:
            call = record(launch, capability)
            src, options = source(*call)
            key = f"{capability} {src.hash()} {options}"
            if key in rows:
                if name not in rows[key]["case"].split("; "):
                    rows[key]["case"] += f"; {name}"
                continue
            rows[key] = inspect(name, call, capability)
            print(f"  {rows[key]['arch']} {name}: {rows[key]['registers']} registers", flush=True)
    return list(rows.values())


COLUMNS = ("arch", "case", "tile", "warps", "stages", "registers", "shared", "spill_bytes",
           "wgmma", "mma", "tma_loads", "tma_stores")  # fmt: skip


def markdown(rows: list[dict]) -> str:
    lines = [
        f"# Triton {triton.__version__}, compiled without a GPU",
        "",
        "Registers per thread, shared memory per block in bytes; tile: images × rows × columns of pixels"
        " × output channels; wgmma and the copy engine (tma) as they stand in the PTX. Nothing here was"
        " run. Written by tools/gpu_static_triton.py.",
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        lines += [
            "",
            f"## {kernel}",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
        ]
        for row in rows:
            if row["kernel"] == kernel:
                cells = [", ".join(v) if isinstance(v := row[c], list) else str(v) for c in COLUMNS]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run(out: Path) -> list[str]:
    """Compile everything, write the table to `out` (and .json beside it); what is wrong."""
    rows = collect()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markdown(rows))
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return [fault for row in rows for fault in faults(row)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(f"benchmarks/results/gpu_static_triton_{triton.__version__}.md")
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    wrong = run(out)
    print(f"wrote {out}")
    if wrong:
        sys.exit("\n".join(["Triton kernels whose code is not as it should be:", *wrong]))


if __name__ == "__main__":
    main()
