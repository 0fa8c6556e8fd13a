"""The fused layer with norm under autograd on a GPU, forward and backward, and what the other ops of the
GPU engine (ends.py) share with it. The seam is ops.py.

The input's gradient is `conv_bwd`'s, the weights' the library's (cuDNN), from d_z with the input's
scalar folded in: so neither needs a pass over the activations for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastphi.engine import ops
from fastphi.engine.op_rules import no_second_derivative, or_zeros


def gpu_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """A custom operator that works on its first tensor's device, whichever is current: Triton launches
    on the current one."""

    def made(call: Callable[..., Any]) -> Any:
        @functools.wraps(call)
        def guarded(first: Tensor, *rest: Any, **options: Any) -> Any:
            with torch.cuda.device(first.device if first.is_cuda else -1):
                return call(first, *rest, **options)

        return custom_op(f"fastphi::{name}", mutates_args=())(guarded)

    return made


def products(dtype: torch.dtype) -> str:
    """How torch's convolutions make products of float32: "ieee" or "tf32"."""
    settings: Any = torch.backends.cudnn  # its allow_tf32 raises where the newer settings are used
    tf32 = dtype == torch.float32 and settings.conv.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def planar(x: Tensor) -> Tensor:
    """(N, H, W, C) seen as torch's (N, C, H, W), channels last in memory."""
    return x.permute(0, 3, 1, 2)


def weight_gradient(d_z: Tensor, source: Tensor, shape: torch.Size) -> Tensor:
    """Of a 3×3 convolution: d_z (N, H, W, Cout), source (N, H, W, Cin) of one dtype -> float32, dense
    as the weights are: the library's own layout follows its inputs', and torch.compile is told one."""
    like = source.new_empty(()).expand(shape)  # says the shape; its values are not read
    args = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    found = torch.ops.aten.convolution_backward(planar(d_z), planar(source), like, *args)[1]
    return found.to(torch.float32, memory_format=torch.contiguous_format)


