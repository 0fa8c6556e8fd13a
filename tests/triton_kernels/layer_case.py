"""A layer, in float64 and as a kernel leaves it: for the fused layer and for the epilogue alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from triton_case import (
    DEVICE,
    STORED,
    SUMMED,
    close,
    guarded,
    nchw,
    nhwc,
    per_image,
    random,
    scalars,
)


class Case(NamedTuple):
    """Sizes of a layer; pooled where they are even."""

    n: int
    height: int
    width: int
    c_in: tuple[int, ...]
    c_out: int
    scales: tuple[float, float] = (1.0, 1.0)


class Inputs(NamedTuple):
    r: torch.Tensor
    s: torch.Tensor
    r2: torch.Tensor | None
    s2: torch.Tensor | None
    weight: torch.Tensor  # in the dtype, torch's layout
    bias: torch.Tensor
    gamma: torch.Tensor  # negative ones and a zero among them


def make(case: Case, dtype: torch.dtype) -> Inputs:
    n, h, w, c_in, c_out, scales = case
    r = [nhwc(random(i, n, c, h, w), dtype) for i, c in enumerate(c_in)]
    s = [scalars(10 + i, n, scale) for i, scale in enumerate(scales[: len(c_in)])]
    c = sum(c_in)
    # as large as the part of the result that the larger source makes
    size = max(scales[: len(c_in)])
    weight = random(20, c_out, c, 3, 3) / (9 * c) ** 0.5
    bias, gamma = size * random(21, c_out), random(22, c_out)
    gamma[0], gamma[1] = 0, -1
    r2, s2 = (r[1], s[1]) if len(c_in) == 2 else (None, None)
    vectors = [guarded(v.float()) for v in (bias, gamma)]
    return Inputs(r[0], s[0], r2, s2, weight.to(dtype).to(DEVICE), *vectors)


def oracle(x: Inputs) -> torch.Tensor:
    """z (N, Cout, H, W) in float64."""
    y = per_image(x.s) * nchw(x.r).double()
    if x.r2 is not None:
        y = torch.cat([y, per_image(x.s2) * nchw(x.r2).double()], dim=1)
    return F.conv2d(y, x.weight.double().cpu(), x.bias.double().cpu(), padding=1)


class Outputs(NamedTuple):
    r_out: torch.Tensor
    pooled: torch.Tensor | None
    partials: torch.Tensor
    sums: torch.Tensor


def merged(partials: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(count, mean, M2) of each image from its slots."""
    count, mean, m2 = partials.double().cpu().unbind(dim=2)
    n = count.sum(dim=1)
    mu = (count * mean).sum(dim=1) / n
    return n, mu, (m2 + count * (mean - mu[:, None]) ** 2).sum(dim=1)


def check_outputs(x: Inputs, out: Outputs) -> None:
    stored = STORED[x.r.dtype]
    z = oracle(x)
    y = F.relu(x.gamma.double().cpu()[:, None, None] * z)
    # per image: their scalars, and so their results, are of very different size
    for i in range(len(z)):
        close(nchw(out.r_out)[i], y[i], stored)
        close(out.sums.cpu()[i].double().sum(dim=0), y[i].sum(dim=(1, 2)), SUMMED)
        if out.pooled is not None:
            close(nchw(out.pooled)[i], F.avg_pool2d(y[i], 2), stored)
    n, mean, m2 = merged(out.partials)
    assert (n == z[0].numel()).all()
    assert not out.partials.isnan().any()
    for i in range(len(z)):
        std = z[i].std(correction=0)
        assert abs((m2[i] / n[i]).sqrt() - std) <= SUMMED * std
        assert abs(mean[i] - z[i].mean()) <= SUMMED * z[i].abs().mean()
