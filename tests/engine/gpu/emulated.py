"""The Triton launchers' contracts in PyTorch, on the CPU at full size, which Triton's interpreter is too
slow for: the same roundings in the same places, sums in float32.

So what bfloat16 does to a result can be known without a GPU. That the kernels keep these contracts
is what test_triton_*.py are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from fastphi.triton_kernels import (
    conv_bwd,
    epilogue,
    first_layer,
    fused_layer,
    last_layer,
    norm_bwd,
    tiles,
    upsample,
)
from fastphi.triton_kernels.scalars import Parts
from torch import Tensor

from fastphi.engine import ops


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """The GPU engine's runner and ops, on CPU tensors."""
    with contextlib.ExitStack() as stack:
        for module, name, launch in (
            (fused_layer, "fused_layer_fwd", _fused_layer_fwd),
            (epilogue, "epilogue_fwd", _epilogue_fwd),
            (first_layer, "first_layer_fwd", _first_layer_fwd),
            (last_layer, "last_layer_fwd", _last_layer_fwd),
            (upsample, "upsample_fwd", _upsample_fwd),
            (conv_bwd, "conv_bwd", _conv_bwd),
            (norm_bwd, "norm_bwd", _norm_bwd),
        ):
            stack.enter_context(mock.patch.object(module, name, launch))
        yield


