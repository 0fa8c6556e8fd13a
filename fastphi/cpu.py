"""The compiled CPU engine: differentiable ops for training, a prepared runner for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastphi import ops, reference

if TYPE_CHECKING:
    from fastphi.unet import UNet, UNetConfig


def refuses(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled engine cannot serve, or None."""
    if (reason := ops.missing()) is not None:
        return reason
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, not in {str(dtype).removeprefix('torch.')}"
    if config.norm != "std":
        return f"norm {config.norm!r} subtracts a mean inside the ReLU, which cannot be deferred"
    return None


class Deferred(NamedTuple):
    """An activation s·r whose norm is not yet divided out. r: (N, H, W, C); s: (N,)."""

    r: Tensor
    s: Tensor


class CPUOps:
    """The ops of the seam (`fastphi.engine.Ops`) on deferred activations."""

    def from_image(self, x: Tensor) -> Deferred:
        return Deferred(x.permute(0, 2, 3, 1).contiguous(), x.new_ones(len(x)))

    def to_image(self, h: Deferred) -> Tensor:
        return (h.s[:, None, None, None] * h.r).permute(0, 3, 1, 2).contiguous()

    def layer(
        self,
        h: Deferred,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        eps: float,
        relu: bool = True,
        skip: Deferred | None = None,
    ) -> Deferred:
        r2, s2 = (None, None) if skip is None else skip
        return Deferred(
            *ops.fused_layer(h.r, h.s, weight, bias, gamma, eps, relu=relu, r2=r2, s2=s2)
        )

    def upsample(self, h: Deferred, weight: Tensor, bias: Tensor | None) -> Deferred:
        r = ops.upsample(h.r, weight)
        if bias is None:
            return Deferred(r, h.s)
        # A bias does not commute with the scalar: the deferral ends here.
        return Deferred(h.s[:, None, None, None] * r + bias, torch.ones_like(h.s))

    def pool(self, h: Deferred) -> Deferred:
        return Deferred(ops.avg_pool(h.r), h.s)

    def mean(self, h: Deferred) -> Tensor:
        return h.s[:, None] * ops.spatial_mean(h.r)


class CPURunner:
    """The runner of the seam (`fastphi.engine.Runner`), by the ops."""

    def __init__(self, model: UNet) -> None:
        self.model = model

    @torch.no_grad()
    def denoise(self, x: Tensor) -> Tensor:
        return self.model.walk(CPUOps(), x)

    @torch.no_grad()
    def block_means(self, x: Tensor, until: str | None = None) -> dict[str, Tensor]:
        return self.model.walk_means(CPUOps(), x, until)

    def match(
        self, x: Tensor, target: Tensor, weight: Tensor, lr: float, max_iter: int, tolerance: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return reference.ReferenceRunner(self.model).match(
            x, target, weight, lr, max_iter, tolerance
        )
