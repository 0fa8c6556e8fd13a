"""What the fused layer does after its products, for a convolution that a library made: deferred scale,
bias, partial statistics, gain, ReLU; where wanted the 2×2 mean pool and the sums over space.

    z = s·c [+ s2·c2] + b        r_out = ReLU(γ z)        (partials of z)

Layouts: c, c2 (N, H, W, Cout), dense, the convolutions of each source; the rest as in
`fused_layer.py`, whose outputs these are.

Tiling: a box of pixels by block_n channels, as there; one step, bound by memory.

To move, per image, bf16: 2·H·W·Cout·(1 or 2, and 1) bytes; 64 channels @64×64: 1.05 MB, 0.24 µs on an
H200 (4.3 TB/s), which the fused layer does not pay. Used only for layers of `engine/gpu/library.json`.
Measured distance to that bound: not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import scalars, tiles
from .box import finish, load_box, load_channels, per_pixel
from .scalars import Parts, begin, merged
from .support import (
    DTYPES,
    capability,
    cdiv,
    check,
    check_can_run,
    descriptor,
    interpreted,
    jit,
    tl,
)

OP = "epilogue_fwd"


@jit
def epilogue_fwd_kernel(
    c,  # (N, H, W, COUT), descriptor or pointer, as c2, r_out and pooled
    s,  # (N,) fp32; as of `scalars.merged`, with what follows
    partials_in,
    mean_in,
    std_in,
    eps,
    c2,  # (N, H, W, COUT) or None
    s2,  # (N,) fp32 or None
    bias,  # (COUT,) fp32 or None
    gamma,  # (COUT,) fp32 or None
    r_out,  # (N, H, W, COUT) or None
    pooled,  # (N, H/2, W/2, COUT) or None
    partials,  # (N, boxes·blocks of channels, 3) fp32 or None
    sums,  # (N, boxes, COUT) fp32 or None
    N,
    H,
    W,
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    COUT: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    RELU: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    PIXELS: tl.constexpr = TH * TW
    BLOCKS: tl.constexpr = (COUT + BLOCK_N - 1) // BLOCK_N
    across = tl.cdiv(W, TW)
    boxes = across * tl.cdiv(H, TH)
    block = tl.program_id(0) % BLOCKS
    box = tl.program_id(0) // BLOCKS
    place = box % boxes
    image = box // boxes * TN
    y0, x0, channel = place // across * TH, place % across * TW, block * BLOCK_N
    n = image + tl.arange(0, TN)

    loaded = begin(s, partials_in, image, N, T, WIDTH, TN)
    z = load_box(c, image, y0, x0, channel, N, H, W, COUT, TN, TH, TW, BLOCK_N, DESCRIPTORS)
    scale = merged(loaded, s, partials_in, mean_in, std_in, eps, image, N, (place == 0) & (block == 0),
                   T, WIDTH, LEVELS, TN)  # fmt: skip
    z *= per_pixel(scale, TN, PIXELS)
    if c2 is not None:
        z2 = load_box(c2, image, y0, x0, channel, N, H, W, COUT, TN, TH, TW, BLOCK_N, DESCRIPTORS)
        z += z2 * per_pixel(tl.load(s2 + n, mask=n < N, other=1.0), TN, PIXELS)
    if bias is not None:
        z += load_channels(bias, channel, COUT, BLOCK_N)
    finish(z, gamma, r_out, pooled, partials, sums, place, boxes, block, BLOCKS, image, y0, x0,
           channel, N, H, W, COUT, TN, TH, TW, BLOCK_N, MASKED, RELU, DESCRIPTORS, UPCAST)  # fmt: skip


def _tile(c_out: int, H: int, W: int, dtype: torch.dtype, device: torch.device) -> tiles.Tile:
    return tiles.epilogue_tile(c_out, H, W, dtype, capability(device))


def sums_per_image(c_out: int, H: int, W: int, dtype: torch.dtype, device: torch.device) -> int:
    """Ts of `sums` (N, Ts, Cout)."""
    t = _tile(c_out, H, W, dtype, device)
    return cdiv(H, t.rows) * cdiv(W, t.columns)


def partials_per_image(c_out: int, H: int, W: int, dtype: torch.dtype, device: torch.device) -> int:
    """T of `partials` (N, T, 3)."""
    block_n = _tile(c_out, H, W, dtype, device).block_n
    return sums_per_image(c_out, H, W, dtype, device) * cdiv(c_out, block_n)


def epilogue_fwd(
    c: Tensor,  # (N, H, W, Cout) bf16, fp16 or fp32
    s: Tensor | Parts,  # (N,) fp32
    bias: Tensor | None,  # (Cout,) fp32
    gamma: Tensor | None,  # (Cout,) fp32; None: no norm
    *,
    c2: Tensor | None = None,  # (N, H, W, Cout)
    s2: Tensor | None = None,  # (N,) fp32
    r_out: Tensor | None = None,  # (N, H, W, Cout); this and the rest as of fused_layer_fwd
    pooled: Tensor | None = None,
    partials: Tensor | None = None,  # (N, partials_per_image, 3) fp32
    sums: Tensor | None = None,  # (N, sums_per_image, Cout) fp32
    relu: bool = True,
) -> None:
    """Launch the epilogue; writes those of the outputs that are given."""
    check_can_run(OP, c.device)
    if c.ndim != 4:
        raise ValueError(f"{OP}: c has shape {tuple(c.shape)}, expected (N, H, W, Cout)")
    if (c2 is None) != (s2 is None):
        raise ValueError(
            f"{OP}: c2 and s2 belong together, got only {'c2' if s2 is None else 's2'}"
        )
    N, H, W, c_out = c.shape
    t = _tile(c_out, H, W, c.dtype, c.device)
    boxes, blocks = cdiv(H, t.rows) * cdiv(W, t.columns), cdiv(c_out, t.block_n)
    single, half = (torch.float32,), (N, H // 2, W // 2, c_out)
    for name, tensor, shape, dtypes in (
        ("c", c, c.shape, DTYPES),
        ("c2", c2, c.shape, (c.dtype,)),
        ("s2", s2, (N,), single),
        ("bias", bias, (c_out,), single),
        ("gamma", gamma, (c_out,), single),
        ("r_out", r_out, c.shape, (c.dtype,)),
        ("pooled", pooled, half, (c.dtype,)),
        ("partials", partials, (N, boxes * blocks, 3), single),
        ("sums", sums, (N, boxes, c_out), single),
    ):
        if tensor is not None:
            check(OP, name, tensor, shape, dtypes, c.device)
    if pooled is not None and (H % 2 or W % 2):
        raise ValueError(f"{OP}: pooled needs even height and width, got {H}×{W}")
    if all(tensor is None for tensor in (r_out, pooled, partials, sums)):
        raise ValueError(f"{OP}: nothing to write: give r_out, pooled, partials or sums")
    scale = scalars.checked(OP, s, N, c.device)
    if c.numel() == 0:
        return
    ends = [c, c2, r_out, pooled]
    if t.descriptors:
        full = (t.images, t.rows, t.columns, t.block_n)
        small = (t.images, t.rows // 2, t.columns // 2, t.block_n)
        ends = [
            e if e is None else descriptor(e, block)
            for e, block in zip(ends, (full, full, full, small), strict=True)
        ]
    a, a2, out, small_out = ends
    epilogue_fwd_kernel[(cdiv(N, t.images) * boxes * blocks,)](
        c=a, c2=a2, s2=s2, bias=bias, gamma=gamma, r_out=out, pooled=small_out,
        partials=partials, sums=sums, N=N, H=H, W=W, **scale,
        **constants(c_out, H, W, c.dtype, t, relu),
    )  # fmt: skip


def constants(
    c_out: int, H: int, W: int, dtype: torch.dtype, t: tiles.Tile, relu: bool
) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return dict(
        COUT=c_out,
        TN=t.images,
        TH=t.rows,
        TW=t.columns,
        BLOCK_N=t.block_n,
        MASKED=H % t.rows != 0 or W % t.columns != 0 or c_out % t.block_n != 0,
        RELU=relu,
        DESCRIPTORS=t.descriptors,
        UPCAST=dtype == torch.bfloat16 and interpreted(),
        **t.options(),
    )
