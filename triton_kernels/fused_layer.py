"""The fused layer (DESIGN: the norm costs nothing): 3×3 convolution, deferred scale, bias, partial
statistics, gain, ReLU; where wanted the 2×2 mean pool and the sums over space.

    z = s·conv(r, W) [+ s2·conv(r2, W2)] + b        r_out = ReLU(γ z)        (partials of z)

where s may still be in parts, as the layer before left it (`scalars.py`).

Layouts: activations (N, H, W, C) dense; weights packed by `pack_weight`: (Cout, K), K = (source,
ky, kx, channel), channels of a source padded with zeros to `tiles.padded`; s, bias, gamma,
statistics and sums fp32.

Tiling: an implicit matrix product. A program owns a box of pixels (images × rows × columns,
`tiles.py`) and block_n output channels, and walks K in one flat loop: a step loads the box of
pixels shifted by (ky, kx), block_k channels of it, and the weights of the same step. With
descriptors (sm_90) the copy engine does both, and fills what lies outside the image with zeros:
that is the convolution's padding. Channel blocks of one box are neighbours in the grid, so the box
comes from L2 the second time.

To move and to do, per image, bf16: 2·H·W·(C1 + C2 + Cout) bytes (the input from memory once; the
nine taps come from L2) and 18·H·W·(C1 + C2)·Cout operations. Bound on an H200 (790 TFLOP/s, 4.3
TB/s), both of them:
    64→64 @64×64      1.05 MB  0.24 µs     302 MFLOP  0.38 µs
    128→128 @32×32    0.52 MB  0.12 µs     302 MFLOP  0.38 µs
    256→256 @16×16    0.26 MB  0.06 µs     302 MFLOP  0.38 µs
    512→512 @8×8      0.13 MB  0.03 µs     302 MFLOP  0.38 µs
Measured distance to that bound: not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastphi.engine.rounding import rounded

from . import pack_taps, scalars, tiles
from .box import accumulate, finish, idle, load_channels, per_pixel, store_box
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
    tl,
)

OP = "fused_layer_fwd"


@jit
def fused_layer_fwd_kernel(
    r,  # (N, H, W, C1)
    s,  # (N,) fp32; written where there are parts
    partials_in,  # (N, T, 3) fp32, parts of s, or None
    mean_in,  # (N,) fp32 or None, written
    std_in,
    eps,
    r2,  # (N, H, W, C2) or None
    s2,  # (N,) fp32 or None
    weight,  # (Cout, K)
    bias,  # (Cout,) fp32 or None
    gamma,  # (Cout,) fp32 or None
    r_out,  # (N, H, W, Cout) or None
    pooled,  # (N, H/2, W/2, Cout) or None
    partials,  # (N, boxes·blocks of channels, 3) fp32 or None
    sums,  # (N, boxes, Cout) fp32 or None
    z_out,  # (N, H, W, Cout) or None
    active,  # (N,) int32 or None
    N,
    H,
    W,
    T: tl.constexpr,  # as of `scalars.merged`
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    P1: tl.constexpr,  # C1, C2 padded
    P2: tl.constexpr,
    COUT: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,  # some boxes reach beyond the image
    RELU: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    PIXELS: tl.constexpr = TH * TW
    BLOCKS: tl.constexpr = (COUT + BLOCK_N - 1) // BLOCK_N
    K: tl.constexpr = 9 * (P1 + P2)
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

    EARLY: tl.constexpr = DESCRIPTORS or z_out is None
    if EARLY:
        loaded = begin(s, partials_in, image, N, T, WIDTH, TN)
    acc = tl.zeros((BLOCK_N, TN * PIXELS), tl.float32)
    acc = accumulate(acc, r, weight, image, y0, x0, channel, N, H, W, 9, K, 0, C1, P1,
                     COUT, COUT % BLOCK_N != 0, TN, TH, TW, BLOCK_N, BLOCK_K,
                     DESCRIPTORS, PRECISION, UPCAST)  # fmt: skip
    if not EARLY:  # the addresses of a gather, and of z, leave no registers for it
        loaded = begin(s, partials_in, image, N, T, WIDTH, TN)
    first = (place == 0) & (block == 0)
    scale = merged(
        loaded, s, partials_in, mean_in, std_in, eps, image, N, first, T, WIDTH, LEVELS, TN
    )
    if r2 is not None:
        # The first source is brought to the second's scale, so that the rest can be added to it.
        # The bound keeps 0·inf out; beyond it nothing would be left of the second source.
        scale2 = tl.load(s2 + n, mask=n < N, other=1.0)
        acc *= per_pixel(tl.minimum(scale / scale2, 1e30), TN, PIXELS)
        acc = accumulate(acc, r2, weight, image, y0, x0, channel, N, H, W, 9, K, 9 * P1, C2, P2,
                         COUT, COUT % BLOCK_N != 0, TN, TH, TW, BLOCK_N, BLOCK_K,
                         DESCRIPTORS, PRECISION, UPCAST)  # fmt: skip
        scale = scale2

    z = acc * per_pixel(scale, TN, PIXELS)
    if bias is not None:
        z += load_channels(bias, channel, COUT, BLOCK_N)
    if z_out is not None:
        store_box(z_out, z, image, y0, x0, channel, N, H, W, COUT, TN, TH, TW, BLOCK_N,
                  DESCRIPTORS, UPCAST)  # fmt: skip
    finish(z, gamma, r_out, pooled, partials, sums, place, boxes, block, BLOCKS, image, y0, x0,
           channel, N, H, W, COUT, TN, TH, TW, BLOCK_N, MASKED, RELU, DESCRIPTORS, UPCAST)  # fmt: skip


def pack_weight(weight: Tensor, split: int | None, dtype: torch.dtype) -> Tensor:
    """torch's (Cout, Cin, 3, 3) -> (Cout, K). `split`: channels of the first of two sources, or None."""
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(
            f"pack_weight: weight has shape {tuple(weight.shape)}, expected (Cout, Cin, 3, 3)"
        )
    c_in = weight.shape[1]
    if split is not None and not 0 < split < c_in:
        raise ValueError(f"pack_weight: split is {split}, expected between 1 and {c_in - 1}")
    if weight.is_cuda:  # the same bits in one launch
        k = sum(9 * tiles.padded(c) for c in ((c_in,) if split is None else (split, c_in - split)))
        out = weight.new_empty(len(weight), k, dtype=dtype)
        pack_taps.pack_taps(weight, out, split=split)
        return out
    weight = rounded(weight, dtype)
    parts = [weight] if split is None else [weight[:, :split], weight[:, split:]]
    packed = []
    for part in parts:
        c = part.shape[1]
        taps = part.permute(0, 2, 3, 1)
        packed.append(torch.nn.functional.pad(taps, (0, tiles.padded(c) - c)).flatten(1))
    return torch.cat(packed, dim=1).contiguous()


