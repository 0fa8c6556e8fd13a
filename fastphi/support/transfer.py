"""Numbers between the host and a GPU. By pinned memory: a copy of other memory waits for all that the GPU
has to do, and cannot be captured.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(
    values: np.ndarray | Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of these values there, in `dtype` (theirs, unless given). Nothing is waited for."""
    x = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    x = x if dtype is None else x.to(dtype)
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """The tensor in the host's memory, once it is there."""
    if not x.is_cuda:
        return x.cpu()
    there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    there.copy_(x.contiguous(), non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return there
