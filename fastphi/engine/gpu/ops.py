"""The GPU engine's ops under autograd, for training and for users' own code (`fastphi.engine.Ops`).

Each is a torch.library op, forward and backward, so they live under torch.compile, autocast and DDP.
Activations are (N, H, W, C) in the dtype to compute in (autocast's, where it is on), scalars and
statistics float32, parameters whatever the model holds (float32 master weights), packed anew at every
call, which is one launch for a convolution (triton_kernels/pack_taps.py). The ops themselves:
layer.py, ends.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastphi.engine import ops
from fastphi.engine.gpu.ends import first_layer_fwd, last_layer_fwd, upsample_fwd
from fastphi.engine.gpu.layer import layer_fwd, planar


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

    def network(self, model: object, x: Tensor) -> None:
        return None

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
        pooled = F.avg_pool2d(planar(h.r), 2).permute(0, 2, 3, 1)
        return Deferred(pooled.contiguous(), h.s)

    def mean(self, h: Deferred) -> Tensor:
        return h.s[:, None] * h.r.mean((1, 2), dtype=torch.float32)
