"""Every layer of the network on a GPU, bf16: ours as the runner runs it (merging the statistics of its
input, leaving its own in parts), cuDNN's bare convolution (channels_last, its algorithm tried out), and
cuDNN's with our epilogue, which is what library.json chooses. Each in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gpu_case
import gpu_sizes
import pytest
import support
import torch
import torch.nn.functional as F
from support import LayerShape

from fastphi.engine.gpu import library as gpu_library

pytestmark = gpu_case.marks()

SHAPES = list(support.layers(gpu_sizes.CONFIG, gpu_sizes.SIZE, decoder=True))
BF16, DEVICE = gpu_sizes.BF16, gpu_sizes.DEVICE
EPS = 1e-5
# Of a stored bf16 value 2^-9, of the product's sums less, over all of an image; cuDNN + epilogue
# rounds twice.
TOLERANCE = 5e-3


class Inputs(NamedTuple):
    r: list[torch.Tensor]  # (N, H, W, C) of each source; an image: one of 3 channels
    s: list[torch.Tensor]  # (N,) of each
    parts: Any  # scalars.Parts that come to the first of them
    weight: torch.Tensor  # torch's layout, bf16
    bias: torch.Tensor  # (Cout,) fp32
    gamma: torch.Tensor


class Way(NamedTuple):
    """launch writes `out`; `library`: cuDNN's layout of the result, (N, C, H, W)."""

    launch: Callable[[], Any]
    out: torch.Tensor | None


def make(shape: LayerShape, n: int) -> Inputs:
    torch.manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE)

    c_in, c_out, size = sum(shape.c_in), shape.c_out, shape.size
    r = [random(n, size, size, c).relu().to(BF16) for c in shape.c_in]
    s = [0.5 + random(n).abs() / 10 for _ in r]
    kernel = (c_in, c_out, 2, 2) if shape.kind == "up" else (c_out, c_in, 3, 3)
    weight = (random(*kernel) / (9 * c_in) ** 0.5).to(BF16)
    parts = parts_of(s[0], shape.c_in[0], size) if shape.kind in ("fused", "last") else None
    return Inputs(r, s, parts, weight, random(c_out) / 10, random(c_out))


def parts_of(s: torch.Tensor, channels: int, size: int) -> Any:
    """As many as a layer leaves to the next, which come to s."""
    from fastphi.triton_kernels import fused_layer, scalars

    count = fused_layer.partials_per_image((channels,), channels, size, size, BF16, DEVICE)
    std = 1 / s - EPS
    partials = torch.zeros(len(s), count, 3, device=DEVICE)
    partials[:, :, 0] = 1.0
    partials[:, :, 2] = (std * std)[:, None]
    return scalars.Parts(partials, EPS, torch.empty_like(s))


