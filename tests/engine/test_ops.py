"""The compiled ops against the layer as it is written in the paper, in float64; and what torch asks.

Expected values come from torch.nn.functional and autograd in float64. Tolerances are relative to the
largest element of the expected array: float64 differs by the order of the sums only (1e-12); float32
sums of up to a few hundred products keep 2e-6, and gradients through the norm, a difference of sums
of similar size, 2e-5. From 16 input channels on float32 layers are Winograd convolutions, whose
transforms amplify the rounding about ten times (csrc/README.md): 6e-6.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastphi import engine, reference
from fastphi.engine import ops

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))

EPS = 1e-5
VALUE = {torch.float64: 1e-12, torch.float32: 2e-6}
WINOGRAD = {torch.float64: 1e-12, torch.float32: 6e-6}
GRADIENT = {torch.float64: 1e-12, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", VALUE, ids=["float64", "float32"])
ISAS = torch.ops.fastphi.build_info() if ops.missing() is None else ""


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str = "") -> None:
    scale = want.detach().abs().max().clamp_min(1e-30)
    error = ((got.detach().double() - want.detach()).abs().max() / scale).item()
    assert got.shape == want.shape and error <= tolerance, f"{what}: {error:.2e} > {tolerance}"


# --- fused layer ----------------------------------------------------------------------------------


def plain_layer(r, s, r2, s2, weight, bias, gamma, relu):
    """(y_out's numerator, its scalar) from the un-deferred form; NHWC outside, NCHW inside."""
    y = s[:, None, None, None] * r
    if r2 is not None:
        y = torch.cat([y, s2[:, None, None, None] * r2], dim=3)
    z = F.conv2d(y.permute(0, 3, 1, 2), weight, bias, padding=1)
    s_out = torch.ones_like(s)
    if gamma is not None:
        s_out = 1 / (z.std(dim=(1, 2, 3), correction=0) + EPS)
        z = gamma[:, None, None] * z
    return (F.relu(z) if relu else z).permute(0, 2, 3, 1), s_out


def layer_arguments(n, h, w, c1, c2, cout, norm, bias, seed=0):
    """float64 arguments; s differs between images, gamma has both signs and a zero."""
    gamma = random(seed + 1, cout)
    if cout > 2:
        gamma[cout // 2] = 0.0
    return {
        "r": random(seed + 2, n, h, w, c1),
        "s": random(seed + 3, n).abs() + 0.5,
        "r2": random(seed + 4, n, h, w, c2) if c2 else None,
        "s2": random(seed + 5, n).abs() + 0.5 if c2 else None,
        "weight": random(seed + 6, cout, c1 + c2, 3, 3) / (3 * (c1 + c2) ** 0.5),
        "bias": random(seed + 7, cout) if bias else None,
        "gamma": gamma if norm else None,
    }


def values_and_gradients(layer, arguments, dtype, relu):
    """Outputs, and the gradients of all arguments under a random upstream gradient."""
    a = {
        k: None if v is None else v.to(dtype).clone().requires_grad_() for k, v in arguments.items()
    }
    r_out, s_out = layer(a, relu)
    upstream = (random(90, *r_out.shape).to(dtype), random(91, *s_out.shape).to(dtype))
    leaves = {k: v for k, v in a.items() if v is not None}
    total = (r_out * upstream[0]).sum() + (s_out * upstream[1] * r_out.numel() ** 0.5).sum()
    return (r_out, s_out), dict(
        zip(leaves, torch.autograd.grad(total, leaves.values()), strict=True)
    )


def compiled(a, relu):
    return ops.fused_layer(
        a["r"], a["s"], a["weight"], a["bias"], a["gamma"], EPS, relu=relu, r2=a["r2"], s2=a["s2"]
    )


def plain(a, relu):
    return plain_layer(a["r"], a["s"], a["r2"], a["s2"], a["weight"], a["bias"], a["gamma"], relu)


# n, h, w, c1, c2, cout, norm, bias, relu
LAYERS = [
    (2, 5, 7, 3, 0, 17, True, True, True),
    (1, 8, 8, 10, 6, 48, True, True, True),
    (2, 6, 25, 17, 48, 33, True, False, True),
    (3, 4, 4, 1, 0, 6, False, True, True),
    (2, 3, 13, 16, 0, 3, False, True, False),
    (1, 1, 1, 6, 0, 10, True, True, True),
    (2, 9, 2, 48, 0, 1, True, True, False),
    (2, 12, 40, 6, 10, 32, True, True, True),
    (1, 3, 70, 20, 0, 36, True, True, True),  # more than a strip of tiles
    (1, 10, 10, 36, 52, 20, True, False, True),
    (1, 10, 10, 36, 52, 128, True, True, True),  # threads share the transformed input
    (1, 2, 2, 52, 0, 65, True, True, True),
    (2, 40, 62, 20, 12, 36, True, True, False),  # weight gradient in slices
    (2, 32, 47, 130, 126, 240, True, True, False),  # and in parts that threads share
]


@DTYPES
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_fused_layer_values_and_gradients(shape, dtype):
    *sizes, relu = shape
    arguments = layer_arguments(*sizes)
    want, want_grads = values_and_gradients(plain, arguments, torch.float64, relu)
    got, got_grads = values_and_gradients(compiled, arguments, dtype, relu)
    tolerance = (WINOGRAD if sizes[3] + sizes[4] >= 16 else VALUE)[dtype]
    for name, g, e in zip(("r_out", "s_out"), got, want, strict=True):
        close(g, e, tolerance, name)
    assert got_grads.keys() == want_grads.keys()
    for name, g in got_grads.items():
        close(g, want_grads[name], GRADIENT[dtype], f"d_{name}")


@DTYPES
def test_fused_layer_of_a_constant_image_has_std_0(dtype):
    """1/(std + ε) is then 1/ε, and no gradient passes through the norm, as autograd has it."""
    arguments = layer_arguments(2, 6, 5, 3, 0, 8, True, True)
    arguments["weight"][:] = 0
    arguments["bias"][:] = 0.25
    (_, s_out), grads = values_and_gradients(compiled, arguments, dtype, True)
    close(s_out, torch.full((2,), 1 / EPS, dtype=torch.float64), VALUE[dtype])
    alive = arguments["gamma"] * 0.25 > 0
    upstream = random(90, 2, 6, 5, 8) * alive
    close(grads["gamma"], 0.25 * upstream.sum((0, 1, 2)), 1e-6, "d_gamma")
    close(grads["bias"], (arguments["gamma"] * upstream).sum((0, 1, 2)), 1e-6, "d_bias")


@DTYPES
@pytest.mark.parametrize("relu", [True, False])
def test_gradients_at_std_0_are_those_of_autograd(relu, dtype):
    """Black input, r = 0, so z is the bias: gradients to r, s and the weight still pass the conv."""
    arguments = layer_arguments(2, 5, 7, 3, 6, 10, True, True)
    arguments["r"].zero_(), arguments["r2"].zero_()
    arguments["bias"][:] = 0.25  # exactly representable: the mean is exact, std is 0 in both
    _, want = values_and_gradients(plain, arguments, torch.float64, relu)
    (_, s_out), got = values_and_gradients(compiled, arguments, dtype, relu)
    close(s_out, torch.full((2,), 1 / EPS, dtype=torch.float64), VALUE[dtype], "s_out")
    assert want["r"].abs().max() > 0.1 and want["r2"].abs().max() > 0.1
    for name, g in got.items():
        close(g, want[name], GRADIENT[dtype], f"d_{name}")


@pytest.mark.parametrize("name", ["r", "s", "r2", "s2", "weight", "bias", "gamma"])
def test_a_gradient_for_one_argument_alone(name):
    """What is not wanted is not computed; what is wanted is the same."""
    arguments = layer_arguments(2, 4, 6, 3, 5, 7, True, True)
    _, every = values_and_gradients(plain, arguments, torch.float64, True)
    a = dict(arguments)
    a[name] = a[name].clone().requires_grad_()
    r_out, s_out = compiled(a, True)
    upstream = random(90, *r_out.shape), random(91, *s_out.shape) * r_out.numel() ** 0.5
    (got,) = torch.autograd.grad((r_out, s_out), a[name], upstream)
    close(got, every[name], GRADIENT[torch.float64], f"d_{name}")


def test_no_gradient_at_all():
    """Asked for neither the input's nor the weights', an op gives none."""
    r, s, z = torch.rand(1, 4, 4, 16), torch.ones(1), torch.rand(1, 4, 4, 16)
    w = torch.rand(16, 16, 3, 3)
    args = (z, s, r, s, None, None, w, None, z, s, s, s, True, False, False)
    assert not any(d.numel() for d in torch.ops.fastphi.fused_layer_bwd(*args))


def test_views_give_what_their_copies_give():
    """Arguments that are not contiguous: channels-first images seen as NHWC, a transposed kernel."""
    a = layer_arguments(2, 5, 7, 3, 4, 6, True, True)
    want, _ = values_and_gradients(plain, a, torch.float64, True)
    for name in ("r", "r2"):
        a[name] = a[name].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    a["weight"] = a["weight"].transpose(2, 3).contiguous().transpose(2, 3)
    assert not any(a[name].is_contiguous() for name in ("r", "r2", "weight"))
    for got, expected in zip(compiled(a, True), want, strict=True):
        close(got, expected, VALUE[torch.float64])


def test_statistics_do_not_cancel():
    """Mean 1000 times the spread: Σz² − (Σz)²/n would keep no digit of it in float32."""
    arguments = layer_arguments(1, 16, 16, 4, 0, 40, True, True)
    arguments["bias"][:] = 1000.0
    (_, want), _ = values_and_gradients(plain, arguments, torch.float64, True)
    (_, got), _ = values_and_gradients(compiled, arguments, torch.float32, True)
    # z itself is stored with a relative error of 6e-8 of 1000, the spread is of order 1
    close(got, want, 1e-3, "s_out")


def test_relu_keeps_nan():
    a = layer_arguments(1, 4, 4, 2, 0, 3, True, True)
    a["r"][0, 1, 2, 0] = torch.nan
    r_out, s_out = compiled({k: v if v is None else v.float() for k, v in a.items()}, True)
    assert r_out.isnan().any() and s_out.isnan().all()


@pytest.mark.parametrize(("channels", "tolerance"), [(2, 1e-6), (16, 2e-6)])
def test_weight_gradient_over_many_pixels_keeps_its_digits(channels, tolerance):
    """131 072 products of the same sign: one float32 sum would lose about 1e-4. From 16 channels on
    Winograd's."""
    n, h, w = 8, 128, 128
    r, d = random(1, n, h, w, channels).abs() + 1, random(2, n, h, w, 3).abs() + 1
    weight = torch.zeros(3, channels, 3, 3, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(
        (
            plain_layer(r, torch.ones(n).double(), None, None, weight, None, None, False)[0] * d
        ).sum(),
        weight,
    )[0]
    leaf = weight.detach().float().requires_grad_()
    r_out, _ = ops.fused_layer(r.float(), torch.ones(n), leaf, None, None, EPS, relu=False)
    got = torch.autograd.grad((r_out * d.float()).sum(), leaf)[0]
    close(got, want, tolerance)


# --- the other ops --------------------------------------------------------------------------------


def check_op(f, plain_f, arguments, dtype):
    """Values and gradients of a function of some tensors against a plain one in float64."""
    outs, grads = [], []
    for function, kind in ((plain_f, torch.float64), (f, dtype)):
        leaves = [t.to(kind).clone().requires_grad_() for t in arguments]
        out = function(*leaves)
        outs.append(out)
        grads.append(torch.autograd.grad((out * random(90, *out.shape).to(kind)).sum(), leaves))
    close(outs[1], outs[0], VALUE[dtype])
    for got, want in zip(grads[1], grads[0], strict=True):
        close(got, want, VALUE[dtype])


@DTYPES
@pytest.mark.parametrize(
    "n, h, w, cin, cout", [(2, 5, 7, 10, 6), (1, 1, 3, 48, 17), (3, 4, 16, 3, 32), (1, 6, 13, 1, 1)]
)
def test_upsample(n, h, w, cin, cout, dtype):
    def plain_f(r, weight):
        return F.conv_transpose2d(r.permute(0, 3, 1, 2), weight, stride=2).permute(0, 2, 3, 1)

    check_op(ops.upsample, plain_f, (random(1, n, h, w, cin), random(2, cin, cout, 2, 2)), dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 6, 10, 3), (1, 2, 2, 17), (3, 8, 4, 48)])
def test_avg_pool(shape, dtype):
    def plain_f(r):
        return F.avg_pool2d(r.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)

    check_op(ops.avg_pool, plain_f, (random(1, *shape),), dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 1, 1, 17), (3, 8, 4, 48)])
