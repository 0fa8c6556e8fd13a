"""The first layer, the last and the up-sampling under autograd on a GPU; its Ops are those of ops.py."""

from __future__ import annotations

import torch
from torch import Tensor

from fastphi.engine.gpu.layer import gpu_op, products, room_for_sums, weight_gradient
from fastphi.engine.op_rules import no_second_derivative

# --- the first layer: image -> r, no norm, no scalar ---------------------------------------------


@gpu_op("gpu_first_layer_fwd")
def first_layer_fwd(
    image: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """ReLU(conv(image) + b): (N, H, W, C) float32 -> (N, H, W, Cout) of `dtype`."""
    from fastphi.triton_kernels import first_layer

    r_out = image.new_empty(*image.shape[:3], len(weight), dtype=dtype)
    packed = first_layer.pack_first_weight(weight, dtype)
    vector = None if bias is None else bias.float()
    first_layer.first_layer_fwd(image, packed, vector, r_out, precision=products(dtype))
    return r_out


@first_layer_fwd.register_fake
def _(image, weight, bias, dtype):
    return image.new_empty(*image.shape[:3], weight.shape[0], dtype=dtype)


@gpu_op("gpu_first_layer_bwd")
def first_layer_bwd(
    d_r_out: Tensor, image: Tensor, weight: Tensor, r_out: Tensor, need_image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_image float32, or empty; d_weight, d_bias)."""
    from fastphi.triton_kernels import conv_bwd, last_layer, norm_bwd

    d_z, sums, dtype = torch.empty_like(r_out), room_for_sums(r_out), r_out.dtype
    norm_bwd.norm_bwd(d_r_out, r_out, None, d_z, sums=sums)
    d_weight = weight_gradient(d_z, image.to(dtype), weight.shape)
    d_bias = sums[:, :, 0].sum((0, 1))
    if not need_image:
        return image.new_empty(0), d_weight, d_bias
    n, height, width, c = image.shape
    d_image = image.new_empty(n, c, height, width)
    packed = conv_bwd.pack_transposed_weight(weight, dtype)
    last_layer.last_layer_fwd(d_z, None, packed, None, d_image, precision=products(dtype))
    return d_image.permute(0, 2, 3, 1).contiguous(), d_weight, d_bias


@first_layer_bwd.register_fake
def _(d_r_out, image, weight, r_out, need_image):
    d_image = torch.empty_like(image) if need_image else image.new_empty(0)
    return d_image, image.new_empty(weight.shape), image.new_empty(weight.shape[0])


def _first_setup(ctx, inputs, output) -> None:
    image, weight, bias, _ = inputs
    ctx.save_for_backward(image, weight, output)
    ctx.has_bias = bias is not None


def _first_backward(ctx, d_r_out):
    image, weight, r_out = ctx.saved_tensors
    need = ctx.needs_input_grad[0]
    d_image, d_weight, d_bias = first_layer_bwd(d_r_out.contiguous(), image, weight, r_out, need)
    d_bias = d_bias.to(weight.dtype) if ctx.has_bias else None
    return d_image if need else None, d_weight.to(weight.dtype), d_bias, None


# --- the last layer: r, s -> image ---------------------------------------------------------------


@gpu_op("gpu_last_layer_fwd")
def last_layer_fwd(r: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """s·conv(r) + b: (N, C, H, W) float32."""
    from fastphi.triton_kernels import fused_layer, last_layer

    n, height, width, _ = r.shape
    out = s.new_empty(n, len(weight), height, width)
    packed = fused_layer.pack_weight(weight, None, r.dtype)
    vector = None if bias is None else bias.float()
    last_layer.last_layer_fwd(r, s, packed, vector, out, precision=products(r.dtype))
    return out


@last_layer_fwd.register_fake
def _(r, s, weight, bias):
    return s.new_empty(r.shape[0], weight.shape[0], *r.shape[1:3])


@gpu_op("gpu_last_layer_bwd")
def last_layer_bwd(
    d_out: Tensor, r: Tensor, s: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_r, d_s, d_weight, d_bias); the transposed convolution from few channels is `first_layer`'s."""
    from fastphi.triton_kernels import first_layer

    folded = (d_out * s[:, None, None, None]).permute(0, 2, 3, 1).to(r.dtype).contiguous()
    packed = first_layer.pack_first_weight(weight.flip(2, 3).transpose(0, 1), r.dtype)
    d_r = torch.empty_like(r)
    first_layer.first_layer_fwd(folded, packed, None, d_r, relu=False, precision=products(r.dtype))
    d_s = (d_r * r).flatten(1).sum(1, dtype=torch.float32) / s
    return d_r, d_s, weight_gradient(folded, r, weight.shape), d_out.sum((0, 2, 3))


@last_layer_bwd.register_fake
def _(d_out, r, s, weight):
    vector = s.new_empty(weight.shape[0])
    return torch.empty_like(r), torch.empty_like(s), s.new_empty(weight.shape), vector


def _last_setup(ctx, inputs, output) -> None:
    r, s, weight, bias = inputs
    ctx.save_for_backward(r, s, weight)
    ctx.has_bias = bias is not None


def _last_backward(ctx, d_out):
    r, s, weight = ctx.saved_tensors
    d_r, d_s, d_weight, d_bias = last_layer_bwd(d_out.float().contiguous(), r, s, weight)
    d_bias = d_bias.to(weight.dtype) if ctx.has_bias else None
    return d_r, d_s, d_weight.to(weight.dtype), d_bias


# --- up-sampling ---------------------------------------------------------------------------------


@gpu_op("gpu_upsample_fwd")
def upsample_fwd(r: Tensor, weight: Tensor) -> Tensor:
    """Transposed conv 2×2, stride 2: (N, H, W, C) -> (N, 2H, 2W, Cout)."""
    from fastphi.triton_kernels import upsample

    n, height, width, _ = r.shape
    out = r.new_empty(n, 2 * height, 2 * width, weight.shape[1])
    packed = upsample.pack_upsample_weight(weight, r.dtype)
    upsample.upsample_fwd(r, None, packed, None, out, precision=products(r.dtype))
    return out


@upsample_fwd.register_fake
def _(r, weight):
    n, height, width, _ = r.shape
    return r.new_empty(n, 2 * height, 2 * width, weight.shape[1])


@gpu_op("gpu_upsample_bwd")
def upsample_bwd(d_out: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(d_r, d_weight): a matrix product per pixel, of its 2×2 places and their channels."""
    (n, height, width, c), c_out = r.shape, weight.shape[1]
    quads = d_out.reshape(n, height, 2, width, 2, c_out).permute(0, 1, 3, 2, 4, 5)
    quads = quads.reshape(-1, 4 * c_out)
    matrix = weight.to(r.dtype).permute(2, 3, 1, 0).reshape(4 * c_out, c)
    d_weight = (r.reshape(-1, c).T @ quads).float().view(c, 2, 2, c_out)
    return (quads @ matrix).view(r.shape), d_weight.permute(0, 3, 1, 2).contiguous()


@upsample_bwd.register_fake
def _(d_out, r, weight):
    return torch.empty_like(r), r.new_empty(weight.shape, dtype=torch.float32)


def _upsample_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _upsample_backward(ctx, d_out):
    r, weight = ctx.saved_tensors
    d_r, d_weight = upsample_bwd(d_out.contiguous(), r, weight)
    return d_r, d_weight.to(weight.dtype)


for _forward, _setup, _backward in (
    (first_layer_fwd, _first_setup, _first_backward),
    (last_layer_fwd, _last_setup, _last_backward),
    (upsample_fwd, _upsample_setup, _upsample_backward),
):
    _forward.register_autograd(_backward, setup_context=_setup)
for _op in (first_layer_bwd, last_layer_bwd, upsample_bwd):
    _op.register_autograd(no_second_derivative)
