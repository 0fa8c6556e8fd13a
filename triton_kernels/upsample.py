"""The up-sampling: transposed convolution 2×2, stride 2, which is a matrix product per pixel.

    out[n, 2y + dy, 2x + dx, co] = Σ_c r[n, y, x, c] W[c, co, dy, dx]      (bias: s · that + b_co)

Without a bias the scalar stays deferred: the result is up(r), its scalar is r's. With one it ends
here, and the result's scalar is 1.

Layouts: r (N, H, W, C), out (N, 2H, 2W, Cout), dense; weights packed by `pack_upsample_weight`:
rows (dy, dx, co), columns the channels of r padded with zeros to `tiles.padded`.

Tiling: a program owns a box of pixels, as in `box.py`, one dy, and block_n of the 2·Cout values
(dx, co) that lie side by side in memory: seen as (N, H, 2, W, 2·Cout), the result is written in
whole boxes.

To move and to do, per image, bf16: 2·H·W·(C + 4·Cout) bytes, 8·H·W·C·Cout operations. Bound on an
H200 (790 TFLOP/s, 4.3 TB/s):
    128→64 @32×32     0.79 MB  0.18 µs      67 MFLOP  0.09 µs
    256→128 @16×16    0.39 MB  0.09 µs      67 MFLOP  0.09 µs
    512→256 @8×8      0.20 MB  0.05 µs      67 MFLOP  0.09 µs
Measured distance to that bound: not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastphi.engine.rounding import rounded

from . import scalars, tiles
from .box import accumulate, per_pixel
from .scalars import Parts, begin, merged
from .support import (
    DTYPES,
    capability,
    cdiv,
    check,
    check_can_run,
    check_precision,
    descriptor,
    interpreted,
    jit,
    round_to_bf16,
    tl,
)

OP = "upsample_fwd"


@jit
def upsample_fwd_kernel(
    r,  # (N, H, W, C), descriptor or pointer
    s,  # (N,) fp32; read with a bias only; as of `scalars.merged`, with what follows
    partials_in,
    mean_in,
    std_in,
    eps,
    weight,  # (4·COUT, P), descriptor or pointer
    bias,  # (COUT,) fp32 or None
    out,  # (N, H, 2, W, 2·COUT), descriptor or pointer
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
    BLOCKS: tl.constexpr = (2 * COUT + BLOCK_N - 1) // BLOCK_N
    across = tl.cdiv(W, TW)
    boxes = across * tl.cdiv(H, TH)
    block = tl.program_id(0) % (2 * BLOCKS)
    box = tl.program_id(0) // (2 * BLOCKS)
    place = box % boxes
    image = box // boxes * TN
    y0, x0 = place // across * TH, place % across * TW
    dy, column = block // BLOCKS, block % BLOCKS * BLOCK_N

    if bias is not None:
        loaded = begin(s, partials_in, image, N, T, WIDTH, TN)
    acc = tl.zeros((BLOCK_N, TN * PIXELS), tl.float32)
    # rows beyond this dy's belong to the other one, or are masked: they are not written
    acc = accumulate(acc, r, weight, image, y0, x0, dy * 2 * COUT + column, N, H, W, 1, P, 0, C, P,
                     4 * COUT, 2 * COUT % BLOCK_N != 0, TN, TH, TW, BLOCK_N, BLOCK_K,
                     DESCRIPTORS, PRECISION, UPCAST)  # fmt: skip
    j = column + tl.arange(0, BLOCK_N)
    if bias is not None:
        scale = merged(loaded, s, partials_in, mean_in, std_in, eps, image, N,
                       (place == 0) & (block == 0), T, WIDTH, LEVELS, TN)  # fmt: skip
        acc *= per_pixel(scale, TN, PIXELS)
        acc += tl.load(bias + j % COUT)[:, None]
    if UPCAST:
        acc = round_to_bf16(acc)
    value = acc.trans()
    if DESCRIPTORS:
        value = value.to(out.dtype).reshape(TN, TH, 1, TW, BLOCK_N)
        out.store([image, y0, dy, x0, column], value)
    else:
        m = tl.arange(0, TN * PIXELS)
        n, y, x = m // PIXELS, y0 + m // TW % TH, x0 + m % TW
        out += image.to(tl.int64) * H * W * (4 * COUT)
        offset = (((n * H + y) * 2 + dy) * W + x) * (2 * COUT)
        mask = ((image + n < N) & (y < H) & (x < W))[:, None] & (j < 2 * COUT)[None, :]
        tl.store(out + offset[:, None] + j[None, :], value, mask=mask)


def pack_upsample_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """torch's (C, Cout, 2, 2) -> (4·Cout, padded C), rows (dy, dx, co)."""
    if weight.ndim != 4 or weight.shape[2:] != (2, 2):
        raise ValueError(
            f"pack_upsample_weight: weight has shape {tuple(weight.shape)}, expected (C, Cout, 2, 2)"
        )
    c = weight.shape[0]
    rows = rounded(weight, dtype).permute(2, 3, 1, 0).reshape(-1, c)
    return torch.nn.functional.pad(rows, (0, tiles.padded(c) - c)).contiguous()


def upsample_fwd(
    r: Tensor,  # (N, H, W, C) bf16, fp16 or fp32
    s: Tensor | Parts | None,  # (N,) fp32; needed with a bias, and not read without
    weight: Tensor,  # (4·Cout, K) from pack_upsample_weight, in r's dtype
    bias: Tensor | None,  # (Cout,) fp32
    out: Tensor,  # (N, 2H, 2W, Cout)
    *,
    precision: str = "ieee",  # of fp32 products: "ieee" or "tf32"
) -> None:
    """Launch the up-sampling into `out`: up(r), or s·up(r) + bias."""
    check_can_run(OP, r.device)
    check_precision(OP, precision)
    if r.ndim != 4:
        raise ValueError(f"{OP}: r has shape {tuple(r.shape)}, expected (N, H, W, C)")
    N, H, W, c = r.shape
    c_out = len(weight) // 4
    check(OP, "r", r, r.shape, DTYPES, r.device)
    check(OP, "weight (from pack_upsample_weight)", weight, (4 * c_out, tiles.padded(c)),
          (r.dtype,), r.device)  # fmt: skip
    check(OP, "out", out, (N, 2 * H, 2 * W, c_out), (r.dtype,), r.device)
    if bias is not None:
        check(OP, "bias", bias, (c_out,), (torch.float32,), r.device)
        if s is None:
            raise ValueError(f"{OP}: s is None, expected the images' scalars, as there is a bias")
    scale = scalars.checked(OP, s if bias is not None else None, N, r.device)
    if r.numel() == 0:
        return
    t = tiles.upsample_tile(c, c_out, H, W, r.dtype, capability(r.device))
    a, w, o = r, weight, out.view(N, H, 2, W, 2 * c_out)
    if t.descriptors:
        a = descriptor(r, (t.images, t.rows, t.columns, t.block_k))
        w = descriptor(weight, (t.block_n, t.block_k))
        o = descriptor(o, (t.images, t.rows, 1, t.columns, t.block_n))
    programs = cdiv(N, t.images) * cdiv(H, t.rows) * cdiv(W, t.columns)
    upsample_fwd_kernel[(programs * 2 * cdiv(2 * c_out, t.block_n),)](
        r=a, weight=w, bias=bias, out=o, N=N, H=H, W=W, **scale,
        **constants(c, c_out, r.dtype, t, precision)
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
