"""Weights in fewer bits, for every engine that multiplies in 16."""

from __future__ import annotations

import torch
from torch import Tensor


def two_parts(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights rounded to `dtype`, and what was lost, in `dtype` too: together they have twice its bits."""
    weight = weight.detach().float()
    high = weight.to(dtype)
    return high, (weight - high.float()).to(dtype)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A convolution's weights (., ., height, width) in `dtype`; what rounding takes from a tap is carried
    on to the next.

    So the sum over the taps, which is what a smooth image sees, keeps its digits: rounded one by one,
    the taps of a trained network leave errors that add up over space (0.1 dB of a denoised image).
    """
    weight = weight.detach()
    if torch.finfo(dtype).bits >= torch.finfo(weight.dtype).bits:
        return weight.to(dtype)
    taps: list[Tensor] = []
    left: Tensor | float = 0.0
    for tap in weight.float().flatten(2).unbind(2):
        taps.append((tap + left).to(dtype))
        left = tap + left - taps[-1].float()
    return torch.stack(taps, dim=2).view(weight.shape)
