"""What torch is told about the compiled operators: shapes without data, and gradients.

The shapes make the same checks as the C++ (csrc/common.h), so that torch.compile and torch.export
find a tensor that does not fit where it is, with the same words. The CPU runner's operators (packing,
unet_fwd, match_steps) are not for tracing and have no rules.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_autograd, register_fake, register_vmap

from fastphi.engine.op_rules_gpu import FAKES, FLOATS, expect_like


def _expect(t: Tensor, name: str, shape: tuple[Any, ...], like: Tensor | None = None) -> None:
    """The checks of csrc/common.h, for tensors without data. None in `shape` fits any size."""
    if t.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"{name}: expected float32 or float64, got {t.dtype}")
    if like is not None and t.dtype != like.dtype:
        raise RuntimeError(f"{name}: expected {like.dtype} like the first argument, got {t.dtype}")
    fits = len(t.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(t.shape, shape, strict=True)
    )
    if not fits:
        raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")


def _expect_layer(r, s, r2, s2, weight, bias, gamma) -> None:
    _expect(r, "r", (None,) * 4)
    n, h, w, cin = r.shape
    _expect(s, "s", (n,), r)
    if (r2 is None) != (s2 is None):
        raise RuntimeError("r2, s2: expected both or neither")
    if r2 is not None:
        _expect(r2, "r2", (n, h, w, None), r)
        _expect(s2, "s2", (n,), r)
        cin = cin + r2.shape[3]
    _expect(weight, "weight", (None, cin, 3, 3), r)
    for t, name in ((bias, "bias"), (gamma, "gamma")):
        if t is not None:
            _expect(t, name, (weight.shape[0],), r)


def _fused_layer_fwd_fake(r, s, r2, s2, weight, bias, gamma, eps, relu):
    _expect_layer(r, s, r2, s2, weight, bias, gamma)
    n, h, w, _ = r.shape
    out = (n, h, w, weight.shape[0])
    return (
        r.new_empty(out),
        r.new_empty((n,)),
        r.new_empty(out),
        r.new_empty((n,)),
        r.new_empty((n,)),
    )


def _fused_layer_bwd_fake(
    d_r_out,
    d_s_out,
    r,
    s,
    r2,
    s2,
    weight,
    gamma,
    z,
    s_out,
    mean,
    std,
    relu,
    need_input,
    need_weight,
):
    _expect_layer(r, s, r2, s2, weight, None, gamma)
    n, h, w, _ = r.shape
    out = (n, h, w, weight.shape[0])
    for t, name, shape in (
        (d_r_out, "d_r_out", out),
        (d_s_out, "d_s_out", (n,)),
        (z, "z", out),
        (s_out, "s_out", (n,)),
        (mean, "mean", (n,)),
        (std, "std", (n,)),
    ):
        _expect(t, name, shape, r)

    def wanted(want: bool, shape: Any) -> Tensor:
        return r.new_empty(shape if want else (0,))

    second = need_input and r2 is not None
    return (
        wanted(need_input, r.shape),
        wanted(need_input, (n,)),
        wanted(second, r2.shape if r2 is not None else None),
        wanted(second, (n,)),
        wanted(need_weight, weight.shape),
        wanted(need_weight, (weight.shape[0],)),
        wanted(need_weight and gamma is not None, (weight.shape[0],)),
    )


def or_zeros(d: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of an output like that, of which a loss may know nothing."""
    return torch.zeros_like(like) if d is None else d


def _fused_layer_setup(ctx, inputs, output) -> None:
    r, s, r2, s2, weight, bias, gamma, eps, relu = inputs
    _, s_out, z, mean, std = output
    ctx.mark_non_differentiable(z, mean, std)  # kept for the gradient, not meant for users
    ctx.set_materialize_grads(False)  # else torch fills zeros for them, z's as large as z
    ctx.save_for_backward(r, s, r2, s2, weight, bias, gamma, z, s_out, mean, std)
    ctx.eps, ctx.relu = eps, relu


