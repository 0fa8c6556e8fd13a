"""The guidance step (Algorithm 2): move images until φ is the target's, at one noise level."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastphi import engine
from fastphi.support import validate
from fastphi.support.transfer import to_device
from fastphi.targets.kinds import check_subset, restrict

if TYPE_CHECKING:
    from fastphi.unet import UNet

log = logging.getLogger("fastphi")
_told_idle: list[bool] = []  # the warning of `_tell_if_idle` comes once


@dataclass(frozen=True)
class MatchResult:
    """What a match gives.

    x: (N, C, H, W), the matched images.
    losses: (max_iter + 1, N), L before each update and after the last; NaN after an image stopped.
    updates: (N,) int64, how many updates each image took.
    converged: (N,) bool, whether L fell to `tolerance` times its first value.
    """

    x: Tensor
    losses: Tensor
    updates: Tensor
    converged: Tensor

    @property
    def first(self) -> Tensor:
        """(N,): L of the images as they came."""
        return self.losses[0]

    @property
    def last(self) -> Tensor:
        """(N,): L of the images as they are."""
        return self.losses.gather(0, self.updates[None])[0]


def match_phi(
    model: UNet,
    x: Tensor,
    target: Tensor,
    *,
    lr: float = 0.01,
    max_iter: int = 100,
    tolerance: float = 0.01,
    channels: Any = None,
    zero_elsewhere: bool = False,
    dtype: torch.dtype | None = None,
) -> MatchResult:
    """Algorithm 2: minimise each image's L(x) = mean_c (φ_c(x) − φ*_c)² over its pixels by Adam.

    x: (N, C, H, W), noisy images, in the model's dtype and on its device; not changed.
    target: φ*, (N, channels[-1]), or one for all: (channels[-1],) or (1, channels[-1]).
    lr: Adam's, in units of images in [0, 1] (β 0.9 and 0.999, ε 1e-8, a fresh state).
    max_iter: updates at most. tolerance: an image is frozen, without a further update, once
        L <= tolerance · L(first); 0 never stops early.
    channels: channel numbers that the loss is the mean over (default: all).
    zero_elsewhere: the authors' form of a subset: the target is zero outside `channels`, and the
        loss is the mean over all channels.
    dtype: to compute in: the model's own (default), or torch.bfloat16, for which images, losses and
        Adam stay in the model's.

    Each image minimises its own L, so the result never depends on who shares the batch. Only the
    encoder and the middle block run; the model is left as found.

    Raises ValueError (TypeError for a wrong type) for arguments that do not fit, FloatingPointError
    where NaN or Inf arises, naming image and update.
    """
    validate.images(x, model.config)
    validate.like_model(x, next(model.parameters()))
    validate.finite(x, "x")
    channels = validate.channel_subset(channels, model.config.channels[-1])
    target = _target(target, len(x), model.config.channels[-1], channels)
    check_options(lr, max_iter, tolerance)
    if dtype not in (None, x.dtype, torch.bfloat16):
        raise ValueError(
            f"dtype: expected the model's own ({x.dtype}) or torch.bfloat16, got {dtype}"
        )
    low = dtype == torch.bfloat16
    result = match(model, x, target, lr, max_iter, tolerance, channels, zero_elsewhere, low=low)
    bad = ~torch.isfinite(result.x).flatten(1).all(1) | ~torch.isfinite(result.last)
    if bad.any():
        i = int(bad.nonzero()[0])
        t = int(torch.isfinite(result.losses[:, i]).sum())
        raise FloatingPointError(
            f"match: NaN or Inf in image {i} at update {t} of at most {max_iter}"
        )
    return result


def match(
    model: UNet,
    x: Tensor,
    target: Tensor,
    lr: float,
    max_iter: int,
    tolerance: float,
    channels: tuple[int, ...] | None = None,
    zero_elsewhere: bool = False,
    low: bool = False,
) -> MatchResult:
    """`match_phi` on arguments that were checked before; target: (N, channels[-1]). low: in bfloat16."""
    with engine.plain_mode(model, x.device, low):
        x = x.detach().clone(memory_format=torch.contiguous_format)
        target = restrict(target.detach().clone(), channels).to(x).contiguous()
        weight = loss_weight(channels, zero_elsewhere, target)
        prepared = engine.runner(model, x)
        result = MatchResult(*prepared.match(x, target, weight, lr, max_iter, tolerance))
        _tell_if_idle(x, result, lr)
        return result


def _tell_if_idle(x: Tensor, result: MatchResult, lr: float) -> None:
    """Warns, once, of images that Adam could not move: an update is lr·g/(|g| + ε), so next to
    nothing where the gradient g is far below ε = 1e-8, as it is where φ is tiny."""
    if _told_idle:
        return
    trying = (result.updates > 0) & ~result.converged & (result.first > 0)
    moved = (result.x - x).abs().flatten(1).amax(1)
    idle = trying & (moved < 0.1 * lr * result.updates.clamp(max=3))
    if idle.any():
        _told_idle.append(True)
        i = int(idle.nonzero()[0])
        log.warning(
            "match: %d of %d images hardly moved (image %d: %.1e at most, in %d updates of lr %g): the "
            "loss's gradient is below Adam's ε = 1e-8, because φ of this model is so small. A network "
            "that is trained longer, or at a higher learning rate, has a larger φ",
            *(int(idle.sum()), len(x), i, float(moved[i]), int(result.updates[i]), lr),
        )


def check_options(lr: float, max_iter: int, tolerance: float) -> None:
    """ValueError or TypeError where an option of Algorithm 2 cannot be."""
    validate.number(lr, "lr", low=0, open_low=True)
    validate.integer(max_iter, "max_iter", low=0)
    validate.number(tolerance, "tolerance", low=0, high=1)


def loss_weight(channels: tuple[int, ...] | None, zero_elsewhere: bool, like: Tensor) -> Tensor:
    """(C,): weight of each channel in L = Σ_c w_c (φ_c − φ*_c)², for targets like `like` (N, C)."""
    check_subset(channels, zero_elsewhere)
    count = like.shape[1]
    if channels is None or zero_elsewhere:
        return like.new_full((count,), 1 / count)
    weight = like.new_zeros(count)
    weight[to_device(np.array(channels), weight.device)] = 1 / len(channels)
    return weight


def _target(target: Any, n: int, count: int, channels: tuple[int, ...] | None) -> Tensor:
    """φ* as (n, count), checked."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a tensor (N, {count}), got {type(target).__name__}")
    shape = tuple(target.shape)
    if shape not in ((count,), (1, count), (n, count)):
        raise ValueError(
            f"target: expected φ* of shape ({n}, {count}), (1, {count}) or ({count},) for {n} "
            f"image(s) and this model's {count} channels, got {shape}"
        )
    if not target.is_floating_point():
        raise ValueError(f"target: expected floating point, got {target.dtype}")
    target = target.detach().reshape(-1, count)
    validate.finite(restrict(target, channels), "target")
    return target.expand(n, count)