@gpu_op("gpu_layer_fwd")
def layer_fwd(
    r: Tensor,
    s: Tensor,
    r2: Tensor | None,
    s2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(r_out, s_out, z, mean, std) of a layer; r2, s2: its second source."""
    from fastphi.triton_kernels import fused_layer

    (n, height, width, c), c_out, dtype = r.shape, len(weight), r.dtype
    c_in = (c,) if r2 is None else (c, r2.shape[3])
    slots = fused_layer.partials_per_image(c_in, c_out, height, width, dtype, r.device)
    r_out, z = (r.new_empty(n, height, width, c_out) for _ in range(2))
    partials = r.new_empty(n, slots, 3, dtype=torch.float32)
    s_out, mean, std = (torch.empty_like(s) for _ in range(3))
    fused_layer.fused_layer_fwd(
        r,
        s,
        fused_layer.pack_weight(weight, None if r2 is None else c, dtype),
        None if bias is None else bias.float(),
        gamma.float(),
        r2=r2,
        s2=s2,
        r_out=r_out,
        z_out=z,
        partials=partials,
        precision=products(dtype),
    )
    ops.combine_moments(partials, eps, s_out, mean, std)
    return r_out, s_out, z, mean, std


@layer_fwd.register_fake
def _(r, s, r2, s2, weight, bias, gamma, eps):
    out = r.new_empty(*r.shape[:3], weight.shape[0])
    scalars = [torch.empty_like(s) for _ in range(3)]
    return out, scalars[0], torch.empty_like(out), scalars[1], scalars[2]


@gpu_op("gpu_layer_bwd")
def layer_bwd(
    d_r_out: Tensor,
    d_s_out: Tensor,
    r: Tensor,
    s: Tensor,
    r2: Tensor | None,
    s2: Tensor | None,
    weight: Tensor,
    gamma: Tensor,
    z: Tensor,
    s_out: Tensor,
    mean: Tensor,
    std: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(d_r, d_s, d_r2, d_s2, d_weight, d_bias, d_gamma); of a second source that is not: empty."""
    from fastphi.triton_kernels import norm_bwd

    n, height, width, c_out = z.shape
    d_z, sums = torch.empty_like(z), room_for_sums(z)
    norm_bwd.norm_bwd(
        d_r_out, z, gamma.float(), d_z, s_in=s, s=s_out, mean=mean, std=std,
        d_s=d_s_out[:, None].contiguous(), sums=sums,
    )  # fmt: skip
    d_bias, d_gamma = (sums[:, :, j].sum((0, 1)) for j in range(2))
    own = r.shape[3]
    d_r, d_s = input_gradient(d_z, weight[:, :own], r, s, None)
    d_weight = weight_gradient(d_z, r, weight[:, :own].shape)
    if r2 is None or s2 is None:
        return d_r, d_s, r.new_empty(0), s.new_empty(0), d_weight, d_bias, d_gamma
    d_r2, d_s2 = input_gradient(d_z, weight[:, own:], r2, s2, s)
    ratio = (s2 / s)[:, None, None, None]  # in float32, and the product rounded once
    scaled = torch.mul(d_z, ratio, out=torch.empty_like(d_z))
    second = weight_gradient(scaled, r2, weight[:, own:].shape)
    return d_r, d_s, d_r2, d_s2, torch.cat([d_weight, second], 1), d_bias, d_gamma


def room_for_sums(z: Tensor) -> Tensor:
    from fastphi.triton_kernels import norm_bwd

    n, height, width, c = z.shape
    parts = norm_bwd.sums_per_image(c, height, width)
    return z.new_empty(n, parts, 2, c, dtype=torch.float32)


def input_gradient(
    d_z: Tensor, weight: Tensor, r: Tensor, s: Tensor, s_z: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(d_r, d_s) of one source."""
    from fastphi.triton_kernels import conv_bwd

    n, height, width, c = d_z.shape
    place = (height, width, r.dtype, r.device)
    d_r = torch.empty_like(r)
    parts = s.new_empty(n, conv_bwd.d_s_per_image(c, r.shape[3], *place))
    packed = conv_bwd.pack_transposed_weight(weight, r.dtype)
    conv_bwd.conv_bwd(d_z, packed, d_r, r=r, s=s, s_z=s_z, d_s=parts, precision=products(r.dtype))
    return d_r, parts.sum(1)


@layer_bwd.register_fake
def _(d_r_out, d_s_out, r, s, r2, s2, weight, gamma, z, s_out, mean, std):
    none = r.new_empty(0), s.new_empty(0)
    second = none if r2 is None else (torch.empty_like(r2), torch.empty_like(s2))
    c_out = weight.shape[0]
    vectors = (s.new_empty(c_out), s.new_empty(c_out))
    return torch.empty_like(r), torch.empty_like(s), *second, s.new_empty(weight.shape), *vectors


def _layer_setup(ctx, inputs, output) -> None:
    r, s, r2, s2, weight, bias, gamma, _ = inputs
    _, s_out, z, mean, std = output
    ctx.mark_non_differentiable(z, mean, std)
    ctx.set_materialize_grads(False)  # else torch fills zeros for them, z's as large as z
    ctx.save_for_backward(r, s, r2, s2, weight, gamma, z, s_out, mean, std)
    ctx.has_bias = bias is not None


def _layer_backward(ctx, d_r_out, d_s_out, *_):
    weight, gamma, z, s_out = ctx.saved_tensors[4:8]
    d_r_out, d_s_out = or_zeros(d_r_out, z), or_zeros(d_s_out, s_out)
    found = layer_bwd(d_r_out.contiguous(), d_s_out.contiguous(), *ctx.saved_tensors)
    d_r, d_s, d_r2, d_s2, d_weight, d_bias, d_gamma = found
    second = (None, None) if ctx.saved_tensors[2] is None else (d_r2, d_s2)
    d_bias = d_bias.to(weight.dtype) if ctx.has_bias else None
    return d_r, d_s, *second, d_weight.to(weight.dtype), d_bias, d_gamma.to(gamma.dtype), None


layer_fwd.register_autograd(_layer_backward, setup_context=_layer_setup)
layer_bwd.register_autograd(no_second_derivative)
