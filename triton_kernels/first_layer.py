"""The first layer: 3×3 convolution of an image of at most 4 channels, bias, ReLU; no norm, so no
statistics.

    r_out = ReLU(conv(x, W) + b)          (where wanted its 2×2 means and its sums over space)

Layouts: image (N, H, W, C) dense; weights packed by `pack_first_weight`: (Cout, parts, K), K = (ky,
kx, c) padded with zeros to a power of two (27 -> 32), so that all nine taps are one step of the product.
16-bit weights have two parts, rounded and what rounding left, so that the products are as if of 16
bits of mantissa: on a smooth image nothing averages their errors out, and with single bf16 weights φ of
such an image is wrong by up to 4 % at small σ (the shipped network, emulated; 0.7 % with two parts).

Tiling: a program owns a box of pixels by block_n channels and gathers its (K, pixels) operand by
pointers: too few channels for the copy engine, and too few bytes to matter (the reads come from the
caches).

To move and to do, per image, bf16, 3→64 @64×64: 0.55 MB, nearly all of it written; 18 MFLOP with
the padding, twice. Bound on an H200 (4.3 TB/s, 790 TFLOP/s): 0.13 µs, all of it memory.
Measured distance to that bound: not yet run on a GPU.

Not fused with the second layer: that would spare writing and reading r_out once (0.24 µs of an
image), but every one of the second layer's nine shifted boxes would be computed anew (half again
its products), in registers instead of by the copy engine; or kept in shared memory with its halo,
which Triton cannot address shifted. The second layer is the one that feeds the tensor cores worst
as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastphi.engine.rounding import two_parts

from . import tiles
from .box import idle, load_channels, store_outputs
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
    power_of_two,
    round_to_bf16,
    tl,
)

OP = "first_layer_fwd"


@jit
def first_layer_fwd_kernel(
    image_in,  # (N, H, W, C), pointer
    weight,  # (COUT, PARTS, K), pointer
    bias,  # (COUT,) fp32 or None
    r_out,  # (N, H, W, COUT) or None
    pooled,  # (N, H/2, W/2, COUT) or None
    sums,  # (N, boxes, COUT) fp32 or None
    active,  # (N,) int32 or None
    N,
    H,
    W,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    COUT: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    RELU: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    M: tl.constexpr = TN * TH * TW
    BLOCKS: tl.constexpr = (COUT + BLOCK_N - 1) // BLOCK_N
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

    k = tl.arange(0, K)[:, None]
    m = tl.arange(0, M)[None, :]
    n, y, x = m // (TH * TW), y0 + m // TW % TH + k // (3 * C) - 1, x0 + m % TW + k // C % 3 - 1
    inside = (k < 9 * C) & (image + n < N) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    offset = ((n * H + y) * W + x) * C + k % C
    a = tl.load(image_in + image.to(tl.int64) * H * W * C + offset, mask=inside, other=0.0)
    co = channel + tl.arange(0, BLOCK_N)[:, None]
    if UPCAST and a.dtype == tl.float32:
        a = round_to_bf16(a)
    a = a.to(weight.dtype.element_ty)
    if UPCAST:
        a = a.to(tl.float32)
    z = tl.zeros((BLOCK_N, M), tl.float32)
    for part in tl.static_range(PARTS):
        at = weight + (co * PARTS + part) * K + tl.arange(0, K)[None, :]
        w = tl.load(at, mask=co < COUT, other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
        z = tl.dot(w, a, z, input_precision=PRECISION)
    if bias is not None:
        z += load_channels(bias, channel, COUT, BLOCK_N)
    if RELU:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    store_outputs(z, r_out, pooled, sums, place, boxes, image, y0, x0, channel, N, H, W, COUT,
                  TN, TH, TW, BLOCK_N, MASKED, DESCRIPTORS, UPCAST)  # fmt: skip


def pack_first_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """torch's (Cout, C, 3, 3) -> (Cout, parts, K)."""
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or not 1 <= weight.shape[1] <= 4:
        raise ValueError(
            f"pack_first_weight: weight has shape {tuple(weight.shape)}, expected (Cout, C, 3, 3)"
            " with C from 1 to 4"
        )
    rows = weight.permute(0, 2, 3, 1).flatten(1)
    packed = torch.stack(two_parts(rows, dtype)[: _parts(dtype)], dim=1)
    return torch.nn.functional.pad(packed, (0, _k(weight.shape[1]) - rows.shape[1])).contiguous()