def _taps(packed: Tensor, *channels: int) -> list[Tensor]:
    """(Cout, K) of `pack_weight` -> torch's (Cout, C, 3, 3) of each source."""
    sizes = [9 * tiles.padded(c) for c in channels]
    parts = zip(packed.float().split(sizes, dim=1), channels, strict=True)
    return [p.view(len(p), 3, 3, -1)[..., :c].permute(0, 3, 1, 2) for p, c in parts]


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, Cout, H, W) float32; autocast knows nothing of kernels."""
    with torch.autocast(x.device.type, enabled=False):
        images = x.float().permute(0, 3, 1, 2)
        # one at a time, as the kernels' bits do not depend on the batch, and torch's do on some CPUs
        return torch.cat([F.conv2d(image[None], weight, padding=1) for image in images])


def _image(s: Tensor) -> Tensor:
    return s[:, None, None, None]


def _put(out: Tensor | None, value: Tensor, active: Tensor | None) -> None:
    """Written where an image takes part, rounded to what `out` holds."""
    if out is not None:
        on = slice(None) if active is None else active != 0
        out[on] = value[on].to(out.dtype)


def _first_slot(out: Tensor | None, value: Tensor, active: Tensor | None) -> None:
    """Of partial results: all in the first part, nothing in the others."""
    if out is not None:
        whole = torch.zeros_like(out)
        whole[:, 0] = value
        _put(out, whole, active)


def _scalars(s: Any, active: Tensor | None) -> Any:
    """(N,), merged where they are still in parts, by the operator to whose bits the kernels merge."""
    if not isinstance(s, Parts):
        return s
    found = [torch.empty_like(s.s) for _ in range(3)]
    ops.combine_moments(s.partials, s.eps, *found)
    for out, value in zip(s[2:], found, strict=True):
        _put(out, value, active)
    return found[0]


def _outputs(value: Tensor, r_out, pooled, sums, active) -> None:
    _put(r_out, value.permute(0, 2, 3, 1), active)
    if pooled is not None:
        _put(pooled, F.avg_pool2d(value, 2).permute(0, 2, 3, 1), active)
    _first_slot(sums, value.sum((2, 3)), active)


def _fused_layer_fwd(
    r, s, weight, bias, gamma, *, r2=None, s2=None, r_out=None, pooled=None, partials=None,
    sums=None, z_out=None, active=None, relu=True, precision="ieee",
) -> None:  # fmt: skip
    s = _scalars(s, active)
    channels = (r.shape[3],) if r2 is None else (r.shape[3], r2.shape[3])
    weights = _taps(weight, *channels)
    z = _image(s) * _conv(r, weights[0])
    if r2 is not None:
        z += _image(s2) * _conv(r2, weights[1])
    _finish(z, bias, gamma, r_out, pooled, partials, sums, z_out, active, relu)


def _finish(z, bias, gamma, r_out, pooled, partials, sums, z_out, active, relu) -> None:
    """What a layer does after its products."""
    if bias is not None:
        z = z + bias[:, None, None]
    _put(z_out, z.permute(0, 2, 3, 1), active)
    flat = z.flatten(1)
    m2 = flat.var(1, correction=0) * flat.shape[1]
    count = torch.full_like(m2, flat.shape[1])
    _first_slot(partials, torch.stack([count, flat.mean(1), m2], 1), active)
    value = z if gamma is None else gamma[:, None, None] * z
    _outputs(value.relu() if relu else value, r_out, pooled, sums, active)


def _epilogue_fwd(
    c, s, bias, gamma, *, c2=None, s2=None, r_out=None, pooled=None, partials=None, sums=None, relu=True,
) -> None:  # fmt: skip
    z = _image(_scalars(s, None)) * c.float().permute(0, 3, 1, 2)
    if c2 is not None:
        z = z + _image(s2) * c2.float().permute(0, 3, 1, 2)
    _finish(z, bias, gamma, r_out, pooled, partials, sums, None, None, relu)


def _first_layer_fwd(
    image, weight, bias, r_out=None, *, pooled=None, sums=None, active=None, relu=True,
    precision="ieee",
) -> None:  # fmt: skip
    c = image.shape[3]
    taps = weight.float().sum(1)[:, : 9 * c].view(-1, 3, 3, c).permute(0, 3, 1, 2)
    value = _conv(image.to(weight.dtype), taps)
    if bias is not None:
        value += bias[:, None, None]
    _outputs(value.relu() if relu else value, r_out, pooled, sums, active)


def _last_layer_fwd(r, s, weight, bias, out, *, active=None, precision="ieee") -> None:
    s = _scalars(s, active)
    value = _conv(r, *_taps(weight, r.shape[3]))
    if s is not None:
        value *= _image(s)
    if bias is not None:
        value += bias[:, None, None]
    _put(out, value, active)


def _upsample_fwd(r, s, weight, bias, out, *, precision="ieee") -> None:
    n, h, w, c = r.shape
    with torch.autocast(r.device.type, enabled=False):
        value = (r.float().reshape(-1, c) @ weight[:, :c].float().T).view(n, h, w, 2, 2, -1)
    if bias is not None:
        value = value * _scalars(s, None).view(n, 1, 1, 1, 1, 1) + bias
    _put(out, value.permute(0, 1, 3, 2, 4, 5).reshape(out.shape), None)


def _conv_bwd(
    d_z, weight, d_r, *, r=None, s=None, s_z=None, d_s=None, masked=False, active=None,
    precision="ieee",
) -> None:  # fmt: skip
    value = _conv(d_z, *_taps(weight, d_z.shape[3])).permute(0, 2, 3, 1)
    if s_z is not None:
        value = value * _image(s / s_z)
    if masked:
        value = value.masked_fill(r <= 0, 0)
    elif r is not None:
        _first_slot(d_s, (value * r.float()).sum((1, 2, 3)) / s, active)
    _put(d_r, value, active)


def _norm_bwd(
    d_r, z, gamma, d_z, *, form="full", s_in=None, s=None, mean=None, std=None, d_s=None,
    sums=None, relu=True, active=None,
) -> None:  # fmt: skip
    value, up = z.float(), d_r.float()
    if form == "means":
        up = up[:, None, None, :]
    elif form == "pooled":
        up = 0.25 * up.repeat_interleave(2, 1).repeat_interleave(2, 2)
    gain: Any = 1 if gamma is None else gamma
    up = up.masked_fill(gain * value <= 0, 0) if relu else up.expand_as(value)
    out = gain * up
    if gamma is not None:
        k = -d_s.sum(1) * s * s / (z[0].numel() * torch.where(std == 0, 1, std))
        k = torch.where(std == 0, 0, k)
        out = out + _image(k) * (value - _image(mean))
    _first_slot(sums, torch.stack([out.sum((1, 2)), (up * value).sum((1, 2))], 1), active)
    _put(d_z, out if s_in is None else out * _image(s_in), active)
