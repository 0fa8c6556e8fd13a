"""The fast path's contract (docs/contract.md): gestures on a model, each against the plain modules."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from contract_case import same
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import fastphi
from fastphi import engine, ops
from fastphi.engine import contract
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


def test_what_leaves_the_engine_its_work(both, x):
    """Hooks on the model itself go round it; after a change is taken back it serves again."""
    model, plain = both
    seen = []
    model.register_forward_hook(lambda m, i, out: seen.append(out) or 2 * out)
    with torch.no_grad():
        assert contract.reason(model, x) is None
        same(model(x), 2 * plain(x))
        assert len(seen) == 1
        for m in both:
            torch.manual_seed(3)
            prune.random_unstructured(m.mid[0], "weight", 0.5)
        assert contract.reason(model, x) == "mid.0 has a hook"
        for m in both:
            prune.remove(m.mid[0], "weight")
        assert contract.reason(model, x) is None
        same(model.phi(x), plain.phi(x))


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
    assert contract._as_configured(model, x, []) and contract.difference(model, x) is None
    for name, change in CHANGES.items():
        changed = copy.deepcopy(model)
        change(changed)
        slow = contract.hooked(changed) or contract.difference(changed, x)
        assert (slow is None) == (name == "an own part beside"), (name, slow)
        assert not contract._as_configured(changed, x, []), name
