"""The scalars of a layer's input, merged from their parts by the kernel that reads them first: to the
bits of csrc/statistics.h, whichever kernel it is.
"""

from __future__ import annotations

import pytest
import torch
from layer_case import Case, make
from triton_case import DEVICE, guarded, need_kernels, poisoned

from fastphi.engine import ops

need_kernels()

from fastphi.triton_kernels import epilogue, fused_layer, last_layer, upsample  # noqa: E402
from fastphi.triton_kernels.scalars import Parts  # noqa: E402

EPS = 1e-5


def parts(n: int, count: int, seed: int = 0) -> Parts:
    """Of random counts, large means beside the spread, and here and there no value at all."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, count, 3, generator=generator)
    values[..., 0] = (values[..., 0] * 300).ceil()
    values[..., 1] = values[..., 1] * 8 - 4
    values[..., 2] *= values[..., 0]
    values[:, 1::7] = 0
    partials = guarded(values.to(DEVICE))
    return Parts(partials, EPS, *(poisoned(n) for _ in range(3)))


def stated(p: Parts) -> list[torch.Tensor]:
    """s, mean, std, by the compiled operator."""
    found = [torch.empty_like(p.s).cpu() for _ in range(3)]
    ops.combine_moments(p.partials.cpu().contiguous(), p.eps, *found)
    return found


def check(p: Parts) -> None:
    for found, want in zip(p[2:], stated(p), strict=True):
        assert torch.equal(found.cpu().view(torch.int32), want.view(torch.int32))


COUNTS = (1, 2, 3, 7, 16, 33, 100, 128, 129, 300)


@pytest.mark.parametrize("count", COUNTS)
def test_bits_in_the_fused_layer(count):
    """17 images: two programs' worth. What it makes is what the merged scalars make."""
    x = make(Case(17, 4, 2, (16,), 16), torch.float16)
    weight = fused_layer.pack_weight(x.weight, None, torch.float16)
    p = parts(17, count)
    outs = [poisoned(*x.r.shape, dtype=torch.float16) for _ in range(2)]
    fused_layer.fused_layer_fwd(x.r, p, weight, x.bias, x.gamma, r_out=outs[0])
    check(p)
    fused_layer.fused_layer_fwd(x.r, p.s, weight, x.bias, x.gamma, r_out=outs[1])
    assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_many_programs_of_an_image_and_two_sources(dtype):
    """Every program merges, one writes; a second source's scalars are merged already."""
    x = make(Case(2, 12, 8, (16, 16), 96), dtype)
    weight = fused_layer.pack_weight(x.weight, 16, dtype)
    p = parts(2, 5)._replace(mean=None, std=None)
    outs = [poisoned(2, 12, 8, 96, dtype=dtype) for _ in range(2)]
    options = dict(r2=x.r2, s2=x.s2)
    fused_layer.fused_layer_fwd(x.r, p, weight, x.bias, x.gamma, r_out=outs[0], **options)
    assert torch.equal(p.s.cpu(), stated(p)[0])
    fused_layer.fused_layer_fwd(x.r, p.s, weight, x.bias, x.gamma, r_out=outs[1], **options)
    assert torch.equal(outs[0], outs[1])


def test_images_that_take_no_part_are_left():
    x = make(Case(17, 4, 2, (16,), 16), torch.float16)
    weight = fused_layer.pack_weight(x.weight, None, torch.float16)
    p, active = parts(17, 3), torch.ones(17, dtype=torch.int32, device=DEVICE)
    active[16:] = 0  # a program of its own
    out = poisoned(*x.r.shape, dtype=torch.float16)
    fused_layer.fused_layer_fwd(x.r, p, weight, x.bias, None, r_out=out, active=active)
    assert torch.equal(p.s[:16].cpu(), stated(p)[0][:16]) and bool(p.s[16:].isnan().all())


@pytest.mark.parametrize("count", [1, 16, 130])
def test_bits_in_the_last_layer(count):
    x = make(Case(3, 8, 20, (16,), 3), torch.float16)
    weight = fused_layer.pack_weight(x.weight, None, torch.float16)
    p = parts(3, count)
    outs = [poisoned(3, 3, 8, 20) for _ in range(2)]
    last_layer.last_layer_fwd(x.r, p, weight, x.bias, outs[0])
    check(p)
    last_layer.last_layer_fwd(x.r, p.s, weight, x.bias, outs[1])
    assert torch.equal(outs[0], outs[1])


def test_bits_in_an_upsampling_with_a_bias():
    x = make(Case(3, 4, 4, (16,), 16), torch.float16)
    matrix = torch.randn(16, 8, 2, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weight = upsample.pack_upsample_weight(matrix, torch.float16)
    p, bias = parts(3, 16), guarded(x.bias[:8].clone())
    outs = [poisoned(3, 8, 8, 8, dtype=torch.float16) for _ in range(2)]
    upsample.upsample_fwd(x.r, p, weight, bias, outs[0])
    check(p)
    upsample.upsample_fwd(x.r, p.s, weight, bias, outs[1])
    assert torch.equal(outs[0], outs[1])


def test_bits_in_the_epilogue():
    x = make(Case(3, 10, 10, (16,), 96), torch.float16)
    c = guarded(torch.randn(3, 10, 10, 96, generator=torch.Generator().manual_seed(2)).half())
    p = parts(3, 9)
    outs = [poisoned(3, 10, 10, 96, dtype=torch.float16) for _ in range(2)]
    epilogue.epilogue_fwd(c, p, x.bias, x.gamma, r_out=outs[0])
    check(p)
    epilogue.epilogue_fwd(c, p.s, x.bias, x.gamma, r_out=outs[1])
    assert torch.equal(outs[0], outs[1])


def test_values_that_are_all_the_same():
    """std 0: s is 1/ε."""
    p = parts(2, 4)
    p.partials[..., 1], p.partials[..., 2] = 3.0, 0.0
    x = make(Case(2, 4, 4, (16,), 16), torch.float32)
    weight = fused_layer.pack_weight(x.weight, None, torch.float32)
    fused_layer.fused_layer_fwd(x.r, p, weight, None, None, z_out=poisoned(2, 4, 4, 16))
    check(p)
    assert bool((p.std == 0).all()) and bool((p.s == 1 / torch.tensor(EPS)).all())


def test_errors_say_what_came_and_what_was_expected():
    x = make(Case(2, 4, 4, (16,), 16), torch.float16)
    weight = fused_layer.pack_weight(x.weight, None, torch.float16)
    p, out = parts(2, 4), poisoned(2, 4, 4, 16, dtype=torch.float16)
    for message, wrong in {
        r"s has shape \(1,\), expected \(2,\)": p._replace(s=p.s[:1]),
        r"partials of s has shape \(2, 4, 2\), expected \(2, 4, 3\)": p._replace(
            partials=p.partials[..., :2]
        ),
        "partials of s has no part": p._replace(partials=p.partials[:, :0]),
        "mean and std belong together": p._replace(std=None),
        "std is float64, expected float32": p._replace(std=p.std.double()),
    }.items():
        with pytest.raises(ValueError, match="fused_layer_fwd: " + message):
            fused_layer.fused_layer_fwd(x.r, wrong, weight, None, None, r_out=out)