def _fused_layer_backward(ctx, d_r_out, d_s_out, *_):
    r, s, r2, s2, weight, bias, gamma, z, s_out, mean, std = ctx.saved_tensors
    need = ctx.needs_input_grad
    d_r_out, d_s_out = or_zeros(d_r_out, z), or_zeros(d_s_out, s_out)
    if torch.is_grad_enabled():  # create_graph: the gradient is to be differentiated itself
        plain = functools.partial(_plain_layer, eps=ctx.eps, relu=ctx.relu)
        inputs = (r, s, r2, s2, weight, bias, gamma)
        return *_plain_gradients(plain, inputs, need, (d_r_out, d_s_out)), None, None
    need_input, need_weight = any(need[:4]), any(need[4:7])
    d_r, d_s, d_r2, d_s2, d_weight, d_bias, d_gamma = torch.ops.fastphi.fused_layer_bwd(
        d_r_out.contiguous(),
        d_s_out.contiguous(),
        r,
        s,
        r2,
        s2,
        weight,
        gamma,
        z,
        s_out,
        mean,
        std,
        ctx.relu,
        need_input,
        need_weight,
    )
    grads = (d_r, d_s, d_r2, d_s2, d_weight, d_bias, d_gamma)
    kept = tuple(g if n else None for g, n in zip(grads, need, strict=False))
    return (*kept, None, None)


def _plain_layer(r, s, r2, s2, weight, bias, gamma, eps, relu) -> tuple[Tensor, Tensor]:
    """The layer in plain PyTorch, which can be differentiated twice."""
    h = s[:, None, None, None] * r
    if r2 is not None:
        h = torch.cat([h, s2[:, None, None, None] * r2], dim=3)
    z = F.conv2d(h.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)
    s_out = torch.ones_like(s)
    if gamma is not None:
        s_out = 1 / (z.std(dim=(1, 2, 3), correction=0) + eps)
        z = gamma * z
    return F.relu(z) if relu else z, s_out


def _plain_upsample(r, weight) -> tuple[Tensor]:
    return (F.conv_transpose2d(r.permute(0, 3, 1, 2), weight, stride=2).permute(0, 2, 3, 1),)


def _plain_gradients(plain, inputs, need, d_out) -> list[Tensor | None]:
    """Of plain(*inputs), with a graph of their own."""
    # As views: one input may have been made of another, and that way is not this op's.
    inputs = [t if t is None else t.view_as(t) for t in inputs]
    out = plain(*inputs)
    wanted = [t for t, n in zip(inputs, need, strict=False) if n]
    made = [(o, d) for o, d in zip(out, d_out, strict=True) if o.requires_grad]
    outs, d_outs = [o for o, _ in made], [d for _, d in made]
    found = iter(torch.autograd.grad(outs, wanted, d_outs, create_graph=True, allow_unused=True))
    return [next(found) if n else None for _, n in zip(inputs, need, strict=False)]


def _upsample_fwd_fake(r, weight):
    _expect(r, "r", (None,) * 4)
    n, h, w, c = r.shape
    _expect(weight, "weight", (c, None, 2, 2), r)
    return r.new_empty((n, 2 * h, 2 * w, weight.shape[1]))


def _upsample_bwd_fake(d_out, r, weight, need_input, need_weight):
    out = _upsample_fwd_fake(r, weight)
    _expect(d_out, "d_out", tuple(out.shape), r)
    d_r = r.new_empty(r.shape if need_input else (0,))
    return d_r, r.new_empty(weight.shape if need_weight else (0,))


def _upsample_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _upsample_backward(ctx, d_out):
    need_input, need_weight = ctx.needs_input_grad
    if torch.is_grad_enabled():
        return tuple(
            _plain_gradients(_plain_upsample, ctx.saved_tensors, ctx.needs_input_grad, (d_out,))
        )
    d_r, d_weight = torch.ops.fastphi.upsample_bwd(
        d_out.contiguous(), *ctx.saved_tensors, need_input, need_weight
    )
    return d_r if need_input else None, d_weight if need_weight else None


