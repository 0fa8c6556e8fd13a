"""What every kernel file here needs: Triton if it is there, and checks of a launcher's arguments."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of activations and weights

MISSING: str | None
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    MISSING = None
except ImportError as error:
    MISSING = f"Triton cannot be imported ({error}); install it with: pip install triton"
    # enough for the kernel files to be imported: their bodies are read by Triton only
    triton, TensorDescriptor = None, None
    tl = SimpleNamespace(constexpr=None)


def jit(kernel: Any) -> Any:
    """`triton.jit`, or the plain function where Triton is missing (no launcher reaches it there).

    Nothing is compiled in of the size of the batch, N: one code, and so the same bits, for all.
    """
    if triton is None:
        return kernel
    batch = [name for name in inspect.signature(kernel).parameters if name == "N"]
    return triton.jit(kernel, do_not_specialize=batch)


@jit
def round_to_bf16(x):
    """fp32 -> the nearest bf16 (ties to even), still in fp32: the interpreter's own conversion cuts."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def ptxas() -> tuple[str, str] | None:
    """(the assembler that Triton calls for sm_90, its version, "12.8.93"), None where there is none."""
    if triton is None:
        return None
    tool = triton.knobs.nvidia.ptxas
    try:
        said = subprocess.run([tool.path, "--version"], capture_output=True, text=True).stdout
    except (OSError, AttributeError, RuntimeError):
        return None
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    return (tool.path, found[1]) if found else None


def check_can_run(op: str, device: torch.device) -> None:
    if MISSING is not None:
        raise RuntimeError(f"{op}: {MISSING}")
    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"{op}: the tensors are on {device.type}, expected cuda"
            " (or TRITON_INTERPRET=1 in the environment, to run in Triton's interpreter)"
        )


def check(
    op: str, name: str, tensor: Tensor, shape: Sequence[int], dtypes: tuple, device: torch.device
) -> None:
    """Dense, of this shape, one of these dtypes, on this device: or an error that says which not."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor[:1].numel() >= 2**31:
        raise ValueError(
            f"{op}: {name} has {tensor[:1].numel()} values per image, expected less than 2^31"
            " (offsets within an image are 32-bit)"
        )
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{op}: {name} is {got}, expected {expected}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} has strides {tensor.stride()}, expected dense row-major memory"
        )


def check_active(op: str, active: Tensor | None, first: Tensor) -> None:
    """(N,) int32 flags of the images of `first`, or None."""
    if active is not None:
        check(op, "active", active, (len(first),), (torch.int32,), first.device)


def check_precision(op: str, precision: str) -> None:
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"{op}: precision is {precision!r}, expected 'ieee' or 'tf32'")


@lru_cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """80, 90, …; the interpreter counts as 90, so that it runs the descriptor form."""
    return 90 if device.type != "cuda" else _capability(device.index or 0)


def descriptor(tensor: Tensor, block: Sequence[int]) -> Any:
    """A host-side tensor descriptor: passed by value, so it needs no memory on the device and a
    captured graph keeps it."""
    if tensor.data_ptr() % 16 != 0:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} starts at {tensor.data_ptr():#x}, expected a"
            " multiple of 16 bytes"
        )
    # dense strides: torch leaves that of a dimension of size 1 open
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(tensor.ndim)]
    return TensorDescriptor(tensor, list(tensor.shape), strides, list(block))


def describable(dtype: torch.dtype, *channels: int) -> bool:
    """Whether the copy engine can address dense tensors of so many channels: strides of 16 bytes."""
    return all(c * dtype.itemsize % 16 == 0 for c in channels)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is no less than n."""
    return 1 << (n - 1).bit_length()
