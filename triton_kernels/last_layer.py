"""The last layer: 3×3 convolution to the image's 1 to 4 channels, straight into an NCHW image.

    out = s·conv(r, W) + b

With the first layer's weights rotated (`conv_bwd.pack_transposed_weight`) it is that layer's
gradient to the image.

Layouts: r (N, H, W, C) dense; weights packed by `fused_layer.pack_weight`; out (N, Cout, H, W).

Tiling: as the fused layer, with the few output channels padded to the 16 rows that a tensor core's
product has at least. Pixels are the columns, so the image is written along its rows as it comes.

To move and to do, per image, bf16 in and fp32 out, 64→3 @64×64: 0.57 MB; 14 MFLOP, 75 with the
padding. Bound on an H200 (4.3 TB/s): 0.13 µs, memory. The nine taps read the box nine times from L2
(4.7 MB), which at its 5.5 TB/s or so is 0.9 µs: that is what this form can reach.
Measured distance to that bound: not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import scalars, tiles
from .box import accumulate, idle, load_channels, per_pixel
from .scalars import Parts, begin, merged
from .support import (
    DTYPES,
    capability,
    cdiv,
    check,
    check_active,
    check_can_run,
    check_precision,
    descriptor,
    interpreted,
    jit,
    round_to_bf16,
    tl,
)

OP = "last_layer_fwd"


@jit
def last_layer_fwd_kernel(
    r,  # (N, H, W, C), descriptor or pointer
    s,  # (N,) fp32, or None: 1; as of `scalars.merged`, with what follows
    partials_in,
    mean_in,
    std_in,
    eps,
    weight,  # (COUT, K), descriptor or pointer
    bias,  # (COUT,) fp32 or None
    out,  # (N, COUT, H, W)
    active,  # (N,) int32 or None
    N,
    H,
    W,
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,  # C padded
    COUT: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    PIXELS: tl.constexpr = TH * TW
    across = tl.cdiv(W, TW)
    boxes = across * tl.cdiv(H, TH)
    place = tl.program_id(0) % boxes
    image = tl.program_id(0) // boxes * TN
    y0, x0 = place // across * TH, place % across * TW
    if active is not None:
        if idle(active, image, N, TN):
            return

    if s is not None:
        loaded = begin(s, partials_in, image, N, T, WIDTH, TN)
    acc = tl.zeros((BLOCK_N, TN * PIXELS), tl.float32)
    acc = accumulate(acc, r, weight, image, y0, x0, 0, N, H, W, 9, 9 * P, 0, C, P, COUT, True,
                     TN, TH, TW, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION, UPCAST)  # fmt: skip
    value = acc
    if s is not None:
        scale = merged(loaded, s, partials_in, mean_in, std_in, eps, image, N, place == 0,
                       T, WIDTH, LEVELS, TN)  # fmt: skip
        value *= per_pixel(scale, TN, PIXELS)
    if bias is not None:
        value += load_channels(bias, 0, COUT, BLOCK_N)
    m = tl.arange(0, TN * PIXELS)
    co = tl.arange(0, BLOCK_N)
    y, x = y0 + m // TW % TH, x0 + m % TW
    mask = (co < COUT)[:, None] & ((image + m // PIXELS < N) & (y < H) & (x < W))[None, :]
    start = image.to(tl.int64) * COUT * H * W
    at = (m // PIXELS * COUT * H + y) * W + x
    at = at[None, :] + (co * H * W)[:, None]
    if UPCAST and out.dtype.element_ty == tl.bfloat16:
        value = round_to_bf16(value)
    tl.store(out + start + at, value, mask=mask)


def last_layer_fwd(
    r: Tensor,  # (N, H, W, C) bf16, fp16 or fp32
    s: Tensor | Parts | None,  # (N,) fp32; None: 1
    weight: Tensor,  # (Cout, K) from fused_layer.pack_weight, in r's dtype; Cout from 1 to 4
    bias: Tensor | None,  # (Cout,) fp32
    out: Tensor,  # (N, Cout, H, W) fp32 or r's dtype
    *,
    active: Tensor | None = None,  # (N,) int32: of images where it is 0 nothing need be written
    precision: str = "ieee",  # of fp32 products: "ieee" or "tf32"
) -> None:
    """Launch the last layer into `out`."""
    check_can_run(OP, r.device)
    check_precision(OP, precision)
    if r.ndim != 4:
        raise ValueError(f"{OP}: r has shape {tuple(r.shape)}, expected (N, H, W, C)")
    N, H, W, c = r.shape
    c_out = len(weight)
    if not 1 <= c_out <= 4:
        raise ValueError(f"{OP}: weight has {c_out} output channels, expected 1 to 4")
    check(OP, "r", r, r.shape, DTYPES, r.device)
    check_active(OP, active, r)
    scale = scalars.checked(OP, s, N, r.device)
    check(
        OP, "weight (from pack_weight)", weight, (c_out, 9 * tiles.padded(c)), (r.dtype,), r.device
    )
    if bias is not None:
        check(OP, "bias", bias, (c_out,), (torch.float32,), r.device)
    check(OP, "out", out, (N, c_out, H, W), (torch.float32, r.dtype), r.device)
    if r.numel() == 0:
        return
    t = tiles.last_tile(c, H, W, r.dtype, capability(r.device))
    a, w = r, weight
    if t.descriptors:
        a = descriptor(r, (t.images, t.rows, t.columns, t.block_k))
        w = descriptor(weight, (t.block_n, t.block_k))
    last_layer_fwd_kernel[(cdiv(N, t.images) * cdiv(H, t.rows) * cdiv(W, t.columns),)](
        r=a, weight=w, bias=bias, out=out, active=active, N=N, H=H, W=W, **scale,
        **constants(c, c_out, r.dtype, t, precision),
    )  # fmt: skip


def constants(
    c: int, c_out: int, dtype: torch.dtype, t: tiles.Tile, precision: str
) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return dict(
        C=c,
        P=tiles.padded(c),
        COUT=c_out,
        TN=t.images,
        TH=t.rows,
        TW=t.columns,
        BLOCK_N=t.block_n,
        BLOCK_K=t.block_k,
        DESCRIPTORS=t.descriptors,
        PRECISION=precision,
        UPCAST=dtype == torch.bfloat16 and interpreted(),
        **t.options(),
    )
