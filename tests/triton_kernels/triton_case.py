"""Shared by the tests of the Triton kernels: where they run, inputs, and how close is close.

With a GPU they run on it. Without one they run in Triton's interpreter, which must be asked for before
Triton is imported: test_interpreter.py starts a process for that, and here they are skipped.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import numpy as np
import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])

# Largest error over the largest value. Stored results: half a unit in the last place, and what the sums'
# order makes of fp32. Statistics and sums are not rounded to the dtype: the same inputs, summed in fp32;
# tensor cores keep fewer bits of what they align than fp32 addition does.
STORED = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}
SUMMED = 2e-6 if INTERPRETED else 2e-5


def skip_reason() -> str | None:
    """Why the kernels cannot be tested at all, or None."""
    if importlib.util.find_spec("fastphi.triton_kernels") is None:
        return "fastphi.triton_kernels is not installed (pip install -e . maps it)"
    from fastphi.triton_kernels import missing

    return missing()


def interpreter_skip_reason() -> str | None:
    """Why a process with Triton's interpreter is not started, or None."""
    if (reason := skip_reason()) is not None:
        return reason
    if torch.cuda.is_available():
        return "a GPU is there: the kernels' tests run on it themselves"
    old = _version("triton") < (3, 9) and _version("numpy") >= (2, 4)
    return "the interpreter of Triton before 3.9 needs numpy before 2.4" if old else None


def _add_products_in_order() -> None:
    """The interpreter leaves products to NumPy and so to a BLAS, whose bits depend on the processor and
    on where in its tile a row lies. A GPU's do not, and tests ask for it: here they are added in order, in
    float64, and rounded once."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, *precision):
        for operand in (a, b):  # bfloat16 is there as its bits: a kernel widens it before
            assert np.issubdtype(operand.data.dtype, np.floating), operand.dtype
        total = d.data.astype(np.float64)
        for k in range(a.data.shape[-1]):
            total += a.data[..., k, None].astype(np.float64) * b.data[..., k, None, :]
        return TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


if INTERPRETED and skip_reason() is None:
    _add_products_in_order()


def need_kernels() -> None:
    """At the top of a test module: skip it where its kernels cannot run in this process."""
    if (reason := skip_reason()) is not None:
        pytest.skip(reason, allow_module_level=True)
    if DEVICE.type == "cpu" and not INTERPRETED:
        reason = "no GPU: test_interpreter.py runs this in Triton's interpreter"
        pytest.skip(reason, allow_module_level=True)


def random(seed: int, *shape: int) -> Tensor:
    """Normal, float64, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def scalars(seed: int, n: int, scale: float = 1.0) -> Tensor:
    """Positive numbers of very different size, fp32 on the device."""
    return (scale * random(seed, n).exp()).float().to(DEVICE)


def guarded(x: Tensor) -> Tensor:
    """On the device, dense, with NaN in the memory before and behind it: a read beyond shows."""
    guard = 4096
    memory = poisoned(x.numel() + 2 * guard, dtype=x.dtype)
    inside = memory[guard : guard + x.numel()].view(x.shape)
    return inside.copy_(x)


def nhwc(x: Tensor, dtype: torch.dtype) -> Tensor:
    return guarded(x.to(dtype).permute(0, 2, 3, 1))


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).cpu()


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a launcher must overwrite everywhere."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    got = got.double().cpu()
    assert got.shape == want.shape
    error = ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
    assert error <= tolerance, f"{error:.2e} > {tolerance:.0e}"


def per_image(s: Tensor) -> Tensor:
    return s.double().cpu()[:, None, None, None]