def test_spatial_mean(shape, dtype):
    check_op(ops.spatial_mean, lambda r: r.mean((1, 2)), (random(1, *shape),), dtype)


def test_spatial_mean_is_accurate_at_512():
    """A running float32 sum of 262 144 values near 1 would be off by about 1e-3."""
    r = random(1, 1, 512, 512, 1).abs() + 1
    close(ops.spatial_mean(r.float()), r.mean((1, 2)), 2e-7)


def philox_normal(seed, sample, stream, draw, shape):
    """The definition of the noise, written again from its text: one number at a time."""
    f = np.float32
    out = np.empty(int(np.prod(shape)), np.float32)
    for element in range(out.size):
        c = [element // 4, draw, stream, sample]
        k = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        xa, xb = c[element % 4 // 2 * 2 : element % 4 // 2 * 2 + 2]
        u = f(2 * (xa >> 9) + 1) * f(2.0**-24)
        bits = int(u.view(np.int32))
        e = (bits - 0x3F3504F3) >> 23
        m = np.int32(bits - (e << 23)).view(np.float32)
        s = (m - f(1)) / (m + f(1))
        w = s * s
        p = (((f(2 / 9) * w + f(2 / 7)) * w + f(2 / 5)) * w + f(2 / 3)) * w
        r = np.sqrt(f(-2) * (f(e) * f(np.log(2)) + (f(2) * s + s * p)))
        a = f(2 * (xb >> 6 & 0x7FFFFF) + 1) * f(np.pi / 4 * 2.0**-24)
        q = a * a
        sin = a * (
            f(1) + q * (f(-1 / 6) + q * (f(1 / 120) + q * (f(-1 / 5040) + q * f(1 / 362880))))
        )
        cos = f(1) + q * (f(-1 / 2) + q * (f(1 / 24) + q * (f(-1 / 720) + q * f(1 / 40320))))
        if xb >> 29 & 1:
            sin, cos = cos, sin
        cos, sin = (-cos if xb >> 30 & 1 else cos), (-sin if xb >> 31 & 1 else sin)
        out[element] = r * (sin if element % 2 else cos)
    return torch.from_numpy(out.reshape(shape))


def test_noise_has_the_defined_bits():
    seed, stream, shape = 2**62 + 12345, 0xFEDCBA98, (3, 5, 7)  # 105 elements: no multiple of 4
    sample, draw = torch.tensor([0, 5, 2**32 - 1]), torch.tensor([7, 0, 2**31])
    got = ops.noise_normal(seed, sample, stream, draw, *shape)
    for i in range(3):
        want = philox_normal(seed, int(sample[i]), stream, int(draw[i]), shape)
        assert torch.equal(got[i], want)


def test_noise_of_the_largest_ids_and_seeds_is_the_references():
    """Many elements at once, so that the threads share them; both ends of every counter."""
    top = 2**32 - 1
    sample, draw = torch.tensor([0, top, 1, top]), torch.tensor([top, 0, 2**31, top])
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        for stream in (0, top):
            want = reference.noise_normal(seed, sample, stream, draw, 3, 17, 33)
            assert torch.equal(ops.noise_normal(seed, sample, stream, draw, 3, 17, 33), want)


# --- what torch asks of an operator ----------------------------------------------------------------


def op_cases():
    """(op, float32 arguments that want gradients where they can)."""

    def leaf(seed, *shape):
        return random(seed, *shape).float().requires_grad_()

    r, s, weight = leaf(1, 2, 4, 6, 3), leaf(2, 2), leaf(3, 5, 3, 3, 3)
    wide = leaf(4, 5, 7, 3, 3)
    yield "fused_layer_fwd", (r, s, None, None, weight, leaf(5, 5), leaf(6, 5), EPS, True)
    yield (
        "fused_layer_fwd",
        (r, s, leaf(7, 2, 4, 6, 4), leaf(8, 2), wide, None, None, EPS, False),
    )
    z, scalar = leaf(9, 2, 4, 6, 5).detach(), random(10, 2).float().abs()
    for need in ((True, True), (True, False), (False, True)):
        common = (r.detach(), s.detach(), None, None, weight.detach(), leaf(6, 5).detach(), z)
        yield "fused_layer_bwd", (z, scalar, *common, scalar, scalar, scalar, True, *need)
    yield "upsample_fwd", (r, leaf(11, 3, 5, 2, 2))
    yield (
        "upsample_bwd",
        (leaf(12, 2, 8, 12, 5).detach(), r.detach(), leaf(11, 3, 5, 2, 2).detach(), True, True),
    )
    yield "avg_pool_fwd", (r,)
    yield "avg_pool_bwd", (r.detach(),)
    yield "spatial_mean_fwd", (r,)
    yield "spatial_mean_bwd", (leaf(13, 2, 3).detach(), 4, 6)
    yield "noise_normal", (1, torch.tensor([3, 4]), 2, torch.tensor([0, 1]), 3, 4, 5)


CASES = list(op_cases()) if ops.missing() is None else []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
@pytest.mark.parametrize("name, arguments", CASES, ids=[name for name, _ in CASES])
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(torch.ops.fastphi, name).default, arguments)


def test_gradcheck():
    """Numerical derivatives in float64, through both outputs of a layer and a chain of ops."""

    def chain(r, s, weight, bias, gamma, up, r2, s2):
        h, t = ops.fused_layer(r, s, weight, bias, gamma, EPS, r2=r2, s2=s2)
        return t[:, None] * ops.spatial_mean(ops.upsample(ops.avg_pool(h), up)), t

    a = layer_arguments(2, 4, 4, 2, 1, 3, True, True)
    a["gamma"] = torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)  # at 0 is a kink
    leaves = [a[k] for k in ("r", "s", "weight", "bias", "gamma")]
    leaves += [random(20, 3, 2, 2, 2), a["r2"], a["s2"]]
    assert torch.autograd.gradcheck(chain, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_second_derivatives(second, relu, norm):
    a = layer_arguments(2, 4, 5, 2, 2 if second else 0, 3, norm, True, seed=40)
    if norm:
        a["gamma"] = torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)  # at 0 is a kink
    names = [k for k, t in a.items() if t is not None]

    def layer(*tensors):
        out = compiled(a | dict(zip(names, tensors, strict=True)), relu)
        return out if norm else out[0]

    assert torch.autograd.gradgradcheck(layer, [a[k].requires_grad_() for k in names])


