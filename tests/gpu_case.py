"""Shared by the tests that need a GPU: the one place where they are skipped for want of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastphi import gpu, ops


def why_no_gpu(whole_engine: bool = True) -> str | None:
    """Why nothing can be tested on a GPU, or None. Not the whole engine: the compiled operators."""
    if not torch.cuda.is_available():
        return "no GPU is visible"
    return gpu.missing() if whole_engine else ops.missing("cuda")


def marks(whole_engine: bool = True) -> list[Any]:
    """Of a test on a GPU: `-m gpu` chooses it, and without one it is skipped."""
    reason = why_no_gpu(whole_engine)
    return [
        pytest.mark.gpu,
        pytest.mark.skipif(reason is not None, reason=f"needs a GPU: {reason}"),
    ]