def _k(channels: int) -> int:
    return max(16, power_of_two(9 * channels))


def _parts(dtype: torch.dtype) -> int:
    return 2 if dtype.itemsize == 2 else 1


def sums_per_image(c_out: int, H: int, W: int, dtype: torch.dtype, device: torch.device) -> int:
    """Ts of `sums` (N, Ts, Cout); dtype: that of the weights."""
    t = tiles.first_tile(c_out, H, W, dtype, capability(device))
    return cdiv(H, t.rows) * cdiv(W, t.columns)


def _check(image, weight, bias, r_out, pooled, sums, boxes) -> None:
    if image.ndim != 4 or not 1 <= image.shape[3] <= 4:
        raise ValueError(
            f"{OP}: image has shape {tuple(image.shape)}, expected (N, H, W, C) with C from 1 to 4"
        )
    N, H, W, c = image.shape
    c_out, dtype, device, single = len(weight), weight.dtype, image.device, (torch.float32,)
    check(OP, "image", image, image.shape, (torch.float32, dtype), device)
    check(
        OP, "weight (from pack_first_weight)", weight, (c_out, _parts(dtype), _k(c)), DTYPES, device
    )
    if pooled is not None and (H % 2 or W % 2):
        raise ValueError(f"{OP}: pooled needs even height and width, got {H}×{W}")
    if r_out is None and pooled is None and sums is None:
        raise ValueError(f"{OP}: nothing to write: give r_out, pooled or sums")
    for name, tensor, shape, dtypes in (
        ("bias", bias, (c_out,), single),
        ("r_out", r_out, (N, H, W, c_out), (dtype,)),
        ("pooled", pooled, (N, H // 2, W // 2, c_out), (dtype,)),
        ("sums", sums, (N, boxes, c_out), single),
    ):
        if tensor is not None:
            check(OP, name, tensor, shape, dtypes, device)


def first_layer_fwd(
    image: Tensor,  # (N, H, W, C) fp32, or of the weights' dtype; C from 1 to 4
    weight: Tensor,  # (Cout, parts, K) from pack_first_weight
    bias: Tensor | None,  # (Cout,) fp32
    r_out: Tensor | None = None,  # (N, H, W, Cout), of the weights' dtype, as `pooled`
    *,
    pooled: Tensor | None = None,  # (N, H/2, W/2, Cout): 2×2 means of r_out before rounding
    sums: Tensor | None = None,  # (N, sums_per_image, Cout) fp32: of r_out before rounding
    active: Tensor | None = None,  # (N,) int32: of images where it is 0 nothing need be written
    relu: bool = True,
    precision: str = "ieee",  # of fp32 products: "ieee" or "tf32"
) -> None:
    """Launch the layer; writes those of the outputs that are given."""
    check_can_run(OP, image.device)
    check_precision(OP, precision)
    check_active(OP, active, image)
    N, H, W, c = image.shape
    c_out = len(weight)
    t = tiles.first_tile(c_out, H, W, weight.dtype, capability(image.device))
    boxes = cdiv(H, t.rows) * cdiv(W, t.columns)
    _check(image, weight, bias, r_out, pooled, sums, boxes)
    if image.numel() == 0:
        return
    out, small = r_out, pooled
    if t.descriptors and r_out is not None:
        out = descriptor(r_out, (t.images, t.rows, t.columns, t.block_n))
    if t.descriptors and pooled is not None:
        small = descriptor(pooled, (t.images, t.rows // 2, t.columns // 2, t.block_n))
    first_layer_fwd_kernel[(cdiv(N, t.images) * boxes * cdiv(c_out, t.block_n),)](
        image, weight, bias, out, small, sums, active, N, H, W,
        **constants(c, c_out, H, W, weight.dtype, t, relu, precision),
    )  # fmt: skip


def constants(
    c: int, c_out: int, H: int, W: int, dtype, t: tiles.Tile, relu: bool, precision: str
) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return dict(
        C=c,
        PARTS=_parts(dtype),
        K=_k(c),
        COUT=c_out,
        TN=t.images,
        TH=t.rows,
        TW=t.columns,
        BLOCK_N=t.block_n,
        MASKED=H % t.rows != 0 or W % t.columns != 0,
        RELU=relu,
        DESCRIPTORS=t.descriptors,
        PRECISION=precision,
        UPCAST=dtype == torch.bfloat16 and interpreted(),
        **t.options(),
    )
