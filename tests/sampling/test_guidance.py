"""Algorithm 2 through its public face, against Adam of PyTorch and the plain reference."""

from __future__ import annotations

import logging

import pytest
import torch

from fastphi import engine, reference
from fastphi.config import UNetConfig
from fastphi.sampling import guidance, match_phi
from fastphi.unet import UNet

CONFIG = UNetConfig(channels=(4, 6, 8), dec_layers=2)


def serving(dtype: torch.dtype) -> list[str]:
    """Engines that serve the tiny network on this machine."""
    device = torch.device("cpu")
    return [e.name for e in engine.ENGINES if e.refuses(CONFIG, device, dtype) is None]


def tiny(backend: str = "auto", dtype: torch.dtype = torch.float64) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = UNet(CONFIG, backend=backend).to(dtype)
    with torch.no_grad():
        for layer in model.mid:
            layer.gamma.mul_(50)  # so that φ is of the size of trained networks' and losses differ
    return model


def case(n: int = 3, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images, and φ* of other images."""
    g = torch.Generator().manual_seed(7)
    x, other = torch.rand(2, n, 3, 16, 16, generator=g, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        return x + 0.2, tiny("reference", dtype).phi(other)


def adam(model: UNet, x, target, weight, max_iter: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 2 without a stop, by torch.optim.Adam, one image at a time."""
    images, losses = [], []
    for i in range(len(x)):
        leaf = x[i : i + 1].clone().requires_grad_(True)
        optimiser = torch.optim.Adam([leaf], lr=0.01)
        column = []
        for t in range(max_iter + 1):
            means = model.walk_means(reference.ReferenceOps(), leaf, "mid")
            loss = (weight * (means["mid"] - target[i]) ** 2).sum()
            column.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            if t < max_iter:
                optimiser.step()
        images.append(leaf.detach())
        losses.append(column)
    return torch.cat(images), torch.tensor(losses, dtype=x.dtype).T


@pytest.mark.parametrize("backend", serving(torch.float64))
@pytest.mark.parametrize("form", ["all", "subset", "authors"])
def test_agrees_with_torch_adam(backend: str, form: str) -> None:
    model, (x, target) = tiny(backend), case()
    wanted, weight, options = target, torch.full((8,), 1 / 8, dtype=x.dtype), {}
    if form != "all":
        options = {"channels": [5, 1], "zero_elsewhere": form == "authors"}
        inside = torch.zeros(8, dtype=torch.bool)
        inside[[1, 5]] = True
        if form == "subset":
            weight = torch.where(inside, 0.5, 0.0).to(x.dtype)
        else:
            wanted = torch.where(inside, target, 0.0)
    expected, losses = adam(tiny("reference"), x, wanted, weight, 12)
    got = match_phi(model, x, target, max_iter=12, tolerance=0, **options)
    # float64; Adam divides by √v, which magnifies rounding where a pixel's gradient is small
    torch.testing.assert_close(got.x, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(got.losses, losses, rtol=1e-7, atol=1e-12)
    assert got.updates.tolist() == [12] * 3 and not got.converged.any()
    torch.testing.assert_close(got.last, losses[-1], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("backend", serving(torch.float32))
def test_an_image_does_not_depend_on_its_company(backend: str) -> None:
    model, (x, target) = tiny(backend, torch.float32), case(5, torch.float32)
    together = match_phi(model, x, target, max_iter=15, tolerance=0.2)
    order = [3, 0, 4, 1, 2]
    permuted = match_phi(model, x[order], target[order], max_iter=15, tolerance=0.2)
    assert torch.equal(permuted.x, together.x[order])
    for i in range(5):
        alone = match_phi(model, x[i : i + 1], target[i], max_iter=15, tolerance=0.2)
        assert torch.equal(alone.x[0], together.x[i])
        assert torch.equal(alone.losses[:, 0].nan_to_num(-1), together.losses[:, i].nan_to_num(-1))
        assert alone.updates[0] == together.updates[i]


@pytest.mark.parametrize("backend", serving(torch.float64))
def test_a_converged_image_is_frozen_without_a_further_update(backend: str) -> None:
    model, (x, target) = tiny(backend), case(4)
    free = match_phi(model, x, target, max_iter=40, tolerance=0)
    got = match_phi(model, x, target, max_iter=40, tolerance=0.3)
    assert got.converged.any() and len(set(got.updates.tolist())) > 1  # they stop apart
    for i, t in enumerate(got.updates.tolist()):
        ratio = free.losses[:, i] / free.losses[0, i]
        first = (ratio <= 0.3).nonzero()
        assert got.converged[i] == bool(len(first))
        assert t == (int(first[0]) if len(first) else 40)
        assert torch.equal(got.losses[: t + 1, i], free.losses[: t + 1, i])
        assert got.losses[t + 1 :, i].isnan().all()
        stopped = match_phi(model, x[i : i + 1], target[i], max_iter=t, tolerance=0)
        assert torch.equal(got.x[i], stopped.x[0])


@pytest.mark.parametrize("backend", serving(torch.float64))
def test_no_updates_asked_for_or_needed(backend: str) -> None:
    model, (x, target) = tiny(backend), case(2)
    none = match_phi(model, x, target, max_iter=0)
    assert torch.equal(none.x, x) and none.losses.shape == (1, 2)
    assert none.updates.tolist() == [0, 0] and not none.converged.any()

    own = engine.runner(model, x).block_means(x, "mid")["mid"]
    there = match_phi(model, x, own, max_iter=3, tolerance=1.0)
    assert torch.equal(there.x, x) and there.converged.all() and not there.updates.any()
    never = match_phi(model, x, own, max_iter=3, tolerance=0)
    assert never.updates.tolist() == [3, 3] and not never.converged.any()


def test_values_outside_a_subset_do_not_matter() -> None:
    model, (x, target) = tiny(), case(2)
    spoilt = target.clone()
    spoilt[:, 0] = torch.nan
    a = match_phi(model, x, target, max_iter=3, channels=[2, 6])
    b = match_phi(model, x, spoilt, max_iter=3, channels=[2, 6])
    assert torch.equal(a.x, b.x) and torch.equal(a.losses, b.losses)


def test_one_target_serves_all_images() -> None:
    model, (x, target) = tiny(), case(2)
    rows = match_phi(model, x, target[:1].expand(2, 8), max_iter=3)
    for one in (target[0], target[:1], target[0].float()):
        got = match_phi(model, x, one, max_iter=3)
        tolerance = 0 if one.dtype == x.dtype else 1e-4  # float32 target: cast, not refused
        torch.testing.assert_close(got.x, rows.x, rtol=0, atol=tolerance)


def test_leaves_everything_as_it_was() -> None:
    model, (x, target) = tiny(dtype=torch.float32), case(2, torch.float32)
    model.train()
    model.mid[0].weight.requires_grad_(False)
    model.enc1[0].weight.grad = torch.ones_like(model.enc1[0].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    x.requires_grad_(True)
    kept, rng = (x.detach().clone(), target.clone()), torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu"):
        inside = match_phi(model, x, target, max_iter=2)
    got = match_phi(model, x, target, max_iter=2)
    assert torch.equal(inside.x, got.x) and not got.x.requires_grad
    assert torch.equal(x, kept[0]) and torch.equal(target, kept[1]) and x.grad is None
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training and flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.enc1[0].weight.grad.eq(1).all() and model.enc2[0].weight.grad is None


X, TARGET = case(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[0]}, r"x: expected a non-empty tensor \(N, C, H, W\)"),
        ({"x": X.numpy()}, "x: expected a tensor"),
        ({"x": X[:, :1]}, "takes 3 channel"),
        ({"x": X[..., :6]}, "multiples of 4"),
        ({"x": X.float()}, "the model is torch.float64"),
        ({"x": X * torch.nan}, "x: .* NaN or Inf"),
        ({"target": TARGET[:, :5]}, r"target: expected φ\* of shape \(2, 8\).* got \(2, 5\)"),
        ({"target": TARGET[[0, 0, 0]]}, r"got \(3, 8\)"),
        ({"target": TARGET.long()}, "target: expected floating point"),
        ({"target": TARGET * torch.inf}, "target: .* NaN or Inf"),
        ({"target": [1.0] * 8}, "target: expected a tensor"),
        ({"lr": 0}, "lr: "),
        ({"lr": "0.1"}, "lr: expected a number"),
        ({"max_iter": -1}, "max_iter: "),
        ({"max_iter": 1.5}, "max_iter: expected an integer"),
        ({"tolerance": -0.1}, "tolerance: "),
        ({"tolerance": 2}, "tolerance: "),
        ({"channels": [8]}, r"channels\[0\]: "),
        ({"channels": []}, "channels: expected distinct"),
        ({"channels": [1, 1]}, "channels: expected distinct"),
        ({"zero_elsewhere": True}, "zero_elsewhere: expected `channels`"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str) -> None:
    arguments = {"x": X, "target": TARGET} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        match_phi(tiny(), arguments.pop("x"), arguments.pop("target"), **arguments)


def test_nan_is_reported_not_returned() -> None:
    model = tiny()
    with torch.no_grad():
        model.mid[0].bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="image 0 at update 0"):
        match_phi(model, X, TARGET, max_iter=3)


def test_images_that_adam_cannot_move_are_told_once(monkeypatch, caplog) -> None:
    """φ of size 1e-6: the gradient is below ε, and the images stay where they are."""
    monkeypatch.setattr(guidance, "_told_idle", [])
    model = tiny()
    x, target = case()
    with caplog.at_level(logging.WARNING, "fastphi"):
        match_phi(model, x, target, max_iter=5)
        assert not caplog.records
        with torch.no_grad():
            model.mid[-1].gamma.mul_(1e-6)
        for _ in range(2):
            result = match_phi(model, x, target * 1e-6, max_iter=5)
        (record,) = caplog.records
    assert (result.x - x).abs().max() < 1e-3
    assert "3 of 3 images hardly moved" in record.message
    caplog.clear()
    monkeypatch.setattr(guidance, "_told_idle", [])
    match_phi(model, x, model.phi(x).detach(), tolerance=0.0, max_iter=3)  # nothing to do
    assert not caplog.records
