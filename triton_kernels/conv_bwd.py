"""The transposed convolution of a layer's gradient: from d_z to the gradient of the layer's input.

    h = convᵀ(d_z, W)        d_r = h·s/s_z        d_s = Σ d_r r / s        (per image; partial sums)

The layer's input is the true activation y = s·r; d_z comes from `norm_bwd` with a scalar s_z folded
in, so h/s_z is the gradient of y. d_r and d_s are those of r and s. s_z = s for a layer of one
source (and then nothing is multiplied); the second source of two has another s than d_z was made
with. Below a layer without norm, whose s is 1, the ReLU's mask can be taken at once:
d_r = h where r > 0 (`masked`), which is that layer's d_z.

Layouts: d_z (N, H, W, C), r and d_r (N, H, W, Cin) dense, C being the layer's output channels and
Cin its input's; weights packed by `pack_transposed_weight`: the same implicit matrix product as
`fused_layer.py`, with weights rotated by 180° and the two channel axes exchanged. d_s (N, T) fp32,
one number per box of pixels and block of channels; who reads them adds them up (`norm_bwd`), so
there are no atomics and an image's bits do not depend on the batch.

To move and to do, per image, bf16: 2·H·W·(C + 2·Cin) bytes and 18·H·W·C·Cin operations. Bound on an
H200 (790 TFLOP/s, 4.3 TB/s), both of them:
    64→64 @64×64      1.57 MB  0.37 µs     302 MFLOP  0.38 µs
    128→128 @32×32    0.79 MB  0.18 µs     302 MFLOP  0.38 µs
    256→256 @16×16    0.39 MB  0.09 µs     302 MFLOP  0.38 µs
    512→512 @8×8      0.20 MB  0.05 µs     302 MFLOP  0.38 µs
Measured distance to that bound: not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import pack_taps, tiles
from .box import accumulate, channel_sums, idle, load_box, per_pixel, store_box
from .fused_layer import pack_weight
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
    tl,
)

OP = "conv_bwd"


@jit
def conv_bwd_kernel(
    d_z,  # (N, H, W, C), descriptor or pointer
    weight,  # (CIN, K), descriptor or pointer
    r,  # (N, H, W, CIN), descriptor or pointer, or None
    s,  # (N,) fp32 or None
    s_z,  # (N,) fp32 or None: s
    d_r,  # (N, H, W, CIN), descriptor or pointer
    d_s,  # (N, boxes·blocks of channels) fp32 or None
    active,  # (N,) int32 or None
    N,
    H,
    W,
    C: tl.constexpr,
    P: tl.constexpr,  # C padded
    CIN: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,  # by the ReLU of the layer below
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    PIXELS: tl.constexpr = TH * TW
    BLOCKS: tl.constexpr = (CIN + BLOCK_N - 1) // BLOCK_N
    across = tl.cdiv(W, TW)
    boxes = across * tl.cdiv(H, TH)
    block = tl.program_id(0) % BLOCKS
    box = tl.program_id(0) // BLOCKS
    place = box % boxes
    image = box // boxes * TN
    y0, x0, channel = place // across * TH, place % across * TW, block * BLOCK_N
    if active is not None:
        if idle(active, image, N, TN):
            return
    n = image + tl.arange(0, TN)

    acc = tl.zeros((BLOCK_N, TN * PIXELS), tl.float32)
    acc = accumulate(acc, d_z, weight, image, y0, x0, channel, N, H, W, 9, 9 * P, 0, C, P,
                     CIN, CIN % BLOCK_N != 0, TN, TH, TW, BLOCK_N, BLOCK_K,
                     DESCRIPTORS, PRECISION, UPCAST)  # fmt: skip
    if s_z is not None:
        scale = tl.load(s + n, mask=n < N, other=1.0) / tl.load(s_z + n, mask=n < N, other=1.0)
        acc *= per_pixel(scale, TN, PIXELS)
    if r is not None:
        below = load_box(r, image, y0, x0, channel, N, H, W, CIN, TN, TH, TW, BLOCK_N, DESCRIPTORS)
        if MASKED:
            acc = tl.where(below <= 0, 0.0, acc)  # not below > 0: a NaN there must come through
        else:
            total = tl.sum(channel_sums(acc * below, TN, PIXELS), axis=0)
            total /= tl.load(s + n, mask=n < N, other=1.0)
            at = d_s + n.to(tl.int64) * (boxes * BLOCKS) + place * BLOCKS + block
            tl.store(at, total, mask=n < N)
    store_box(d_r, acc, image, y0, x0, channel, N, H, W, CIN, TN, TH, TW, BLOCK_N,
              DESCRIPTORS, UPCAST)  # fmt: skip


def pack_transposed_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """torch's (Cout, Cin, 3, 3) -> (Cin, K) of the transposed convolution: rotated by 180°."""
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(
            f"pack_transposed_weight: weight has shape {tuple(weight.shape)},"
            " expected (Cout, Cin, 3, 3)"
        )
    if weight.is_cuda:  # the same bits in one launch
        out = weight.new_empty(weight.shape[1], 9 * tiles.padded(len(weight)), dtype=dtype)
        pack_taps.pack_taps(weight, out, transposed=True)
        return out
    return pack_weight(weight.flip(2, 3).transpose(0, 1), None, dtype)