def test_second_derivatives_of_the_other_ops():
    r, up = (
        random(20 + i, *s).requires_grad_() for i, s in enumerate([(2, 4, 6, 3), (3, 2, 2, 2)])
    )
    for op in (ops.avg_pool, ops.spatial_mean):
        assert torch.autograd.gradgradcheck(op, (r,))
    assert torch.autograd.gradgradcheck(ops.upsample, (r, up))


def test_second_derivatives_where_one_input_was_made_of_another():
    """A skip connection: what the first source owes to the second is not the layer's own gradient."""
    weight, up, gamma = random(30, 3, 5, 3, 3), random(31, 2, 3, 2, 2), random(32, 3)

    def chain(skip, plain):
        s = skip.new_ones(len(skip))
        if plain:
            deep = F.conv_transpose2d(F.avg_pool2d(skip.permute(0, 3, 1, 2), 2), up, stride=2)
            out, t = plain_layer(deep.permute(0, 2, 3, 1), s, skip, s, weight, None, gamma, True)
        else:
            deep = ops.upsample(ops.avg_pool(skip), up)
            out, t = ops.fused_layer(deep, s, weight, None, gamma, EPS, r2=skip, s2=s)
        return (t[:, None, None, None] * out).square().sum()

    found = []
    for plain in (False, True):
        skip = random(33, 2, 4, 4, 2).requires_grad_()
        (g,) = torch.autograd.grad(chain(skip, plain), skip, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), skip)[0])
    close(*found, 1e-10)