def empty(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.full(size, torch.nan, dtype=dtype, device=DEVICE)


def fused(shape: LayerShape, x: Inputs, launch: Any, slots: int) -> Way:
    n, (size, c_out) = len(x.r[0]), (shape.size, shape.c_out)
    out, partials = empty(n, size, size, c_out), empty(n, slots, 3, dtype=torch.float32)
    r2, s2 = (x.r[1], x.s[1]) if len(x.r) == 2 else (None, None)

    return Way(
        lambda: launch(x.r[0], x.parts, r2=r2, s2=s2, r_out=out, partials=partials),
        out,
    )


def ours(shape: LayerShape, x: Inputs) -> Way:
    from fastphi.triton_kernels import first_layer, fused_layer, last_layer, upsample

    n, (kind, c_in, c_out, size) = len(x.r[0]), shape
    if kind == "first":
        packed, out = first_layer.pack_first_weight(x.weight, BF16), empty(n, size, size, c_out)
        return Way(lambda: first_layer.first_layer_fwd(x.r[0], packed, x.bias, out), out)
    if kind == "up":
        packed = upsample.pack_upsample_weight(x.weight, BF16)
        out = empty(n, 2 * size, 2 * size, c_out)
        return Way(lambda: upsample.upsample_fwd(x.r[0], None, packed, None, out), out)
    packed = fused_layer.pack_weight(x.weight, c_in[0] if len(c_in) == 2 else None, BF16)
    if kind == "last":
        out = empty(n, c_out, size, size, dtype=torch.float32)
        return Way(
            lambda: last_layer.last_layer_fwd(x.r[0], x.parts, packed, x.bias, out),
            out.permute(0, 2, 3, 1),
        )

    def launch(r, s, **options):
        fused_layer.fused_layer_fwd(r, s, packed, x.bias, x.gamma, **options)

    slots = fused_layer.partials_per_image(c_in, c_out, size, size, BF16, DEVICE)
    return fused(shape, x, launch, slots)


def by_library(shape: LayerShape, x: Inputs) -> Way:
    from fastphi.triton_kernels import epilogue

    weights = gpu_library.split(x.weight, len(x.r), BF16)

    def launch(r, s, **options):
        gpu_library.layer_fwd(r, s, weights, x.bias, x.gamma, **options)

    slots = epilogue.partials_per_image(shape.c_out, shape.size, shape.size, BF16, DEVICE)
    return fused(shape, x, launch, slots)


def bare(shape: LayerShape, x: Inputs) -> Way:
    """cuDNN's convolution alone, of sources that are one tensor already."""
    nchw = torch.cat(x.r, dim=3).permute(0, 3, 1, 2)
    weight = x.weight.contiguous(memory_format=torch.channels_last)
    if shape.kind == "up":
        return Way(lambda: F.conv_transpose2d(nchw, weight, stride=2), None)
    return Way(lambda: F.conv2d(nchw, weight, padding=1), None)


def reference(shape: LayerShape, x: Inputs, n: int) -> torch.Tensor:
    """The first n images in float64, NHWC."""
    scaled = [
        r[:n].double() * (1 if shape.kind in ("first", "up") else s[:n, None, None, None].double())
        for r, s in zip(x.r, x.s, strict=True)
    ]
    y, w = torch.cat(scaled, dim=3).permute(0, 3, 1, 2), x.weight.double()
    if shape.kind == "up":
        return F.conv_transpose2d(y, w, stride=2).permute(0, 2, 3, 1)
    z = F.conv2d(y, w, x.bias.double(), padding=1)
    if shape.kind == "fused":
        z = x.gamma.double()[:, None, None] * z
    return (z if shape.kind == "last" else z.relu()).permute(0, 2, 3, 1)


@pytest.fixture(autouse=True)
def _tried_out():
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    yield
    torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("n", gpu_sizes.BATCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@torch.no_grad()
def test_layer(shape, n, timed, peaks):
    n = gpu_sizes.batch(n)
    x = make(shape, n)
    ways = {"ours": ours(shape, x), "cuDNN bare": bare(shape, x)}
    if shape.kind == "fused":
        ways["cuDNN + epilogue"] = by_library(shape, x)
    want = reference(shape, x, min(n, 2))
    for name, way in ways.items():
        way.launch()
        if way.out is not None:
            error = support.relative_error(way.out[: len(want)], want)
            limit = TOLERANCE * (2 if name == "cuDNN + epilogue" else 1)
            assert error <= limit, f"{name}: relative error {error:.1e}, no time for that"
            assert not way.out.isnan().any(), f"{name} left values unwritten"
        case = {
            "what": shape.name,
            "way": name,
            "images": n,
            "c_in": list(shape.c_in),
            "c_out": shape.c_out,
            "size": shape.size,
            "layer": shape.kind,
            "bound": n * shape.bound(peaks["flops"], peaks["bytes_per_second"]),
            "flops": n * shape.flops,
        }
        copies = max(1, 256 // n)  # of short work, so that a replay's own time is small beside it
        times = support.gpu_times(support.captured(way.launch, copies), rounds=15)
        found = timed(case, way.launch, times=[t / copies for t in times])
        assert found["seconds"]["median"] > 0
