"""Shared by the tests of the GPU engine's small operators: on the CPU always, on CUDA tensors where a GPU
is.
"""

from __future__ import annotations

import gpu_case
import pytest
import torch

ON_GPU = gpu_case.marks(whole_engine=False)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])


def GPU(test):
    for mark in ON_GPU:
        test = mark(test)
    return test


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EPS = 1e-5


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: str) -> torch.Tensor:
    """A buffer in which whatever is not written shows."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    kind = torch.int32 if got.dtype == torch.float32 else torch.int16
    assert torch.equal(got.cpu().contiguous().view(kind), want.contiguous().view(kind))
