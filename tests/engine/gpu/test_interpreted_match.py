"""The GPU engine's guidance loop against float64: gradient to the image, losses, stops, company.

Without a GPU its plans are walked launch by launch in Triton's interpreter; graphs, streams and full
size are test_match.py's.
"""

from __future__ import annotations

import functools

import gpu_case
import pytest
import torch
from triton_case import DEVICE, INTERPRETED, need_kernels

from fastphi import reference
from fastphi.config import UNetConfig
from fastphi.engine import ops
from fastphi.engine.gpu import match as gpu_match
from fastphi.engine.gpu import runner as gpu
from fastphi.unet import UNet

need_kernels()
if (reason := ops.missing() if INTERPRETED else gpu.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("exact_products")

NETWORKS = {
    "three blocks": (
        UNetConfig(channels=(16, 24, 32), dec_layers=2, enc_layers=(2, 1), mid_layers=2),
        (1, 3, 8, 8),
    ),
    # grey, odd channels, no bias, a first block of one layer, not square
    "odd": (
        UNetConfig(
            channels=(12, 20, 36),
            image_channels=1,
            bias=False,
            enc_layers=(1, 2),
            mid_layers=1,
            dec_layers=2,
        ),
        (1, 1, 4, 8),
    ),
    "tiny": (
        UNetConfig(channels=(16, 16), image_channels=4, dec_layers=2, mid_layers=2),
        (3, 4, 4, 2),
    ),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


@functools.cache
def network(name: str) -> UNet:
    """One gain of each layer is 0."""
    model = gpu_case.network(NETWORKS[name][0], seed=0)
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            if parameter.endswith("gamma"):
                values[0] = 0
    return model.to(DEVICE)


def exact(model: UNet) -> UNet:
    return gpu_case.exact(model).cpu()


def case(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, φ* of others, and weights of the channels, all float32."""
    g = torch.Generator().manual_seed(1)
    x, other = torch.rand(2, *NETWORKS[name][1], generator=g)
    width = NETWORKS[name][0].channels[-1]
    with torch.no_grad():
        target = exact(network(name)).phi(other.double()).float()
    weight = torch.rand(width, generator=g) / width
    return x.to(DEVICE), target.to(DEVICE), weight.to(DEVICE)


def exact_match(name: str, x, target, weight, max_iter: int, tolerance: float, lr: float = 0.01):
    runner = reference.ReferenceRunner(exact(network(name)))
    double = (t.double().cpu() for t in (x, target, weight))
    return runner.match(*double, lr, max_iter, tolerance)


def the_plan(runner: gpu.GPURunner) -> gpu_match.MatchPlan:
    (plan,) = runner._plans.values()
    return plan


@each_network
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradient_to_the_image(name, dtype, monkeypatch):
    """Of each image's own loss, under weights and targets without any order in them.

    bfloat16: every activation and every gradient between layers is rounded to 8 bits, and a ReLU
    whose z lies near 0 may fall the other way; in networks as small as these little averages out.
    """
    x, target, weight = case(name)
    x = x.to(dtype).float()  # the same pixels for both
    monkeypatch.setattr(gpu_match, "STEPS", 1)
    runner = gpu.GPURunner(network(name))
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        runner.match(x, target, weight, 0.01, 0, 0.0)
    plan = the_plan(runner)
    assert plan.image.dtype == dtype
    plan.start(x, target, weight, 0.01, 1, 0.0)
    plan.run()
    leaf = x.double().cpu().requires_grad_(True)
    means = exact(network(name)).walk_means(reference.ReferenceOps(), leaf, "mid")["mid"]
    loss = (weight.double().cpu() * (means - target.double().cpu()) ** 2).sum()
    (want,) = torch.autograd.grad(loss, leaf)
    for i in range(len(x)):
        error = (plan.gradient[i].double().cpu() - want[i]).norm() / want[i].norm()
        assert error <= (5e-6 if dtype == torch.float32 else 0.12), error


@each_network
def test_agrees_with_the_reference(name):
    x, target, weight = case(name)
    found = gpu.GPURunner(network(name)).match(x, target, weight, 0.01, 3, 0.0)
    want = exact_match(name, x, target, weight, 3, 0.0)
    # Adam divides by the gradient's own size: where that is near 0 its rounding shows
    assert (found[0].double().cpu() - want[0]).abs().max() < 1e-4
    assert found[1].shape == (4, len(x)) and found[1].dtype == torch.float32
    torch.testing.assert_close(found[1].double().cpu(), want[1], rtol=1e-4, atol=0)
    assert found[2].tolist() == [3] * len(x) and not found[3].any()


@functools.cache
def stopped() -> tuple:
    """The tiny network's images, which stop apart from each other; one never does."""
    x, target, weight = case("tiny")
    return gpu.GPURunner(network("tiny")).match(x, target, weight, 0.02, 9, 0.6)


def test_each_image_stops_on_its_own():
    x, target, weight = case("tiny")
    images, losses, updates, converged = stopped()
    want = exact_match("tiny", x, target, weight, 9, 0.6, lr=0.02)
    assert updates.tolist() == want[2].tolist() and converged.tolist() == want[3].tolist()
    assert len(set(updates.tolist())) > 1, "else nothing was tested"
    assert torch.equal(losses.isnan().cpu(), want[1].isnan())
    kept = ~want[1].isnan()
    torch.testing.assert_close(losses.double().cpu()[kept], want[1][kept], rtol=1e-3, atol=0)
    assert (images.double().cpu() - want[0]).abs().max() < 1e-3


def test_the_same_bits_alone_and_in_any_company():
    x, target, weight = case("tiny")
    whole = stopped()
    runner = gpu.GPURunner(network("tiny"))
    for rows in ([2], [1, 0, 2, 1, 0]):
        part = runner.match(x[rows], target[rows], weight, 0.02, 9, 0.6)
        assert torch.equal(part[0], whole[0][rows])
        assert torch.equal(part[1].nan_to_num(-1), whole[1][:, rows].nan_to_num(-1))
        assert torch.equal(part[2], whole[2][rows]) and torch.equal(part[3], whole[3][rows])
    assert sorted(key[0][0] for key in runner._plans) == [1, 8]  # a power of two serves them


def test_in_parts_and_again_with_the_same_plan(monkeypatch):
    x, target, weight = case("tiny")
    monkeypatch.setattr(gpu, "CHUNK", 2 * 4 * 2)
    runner = gpu.GPURunner(network("tiny"))
    for _ in range(2):  # nothing is left over from the first
        part = runner.match(x, target, weight, 0.02, 9, 0.6)
        for got, want in zip(part, stopped(), strict=True):
            assert torch.equal(got.nan_to_num(-1), want.nan_to_num(-1))


def test_no_updates_asked_for_or_needed():
    x, target, weight = case("tiny")
    runner = gpu.GPURunner(network("tiny"))
    images, losses, updates, converged = runner.match(x, target, weight, 0.01, 0, 0.01)
    assert torch.equal(images, x) and losses.shape == (1, 3) and losses.isfinite().all()
    assert not updates.any() and not converged.any() and images.data_ptr() != x.data_ptr()
    images, losses, updates, converged = runner.match(x, target, weight, 0.01, 2, 1.0)
    assert torch.equal(images, x) and converged.all() and not updates.any()


def test_loss_is_of_the_means_that_the_runner_gives():
    x, _, weight = case("three blocks")
    runner = gpu.GPURunner(network("three blocks"))
    own = runner.block_means(x, "mid")["mid"]
    losses = runner.match(x, own, weight, 0.01, 0, 0.0)[1]
    assert not losses.any()


def test_new_weights_are_packed_again():
    x, target, weight = case("tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = UNet(NETWORKS["tiny"][0]).to(DEVICE)
    runner = gpu.GPURunner(model)
    runner.match(x, target, weight, 0.01, 1, 0.0)
    model.load_state_dict(network("tiny").state_dict())
    again = runner.match(x, target, weight, 0.02, 9, 0.6)
    assert all(
        torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
        for a, b in zip(again, stopped(), strict=True)
    )
    assert len(runner._plans) == 1


def test_an_interrupt_leaves_the_runner_usable(monkeypatch):
    x, target, weight = case("tiny")
    runner, run, calls = gpu.GPURunner(network("tiny")), gpu_match.MatchPlan.run, []

    def interrupted(plan):
        calls.append(plan)
        if len(calls) == 2:
            raise KeyboardInterrupt
        run(plan)

    monkeypatch.setattr(gpu_match.MatchPlan, "run", interrupted)
    if DEVICE.type == "cuda":
        calls.append(None)  # a plan runs once as it is made
    with pytest.raises(KeyboardInterrupt):
        runner.match(x, target, weight, 0.02, 9, 0.0)
    monkeypatch.undo()
    again = runner.match(x, target, weight, 0.02, 9, 0.6)
    assert all(
        torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
        for a, b in zip(again, stopped(), strict=True)
    )


def test_nothing_is_read_before_it_is_written(monkeypatch):
    """All the memory between the layers poisoned: the same bits."""
    x, target, weight = case("three blocks")
    memory: list[torch.Tensor] = []
    take = gpu_match.MatchPlan._take

    def kept(self, *arguments):
        memory.append(take(self, *arguments))
        return memory[-1]

    monkeypatch.setattr(gpu_match.MatchPlan, "_take", kept)
    monkeypatch.setattr(gpu_match, "STEPS", 1)
    runner = gpu.GPURunner(network("three blocks"))
    want = runner.match(x, target, weight, 0.01, 0, 0.0)
    gradients = []
    plan = the_plan(runner)
    for value in (0.0, torch.nan):
        for tensor in memory:
            tensor.fill_(value)
        plan.start(x, target, weight, 0.01, 1, 0.0)
        plan.run()
        gradients.append(plan.gradient.clone())
    assert torch.equal(*gradients) and gradients[0].isfinite().all()
    assert torch.equal(plan.losses[0, :1], want[1][0])
