"""The running average of the weights (EMA): ā ← ā + w_t (θ_t − ā) after optimiser step t.

exponential: 1 − w_t = ½^(B/h), B images a step and h the half-life in images, which is at most a 20th of
    those seen so far: an average of the first steps would remember the initial weights.
power (Karras et al. 2024, arXiv 2312.02696): 1 − w_t = (1 − 1/t)^(γ+1). θ_τ then has a share ∝ τ^γ, whose
    standard deviation is σ_rel t: the average spans the same part of a run however long that is.

On a CPU that is 9 ms of one thread for the paper's network, 1.2 % of a step on 8 images (Adam: 19 ms).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastphi.train.config import TrainConfig

RAMP = 20  # the exponential's half-life is at most the images seen, over this


def weight(config: TrainConfig, step: int) -> float:
    """w of the optimiser's step number `step`, from 1; 0 where nothing is averaged."""
    if config.ema == "power":
        assert config.ema_sigma_rel is not None
        # expm1 and log1p: 1 − w rounds badly late in a long run, where w is small
        return -math.expm1((gamma(config.ema_sigma_rel) + 1) * _log1m(1 / step))
    if config.ema == "exponential":
        assert config.ema_halflife is not None
        halflife = min(config.ema_halflife, step * config.batch / RAMP)
        return -math.expm1(-math.log(2) * config.batch / halflife)
    return 0.0


def gamma(sigma_rel: float) -> float:
    """γ ≥ 0 where the density (γ+1) τ^γ on [0, 1] has the standard deviation `sigma_rel`, ≤ 1/√12.

    The variance is (γ+1)/((γ+2)² (γ+3)): a cubic's largest root, which Newton's method reaches from above.
    """
    a, x = sigma_rel**-2, 1 / sigma_rel

    def cubic(x: float) -> tuple[float, float]:  # and its derivative
        return (x + 2) ** 2 * (x + 3) - a * (x + 1), (x + 2) * (3 * x + 8) - a

    while True:
        value, slope = cubic(x)
        if not (lower := x - value / slope) < x:
            return max(x, 0.0)
        x = lower


@torch.no_grad()
def follow(
    average: list[Tensor],
    parameters: list[Tensor],
    weight: float | Tensor,
    stop: Tensor | None = None,
) -> None:
    """ā ← ā + w (θ − ā), in one pass. weight: a number, or () float32 on the device of the tensors; stop,
    there too: 1: nothing changes.

    It is the one fused operator that reads both from the device: SGD of the "gradient" θ with the decay −1
    at the rate −w.
    """
    torch._fused_sgd_(
        average,
        parameters,
        [],
        weight_decay=-1.0,
        momentum=0.0,
        lr=-weight,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=stop,
    )


def _log1m(x: float) -> float:
    """log(1 − x) on [0, 1]."""
    return math.log1p(-x) if x < 1 else -math.inf
