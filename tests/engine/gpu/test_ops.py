"""The GPU engine's small operators: on the CPU always, and on CUDA tensors where a GPU is.

The combined statistics are compared in float64; in float32 each of up to a few hundred merges adds about
6e-8.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_ops_case import DEVICES, DTYPES, EPS, GPU, poisoned, random, same_bits

from fastphi.engine import ops

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))


# --- combine_moments, combine_means ----------------------------------------------------------------


def partial_statistics(z: torch.Tensor, slots: int) -> torch.Tensor:
    """(N, values) -> (N, slots, 3): count, mean, M2 of parts that differ in size."""
    n, size = z.shape
    cuts = sorted({0, size, *(int(size * (t / slots) ** 1.2) for t in range(1, slots))})
    parts = [z[:, a:b].double() for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    rows = [
        torch.stack(
            [
                torch.full((n,), p.shape[1], dtype=torch.float64),
                p.mean(1),
                p.var(1, correction=0) * p.shape[1],
            ],
            1,
        )
        for p in parts
    ]
    return torch.stack(rows, 1).float()


@DEVICES
@pytest.mark.parametrize("slots", [1, 2, 31, 127, 128, 129, 700])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_combine_moments(slots, mean, device):
    """Where the mean is 1000 times the spread, its rounding in float32 (6e-5 / 1) remains."""
    z = random(1, 3, 20_000) + mean
    partials = partial_statistics(z, slots).to(device)
    found = [poisoned(3, device=device) for _ in range(3)]
    ops.combine_moments(partials, EPS, *found)
    spread, rtol = z.double().std(1, correction=0), 1e-6 if mean == 0 else 3e-4
    wants = (1 / (spread + EPS), z.double().mean(1), spread)
    for got, want, atol in zip(found, wants, (0, 1e-6, 0), strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=rtol, atol=atol)


@DEVICES
def test_combine_moments_of_constant_images(device):
    """std 0, and parts of no values, which change nothing."""
    partials = torch.zeros(2, 5, 3, device=device)
    partials[:, 1] = partials.new_tensor([7.0, 0.25, 0.0])
    partials[1, 3] = partials.new_tensor([9.0, 0.25, 0.0])
    s, mean, std = (poisoned(2, device=device) for _ in range(3))
    ops.combine_moments(partials, EPS, s, mean, std)
    np.testing.assert_allclose(s.cpu(), 1 / EPS, rtol=1e-6)
    assert bool((std == 0).all()) and bool((mean == 0.25).all())


@DEVICES
@pytest.mark.parametrize("slots, channels", [(1, 3), (2, 512), (7, 33), (300, 64)])
def test_combine_means(slots, channels, device):
    sums, s = random(2, 3, slots, channels), random(3, 3).abs() + 0.1
    means = poisoned(3, channels, device=device)
    ops.combine_means([sums.to(device)], [s.to(device)], [100], [means])
    want = s.double()[:, None] * sums.double().sum(1) / 100
    # against the sum of the sizes of what is added: sums of both signs cancel
    scale = s.double()[:, None] * sums.double().abs().sum(1) / 100
    assert ((means.cpu() - want).abs() <= 1e-6 * scale).all()


@DEVICES
@pytest.mark.parametrize("blocks", [1, 3, 20])
def test_combine_means_of_several_blocks_whose_last_scalar_is_in_parts(blocks, device):
    """The bits of one after another; 20 blocks are more than one launch's."""
    partials = partial_statistics(random(7, 4, 9_000), 37).to(device)
    sums = [random(20 + b, 4, 3 + b, 5 + 7 * b).to(device) for b in range(blocks)]
    s = [random(50 + b, 4).abs().to(device) for b in range(blocks)]
    want = [poisoned(4, x.shape[2], device=device) for x in sums]
    moments = [poisoned(4, device=device) for _ in range(3)]
    ops.combine_moments(partials, EPS, *moments)
    for b, (x, out) in enumerate(zip(sums, want, strict=True)):
        ops.combine_means([x], [moments[0] if b == blocks - 1 else s[b]], [64 + b], [out])
    s[-1].fill_(torch.nan)
    means = [poisoned(4, x.shape[2], device=device) for x in sums]
    mean, std = poisoned(4, device=device), poisoned(4, device=device)
    pixels = [64 + b for b in range(blocks)]
    ops.combine_means(sums, s, pixels, means, partials, EPS, mean, std)
    for got, expected in zip([*means, s[-1], mean, std], [*want, *moments], strict=True):
        assert torch.equal(got, expected)


