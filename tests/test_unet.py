from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastphi import reference
from fastphi.config import TrainingInfo, UNetConfig
from fastphi.unet import UNet

# --- facts of the paper ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default():
    with torch.device("meta"):
        return UNet()


def test_default_has_13124803_parameters(default):
    assert sum(p.numel() for p in default.parameters()) == 13_124_803


def test_flops_of_the_default(default):
    """Per image of 3×64×64, multiply and add counted apart."""
    x = torch.empty(1, 3, 64, 64, device="meta")
    for run, billions in (
        (lambda: default.walk(reference.ReferenceOps(), x), 8.23),
        (lambda: default.walk_means(reference.ReferenceOps(), x, "mid"), 1.98),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        assert round(counter.get_total_flops() / 1e9, 2) == billions


class HeldStd(reference.ReferenceOps):
    """The norm's std as a constant: it is what couples all pixels."""

    def layer(self, h, weight, bias, gamma, eps, relu=True, skip=None):
        if gamma is None:
            return super().layer(h, weight, bias, gamma, eps, relu, skip)
        z = super().layer(h, weight, bias, None, eps, relu=False)
        std = z.detach().std(dim=(1, 2, 3), keepdim=True, correction=0)
        return torch.relu(gamma[:, None, None] * z / (std + eps))


@pytest.mark.parametrize(("ops", "size"), [(HeldStd(), 84), (reference.ReferenceOps(), 128)])
def test_receptive_field_of_the_middle_block(ops, size):
    """Default depths, few channels; all terms positive, so that nothing cancels or is cut off."""
    model = UNet(UNetConfig(channels=(2, 2, 2, 2), image_channels=1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_().add_(0.1)
    x = torch.rand(1, 1, 128, 128, dtype=torch.float64, requires_grad=True)
    mid = next(h for name, h in model._blocks(ops, x) if name == "mid")
    (gradient,) = torch.autograd.grad(mid[0, 0, 8, 8], x)
    rows, columns = gradient[0, 0].nonzero().unbind(1)
    assert rows.max() - rows.min() + 1 == size == columns.max() - columns.min() + 1


def test_initial_values():
    """Kaiming-normal weights (fan-in), biases 0, gains N(0, (2/9/64)²) within ±0.025."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet(UNetConfig(channels=(32, 64), upsample_bias=True))
    assert model.mid[1].weight.detach().std() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert model.up1.weight.detach().std() == pytest.approx((2 / (64 * 4)) ** 0.5, rel=0.05)
    gains = torch.cat([p.detach() for n, p in model.named_parameters() if n.endswith("gamma")])
    assert gains.std() == pytest.approx(2 / 9 / 64, rel=0.1) and gains.abs().max() <= 0.025
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("bias"))


def test_names_are_pinned(default):
    """Flat and final: they are in people's checkpoints."""
    config = UNetConfig(channels=(4, 6, 8), enc_layers=(1, 2), mid_layers=1, dec_layers=2)
    assert list(UNet(config).state_dict()) == [
        *("enc1.0.weight", "enc1.0.bias"),
        *("enc2.0.weight", "enc2.0.bias", "enc2.0.gamma"),
        *("enc2.1.weight", "enc2.1.bias", "enc2.1.gamma"),
        *("mid.0.weight", "mid.0.bias", "mid.0.gamma"),
        "up2.weight",
        *("dec2.0.weight", "dec2.0.bias", "dec2.0.gamma"),
        *("dec2.1.weight", "dec2.1.bias", "dec2.1.gamma"),
        "up1.weight",
        *("dec1.0.weight", "dec1.0.bias", "dec1.0.gamma"),
        *("dec1.1.weight", "dec1.1.bias"),
    ]
    assert default.config.block_names == ("enc1", "enc2", "enc3", "mid", "dec3", "dec2")
    layer = UNet(UNetConfig(channels=(4, 6), norm="layer", upsample_bias=True, bias=False))
    assert [n for n in layer.state_dict() if n.startswith(("mid.0", "up"))] == [
        *("mid.0.weight", "mid.0.gamma", "mid.0.beta", "up1.weight")
    ]


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"channels": (4,)}, ValueError, "at least two"),
        ({"channels": 4}, TypeError, "channels"),
        ({"channels": (4, 0)}, ValueError, r"channels\[1\]"),
        ({"channels": (4, 6.5)}, TypeError, r"channels\[1\]"),
        ({"enc_layers": (2, 2)}, ValueError, r"enc_layers.*one per resolution \(3\)"),
        ({"dec_layers": (1, 6, 6)}, ValueError, "decoder block 1"),
        ({"mid_layers": 0}, ValueError, "mid_layers"),
        ({"image_channels": 0}, ValueError, "image_channels"),
        ({"norm": "batch"}, ValueError, "norm"),
        ({"eps": 0}, ValueError, "eps"),
        ({"bias": 1}, TypeError, "bias"),
    ],
)
def test_impossible_configurations(config, error, match):
    with pytest.raises(error, match=match):
        UNetConfig(**config)


# --- every legal configuration, on every engine, against the reference in float64 -----------------

CONFIGS = {
    "three blocks": {"channels": (4, 6, 8, 10)},
    "one block": {"channels": (5, 7)},
    "grey, odd": {"channels": (3, 5, 9), "image_channels": 1},
    "four image channels": {"image_channels": 4},
    "one channel": {"channels": (1, 1, 1), "image_channels": 1},
    "counts per resolution": {"enc_layers": (1, 3), "mid_layers": 1, "dec_layers": (4, 1)},
    "shallow": {"enc_layers": 1, "mid_layers": 1, "dec_layers": 2},
    "up-sampling with bias": {"channels": (4, 6, 8, 10), "upsample_bias": True},
    "residual": {"residual": True},
    "no bias": {"bias": False},
    "wide": {"channels": (17, 33)},
    "textbook norm": {"norm": "layer"},
    "eps": {"eps": 0.3},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_configuration_runs_as_the_reference(make_model, backend, config):
    model = make_model(backend=backend, **config)
    multiple = 2**model.config.blocks
    shape = (2, model.config.image_channels, 2 * multiple, 3 * multiple)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    if backend == "cpu" and model.config.norm == "layer":
        with pytest.raises(RuntimeError, match="cannot serve.*norm"):
            model(x)
        return
    oracle = copy.deepcopy(model).double()
    oracle.backend = "reference"
    with torch.no_grad():
        close(model(x), oracle(x.double()))
        means = model.block_means(x)
        assert tuple(means) == model.config.block_names
        for name, expected in oracle.block_means(x.double()).items():
            close(means[name], expected)
    check_gradients(model, oracle, x)


def check_gradients(model, oracle, x):
    """Of a random functional of the denoised image, to the input and to every parameter."""
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    gradients = []
    for network in (model, oracle):
        dtype = next(network.parameters()).dtype
        leaf = x.to(dtype).requires_grad_()
        out = network(leaf)
        close(out.detach(), oracle(x.double()).detach())
        gradients.append(
            torch.autograd.grad((out * upstream.to(dtype)).sum(), [leaf, *network.parameters()])
        )
    for found, expected in zip(*gradients, strict=True):
        close(found, expected, 1e-4)  # up to fourteen layers forward and back in float32


def close(found, expected, tolerance=2e-5):
    """Relative to the largest value; an array of zeros must be zeros up to rounding."""
    assert found.shape == expected.shape
    scale = max(float(expected.abs().max()), 1e-3)
    assert float((found.double() - expected).abs().max()) <= tolerance * scale


# --- calls ----------------------------------------------------------------------------------------


@pytest.fixture
def x():
    return torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(4))


def fails(*_, **__):
    raise AssertionError("a block after the last one asked for was run")


@pytest.mark.parametrize("grad", [False, True], ids=["runner", "ops"])
@pytest.mark.parametrize("until", ["enc1", "enc2", "mid", "dec2"])
def test_early_exit_is_true(make_model, x, until, grad):
    """What comes after the last block asked for may fail as it likes: nobody calls it."""
    model = make_model(backend="reference")
    with torch.set_grad_enabled(grad):
        expected = {k: v.detach() for k, v in model.block_means(x).items()}
        names = ["enc1", "enc2", "mid", "up2", "dec2", "up1", "dec1"]
        short = make_model()  # an engine steps back: it could not fail like that
        for name in names[names.index(until) + 1 :]:
            for module in short.get_submodule(name).modules():
                module.forward = fails
        found = short.block_means(x, until=until)
        assert tuple(found) == model.config.block_names[: len(found)] and list(found)[-1] == until
        for name, mean in found.items():
            assert torch.equal(mean.detach(), expected[name])
        if until == "mid":
            assert torch.equal(short.phi(x).detach(), expected["mid"])


def test_later_blocks_cannot_reach_phi(make_model, backend, x):
    model = make_model(backend=backend)
    with torch.no_grad():
        expected = model.phi(x)
        for name, parameter in model.named_parameters():
            if name.startswith(("up", "dec")):
                parameter.fill_(torch.nan)
        assert torch.equal(model.phi(x), expected)
        assert model(x).isnan().all()


def test_block_means_are_means_before_pooling(make_model, x):
    model = make_model(backend="reference")
    seen = []

    class Watching(reference.ReferenceOps):
        def pool(self, h):
            seen.append(h.detach())
            return super().pool(h)

    with torch.no_grad():
        means = model.walk_means(Watching(), x, "mid")
    for name, h in zip(("enc1", "enc2"), seen, strict=True):
        torch.testing.assert_close(means[name], h.sum(dim=(2, 3)) / (h.shape[2] * h.shape[3]))


