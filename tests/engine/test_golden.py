"""Every engine against the known answers of the authors' network (tests/golden/README.md)."""

from __future__ import annotations

import golden_case
import pytest
import torch

from fastphi import engine

# Tolerances of the README: relative to the array's maximum; Adam divides by the gradient's own
# size, so 20 iterations amplify its error.
FORWARD, GRADIENT, MATCH = (
    1e-5,
    1e-5,
    2e-3,
)  # the gradient on "plain", without fused multiply-adds: 5.3e-6


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(params=golden_case.NAMES)
def case(request, backend):
    return golden_case.load_golden(request.param, backend)


@pytest.fixture(params=[False, True], ids=["runner", "ops"])
def grad(request):
    """Without a gradient the engine's runner serves, with one its ops."""
    with torch.set_grad_enabled(request.param):
        yield


def loss(model, x, target):
    return ((model.phi(x) - target) ** 2).mean(dim=1)


def test_denoised(case, grad):
    model, a = case
    close(model(a["x"]).detach(), a["denoised"], FORWARD)


def test_block_means(case, grad):
    model, a = case
    means = model.block_means(a["x"])
    assert tuple(means) == model.config.block_names
    for j, mean in enumerate(means.values()):
        close(mean.detach(), a[f"block_mean/{j}"], FORWARD)
    close(model.phi(a["x_target"]).detach(), a["phi_target"], FORWARD)


def test_loss_and_gradient(case):
    model, a = case
    x = a["x"].clone().requires_grad_()
    losses = loss(model, x, a["phi_target"])
    close(losses.detach(), a["loss0"], FORWARD)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    close(gradient, a["grad"], GRADIENT)


def test_match_by_the_runner(case):
    model, a = case
    weight = torch.full((a["phi_target"].shape[1],), 1 / a["phi_target"].shape[1])
    runner = engine.runner(model, a["x"])
    x, losses, updates, converged = runner.match(a["x"], a["phi_target"], weight, 0.01, 20, 0.0)
    assert updates.tolist() == [20] * len(x) and not converged.any()
    close(losses[:20], a["match_losses"], 1e-3)
    assert (x - a["match_x"]).abs().max() <= MATCH


def test_match_by_autograd(case):
    model, a = case
    x = a["x"].clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=0.01)
    for expected in a["match_losses"]:
        losses = loss(model, x, a["phi_target"])
        close(losses.detach(), expected, 1e-3)
        (x.grad,) = torch.autograd.grad(losses.sum(), x)
        adam.step()
    assert (x.detach() - a["match_x"]).abs().max() <= MATCH


@pytest.mark.parametrize("name", golden_case.NAMES)
def test_reference_in_float64(name):
    """The oracle of all other tests: as near as float32 storage of the known answers allows."""
    model, a = golden_case.load_golden(name, "reference")
    model = model.double()
    x = a["x"].double().requires_grad_()
    close(model(x).detach(), a["denoised"], 1e-7)
    (gradient,) = torch.autograd.grad(loss(model, x, a["phi_target"].double()).sum(), x)
    close(gradient, a["grad"], 1e-6)
