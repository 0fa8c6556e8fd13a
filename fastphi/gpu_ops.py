"""The GPU engine's ops under autograd, for training and for users' own code (`fastphi.engine.Ops`).

Each is a torch.library op, forward and backward, so they live under torch.compile, autocast and DDP.
Activations are (N, H, W, C) in the dtype to compute in (autocast's, where it is on), scalars and
statistics float32, parameters whatever the model holds (float32 master weights), packed anew at every
call. The input's gradient is `conv_bwd`'s, the weights' the library's (cuDNN), from d_z with the
input's scalar folded in: so neither needs a pass over the activations for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from fastphi import ops
from fastphi.op_rules import no_second_derivative


def products(dtype: torch.dtype) -> str:
    """How torch's convolutions make products of float32: "ieee" or "tf32"."""
    settings: Any = torch.backends.cudnn  # its allow_tf32 raises where the newer settings are used
    tf32 = dtype == torch.float32 and settings.conv.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _planar(x: Tensor) -> Tensor:
    """(N, H, W, C) seen as torch's (N, C, H, W), channels last in memory."""
    return x.permute(0, 3, 1, 2)


def _weight_gradient(d_z: Tensor, source: Tensor, shape: torch.Size) -> Tensor:
    """Of a 3×3 convolution: d_z (N, H, W, Cout), source (N, H, W, Cin) of one dtype -> float32, dense
    as the weights are: the library's own layout follows its inputs', and torch.compile is told one."""
    like = source.new_empty(()).expand(shape)  # says the shape; its values are not read
    args = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    found = torch.ops.aten.convolution_backward(_planar(d_z), _planar(source), like, *args)[1]
    return found.to(torch.float32, memory_format=torch.contiguous_format)


# --- a layer with norm ---------------------------------------------------------------------------


@custom_op("fastphi::gpu_layer_fwd", mutates_args=())
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


@custom_op("fastphi::gpu_layer_bwd", mutates_args=())
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
    d_z, sums = torch.empty_like(z), _sums(z)
    norm_bwd.norm_bwd(
        d_r_out, z, gamma.float(), d_z, s_in=s, s=s_out, mean=mean, std=std,
        d_s=d_s_out[:, None].contiguous(), sums=sums,
    )  # fmt: skip
    d_bias, d_gamma = (sums[:, :, j].sum((0, 1)) for j in range(2))
    own = r.shape[3]
    d_r, d_s = _input_gradient(d_z, weight[:, :own], r, s, None)
    d_weight = _weight_gradient(d_z, r, weight[:, :own].shape)
    if r2 is None or s2 is None:
        return d_r, d_s, r.new_empty(0), s.new_empty(0), d_weight, d_bias, d_gamma
    d_r2, d_s2 = _input_gradient(d_z, weight[:, own:], r2, s2, s)
    scaled = d_z * (s2 / s)[:, None, None, None].to(d_z.dtype)
    second = _weight_gradient(scaled, r2, weight[:, own:].shape)
    return d_r, d_s, d_r2, d_s2, torch.cat([d_weight, second], 1), d_bias, d_gamma


def _sums(z: Tensor) -> Tensor:
    from fastphi.triton_kernels import norm_bwd

    n, height, width, c = z.shape
    parts = norm_bwd.sums_per_image(c, height, width)
    return z.new_empty(n, parts, 2, c, dtype=torch.float32)


