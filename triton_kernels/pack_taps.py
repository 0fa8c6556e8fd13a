"""A 3×3 convolution's weights as the kernels read them, in one launch: rounded, padded, and for the
gradient transposed. Training does this for every layer and step; in torch it is some 50 launches each.

    packed[row, (source, tap, channel)] = rounded w[row, channel, tap]

as `fused_layer.pack_weight` defines it, which is this in torch, and to the same bits: what rounding
takes from a tap is carried on to the next (`fastphi.engine.rounding`). Transposed: rows are the channels of
the input, and the taps come from last to first (a rotation by 180°).

Layouts: weight (Cout, Cin, 3, 3) of any strides; packed (rows, K), K = 9·Σ padded channels, dense.

Tiling: a program owns block_r rows by block_c padded channels, and walks the nine taps. To move: 6 bytes
a weight in bf16, 0.17 MB for 64→64, 14 MB for 512→512, 3.3 µs on an H200 (4.3 TB/s).
Measured distance to that bound: not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import tiles
from .support import DTYPES, cdiv, check, check_can_run, interpreted, jit, round_to_bf16, tl

OP = "pack_taps"


@jit
def pack_taps_kernel(
    weight,  # at the first tap
    packed,  # (ROWS, K)
    ROWS,
    K,
    C1,  # channels of each source
    C2,
    P1,  # the same, padded
    P2,
    s_row,  # strides, in elements
    s_channel,
    s_y,
    s_x,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    second = column >= P1
    c = tl.where(second, column - P1, column)
    there = (row < ROWS) & (c < tl.where(second, C2, C1))
    source = weight + row * s_row + (c + tl.where(second, C1, 0)) * s_channel
    target = packed + row * K + tl.where(second, 9 * P1, 0) + c
    written = (row < ROWS) & (column < P1 + P2)
    left = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tap in tl.static_range(9):
        at = tap // 3 * s_y + tap % 3 * s_x
        value = left + tl.load(source + at, mask=there, other=0.0).to(tl.float32)
        low = round_to_bf16(value) if UPCAST else value
        low = low.to(packed.dtype.element_ty)
        left = value - low.to(tl.float32)
        tl.store(target + tap * tl.where(second, P2, P1), low, mask=written)


def pack_taps(
    weight: Tensor,  # (Cout, Cin, 3, 3) bf16, fp16, fp32 or fp64
    packed: Tensor,  # (Cout, K), or transposed (Cin, K); written
    *,
    split: int | None = None,  # channels of the first of two sources
    transposed: bool = False,
) -> None:
    """Launch the packing into `packed`."""
    check_can_run(OP, weight.device)
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(
            f"{OP}: weight has shape {tuple(weight.shape)}, expected (Cout, Cin, 3, 3)"
        )
    rows, channels = weight.shape[:2]
    s_row, s_channel, s_y, s_x = weight.stride()
    first = weight.detach()
    if transposed:
        rows, channels, s_row, s_channel = channels, rows, s_channel, s_row
        s_y, s_x, first = -s_y, -s_x, first[:, :, 2:, 2:]
    c1, c2 = (channels, 0) if split is None else (split, channels - split)
    p1, p2 = tiles.padded(c1), tiles.padded(c2) if c2 else 0
    check(OP, "packed", packed, (rows, 9 * (p1 + p2)), DTYPES, weight.device)
    if weight.numel() == 0:
        return
    block_r, block_c = tiles.PACK_ROWS, tiles.PACK_CHANNELS
    pack_taps_kernel[(cdiv(rows, block_r), cdiv(p1 + p2, block_c))](
        first, packed, rows, 9 * (p1 + p2), c1, c2, p1, p2, s_row, s_channel, s_y, s_x,
        **constants(packed.dtype),
    )  # fmt: skip


def constants(dtype: torch.dtype) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return dict(
        BLOCK_R=tiles.PACK_ROWS,
        BLOCK_C=tiles.PACK_CHANNELS,
        UPCAST=dtype == torch.bfloat16 and interpreted(),
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )
