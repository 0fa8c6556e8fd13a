"""The gradient of gain, ReLU and deferred norm: from (d_r, d_s) of a layer's output to d_z.

    d_z = s_in · (m γ d_r + k (z − mean))        m = 1[γ z > 0]        k = −d_s s² / (n std)

r = ReLU(γ z) and s = 1/(std(z) + ε) are the layer's output; mean and std are over the n = H·W·C values of
an image's z; k = 0 where std = 0, as autograd has it. s_in is the scalar of the layer's input,
folded in here, where it costs nothing: so `conv_bwd` has the gradient of the input's r at once. The
parts of d_s that `conv_bwd` left are added up here, in a fixed order.

d_r comes in one of three forms: of the layer's output (N, H, W, C); of its 2×2 means (N, H/2, W/2, C),
read at (y/2, x/2) times ¼; or one number per channel (N, C), where the loss is of spatial means.
Without a norm (gamma None) z may be r itself: d_z = s_in m d_r. For training the parts of the
gradients of bias and gain over a program's pixels:
    sums (N, parts, 2, C): Σ d_z/s_in and Σ m d_r z

Layouts: z, d_z (N, H, W, C) dense; statistics, gain, d_s, sums fp32. A program owns block_p pixels of
an image by block_c channels. One pass over memory, between two convolutions: both operands of those
must lie in shared memory, so computing d_z there, at the load, would load z and d_r nine times and
take each value through registers.

To move, per image, bf16: 2·H·W·C·(2 + 1, ¼ or 0) bytes. Bound on an H200 (4.3 TB/s):
    64 @64×64, pooled    1.18 MB  0.27 µs        128 @32×32    0.79 MB  0.18 µs
    128 @32×32, pooled   0.59 MB  0.14 µs        256 @16×16    0.39 MB  0.09 µs
    256 @16×16, pooled   0.29 MB  0.07 µs        512 @8×8      0.20 MB  0.05 µs
and 512 @8×8 from the means 0.13 MB, 0.03 µs; 0.88 µs for a guidance iteration's layers, whose products'
bound is 5.0 µs. Measured distance to that bound: not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import tiles
from .support import (
    DTYPES,
    cdiv,
    check,
    check_active,
    check_can_run,
    interpreted,
    jit,
    power_of_two,
    round_to_bf16,
    tl,
)

OP = "norm_bwd"
FORMS = ("full", "pooled", "means")


@jit
def norm_bwd_kernel(
    d_r,  # (N, H, W, C), (N, H/2, W/2, C), or (N, C) fp32
    z,  # (N, H, W, C)
    gamma,  # (C,) fp32 or None: no norm
    s_in,  # (N,) fp32 or None: 1
    s,  # (N,) fp32, as mean, std; read with gamma only
    mean,
    std,
    d_s,  # (N, T) fp32
    d_z,  # (N, H, W, C)
    sums,  # (N, parts, 2, C) fp32 or None
    active,  # (N,) int32 or None
    H,
    W,
    C: tl.constexpr,
    T: tl.constexpr,
    TP: tl.constexpr,  # T padded to a power of two
    FORM: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    parts = tl.cdiv(H * W, BLOCK_P)
    block = tl.program_id(0) % BLOCKS
    part = tl.program_id(0) // BLOCKS % parts
    image = (tl.program_id(0) // BLOCKS // parts).to(tl.int64)
    if active is not None:
        if tl.load(active + image) == 0:
            return
    pixel = part * BLOCK_P + tl.arange(0, BLOCK_P)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < C
    inside = (pixel < H * W)[:, None] & there[None, :]
    at = pixel[:, None] * C + c[None, :]
    value = tl.load(z + image * H * W * C + at, mask=inside, other=0.0).to(tl.float32)
    if FORM == "means":
        up = tl.load(d_r + image * C + c, mask=there, other=0.0)[None, :]
        up = tl.broadcast_to(up, (BLOCK_P, BLOCK_C))
    elif FORM == "pooled":
        small = (pixel // W // 2 * (W // 2) + pixel % W // 2)[:, None] * C + c[None, :]
        start = image * (H // 2) * (W // 2) * C
        up = 0.25 * tl.load(d_r + start + small, mask=inside, other=0.0).to(tl.float32)
    else:
        up = tl.load(d_r + image * H * W * C + at, mask=inside, other=0.0).to(tl.float32)

    if gamma is not None:
        gain = tl.load(gamma + c, mask=there, other=0.0)[None, :]
        if RELU:
            up = tl.where(gain * value <= 0, 0.0, up)
        t = tl.arange(0, TP)
        total = tl.sum(tl.load(d_s + image * T + t, mask=t < T, other=0.0), axis=0)
        scale, spread = tl.load(s + image), tl.load(std + image)
        flat = spread == 0
        k = -total * scale * scale / (1.0 * H * W * C * tl.where(flat, 1.0, spread))
        k = tl.where(flat, 0.0, k)
        out = gain * up + k * (value - tl.load(mean + image))
    else:
        if RELU:
            up = tl.where(value <= 0, 0.0, up)
        out = up
    if sums is not None:
        to = sums + (image * parts + part) * (2 * C) + c
        tl.store(to, tl.sum(tl.where(inside, out, 0.0), axis=0), mask=there)
        tl.store(to + C, tl.sum(up * value, axis=0), mask=there)
    if s_in is not None:
        out *= tl.load(s_in + image)
    if UPCAST:
        out = round_to_bf16(out)
    tl.store(d_z + image * H * W * C + at, out, mask=inside)


def sums_per_image(c: int, H: int, W: int) -> int:
    """Parts of `sums` (N, parts, 2, C)."""
    return cdiv(H * W, tiles.norm_bwd_block(c)[0])


def _check(d_r, z, gamma, s_in, s, mean, std, d_s, d_z, sums, form) -> None:
    if form not in FORMS:
        raise ValueError(f"{OP}: form is {form!r}, expected one of {', '.join(FORMS)}")
    if z.ndim != 4:
        raise ValueError(f"{OP}: z has shape {tuple(z.shape)}, expected (N, H, W, C)")
    N, H, W, c = z.shape
    if form == "pooled" and (H % 2 or W % 2):
        raise ValueError(f"{OP}: pooled needs even height and width, got {H}×{W}")
    single, own = (torch.float32,), (z.dtype,)
    of = {"full": (N, H, W, c), "pooled": (N, H // 2, W // 2, c), "means": (N, c)}[form]
    check(OP, "z", z, z.shape, DTYPES, z.device)
    check(OP, "d_r", d_r, of, single if form == "means" else own, z.device)
    check(OP, "d_z", d_z, z.shape, own, z.device)
    norm = {"s": s, "mean": mean, "std": std, "d_s": d_s}
    absent = [name for name, tensor in norm.items() if tensor is None]
    if gamma is not None and absent:
        raise ValueError(f"{OP}: {absent[0]} is None, expected a tensor, as there is a gamma")
    t = d_s.shape[-1] if d_s is not None and d_s.ndim == 2 else 0
    for name, tensor, shape in (
        ("gamma", gamma, (c,)),
        ("s_in", s_in, (N,)),
        *((name, tensor, (N, t) if name == "d_s" else (N,)) for name, tensor in norm.items()),
        ("sums", sums, (N, sums_per_image(c, H, W), 2, c)),
    ):
        if tensor is not None:
            check(OP, name, tensor, shape, single, z.device)


def norm_bwd(
    d_r: Tensor,  # in the form that `form` says
    z: Tensor,  # (N, H, W, C) bf16, fp16 or fp32; without gamma: z, or r = ReLU(z)
    gamma: Tensor | None,  # (C,) fp32; None: no norm
    d_z: Tensor,  # (N, H, W, C), written
    *,
    form: str = "full",  # "full", "pooled", "means"
    s_in: Tensor | None = None,  # (N,) fp32
    s: Tensor | None = None,  # (N,) fp32, with gamma, as all that follow
    mean: Tensor | None = None,  # (N,) fp32
    std: Tensor | None = None,  # (N,) fp32
    d_s: Tensor | None = None,  # (N, T) fp32: parts of the gradient of s
    sums: Tensor | None = None,  # (N, sums_per_image, 2, C) fp32, written
    relu: bool = True,
    active: Tensor | None = None,  # (N,) int32: of images where it is 0 nothing need be written
) -> None:
    """Launch the pass into `d_z`, and `sums` where it is given."""
    check_can_run(OP, z.device)
    check_active(OP, active, z)
    _check(d_r, z, gamma, s_in, s, mean, std, d_s, d_z, sums, form)
    if z.numel() == 0:
        return
    N, H, W, c = z.shape
    block_p, block_c = tiles.norm_bwd_block(c)
    slots = 1 if gamma is None or d_s is None else d_s.shape[1]
    norm_bwd_kernel[(N * cdiv(H * W, block_p) * cdiv(c, block_c),)](
        d_r, z, gamma, s_in, s, mean, std, d_s, d_z, sums, active, H, W,
        **constants(c, slots, z.dtype, form, relu),
    )  # fmt: skip


def constants(c: int, slots: int, dtype: torch.dtype, form: str, relu: bool) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    block_p, block_c = tiles.norm_bwd_block(c)
    return dict(
        C=c,
        T=slots,
        TP=power_of_two(slots),
        FORM=form,
        RELU=relu,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        UPCAST=dtype == torch.bfloat16 and interpreted(),
        num_warps=tiles.NORM_BWD_WARPS,
        num_stages=1,
        enable_fp_fusion=True,
    )
