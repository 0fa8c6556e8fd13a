"""The Winograd convolution inside the runner, and that no bit depends on how its work is shared.

test_ops.py compares single layers with the plain form on every instruction set; here are what the
runner alone asks of it (pool and means without the activation, gradients read from z), and sizes that
take every way of sharing.
"""

from __future__ import annotations

import pytest
import torch

import fastphi
from fastphi import engine
from fastphi.engine import ops

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))

# channel counts beside the vector's, and enough of them for Winograd from the second layer on
CONFIGS = {
    "multiples": dict(channels=(16, 32, 48), mid_layers=2, dec_layers=2),
    "odd": dict(channels=(20, 36, 52), image_channels=1, upsample_bias=True, dec_layers=2),
    "one layer each": dict(channels=(17, 40), enc_layers=1, mid_layers=1, dec_layers=2),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# tiles that are cut by the border, one pixel high at the smallest level, and more than a strip
SIZES = [(8, 12), (20, 28), (4, 136)]


def image(n: int, c: int, h: int, w: int) -> torch.Tensor:
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(got, want, tolerance) -> None:
    error = (got.double() - want).abs().max() / want.abs().max()
    assert got.shape == want.shape and error <= tolerance, f"{error:.2e} > {tolerance}"


@each_config
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_images_and_means(make_model, config, size):
    """float32 keeps the accuracy that the engine promises: images 1e-5, means 5e-6."""
    oracle = make_model(backend="reference", **config).double()
    model = make_model(backend="cpu", **config)
    x = image(2, model.config.image_channels, *size)
    close(model(x.float()), oracle(x), 1e-5)
    means, want = model.block_means(x.float()), oracle.block_means(x)
    for name in want:
        close(means[name], want[name], 5e-6)
        # until an inner block: its activation is never written
        assert torch.equal(model.block_means(x.float(), until=name)[name], means[name])


def first_moment(model, x, target):
    """Adam's m after one update of the match: a tenth of the gradient to the image."""
    runner = engine.runner(model, x)
    config, n = model.config, len(x)
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    weight = torch.full((config.channels[-1],), 1 / config.channels[-1], dtype=x.dtype)
    channels, enc_layers, mid_layers, _, eps, packed = runner._network(False, torch.float32)
    torch.ops.fastphi.match_steps(
        x.clone(),
        m,
        v,
        x.new_zeros((2, n)),
        torch.zeros(n, dtype=torch.int64),
        torch.ones(n, dtype=torch.bool),
        target,
        weight,
        channels,
        enc_layers,
        mid_layers,
        eps,
        packed,
        runner._parameters("transposed", torch.float32),
        0.01,
        0.0,
        0,
        1,
    )
    return m


@each_config
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradient_to_the_image(make_model, config, size):
    oracle = make_model(backend="reference", **config).double()
    model = make_model(backend="cpu", **config)
    x = image(2, model.config.image_channels, *size).requires_grad_()
    with torch.no_grad():
        target = 2 * oracle.phi(x)  # far away: the loss's own difference shall not cancel
    loss = ((oracle.phi(x) - target) ** 2).mean(dim=1).sum()
    (want,) = torch.autograd.grad(loss, x)
    got = first_moment(model, x.detach().float(), target.float())
    close(got * 10, want, 1e-5)


# (n, h, w, channels, outputs): few weights; more weights than a cache, few tiles; and many tiles
SHARES = [(5, 12, 20, 24, 40), (5, 8, 12, 100, 112), (9, 40, 64, 96, 100)]


@pytest.mark.parametrize("share", SHARES, ids=str)
@torch.no_grad()
def test_bits_do_not_depend_on_company_or_threads(share):
    n, h, w, c, cout = share
    seeded = torch.Generator().manual_seed(2)
    r = torch.rand(n, h, w, c, generator=seeded)
    weight = torch.randn(cout, c, 3, 3, generator=seeded)
    gamma, s = torch.randn(cout, generator=seeded), torch.rand(n, generator=seeded) + 0.5
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        want = ops.fused_layer(r, s, weight, None, gamma, 1e-5)
        torch.set_num_threads(1)
        for got, expected in zip(
            ops.fused_layer(r, s, weight, None, gamma, 1e-5), want, strict=True
        ):
            assert torch.equal(got, expected)
        for i in (0, n - 1):
            r_out, s_out = ops.fused_layer(r[i : i + 1], s[i : i + 1], weight, None, gamma, 1e-5)
            assert torch.equal(r_out[0], want[0][i]) and torch.equal(s_out[0], want[1][i])
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_nan_stays_in_its_image(make_model):
    """Border pixels and lanes beyond the channels come from zeros, never from a neighbour."""
    model = make_model(backend="cpu", **CONFIGS["odd"])
    x = image(3, 1, 12, 20).float()
    want = model(x)
    x[1] = torch.nan
    got = model(x)
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2]) and got[1].isnan().all()


@torch.no_grad()
def test_weights_that_few_tiles_share_are_the_model_s_own(make_model):
    """One image's are transformed where they are used, many images' packed: to the same bits; and
    whoever writes them, in whatever way, is seen at the next call, within `frozen` too."""
    model = make_model(channels=(16, 136), mid_layers=2, enc_layers=1, dec_layers=2)
    oracle = make_model(
        backend="reference", channels=(16, 136), mid_layers=2, enc_layers=1, dec_layers=2
    ).double()
    x = image(18, 3, 20, 12).float()  # 6 tiles each in the middle block
    runner = engine.runner(model, x)
    assert runner._few(x) == frozenset() and runner._few(x[:1]) == {("mid", 1)}
    whole, phi = model(x), model.phi(x)
    close(whole, oracle(x.double()), 1e-5)
    for i in (0, 7):
        assert torch.equal(model(x[i : i + 1])[0], whole[i])
        assert torch.equal(model.phi(x[i : i + 1])[0], phi[i])
    with fastphi.frozen(model):
        model.phi(x[:1])
        model.mid[1].weight.data[5] *= 2
        changed = model.phi(x[:1])
    assert not torch.equal(changed, phi[:1]) and torch.equal(changed, model.phi(x)[:1])