def _shape(c_in: tuple[int, ...], c_out: int, H: int, W: int, dtype, device) -> tuple[int, int]:
    """(boxes of pixels, blocks of output channels) of an image."""
    t = tiles.tile(c_in, c_out, H, W, dtype, capability(device))
    return cdiv(H, t.rows) * cdiv(W, t.columns), cdiv(c_out, t.block_n)


def partials_per_image(
    c_in: tuple[int, ...], c_out: int, H: int, W: int, dtype: torch.dtype, device: torch.device
) -> int:
    """T of `partials` (N, T, 3). c_in: the channels of each source."""
    boxes, blocks = _shape(c_in, c_out, H, W, dtype, device)
    return boxes * blocks


def sums_per_image(
    c_in: tuple[int, ...], c_out: int, H: int, W: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Ts of `sums` (N, Ts, Cout)."""
    return _shape(c_in, c_out, H, W, dtype, device)[0]


def _check_inputs(r, weight, bias, gamma, r2, s2) -> None:
    if r.ndim != 4:
        raise ValueError(f"{OP}: r has shape {tuple(r.shape)}, expected (N, H, W, C)")
    if (r2 is None) != (s2 is None):
        raise ValueError(
            f"{OP}: r2 and s2 belong together, got only {'r2' if s2 is None else 's2'}"
        )
    N, H, W, c1 = r.shape
    check(OP, "r", r, r.shape, DTYPES, r.device)
    k = tiles.padded(c1)
    if r2 is not None:
        check(OP, "r2", r2, (N, H, W, r2.shape[-1]), (r.dtype,), r.device)
        check(OP, "s2", s2, (N,), (torch.float32,), r.device)
        k += tiles.padded(r2.shape[-1])
    check(OP, "weight (from pack_weight)", weight, (len(weight), 9 * k), (r.dtype,), r.device)
    for name, vector in (("bias", bias), ("gamma", gamma)):
        if vector is not None:
            check(OP, name, vector, (len(weight),), (torch.float32,), r.device)


def _check_outputs(r, c_out, boxes, blocks, r_out, pooled, partials, sums, z_out) -> None:
    N, H, W, _ = r.shape
    if pooled is not None and (H % 2 or W % 2):
        raise ValueError(f"{OP}: pooled needs even height and width, got {H}×{W}")
    single = (torch.float32,)
    wanted = (
        ("r_out", r_out, (N, H, W, c_out), DTYPES),
        ("pooled", pooled, (N, H // 2, W // 2, c_out), DTYPES),
        ("partials", partials, (N, boxes * blocks, 3), single),
        ("sums", sums, (N, boxes, c_out), single),
        ("z_out", z_out, (N, H, W, c_out), DTYPES),
    )
    for name, tensor, shape, dtypes in wanted:
        if tensor is not None:
            check(OP, name, tensor, shape, dtypes if dtypes is single else (r.dtype,), r.device)
    if all(tensor is None for _, tensor, _, _ in wanted):
        raise ValueError(f"{OP}: nothing to write: give r_out, pooled, partials, sums or z_out")


def fused_layer_fwd(
    r: Tensor,  # (N, H, W, C1) bf16, fp16 or fp32
    s: Tensor | Parts,  # (N,) fp32
    weight: Tensor,  # (Cout, K) from pack_weight, in r's dtype
    bias: Tensor | None,  # (Cout,) fp32
    gamma: Tensor | None,  # (Cout,) fp32; None: no norm
    *,
    r2: Tensor | None = None,  # (N, H, W, C2)
    s2: Tensor | None = None,  # (N,) fp32
    r_out: Tensor | None = None,  # (N, H, W, Cout)
    pooled: Tensor | None = None,  # (N, H/2, W/2, Cout): 2×2 means of r_out before rounding
    partials: Tensor | None = None,  # (N, partials_per_image, 3) fp32: count, mean, M2 of z
    sums: Tensor | None = None,  # (N, sums_per_image, Cout) fp32: of r_out before rounding
    z_out: Tensor | None = None,  # (N, H, W, Cout): for the gradient
    active: Tensor | None = None,  # (N,) int32: of images where it is 0 nothing need be written
    relu: bool = True,
    precision: str = "ieee",  # of fp32 products: "ieee" or "tf32"
) -> None:
    """Launch the layer; writes those of the outputs that are given."""
    check_can_run(OP, r.device)
    check_precision(OP, precision)
    check_active(OP, active, r)
    _check_inputs(r, weight, bias, gamma, r2, s2)
    N, H, W, c1 = r.shape
    scale = scalars.checked(OP, s, N, r.device)
    c2 = 0 if r2 is None else r2.shape[3]
    c_out = len(weight)
    c_in = (c1, c2) if c2 else (c1,)
    t = tiles.tile(c_in, c_out, H, W, r.dtype, capability(r.device))
    if z_out is not None and not t.descriptors:
        t = t._replace(stages=2)  # with the addresses of z too, more spills under Triton 3.9
    boxes, blocks = cdiv(H, t.rows) * cdiv(W, t.columns), cdiv(c_out, t.block_n)
    _check_outputs(r, c_out, boxes, blocks, r_out, pooled, partials, sums, z_out)
    if r.numel() == 0:
        return
    ends = [r, r2, weight, r_out, pooled, z_out]
    if t.descriptors:
        full = (t.images, t.rows, t.columns)
        half = (t.images, t.rows // 2, t.columns // 2)
        blocks_of = [(*full, t.block_k), (*full, t.block_k), (t.block_n, t.block_k),
                     (*full, t.block_n), (*half, t.block_n), (*full, t.block_n)]  # fmt: skip
        ends = [e if e is None else descriptor(e, b) for e, b in zip(ends, blocks_of, strict=True)]
    a, a2, w, out, small, z = ends
    fused_layer_fwd_kernel[(cdiv(N, t.images) * boxes * blocks,)](
        r=a, r2=a2, s2=s2, weight=w, bias=bias, gamma=gamma, r_out=out, pooled=small,
        partials=partials, sums=sums, z_out=z, active=active, N=N, H=H, W=W, **scale,
        **constants(c_in, c_out, H, W, r.dtype, t, relu, precision),
    )  # fmt: skip


def constants(
    c_in: tuple[int, ...], c_out: int, H: int, W: int, dtype, t: tiles.Tile, relu: bool, precision
) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    c1, c2 = (*c_in, 0)[:2]
    return dict(
        C1=c1,
        C2=c2,
        P1=tiles.padded(c1),
        P2=tiles.padded(c2) if c2 else 0,
        COUT=c_out,
        TN=t.images,
        TH=t.rows,
        TW=t.columns,
        BLOCK_N=t.block_n,
        BLOCK_K=t.block_k,
        MASKED=H % t.rows != 0 or W % t.columns != 0 or c_out % t.block_n != 0,
        RELU=relu,
        DESCRIPTORS=t.descriptors,
        PRECISION=precision,
        UPCAST=dtype == torch.bfloat16 and interpreted(),  # its bf16 products are wrong
        **t.options(),
    )