def small_network(r, s, weight, gamma, up):
    h, t = ops.fused_layer(r, s, weight, None, gamma, EPS)
    return t[:, None] * ops.spatial_mean(ops.upsample(ops.avg_pool(h), up))


NETWORK = ((1, 2, 4, 6, 3), (2, 2), (3, 5, 3, 3, 3), (4, 5), (5, 5, 2, 2, 2))


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_compile_fullgraph_with_backward():
    eager = [random(*shape).float().requires_grad_() for shape in NETWORK]
    traced = [t.detach().clone().requires_grad_() for t in eager]
    out = small_network(*eager)
    got = torch.compile(small_network, fullgraph=True, backend="aot_eager")(*traced)
    torch.testing.assert_close(got, out)
    out.square().sum().backward()
    got.square().sum().backward()
    for a, b in zip(traced, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.filterwarnings("ignore")
def test_export():
    class Network(torch.nn.Module):
        def forward(self, *tensors):
            return small_network(*tensors)

    tensors = tuple(random(*shape).float() for shape in NETWORK)
    exported = torch.export.export(Network(), tensors)
    called = {str(node.target) for node in exported.graph.nodes}
    assert "fastphi.fused_layer_fwd.default" in called
    torch.testing.assert_close(exported.module()(*tensors), small_network(*tensors))


# --- the same bits, whoever computes beside ---------------------------------------------------------


def everything(a):
    """All outputs and gradients of a layer with two sources and of an up-sampling."""
    _, grads = (outs := values_and_gradients(compiled, a, torch.float32, True))
    r = a["r"].float().requires_grad_()
    up = random(30, r.shape[3], 21, 2, 2).float().requires_grad_()
    out = ops.upsample(r, up)
    more = torch.autograd.grad(out.square().sum(), (r, up))
    return [*outs[0], *grads.values(), out, *more, ops.spatial_mean(r)]


@pytest.mark.parametrize(
    "sizes", [(3, 16, 24, 20, 12, 70), (2, 40, 62, 20, 12, 36), (2, 32, 47, 130, 126, 240)], ids=str
)
def test_bits_do_not_depend_on_threads(sizes):
    a = layer_arguments(*sizes, True, True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything(a))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_bits_do_not_depend_on_the_batch():
    a = layer_arguments(5, 16, 24, 20, 12, 70, True, True)
    upstream = random(40, 5, 16, 24, 70).float()

    def run(which):
        b = {k: None if v is None else v.float() for k, v in a.items()}
        for k in ("r", "s", "r2", "s2"):
            b[k] = b[k][which].clone().requires_grad_()
        r_out, s_out = compiled(b, True)
        total = (r_out * upstream[which]).sum() + s_out.sum()
        return r_out, s_out, *torch.autograd.grad(total, [b[k] for k in ("r", "s", "r2", "s2")])

    whole, part = run(slice(None)), run([3, 1])
    assert all(torch.equal(x[[3, 1]], y) for x, y in zip(whole, part, strict=True))


@pytest.fixture(params=["float32", "float64"])
def runner(request, make_model):
    """A runner and 5 images of 6400 pixels: one thread takes two at a time, two take all five."""
    dtype = getattr(torch, request.param)
    model = make_model(backend="cpu", dtype=dtype, channels=(6, 17, 33), upsample_bias=True)
    x = random(60, 5, 3, 64, 100).to(dtype)
    assert engine.pick(model, x).name == "cpu"
    return model, engine.runner(model, x), x  # the runner does not keep its model alive


def run_runner(served, x, target):
    """Everything a runner computes, by image. 11 updates of match are two calls into C++."""
    weight = torch.full((target.shape[1],), 1 / target.shape[1], dtype=x.dtype)
    matched, losses, updates, converged = served.match(x, target, weight, 0.005, 11, 0.3)
    return {
        "denoised": served.denoise(x),
        **served.block_means(x),
        "matched": matched,
        "losses": losses.nan_to_num(-1).T,
        "updates": updates,
        "converged": converged,
    }


def test_runner_bits_do_not_depend_on_threads(runner):
    _, served, x = runner
    target = served.block_means(x.roll(1, 0), until="mid")["mid"]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run_runner(served, x, target))
    assert results[0]["updates"].min() > 0  # else nothing was tested
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_runner_bits_do_not_depend_on_the_place_in_the_batch(runner):
    _, served, x = runner
    target = served.block_means(x.roll(1, 0), until="mid")["mid"]
    whole = run_runner(served, x, target)
    for rows in ([3], [4, 0, 4], [2, 1]):
        part = run_runner(served, x[rows], target[rows])
        for name, value in part.items():
            assert torch.equal(value, whole[name][rows]), (name, rows)


