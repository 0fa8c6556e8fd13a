"""The scalars of a layer's input (DESIGN: s = 1/(std + ε)), merged from its partial statistics by whoever
reads them first: so the norm costs no launch of its own.

A kernel takes `s` as one of two: (N,) float32, the scalars; or `Parts`, of which every program merges
those of its own images, in the order of csrc/statistics.h and to its bits, and the first program of each
image leaves s (and mean, std, for a gradient) for those who come later.

Lane l of 128 takes the parts l, l + 128, …; lanes are merged in halves. Lanes without a part change
nothing, so the kernel has only as many as there are parts, rounded up to a power of two: four halvings for
64 channels of 64×64 in bfloat16, two or less below. Products are kept from being fused with sums.
The parts are loaded before a kernel's main loop and merged after it, so that their way from memory is
hidden. To move: 12 bytes a part, 192 B an image at most at the paper's size in bfloat16.
Measured cost: not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .support import check, interpreted, jit, power_of_two, tl

LANES = 128  # STATS_LANES of csrc/statistics.h


class Parts(NamedTuple):
    """Statistics of z that are still in parts, and where the first who merges them leaves the result."""

    partials: Tensor  # (N, T, 3) float32: count, mean, M2
    eps: float
    s: Tensor  # (N,) float32, written, as mean and std
    mean: Tensor | None = None
    std: Tensor | None = None


if interpreted():  # where nothing is fused

    @jit
    def product(a, b):
        return a * b
else:

    @jit
    def product(a, b):
        """a·b, rounded by itself: not fused with a sum, as a plain product may be, nor cut to zero."""
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@jit
def _merge(count, mean, m2, count_b, mean_b, m2_b):
    """`merge` of csrc/statistics.h."""
    both = count + count_b
    share = tl.div_rn(count_b, tl.where(both == 0, 1.0, both))
    delta = mean_b - mean
    new_mean = mean + product(delta, share)
    new_m2 = m2 + m2_b + product(product(delta, delta), product(count, share))
    new_mean = tl.where(count_b == 0, mean, tl.where(count == 0, mean_b, new_mean))
    new_m2 = tl.where(count_b == 0, m2, tl.where(count == 0, m2_b, new_m2))
    return both, new_mean, new_m2


@jit
def _half(x, which: tl.constexpr, TN: tl.constexpr, HALF: tl.constexpr):
    """(TN, 2·HALF) -> its first or second half, bit by bit: a sum of one number and zeros."""
    bits = x.to(tl.int32, bitcast=True).reshape(TN, 2, HALF)
    there = tl.arange(0, 2)[None, :, None] == which
    return tl.sum(tl.where(there, bits, 0), axis=1).to(tl.float32, bitcast=True)


@jit
def _halve(count, mean, m2, TN: tl.constexpr, HALF: tl.constexpr):
    """Lane l with lane l + HALF."""
    return _merge(
        _half(count, 0, TN, HALF), _half(mean, 0, TN, HALF), _half(m2, 0, TN, HALF),
        _half(count, 1, TN, HALF), _half(mean, 1, TN, HALF), _half(m2, 1, TN, HALF),
    )  # fmt: skip


@jit
def _lanes(partials, image, N, first, T: tl.constexpr, WIDTH: tl.constexpr, TN: tl.constexpr):
    """A part for each lane, (TN, WIDTH): count, mean, M2; a count of 0 where there is none."""
    n, t = image + tl.arange(0, TN)[:, None], first + tl.arange(0, WIDTH)[None, :]
    at = partials + (n.to(tl.int64) * T + t) * 3
    there = (n < N) & (t < T)
    count = tl.load(at, mask=there, other=0.0)
    return count, tl.load(at + 1, mask=there, other=0.0), tl.load(at + 2, mask=there, other=0.0)


@jit
def begin(s, partials, image, N, T: tl.constexpr, WIDTH: tl.constexpr, TN: tl.constexpr):
    """What `merged` is given: loads, put before a kernel's main loop."""
    n = image + tl.arange(0, TN)
    if partials is not None:
        loaded = _lanes(partials, image, N, 0, T, WIDTH, TN)
    else:
        scale = tl.load(s + n, mask=n < N, other=1.0)
        loaded = (scale, scale, scale)
    return loaded


@jit
def merged(
    loaded,  # of `begin`
    s,  # (N,) fp32; written where there are partials
    partials,  # (N, T, 3) fp32 or None
    mean_out,  # (N,) fp32 or None
    std_out,
    eps,
    image,
    N,
    first,  # whether this is the first program of its images
    T: tl.constexpr,
    WIDTH: tl.constexpr,  # of lanes: T rounded up to a power of two, at most 128
    LEVELS: tl.constexpr,  # log2 of WIDTH
    TN: tl.constexpr,
):
    """(TN,) fp32: the scalars of a program's images; 1 for those beyond the batch."""
    if partials is not None:
        count, mean, m2 = loaded
        for more in range(WIDTH, T, WIDTH):
            count_b, mean_b, m2_b = _lanes(partials, image, N, more, T, WIDTH, TN)
            count, mean, m2 = _merge(count, mean, m2, count_b, mean_b, m2_b)
        for level in tl.static_range(LEVELS):
            count, mean, m2 = _halve(count, mean, m2, TN, WIDTH >> (level + 1))
        count, mean, m2 = count.reshape(TN), mean.reshape(TN), m2.reshape(TN)
        n = image + tl.arange(0, TN)
        spread = tl.sqrt_rn(tl.div_rn(m2, tl.where(count == 0, 1.0, count)))
        scale = tl.where(n < N, tl.div_rn(1.0, spread + eps), 1.0)
        mask = (n < N) & first
        tl.store(s + n, scale, mask=mask)
        if mean_out is not None:
            tl.store(mean_out + n, mean, mask=mask)
            tl.store(std_out + n, spread, mask=mask)
    else:
        scale, _, _ = loaded
    return scale


def checked(op: str, s: Tensor | Parts | None, n: int, device: torch.device) -> dict[str, Any]:
    """The kernel's arguments s, partials, mean, std, eps, T, WIDTH, LEVELS."""
    parts = s if isinstance(s, Parts) else Parts(None, 0.0, s)  # type: ignore[arg-type]
    single = (torch.float32,)
    for name, vector in (("s", parts.s), ("mean", parts.mean), ("std", parts.std)):
        if vector is not None:
            check(op, name, vector, (n,), single, device)
    count = 1
    if parts.partials is not None:
        count = parts.partials.shape[1] if parts.partials.ndim == 3 else 1
        check(op, "partials of s", parts.partials, (n, count, 3), single, device)
        if not count:
            raise ValueError(f"{op}: partials of s has no part, expected (N, T, 3) with T >= 1")
        if (parts.mean is None) != (parts.std is None):
            raise ValueError(f"{op}: mean and std belong together, got only one of them")
    return dict(
        s=parts.s,
        partials_in=parts.partials,
        mean_in=parts.mean,
        std_in=parts.std,
        eps=parts.eps,
        **lanes(count),
    )


def lanes(count: int) -> dict[str, int]:
    """Compile-time: of so many parts."""
    width = min(LANES, power_of_two(count))
    return dict(T=count, WIDTH=width, LEVELS=width.bit_length() - 1)