@DEVICES
def test_combined_bits_do_not_depend_on_the_batch(device):
    partials = partial_statistics(random(4, 5, 9_000), 200).to(device)
    sums, s = random(5, 5, 50, 70).to(device), random(6, 5).abs().to(device)
    rows = torch.tensor([3, 0], device=device)

    def run(which):
        scalars = [poisoned(len(which), device=device) for _ in range(3)]
        means = poisoned(len(which), 70, device=device)
        ops.combine_moments(partials[which], EPS, *scalars)
        ops.combine_means([sums[which]], [s[which]], [64], [means])
        return *scalars, means

    for whole, part in zip(run(torch.arange(5, device=device)), run(rows), strict=True):
        assert torch.equal(whole[rows], part)


# --- spatial_mean on the GPU -----------------------------------------------------------------------


@GPU
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(2, 5, 7, 3), (1, 1, 1, 17), (3, 8, 4, 48), (2, 8, 8, 512), (1, 3, 3, 2100), (1, 512, 512, 8)],
)
def test_spatial_mean(shape, dtype):
    """float32 sums in a tree: 1e-6 of the mean size; bfloat16 rounds the result by up to 2^-8."""
    r = random(12, *shape).abs().to(dtype)
    got = ops.spatial_mean(r.cuda())
    assert got.dtype == dtype
    want = r.double().mean((1, 2))
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(got.cpu().double(), want, rtol=tolerance, atol=0)
    one = ops.spatial_mean(r[-1:].cuda())
    assert torch.equal(one, got[-1:])


# --- the CPU's bits, graphs, streams ---------------------------------------------------------------


@GPU
def test_the_gpu_has_the_cpus_bits():
    partials = partial_statistics(random(13, 4, 9_000), 150)
    sums, s = random(14, 4, 37, 70), random(15, 4).abs()
    results = []
    for device in ("cpu", "cuda"):
        scalars = [poisoned(4, device=device) for _ in range(3)]
        means = poisoned(4, 70, device=device)
        ops.combine_moments(partials.to(device), EPS, *scalars)
        ops.combine_means([sums.to(device)], [s.to(device)], [64], [means])
        results.append((*scalars, means))
    for cpu, cuda in zip(*results, strict=True):
        same_bits(cuda, cpu)


@GPU
def test_a_captured_graph_replays_what_eager_computes():
    images = random(16, 5, 3, 16, 16).cuda()
    sigma = torch.full((5,), 0.5, device="cuda")
    ids, draw = torch.arange(5, device="cuda"), torch.zeros(5, dtype=torch.int64, device="cuda")
    partials = partial_statistics(random(17, 5, 900), 20).cuda()
    out = poisoned(5, 16, 16, 3, device="cuda")
    s, *others = (poisoned(5, device="cuda") for _ in range(3))

    def run():
        ops.noisy_image(images, None, sigma, 1, ids, 2, draw, out)
        ops.combine_moments(partials, EPS, s, *others)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    draw += 1  # read when the graph runs, not when it was captured
    partials *= 2
    out.fill_(torch.nan), s.fill_(torch.nan)
    graph.replay()
    got = out.clone(), s.clone()
    run()
    assert torch.equal(got[0], out) and torch.equal(got[1], s)
