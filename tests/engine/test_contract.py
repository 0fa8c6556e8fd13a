"""The fast path's contract (docs/contract.md): gestures on a model, each against the plain modules."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import fastphi
from fastphi import engine, ops, reference
from fastphi.engine import contract
from fastphi.engine.cpu import pack as cpu_pack
from fastphi.unet import UNet

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))
F = torch.func
A = torch.autograd.functional


@pytest.fixture
def x():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def v(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)


@pytest.fixture
def both(make_model):
    """The same model by its engine and by plain PyTorch."""
    model = make_model(dtype=torch.float64, upsample_bias=True)
    plain = copy.deepcopy(model)
    plain.backend = "reference"
    return model, plain


def same(a, b, tolerance: float = 1e-9) -> None:
    a, b = (torch.as_tensor(t).detach().double() for t in (a, b))
    assert a.shape == b.shape and b.abs().max() > 0  # else nothing was tested
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def loss(model, x):
    return model.phi(x).square().sum()


def dual(model, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent


def penalty(model, x, v):
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
    g.square().sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([*grads, leaf.grad.flatten()])


DERIVATIVES = {
    "jvp": lambda m, x, v: F.jvp(m, (x,), (v,))[1],
    "jvp of the score": lambda m, x, v: F.jvp(lambda y: m.score(y, 0.1), (x,), (v,))[1],
    "jvp of phi": lambda m, x, v: F.jvp(m.phi, (x,), (v,))[1],
    "vjp": lambda m, x, v: F.vjp(m, x)[1](v)[0],
    "grad": lambda m, x, v: F.grad(lambda y: loss(m, y))(x),
    "vmap": lambda m, x, v: F.vmap(m)(torch.stack([x, v])),
    "vmap of grad": lambda m, x, v: F.vmap(F.grad(lambda y: m(y[None]).square().sum()))(x),
    "jacrev": lambda m, x, v: F.jacrev(m.phi)(x),
    "jacfwd": lambda m, x, v: F.jacfwd(m.phi)(x),
    "hessian": lambda m, x, v: F.hessian(lambda y: loss(m, y))(x[:1, :, :4, :4]),
    "linearize": lambda m, x, v: F.linearize(m, x)[1](v),
    "dual numbers": dual,
    "autograd.hvp": lambda m, x, v: A.hvp(lambda y: loss(m, y), x, v)[1],
    "autograd.jvp": lambda m, x, v: A.jvp(m, x, v)[1],
    "autograd.jacobian": lambda m, x, v: A.jacobian(m.phi, x),
    "in one vmap": lambda m, x, v: A.jacobian(m.phi, x, vectorize=True),
    "forward": lambda m, x, v: A.jacobian(m.phi, x, vectorize=True, strategy="forward-mode"),
    "gradient penalty": penalty,
    "functional_call": lambda m, x, v: F.functional_call(m, dict(m.named_parameters()), (x,)),
    "of parameters": lambda m, x, v: F.grad(lambda p: F.functional_call(m, p, (x,)).square().sum())(
        dict(m.named_parameters())
    )["mid.0.weight"],
    "jit.trace": lambda m, x, v: torch.jit.trace(m, (x,), check_trace=False)(v),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_and_transforms(both, x, v, name):
    found, expected = (DERIVATIVES[name](model, x, v) for model in both)
    same(found, expected)


def test_a_divergence_and_a_jacobian_against_finite_differences(both, x):
    """As docs/contract.md shows them."""
    model, _ = both
    image, step = x[:1], 1e-6
    jacobian = F.jacrev(lambda y: model(y))(image).reshape(image.numel(), image.numel())
    columns = []
    with torch.no_grad():
        for i in range(image.numel()):
            e = torch.zeros(image.numel(), dtype=image.dtype)
            e[i] = step
            e = e.reshape(image.shape)
            columns.append((model(image + e) - model(image - e)).flatten() / (2 * step))
    same(jacobian, torch.stack(columns, dim=1), 1e-5)
    probe = torch.sign(x[:1] - 0.5)
    _, product = F.jvp(model, (image,), (probe,))
    same((probe * product).sum(), (probe.flatten() @ jacobian @ probe.flatten()), 1e-9)


def test_ops_under_a_transform_refuse_in_one_sentence(x):
    h = x.permute(0, 2, 3, 1).contiguous()
    for use in (
        lambda: F.jvp(ops.avg_pool, (h,), (h,)),
        lambda: F.grad(lambda t: ops.spatial_mean(t).sum())(h),
        lambda: F.vmap(ops.avg_pool)(h[None]),
    ):
        with pytest.raises(
            RuntimeError, match="fastphi.ops.*: .* is at work, which it has no rule"
        ):
            use()


# --- hooks ----------------------------------------------------------------------------------------


def forward_hook(model, seen):
    return model.mid[-1].register_forward_hook(lambda m, i, out: seen.append(out.detach()))


def replacing_hook(model, seen):
    return model.mid[0].register_forward_hook(lambda m, i, out: 2 * out + 0.1)


def pre_hook(model, seen):
    def hook(module, inputs):
        seen.append(inputs[0].detach())
        return (inputs[0] + 0.5,)

    return model.up1.register_forward_pre_hook(hook)


def block_hook(model, seen):
    return model.dec2.register_forward_hook(lambda m, i, out: seen.extend(t.detach() for t in i))


def global_hook(model, seen):
    return nn.modules.module.register_module_forward_hook(
        lambda m, i, out: seen.append(out.detach()) if m is model.mid[1] else None
    )


HOOKS = [forward_hook, replacing_hook, pre_hook, block_hook, global_hook]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("hook", HOOKS, ids=lambda h: h.__name__)
def test_hooks_see_and_replace_activations(both, x, hook, grad):
    results = []
    for model in both:
        with torch.set_grad_enabled(grad):
            before, seen = model(x), []
            handle = hook(model, seen)
            after = model(x)
            handle.remove()
            assert torch.equal(model(x), before)
        assert all(t.dim() == 4 and len(t) == len(x) for t in seen)
        results.append((after, *seen))
    assert len(results[0]) == len(results[1])
    for found, expected in zip(*results, strict=True):
        same(found, expected)


def test_backward_hooks(both, x):
    results = []
    for model in both:
        seen = []
        model.mid[1].register_full_backward_hook(lambda m, gi, go, seen=seen: seen.append(go[0]))
        model(x).square().sum().backward()
        results.append(seen[0])
    same(*results)


def test_the_runner_that_jobs_use_steps_back_too(both, x):
    results = []
    for model in both:
        forward_hook(model, seen := [])
        replacing_hook(model, seen)
        target = torch.zeros(2, 8, dtype=x.dtype)
        results.append(fastphi.match_phi(model, x, target, max_iter=3).x)
        assert seen
    same(*results)


def test_flops_are_counted_by_part(both, x):
    counts = []
    for model in both:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_feature_extraction_by_a_graph(both, x):
    model, plain = both
    graph = torch.fx.symbolic_trace(model, concrete_args={"sigma": None})
    with torch.no_grad():
        same(graph(x), plain(x))


def test_a_compiled_model_with_a_hook(both, x):
    model, plain = both
    for m in both:
        replacing_hook(m, None)
    same(torch.compile(model, backend="aot_eager")(x), plain(x))


# --- what a model is made of ----------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


class Own(nn.Module):
    def forward(self, h, skip=None):
        return h.abs() + 0.1


class Sub(UNet):
    def _blocks(self, ops, x):
        for name, h in super()._blocks(ops, x):
            yield name, h + 1 if name == "mid" else h


def parameter(model, name, *shape):
    part, _, key = name.rpartition(".")
    fresh = torch.full(shape, 0.3, dtype=torch.float64)
    setattr(model.get_submodule(part), key, nn.Parameter(fresh))


CHANGES = {
    "parametrization": lambda m: parametrize.register_parametrization(
        m.mid[1], "weight", Doubled()
    ),
    "weight norm": lambda m: parametrizations.weight_norm(m.mid[1]),
    "spectral norm": lambda m: parametrizations.spectral_norm(m.dec1[0]),
    "pruning": lambda m: prune.random_unstructured(m.mid[0], "weight", 0.5),
    "a layer's relu": lambda m: setattr(m.mid[1], "relu", False),
    "a layer's eps": lambda m: setattr(m.mid[1], "eps", 0.5),
    "a layer replaced": lambda m: m.mid.__setitem__(1, Own()),
    "a layer less": lambda m: m.mid.__delitem__(1),
    "a layer's forward": lambda m: setattr(m.mid[1], "forward", Own().forward),
    "an up-sampling replaced": lambda m: setattr(m, "up1", nn.ConvTranspose2d(6, 4, 2, 2).double()),
    "a gain for all channels": lambda m: parameter(m, "mid.2.gamma", 1),
    "no gain": lambda m: setattr(m.mid[2], "gamma", None),
    "no bias": lambda m: setattr(m.mid[2], "bias", None),
    "a subclass": lambda m: setattr(m, "__class__", Sub),
    "float32 weights in a layer that is not called": lambda m: m.dec1.float() and None,
    "an own part beside": lambda m: setattr(m, "head", nn.Linear(2, 2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_is_not_its_configuration(both, x, name):
    results = []
    for model in both:
        torch.manual_seed(3)  # of what is random in a change
        with torch.no_grad():
            model.phi(x)
            CHANGES[name](model)
            results.append(model.phi(x))
            if "float32" not in name:
                results.append(model(x))
        if "float32" not in name:
            results.append(model(x).detach())
    half = len(results) // 2
    for found, expected in zip(results[:half], results[half:], strict=True):
        same(found, expected)


@pytest.mark.parametrize(("name", "shape"), [("mid.0.bias", (3,)), ("mid.0.weight", (8, 5, 3, 3))])
def test_a_parameter_that_cannot_be_is_an_error(both, x, name, shape):
    model, _ = both
    parameter(model, name, *shape)
    with pytest.raises(RuntimeError):
        model.phi(x)
    model.backend = "cpu"
    with torch.no_grad(), pytest.raises(RuntimeError, match=rf"{name} is Parameter .*; expected"):
        model.phi(x)


def test_the_reason_is_told_once_and_an_engine_by_name_refuses(both, x, caplog):
    model, _ = both
    engine.seam._told.clear()
    model.mid[1].relu = False
    with torch.no_grad(), caplog.at_level(logging.WARNING, "fastphi"):
        model(x), model(x)
    told = [r.message for r in caplog.records]
    assert told == [
        "the reference engine runs: engine cpu: mid.1.relu is False, its configuration has True"
    ]
    model.backend = "cpu"
    with pytest.raises(RuntimeError, match="'cpu' was asked for but cannot serve .*mid.1.relu"):
        model(x)


def test_every_reason(both, x):
    """The quick look and the slow one, which says why, agree."""
    model, _ = both
    assert contract._as_configured(model, x) and contract.difference(model, x) is None
    for name, change in CHANGES.items():
        changed = copy.deepcopy(model)
        change(changed)
        slow = contract.hooked(changed) or contract.difference(changed, x)
        assert (slow is None) == (name == "an own part beside"), (name, slow)
        assert not contract._as_configured(changed, x), name


# --- weights --------------------------------------------------------------------------------------


def by_data(p):
    p.data[-1] = 0.7


def by_numpy(p):
    p.detach().numpy()[-1] *= -2


def by_dlpack(p):
    np.from_dlpack(p.detach())[0] += 1


def by_storage(p):
    torch.tensor([], dtype=p.dtype).set_(p.untyped_storage(), 0, p.shape, p.stride()).mul_(0.5)


def by_swap(p):
    """Two outputs change places: the same values."""
    p.data[[0, 1]] = p.data[[1, 0]]


def by_fused_adam(p):
    p.grad = torch.zeros_like(p)
    p.grad.flatten()[7 % p.numel()] = 1
    torch.optim.Adam([p], lr=0.5, fused=True).step()


def by_fused_sgd(p):
    p.grad = torch.zeros_like(p)
    p.grad.flatten()[-1] = 1
    torch.optim.SGD([p], lr=0.5, fused=True).step()


def by_data_pointer(p):
    p.data = p.detach() * 1.5


WRITES = [by_data, by_numpy, by_dlpack, by_storage, by_swap, by_fused_adam, by_fused_sgd]
WRITES.append(by_data_pointer)


@pytest.mark.parametrize("name", ["mid.1.weight", "enc1.0.bias", "mid.2.gamma", "dec1.1.weight"])
@pytest.mark.parametrize("write", WRITES, ids=lambda w: w.__name__)
def test_weights_are_never_stale(make_model, x, write, name):
    model, x = make_model(), x.float()
    plain = reference.ReferenceRunner(model)
    with torch.no_grad():
        before = model(x)
        runner = engine.runner(model, x)  # held on to
    write(model.get_parameter(name))
    with torch.no_grad():
        found, expected = model(x), plain.denoise(x)
        assert not torch.equal(found, before)
        same(found, expected, 1e-4)
        assert torch.equal(runner.denoise(x), found)


def test_a_store_has_the_means_of_the_weights_it_names(make_model, x, tmp_path):
    model, x = make_model(), x.float()
    with torch.no_grad():
        model.phi(x)
    model.mid[-1].weight.data[1] = 0.5
    store = fastphi.extract(model, x, tmp_path / "store", sigmas=[0.0], draws=1)
    again = fastphi.extract(copy.deepcopy(model), x, sigmas=[0.0], draws=1)
    assert np.array_equal(store.array(0.0), again.array(0.0))


def test_frozen_looks_once_and_at_what_torch_sees(make_model, x):
    model, x = make_model(), x.float()
    with torch.no_grad():
        model.phi(x)
        model.mid[-1].weight.data[1] = 0.5
        with fastphi.frozen(model):
            first = model.phi(x)  # a job's start: looked at
            torch.testing.assert_close(
                first, reference.ReferenceRunner(model).block_means(x)["mid"]
            )
            model.mid[-1].weight.data[1] = 0.7
            assert torch.equal(model.phi(x), first)  # vouched for
            model.mid[-1].weight.mul_(2)
            assert not torch.equal(model.phi(x), first)  # torch counted this one
            with fastphi.frozen(model):
                assert engine.runner(model, x).vouched
            assert engine.runner(model, x).vouched
        assert engine.runner(model, x).vouched is None
        model.mid[-1].weight.data[1] = -0.7
        torch.testing.assert_close(
            model.phi(x), reference.ReferenceRunner(model).block_means(x)["mid"]
        )


@pytest.mark.parametrize("job", ["extract", "match_phi", "sample", "reconstruct"])
def test_jobs_look_once(make_model, x, job, monkeypatch):
    model, x = make_model(), x.float()
    checksums = []
    true = cpu_pack.checksum
    monkeypatch.setattr(cpu_pack, "checksum", lambda t: checksums.append(len(t)) or true(t))
    if job == "extract":
        fastphi.extract(model, x, sigmas=[0.1, 0.2], draws=3, batch=1)
    elif job == "match_phi":
        fastphi.match_phi(model, x, torch.zeros(2, 8), max_iter=2)
    elif job == "sample":
        fastphi.sample(model, 2, size=8, max_steps=4)
    else:
        targets = fastphi.targets.from_images(model, x)
        checksums.clear()
        fastphi.reconstruct(model, targets, sigmas=(1.0, 0.1, 4), max_iter=2, size=8)
    assert 0 < len(checksums) <= 3  # encoder, decoder, transposed


# --- memory and range -----------------------------------------------------------------------------


def test_a_storage_that_was_taken_away_is_an_error(both, x):
    model, _ = both
    gone = x.clone()
    gone.untyped_storage().resize_(0)
    with torch.no_grad():
        for call in (model, model.phi, lambda t: model.score(t, 0.1)):
            with pytest.raises((RuntimeError, ValueError), match="x: its storage has 0 bytes"):
                call(gone)
        model.mid[0].weight.untyped_storage().resize_(8)
        with pytest.raises((RuntimeError, ValueError), match="storage has 8 bytes"):
            model(x)
    with pytest.raises((RuntimeError, ValueError), match="x: its storage has 0 bytes"):
        model(gone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e9, 0.9e12, 1e13, 1e18, 1e20])
def test_images_beyond_the_range(make_model, x, dtype, scale):
    model = make_model(dtype=dtype)
    plain = copy.deepcopy(model)
    plain.backend = "reference"
    x = (x * scale).to(dtype)
    with torch.no_grad():
        same(model(x), plain(x), 2e-5)
        same(model.phi(x), plain.phi(x), 2e-5)
    found, expected = (
        torch.autograd.grad(m(y := x.clone().requires_grad_()).sum(), y)[0] for m in (model, plain)
    )
    same(found, expected, 1e-3)


def test_the_largest_value_is_found_whatever_the_layout():
    largest = torch.ops.fastphi.largest_magnitude
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        t = torch.randn(3, 5, 7, dtype=torch.float64).to(dtype)
        t[1, 2, 3] = -9
        t[0, 0, 0] = torch.nan
        assert largest(t) == largest(t.transpose(0, 2)) == 9
        t[2, 1, 1] = torch.inf
        assert largest(t) == float("inf")