def _input_gradient(
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
    ctx.save_for_backward(r, s, r2, s2, weight, gamma, z, s_out, mean, std)
    ctx.has_bias = bias is not None


def _layer_backward(ctx, d_r_out, d_s_out, *_):
    weight, gamma = ctx.saved_tensors[4:6]
    found = layer_bwd(d_r_out.contiguous(), d_s_out.contiguous(), *ctx.saved_tensors)
    d_r, d_s, d_r2, d_s2, d_weight, d_bias, d_gamma = found
    second = (None, None) if ctx.saved_tensors[2] is None else (d_r2, d_s2)
    d_bias = d_bias.to(weight.dtype) if ctx.has_bias else None
    return d_r, d_s, *second, d_weight.to(weight.dtype), d_bias, d_gamma.to(gamma.dtype), None


# --- the first layer: image -> r, no norm, no scalar ---------------------------------------------


@custom_op("fastphi::gpu_first_layer_fwd", mutates_args=())
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


@custom_op("fastphi::gpu_first_layer_bwd", mutates_args=())
def first_layer_bwd(
    d_r_out: Tensor, image: Tensor, weight: Tensor, r_out: Tensor, need_image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_image float32, or empty; d_weight, d_bias)."""
    from fastphi.triton_kernels import conv_bwd, last_layer, norm_bwd

    d_z, sums, dtype = torch.empty_like(r_out), _sums(r_out), r_out.dtype
    norm_bwd.norm_bwd(d_r_out, r_out, None, d_z, sums=sums)
    d_weight = _weight_gradient(d_z, image.to(dtype), weight.shape)
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


@custom_op("fastphi::gpu_last_layer_fwd", mutates_args=())
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


@custom_op("fastphi::gpu_last_layer_bwd", mutates_args=())
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
    return d_r, d_s, _weight_gradient(folded, r, weight.shape), d_out.sum((0, 2, 3))


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


@custom_op("fastphi::gpu_upsample_fwd", mutates_args=())
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


@custom_op("fastphi::gpu_upsample_bwd", mutates_args=())
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
    (layer_fwd, _layer_setup, _layer_backward),
    (first_layer_fwd, _first_setup, _first_backward),
    (last_layer_fwd, _last_setup, _last_backward),
    (upsample_fwd, _upsample_setup, _upsample_backward),
):
    _forward.register_autograd(_backward, setup_context=_setup)
for _op in (layer_bwd, first_layer_bwd, last_layer_bwd, upsample_bwd):
    _op.register_autograd(no_second_derivative)


# --- the seam ------------------------------------------------------------------------------------


class Deferred(NamedTuple):
    """An activation s·r whose norm is not yet divided out. r: (N, H, W, C); s: (N,) float32."""

    r: Tensor
    s: Tensor


class Image(NamedTuple):
    """x: (N, H, W, C) float32 on the way in; the dtype to compute in."""

    x: Tensor
    dtype: torch.dtype


class GPUOps:
    """The ops of the seam (`fastphi.engine.Ops`)."""

    def from_image(self, x: Tensor) -> Image:
        return Image(x.float().permute(0, 2, 3, 1).contiguous(), ops.compute_dtype(x))

    def to_image(self, h: Tensor) -> Tensor:
        return h

    def layer(
        self,
        h: Any,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        eps: float,
        relu: bool = True,
        skip: Deferred | None = None,
    ) -> Any:
        if isinstance(h, Image):
            r = first_layer_fwd(h.x, weight, bias, h.dtype)
            return Deferred(r, torch.ones(len(r), device=r.device))
        if gamma is None:
            return last_layer_fwd(h.r, h.s, weight, bias)
        r2, s2 = (None, None) if skip is None else skip
        r, s, *_ = layer_fwd(h.r, h.s, r2, s2, weight, bias, gamma, eps)
        return Deferred(r, s)

    def upsample(self, h: Deferred, weight: Tensor, bias: Tensor | None) -> Deferred:
        r = upsample_fwd(h.r, weight)
        if bias is None:
            return Deferred(r, h.s)
        # A bias does not commute with the scalar: the deferral ends here.
        scaled = h.s[:, None, None, None] * r + bias
        return Deferred(scaled.to(r.dtype), torch.ones_like(h.s))

    def pool(self, h: Deferred) -> Deferred:
        pooled = F.avg_pool2d(_planar(h.r), 2).permute(0, 2, 3, 1)
        return Deferred(pooled.contiguous(), h.s)

    def mean(self, h: Deferred) -> Tensor:
        return h.s[:, None] * h.r.mean((1, 2), dtype=torch.float32)
