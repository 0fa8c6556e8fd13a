"""Which engine serves a call, and what each of them promises."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref

import pytest
import torch

from fastphi import engine, reference
from fastphi.config import UNetConfig
from fastphi.engine import seam
from fastphi.unet import UNet


@pytest.fixture
def x():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fake(monkeypatch):
    """Two engines beside the reference: one that refuses float64, one that refuses all."""

    def made(name, refuses):
        return dataclasses.replace(engine.ENGINES[-1], name=name, refuses=refuses)

    never = made("never", lambda config, device, dtype: "it never does")
    single = made("single", lambda config, device, dtype: (
        None if dtype == torch.float32 else f"it does not take {dtype}"
    ))  # fmt: skip
    engines = (never, single, engine.ENGINES[-1])
    monkeypatch.setattr(seam, "ENGINES", engines)
    for module in (engine, seam):
        monkeypatch.setattr(module, "BACKENDS", ("auto", *(e.name for e in engines)))
    monkeypatch.setattr(seam, "_told", set())
    monkeypatch.delenv("FASTPHI_BACKEND", raising=False)


def pick(backend, x, config=None):
    return engine.pick(UNet(config or UNetConfig(channels=(2, 2)), backend=backend), x).name


def test_auto_takes_the_first_that_can(fake, x):
    assert pick("auto", x) == "single"
    assert pick("auto", x.double()) == "reference"
    assert pick("reference", x) == "reference"


def test_an_engine_asked_for_that_cannot_serve_raises(fake, x):
    with pytest.raises(RuntimeError, match="'never' .* cannot serve .*it never does"):
        pick("never", x)
    with pytest.raises(RuntimeError, match=r"'single' .*it does not take torch\.float64"):
        pick("single", x.double())
    with pytest.raises(ValueError, match="backend: expected one of auto, never, reference, single"):
        pick("sparkle", x)


def test_environment_chooses_under_auto_only(fake, x, monkeypatch):
    monkeypatch.setenv("FASTPHI_BACKEND", "reference")
    assert pick("auto", x) == "reference" and pick("single", x) == "single"
    monkeypatch.setenv("FASTPHI_BACKEND", "never")
    with pytest.raises(RuntimeError, match="it never does"):
        pick("auto", x)
    monkeypatch.setenv("FASTPHI_BACKEND", "sparkle")
    with pytest.raises(ValueError, match="FASTPHI_BACKEND: expected one of .* got 'sparkle'"):
        pick("auto", x)


def test_a_fallback_is_told_once_with_its_reason(fake, x, caplog):
    with caplog.at_level(logging.WARNING, "fastphi"):
        for _ in range(3):
            pick("auto", x)
        pick("auto", x.double())
        pick("reference", x)  # asked for: nothing to tell
    assert [r.message for r in caplog.records] == [
        "the single engine runs: engine never: it never does",
        "the reference engine runs: engine never: it never does; "
        "engine single: it does not take torch.float64",
    ]


def test_the_compiled_engine_refuses_what_it_cannot_do():
    refuses = engine.ENGINES[0].refuses
    config, cpu = UNetConfig(), torch.device("cpu")
    if refuses(config, cpu, torch.float32) is not None:
        pytest.skip(refuses(config, cpu, torch.float32))
    assert refuses(config, cpu, torch.float64) is None
    assert "cuda" in refuses(config, torch.device("cuda"), torch.float32)
    assert "float16" in refuses(config, cpu, torch.float16)
    assert "norm" in refuses(UNetConfig(norm="layer"), cpu, torch.float32)


def test_a_gradient_needs_ops_and_nothing_else_does(make_model, x, monkeypatch):
    served = []
    serving = engine.serving

    def watching(*args, **options):
        found = serving(*args, **options)
        served.extend(way for way, part in zip(("runner", "ops"), found, strict=True) if part)
        return found

    monkeypatch.setattr(engine, "serving", watching)
    model = make_model()

    def by(call):
        served.clear()
        call()
        return served == ["runner"]

    assert not by(lambda: model(x)) and not by(lambda: model.phi(x))  # the parameters want one
    with torch.no_grad():
        assert by(lambda: model(x)) and by(lambda: model.phi(x))
    model.requires_grad_(False)
    assert by(lambda: model(x)) and by(lambda: model.phi(x))
    leaf = x.clone().requires_grad_()
    assert not by(lambda: model(leaf)) and not by(lambda: model.phi(leaf))
    with torch.no_grad():
        assert not model.phi(leaf).requires_grad and by(lambda: model(leaf))


def test_autocast_is_followed_in_low_precision(make_model, x):
    """Where something is faster in it: there with float32 statistics, and a gradient by the reference."""
    model = make_model()
    cpu = next(e for e in engine.ENGINES if e.name == "cpu")
    widened = cpu.remark(model.config, torch.bfloat16) is not None
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            serving = engine.pick(model, x, gradient=True).name
            found = model(x)
    assert serving == ("cpu" if widened else "reference")
    assert torch.equal(found, expected) == widened
    difference = (found.float() - expected).abs().max() / expected.abs().max()
    assert difference < 0.1  # eight bits of mantissa through a dozen layers


def test_a_runner_is_made_once_and_goes_with_its_model(make_model, backend, x):
    model = make_model(backend=backend)
    first = engine.runner(model, x)
    assert engine.runner(model, x.clone()) is first
    assert engine.runner(make_model(backend=backend), x) is not first
    with torch.no_grad():
        model(x)
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None


@pytest.mark.parametrize("change", ["in place", "data", "load", "replace", "optimiser", "dtype"])
def test_a_runner_sees_that_a_parameter_changed(make_model, backend, x, change):
    model, other = make_model(backend=backend), make_model(seed=1, backend=backend)
    with torch.no_grad():
        model(x), model.phi(x)  # prepared
    name, new = "mid.1.weight", other.mid[1].weight.detach()
    if change == "in place":
        with torch.no_grad():
            model.get_parameter(name).copy_(new)
    elif change == "data":
        model.get_parameter(name).data = new.clone()
    elif change == "load":
        model.load_state_dict(other.state_dict())
    elif change == "replace":
        model.mid[1].weight = torch.nn.Parameter(new.clone())
    elif change == "optimiser":
        model(x).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    else:
        model, x = model.double(), x.double()
    plain = reference.ReferenceRunner(model)
    with torch.no_grad():
        for found, expected in (
            (model(x), plain.denoise(x)),
            (model.phi(x), plain.block_means(x)["mid"]),
        ):
            assert found.dtype == x.dtype
            assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_results_are_the_callers_own(make_model, backend, x):
    """A runner may keep a workspace; what it returns must not change under the caller."""
    model = make_model(backend=backend)
    with torch.no_grad():
        denoised, phi = model(x), model.phi(x)
        kept = denoised.clone(), phi.clone()
        model(1 - x), model.phi(1 - x)
        assert torch.equal(denoised, kept[0]) and torch.equal(phi, kept[1])
        denoised.zero_()
        assert torch.equal(model(x), kept[0])


def match(model, x, target, **options):
    settings = {"lr": 0.01, "max_iter": 12, "tolerance": 0.0} | options
    weight = settings.pop("weight", torch.full((8,), 1 / 8))
    weight = weight.to(x.dtype)
    return engine.runner(model, x).match(x, target.to(x.dtype), weight, *settings.values())


@pytest.fixture
def matching(make_model, backend):
    model = make_model(backend=backend)
    x, other = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, x, model.phi(other)


def test_match_agrees_with_the_reference_in_float64(matching, make_model):
    model, x, target = matching
    oracle = reference.ReferenceRunner(make_model(dtype=torch.float64))
    for weight in (torch.full((8,), 1 / 8), torch.tensor([0, 0.5, 0, 0, 0.5, 0, 0, 0])):
        found = match(model, x, target, weight=weight)
        expected = oracle.match(x.double(), target.double(), weight.double(), 0.01, 12, 0.0)
        assert found[0].shape == x.shape and found[1].shape == (13, 4)
        # Adam divides by the gradient's own size: where that is near 0 its rounding shows
        assert (found[0] - expected[0]).abs().max() < 2e-3
        torch.testing.assert_close(found[1].double(), expected[1], rtol=2e-3, atol=1e-9)
        assert found[2].tolist() == [12] * 4 and not found[3].any()


def test_match_stops_each_image_on_its_own(matching):
    model, x, target = matching
    _, free, _, _ = match(model, x, target, max_iter=40)
    found, losses, updates, converged = match(model, x, target, max_iter=40, tolerance=0.1)
    for i in range(4):
        stop = int(updates[i])
        column = losses[:, i]
        if converged[i]:
            assert column[stop] <= 0.1 * column[0] and column[stop + 1 :].isnan().all()
            assert (column[1:stop] > 0.1 * column[0]).all()
        else:
            assert stop == 40 and not column.isnan().any()
        torch.testing.assert_close(column[: stop + 1], free[: stop + 1, i], rtol=0, atol=0)
    assert converged.sum() >= 2 and len(set(updates.tolist())) >= 3  # else nothing was tested


def test_match_does_not_depend_on_the_batch(matching):
    model, x, target = matching
    whole = match(model, x, target, tolerance=0.25)
    for rows in ([2], [3, 0], [1, 1, 2]):
        part = match(model, x[rows], target[rows], tolerance=0.25)
        assert torch.equal(part[0], whole[0][rows])
        assert torch.equal(part[1].nan_to_num(-1), whole[1][:, rows].nan_to_num(-1))
        assert torch.equal(part[2], whole[2][rows]) and torch.equal(part[3], whole[3][rows])


def test_match_leaves_everything_as_found(matching):
    model, x, target = matching
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept = x.clone(), target.clone()
    match(model, x, target)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(x, kept[0]) and torch.equal(target, kept[1]) and not x.requires_grad
    found, losses, updates, _ = match(model, x, target, max_iter=0)
    assert torch.equal(found, x) and losses.shape == (1, 4) and updates.tolist() == [0] * 4
    assert found.data_ptr() != x.data_ptr()