@pytest.mark.parametrize("name", ["enc1.0.weight", "mid.2.gamma", "up1.weight", "dec2.0.weight"])
def test_runner_repacks_what_changed_in_place(make_model, name):
    """Every part it packs, those of the gradient too (match). The other changes: test_seam.py."""
    model = make_model(backend="cpu", dtype=torch.float64)
    x = random(61, 2, 3, 8, 8)
    plain_runner = reference.ReferenceRunner(model)
    served = engine.runner(model, x)
    target, weight = random(62, 2, 8), torch.full((8,), 1 / 8, dtype=torch.float64)
    before = served.denoise(x), served.match(x, target, weight, 0.01, 3, 0.0)[1]
    with torch.no_grad():
        model.get_parameter(name).mul_(-1.5)
    close(served.denoise(x), plain_runner.denoise(x), 1e-10)
    found = served.match(x, target, weight, 0.01, 3, 0.0)[1]
    close(found, plain_runner.match(x, target, weight, 0.01, 3, 0.0)[1], 1e-8)
    assert not torch.equal(served.denoise(x), before[0])
    assert torch.equal(found, before[1]) == name.startswith(("up", "dec"))


def test_one_openmp_runtime():
    """Two pools of threads would fight for the cores; a second runtime can also deadlock."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    look = (
        "import torch; {}torch.ones(99999).sum();"
        "print({{l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.split()[-1]}})"
    )

    def loaded(more):
        command = [sys.executable, "-c", look.format(more)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        names = run.stdout.strip().strip("{}").split(", ")
        stems = ("libgomp", "libomp", "libiomp")
        return {n for n in names if os.path.basename(n.strip("'")).startswith(stems)}

    use = (
        "from fastphi import ops; "
        "ops.fused_layer(torch.ones(2, 32, 32, 8), torch.ones(2), torch.ones(8, 8, 3, 3),"
        " None, None, 1.0);"
    )
    alone, beside = loaded(""), loaded(use)
    assert len(beside) == 1, beside
    assert beside == alone, "not torch's own"


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_each_instruction_set(isa):
    """The comparison with the plain form, in a process of its own that runs this set."""
    if isa not in ISAS:
        pytest.skip(f"{isa} is not compiled on this platform")
    here = Path(__file__)
    run = subprocess.run(
        [sys.executable, "-c", "import test_ops; test_ops.main()"],
        env={**os.environ, "FASTPHI_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    if "this processor does not have" in run.stderr:
        pytest.skip(run.stderr.strip().splitlines()[-1])
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["isa"] == isa


def main() -> None:
    """Every layer and the other ops, on the instruction set that FASTPHI_ISA names."""
    for dtype in VALUE:
        for shape in LAYERS:
            test_fused_layer_values_and_gradients(shape, dtype)
        test_upsample(2, 5, 7, 10, 6, dtype)
        test_upsample(3, 4, 16, 3, 32, dtype)
    print(torch.ops.fastphi.build_info())


def test_an_unknown_instruction_set_is_an_error():
    run = subprocess.run(
        [sys.executable, "-c", "from fastphi import ops; ops.missing()"],
        env={**os.environ, "FASTPHI_ISA": "mmx", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0 and "FASTPHI_ISA: expected one of" in run.stderr


# --- bad inputs -------------------------------------------------------------------------------------


def bad_layers():
    r, s, weight, c = torch.zeros(2, 4, 6, 3), torch.ones(2), torch.zeros(5, 3, 3, 3), torch.ones(5)
    good = {"r": r, "s": s, "weight": weight, "bias": c, "gamma": c}
    yield {**good, "r": r[0]}, "r: expected 4 dimensions|r: expected shape"
    yield {**good, "r": r.to(torch.bfloat16)}, "r: expected float32 or float64"
    yield {**good, "s": s.double()}, "s: expected .* like the first argument"
    yield {**good, "s": torch.ones(3)}, "s: expected shape"
    yield {**good, "weight": torch.zeros(5, 4, 3, 3)}, "weight: expected shape"
    yield {**good, "weight": torch.zeros(5, 3, 5, 5)}, "weight: expected shape"
    yield {**good, "bias": torch.ones(4)}, "bias: expected shape"
    yield {**good, "gamma": torch.ones(6)}, "gamma: expected shape"
    yield {**good, "r2": r}, "r2, s2: expected both or neither"
    yield {**good, "r2": torch.zeros(2, 4, 5, 1), "s2": s}, "r2: expected shape"
    yield {**good, "r2": torch.zeros(2, 4, 6, 1), "s2": torch.ones(1)}, "s2: expected shape"


@pytest.mark.parametrize("meta", [False, True], ids=["data", "fake"])
@pytest.mark.parametrize("arguments, words", list(bad_layers()), ids=lambda v: str(v)[:40])
def test_bad_layers_are_named(arguments, words, meta):
    if meta:
        arguments = {k: v.to("meta") for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=words):
        ops.fused_layer(eps=EPS, **arguments)


def test_other_bad_inputs_are_named():
    r = torch.zeros(2, 4, 6, 3)
    with pytest.raises(RuntimeError, match="r: expected even height and width"):
        ops.avg_pool(r[:, :3])
    with pytest.raises(RuntimeError, match="weight: expected shape"):
        ops.upsample(r, torch.zeros(4, 3, 2, 2))
    with pytest.raises(RuntimeError, match=r"weight: expected \w+ like the first"):
        ops.upsample(r, torch.zeros(3, 3, 2, 2).double())
    with pytest.raises(RuntimeError, match="r: expected float32 or float64"):
        ops.spatial_mean(r.half())
    with pytest.raises(RuntimeError, match="draw: expected 2 numbers like sample"):
        ops.noise_normal(0, torch.tensor([1, 2]), 0, torch.tensor([1]), 3, 4, 4)
    with pytest.raises(RuntimeError, match="sample: expected a contiguous int64"):
        ops.noise_normal(0, torch.tensor([1.0]), 0, torch.tensor([1]), 3, 4, 4)


def empty_inputs():
    s, weight, up = torch.ones(2), torch.zeros(5, 3, 3, 3), torch.zeros(3, 2, 2, 2)
    r, none = torch.zeros(2, 4, 6, 3), torch.zeros(2, 4, 6, 0)
    layer = ops.fused_layer
    yield "r", lambda: layer(r[:0], s[:0], weight, None, None, EPS)
    yield "r", lambda: layer(r[:, :, :0], s, weight, None, None, EPS)
    yield "r2", lambda: layer(r, s, weight, None, None, EPS, r2=none, s2=s)
    yield "weight", lambda: layer(r, s, weight[:0], None, s[:0], EPS)
    yield "r", lambda: ops.upsample(r[:, :, :0], up)
    yield "r", lambda: ops.upsample(none, up[:0])
    yield "weight", lambda: ops.upsample(r, up[:, :0])
    yield "r", lambda: ops.spatial_mean(r[:, :0])


@pytest.mark.parametrize("name, call", list(empty_inputs()))
def test_empty_inputs_are_named(name, call):
    """Sizes are divided by: without a check some of these ended the process."""
    with pytest.raises(RuntimeError, match=rf"\b{name}: expected no empty dimension"):
        call()


def test_without_the_library_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(ops, "_missing", "the compiled library is not there; build it with: pip")
    with pytest.raises(RuntimeError, match="fused_layer_fwd: the compiled library .*build it"):
        ops.fused_layer(
            torch.zeros(1, 2, 2, 1), torch.ones(1), torch.zeros(1, 1, 3, 3), None, None, 1
        )
