"""How fast a GPU's multiprocessors read what lies in L2: as the engine's kernels do it, boxes by TMA."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS = 64, 64  # of a box: 16 KB of 32-bit integers


@triton.jit
def l2_read_kernel(  # source: (boxes * ROWS, COLUMNS); sums: (programs, ROWS)
    source, sums, boxes, passes, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Each program reads every box `passes` times, from a place of its own on."""
    program = tl.program_id(0)
    total = tl.zeros((ROWS,), tl.int32)
    for i in tl.range(0, boxes * passes, num_stages=6):
        box = (i + program) % boxes
        total += tl.sum(source.load([box * ROWS, 0]), 1)
    tl.store(sums + program * ROWS + tl.arange(0, ROWS), total)


def l2_read(source: Tensor, sums: Tensor, passes: int) -> None:
    boxes = source.shape[0] // ROWS
    box = TensorDescriptor.from_tensor(source, [ROWS, COLUMNS])
    l2_read_kernel[(len(sums),)](box, sums, boxes, passes, ROWS, COLUMNS)


def source_of(bytes: int, device: torch.device) -> Tensor:
    boxes = bytes // (4 * ROWS * COLUMNS)
    return torch.ones(boxes * ROWS, COLUMNS, dtype=torch.int32, device=device)