def test_results_do_not_depend_on_the_batch(make_model, backend):
    model = make_model(backend=backend)
    x = torch.rand(5, 3, 16, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        denoised, phi = model(x), model.phi(x)
        for rows in ([2], [4, 0], [3, 3, 1]):
            assert torch.equal(model(x[rows]), denoised[rows])
            assert torch.equal(model.phi(x[rows]), phi[rows])


def test_memory_layout_does_not_matter(make_model, backend, x):
    model = make_model(backend=backend)
    strided = torch.zeros(3, 3, 16, 12)[:, :, ::2].copy_(x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = model(x).detach()
            for y in (x.to(memory_format=torch.channels_last), strided):
                close(model(y).detach(), expected)


def test_score(make_model, x):
    model = make_model()
    with torch.no_grad():
        denoised = model(x)
        torch.testing.assert_close(model.score(x, 0.5), (denoised - x) * 4)
        each = model.score(x, torch.tensor([0.5, 1.0, 2.0]))
        for i, variance in enumerate((0.25, 1.0, 4.0)):
            torch.testing.assert_close(each[i], (denoised[i] - x[i]) / variance)
        assert torch.equal(model(x, sigma=0.3), denoised)  # blind: accepted, not used
        for sigma in (0.0, -1.0, float("nan"), [0.5, 0.5]):
            with pytest.raises(ValueError, match="sigma"):
                model.score(x, sigma)


def test_residual_is_the_other_sign_of_the_same_network(make_model, x):
    plain, residual = make_model(), make_model(residual=True)
    with torch.no_grad():
        torch.testing.assert_close(residual(x), x - plain(x))
        assert torch.equal(residual.phi(x), plain.phi(x))


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (torch.rand(3, 8, 8), ValueError, r"\(N, C, H, W\), got shape \(3, 8, 8\)"),
        (torch.rand(1, 1, 8, 8), ValueError, r"takes 3 channel\(s\), got 1"),
        (torch.rand(1, 3, 10, 8), ValueError, "multiples of 4 .* got 10x8"),
        (torch.rand(1, 3, 8, 2), ValueError, "multiples of 4"),
        (torch.rand(0, 3, 8, 8), ValueError, "non-empty"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ValueError, "uint8"),
        (torch.rand(1, 3, 8, 8).double(), ValueError, "float64 .* the model is torch.float32"),
        ([[1.0]], TypeError, "expected a tensor"),
    ],
)
def test_bad_images(make_model, bad, error, match):
    model = make_model()
    for call in (model, model.phi, model.block_means, lambda x: model.score(x, 1.0)):
        with torch.no_grad(), pytest.raises(error, match=match):
            call(bad)
    with pytest.raises(ValueError, match="until: expected one of dec2, enc1, enc2, mid"):
        model.block_means(torch.rand(1, 3, 8, 8), until="dec1")


def test_copies_and_pickles(make_model, backend, x):
    model = make_model(backend=backend)
    model.training_info = TrainingInfo(0.1, 2.0, (0.5, 0.5, 0.5), "a", 3)
    with torch.no_grad():
        expected = model(x)  # a prepared runner must not be in the way
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)
            assert other.training_info == model.training_info and other.config == model.config
            next(other.parameters()).add_(1)
            assert not torch.equal(other(x), expected) and torch.equal(model(x), expected)


def test_representation_has_no_parameters(make_model, backend, x):
    model = make_model(backend=backend)
    phi = model.representation()
    assert not list(phi.parameters()) and not phi.state_dict() and not list(phi.buffers())
    phi.eval().requires_grad_(False)
    assert all(p.requires_grad for p in model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # as plenoptic asks of what it synthesises with
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(phi(leaf).square().sum(), leaf)
    (expected,) = torch.autograd.grad(model.phi(leaf).square().sum(), leaf)
    assert torch.equal(gradient, expected) and gradient.abs().sum() > 0


# --- torch.compile and export ---------------------------------------------------------------------


@pytest.mark.parametrize("call", ["forward", "phi"])
def test_compiles_as_one_graph(make_model, backend, x, call):
    model = make_model(backend=backend, enc_layers=1, mid_layers=1, dec_layers=2)
    plain = getattr(model, call)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = plain(a), compiled(b)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(6))
    (expected,) = torch.autograd.grad((expected * upstream).sum(), a)
    (found,) = torch.autograd.grad((found * upstream).sum(), b)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-6)


def test_compiles_as_one_graph_in_bfloat16(make_model, x):
    model = make_model(enc_layers=1, mid_layers=1, dec_layers=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), model(x)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    low = model.bfloat16()
    with torch.no_grad():
        found = torch.compile(low, fullgraph=True, backend="aot_eager")(x.bfloat16())
        torch.testing.assert_close(found, low(x.bfloat16()), rtol=2e-2, atol=2e-2)


def test_exports(make_model, backend, x):
    model = make_model(backend=backend, enc_layers=1, mid_layers=1, dec_layers=2)
    program = torch.export.export(model, (x,))
    close(program.module()(x).detach(), model(x).detach())