def _avg_pool_fwd_fake(r):
    _expect(r, "r", (None,) * 4)
    n, h, w, c = r.shape
    if h % 2 or w % 2:
        raise RuntimeError(f"r: expected even height and width, got shape {tuple(r.shape)}")
    return r.new_empty((n, h // 2, w // 2, c))


def _avg_pool_bwd_fake(d_out):
    _expect(d_out, "d_out", (None,) * 4)
    n, h, w, c = d_out.shape
    return d_out.new_empty((n, 2 * h, 2 * w, c))


def _spatial_mean_fwd_fake(r):
    if r.device.type == "cuda":  # its sums are float32: no float64, and bfloat16 is welcome
        expect_like(r, "r", r, FLOATS, (None,) * 4)
    else:
        _expect(r, "r", (None,) * 4)
    return r.new_empty((r.shape[0], r.shape[3]))


def _spatial_mean_bwd_fake(d_mean, height, width):
    _expect(d_mean, "d_mean", (None,) * 2)
    return d_mean.new_empty((d_mean.shape[0], height, width, d_mean.shape[1]))


def _spatial_mean_setup(ctx, inputs, output) -> None:
    ctx.size = inputs[0].shape[1:3]


def _spatial_mean_backward(ctx, d_mean):
    return torch.ops.fastphi.spatial_mean_bwd(d_mean.contiguous(), *ctx.size)


def _no_setup(ctx, inputs, output) -> None:
    pass


def no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "fastphi: second derivatives are not supported by the compiled ops; "
        "use the reference engine (FASTPHI_BACKEND=reference, or backend='reference')"
    )


FAKES_OF_ALL: dict[str, Any] = {
    "fused_layer_fwd": _fused_layer_fwd_fake,
    "fused_layer_bwd": _fused_layer_bwd_fake,
    "upsample_fwd": _upsample_fwd_fake,
    "upsample_bwd": _upsample_bwd_fake,
    "avg_pool_fwd": _avg_pool_fwd_fake,
    "avg_pool_bwd": _avg_pool_bwd_fake,
    "spatial_mean_fwd": _spatial_mean_fwd_fake,
    "spatial_mean_bwd": _spatial_mean_bwd_fake,
    **FAKES,
}


def register() -> None:
    """Tells torch: once, after the library was loaded."""
    for name, fake in FAKES_OF_ALL.items():
        register_fake(f"fastphi::{name}", fake)

    def pool_backward(ctx, d_out):
        return torch.ops.fastphi.avg_pool_bwd(d_out.contiguous())

    gradients: dict[str, Any] = {
        "fused_layer_fwd": (_fused_layer_backward, _fused_layer_setup),
        "upsample_fwd": (_upsample_backward, _upsample_setup),
        "avg_pool_fwd": (pool_backward, _no_setup),
        "spatial_mean_fwd": (_spatial_mean_backward, _spatial_mean_setup),
        # linear: the gradient's gradient is the op itself
        "avg_pool_bwd": (lambda ctx, d: torch.ops.fastphi.avg_pool_fwd(d.contiguous()), _no_setup),
        "spatial_mean_bwd": (
            lambda ctx, d: (torch.ops.fastphi.spatial_mean_fwd(d.contiguous()), None, None),
            _no_setup,
        ),
    }
    for name in ("fused_layer_bwd", "upsample_bwd"):  # not differentiated: the plain form is
        gradients[name] = (no_second_derivative, _no_setup)
    for name, (backward, setup) in gradients.items():
        register_autograd(f"fastphi::{name}", backward, setup_context=setup)
        register_vmap(f"fastphi::{name}", _one_by_one(getattr(torch.ops.fastphi, name)))


def _one_by_one(op: Any) -> Any:
    """vmap of an op (of its gradient, mostly: `is_grads_batched`), in as many calls."""

    def rule(info, in_dims, *args):
        def at(i: int) -> list[Any]:
            return [
                a if dim is None else a.select(dim, i).contiguous()
                for a, dim in zip(args, in_dims, strict=True)
            ]

        out = [op(*at(i)) for i in range(info.batch_size)]
        if isinstance(out[0], Tensor):
            return torch.stack(out), 0
        return tuple(torch.stack(parts) for parts in zip(*out, strict=True)), (0,) * len(out[0])

    return rule