def d_s_per_image(
    c: int, c_in: int, H: int, W: int, dtype: torch.dtype, device: torch.device
) -> int:
    """T of `d_s` (N, T); c, c_in: channels of d_z and of d_r."""
    t = tiles.conv_bwd_tile(c, c_in, H, W, dtype, capability(device))
    return cdiv(H, t.rows) * cdiv(W, t.columns) * cdiv(c_in, t.block_n)


def _check(d_z, weight, r, s, s_z, d_r, d_s, programs, masked) -> None:
    if d_z.ndim != 4:
        raise ValueError(f"{OP}: d_z has shape {tuple(d_z.shape)}, expected (N, H, W, C)")
    N, H, W, c = d_z.shape
    c_in, device, single = len(weight), d_z.device, (torch.float32,)
    check(OP, "d_z", d_z, d_z.shape, DTYPES, device)
    check(OP, "weight (from pack_transposed_weight)", weight, (c_in, 9 * tiles.padded(c)),
          (d_z.dtype,), device)  # fmt: skip
    if masked and (r is None or d_s is not None):
        raise ValueError(f"{OP}: masked takes r, and no d_s: the layer below has no norm")
    if not masked and (r is None) != (d_s is None):
        raise ValueError(
            f"{OP}: r and d_s belong together, got only {'r' if r is not None else 'd_s'}"
        )
    if s is None and (d_s is not None or s_z is not None):
        raise ValueError(f"{OP}: s is None, expected the scalars of r, as d_s or s_z is given")
    for name, tensor, shape, dtypes in (
        ("r", r, (N, H, W, c_in), (d_z.dtype,)),
        ("s", s, (N,), single),
        ("s_z", s_z, (N,), single),
        ("d_r", d_r, (N, H, W, c_in), (d_z.dtype,)),
        ("d_s", d_s, (N, programs), single),
    ):
        if tensor is not None:
            check(OP, name, tensor, shape, dtypes, device)


def conv_bwd(
    d_z: Tensor,  # (N, H, W, C) bf16, fp16 or fp32, from norm_bwd
    weight: Tensor,  # (Cin, K) from pack_transposed_weight, in d_z's dtype
    d_r: Tensor,  # (N, H, W, Cin), written
    *,
    r: Tensor | None = None,  # (N, H, W, Cin): the layer's input
    s: Tensor | None = None,  # (N,) fp32: its scalars
    s_z: Tensor | None = None,  # (N,) fp32: what is folded in d_z, where it is not s
    d_s: Tensor | None = None,  # (N, d_s_per_image) fp32, written: parts of the gradient of s
    masked: bool = False,  # d_r is 0 where r is not positive; no d_s
    active: Tensor | None = None,  # (N,) int32: of images where it is 0 nothing need be written
    precision: str = "ieee",  # of fp32 products: "ieee" or "tf32"
) -> None:
    """Launch the transposed convolution into `d_r`, and `d_s` where it is given."""
    check_can_run(OP, d_z.device)
    check_precision(OP, precision)
    check_active(OP, active, d_z)
    N, H, W, c = d_z.shape
    c_in = len(weight)
    t = tiles.conv_bwd_tile(c, c_in, H, W, d_z.dtype, capability(d_z.device))
    boxes, blocks = cdiv(H, t.rows) * cdiv(W, t.columns), cdiv(c_in, t.block_n)
    _check(d_z, weight, r, s, s_z, d_r, d_s, boxes * blocks, masked)
    if d_z.numel() == 0:
        return
    ends = [d_z, weight, r, d_r]
    if t.descriptors:
        full = (t.images, t.rows, t.columns)
        blocks_of = [(*full, t.block_k), (t.block_n, t.block_k), (*full, t.block_n),
                     (*full, t.block_n)]  # fmt: skip
        ends = [e if e is None else descriptor(e, b) for e, b in zip(ends, blocks_of, strict=True)]
    a, w, below, out = ends
    conv_bwd_kernel[(cdiv(N, t.images) * boxes * blocks,)](
        a, w, below, s, s_z, out, d_s, active, N, H, W,
        **constants(c, c_in, d_z.dtype, t, masked, precision),
    )  # fmt: skip


def constants(
    c: int, c_in: int, dtype: torch.dtype, t: tiles.Tile, masked: bool, precision: str
) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return dict(
        C=c,
        P=tiles.padded(c),
        CIN=c_in,
        TN=t.images,
        TH=t.rows,
        TW=t.columns,
        BLOCK_N=t.block_n,
        BLOCK_K=t.block_k,
        MASKED=masked,
        DESCRIPTORS=t.descriptors,
        PRECISION=precision,
        UPCAST=dtype == torch.bfloat16 and interpreted(),
        **t.options(),
    )
