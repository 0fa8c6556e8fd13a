"""What bfloat16 does to the GPU engine's results, without a GPU: its runner and ops on emulated.py's
kernels, at full size and on trained weights. The tolerances of the tests that need a GPU stand on this.
"""

from __future__ import annotations

import copy
import functools
import importlib.util

import pytest
import torch

import fastphi
from fastphi.config import UNetConfig
from fastphi.engine import ops
from fastphi.unet import UNet

if importlib.util.find_spec("fastphi.triton_kernels") is None:
    pytest.skip("fastphi.triton_kernels is not installed", allow_module_level=True)
if ops.missing() is not None:
    pytest.skip(str(ops.missing()), allow_module_level=True)

import emulated  # noqa: E402
import gpu_case  # noqa: E402

from fastphi.engine.gpu import ends as gpu_ends  # noqa: E402
from fastphi.engine.gpu import layer as gpu_layer  # noqa: E402
from fastphi.engine.gpu import runner as gpu  # noqa: E402

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _kernels():
    with emulated.kernels():
        yield


@functools.cache
def shipped() -> UNet:
    return fastphi.load_pretrained("natural64-small", backend="reference").eval()


@functools.cache
def full_size() -> UNet:
    return gpu_case.network(UNetConfig(), seed=0, backend="reference")


def smooth(n: int, size: int, seed: int = 0) -> torch.Tensor:
    """(n, 3, size, size) in [0, 1]: shaded, with edges, as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    shades, edges = torch.randn(2, n, 3, size // 8, size // 8, generator=generator)
    shades = torch.nn.functional.interpolate(shades, size, mode="bicubic")
    return (shades + 0.3 * torch.nn.functional.interpolate(edges, size)).sigmoid()


def low(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", BF16, enabled=enabled)


@pytest.mark.parametrize(
    "model, whole, worst", [(shipped, 0.1, 0.15), (full_size, 0.02, 0.3)], ids=["shipped", "full"]
)
def test_every_gradient_of_training(model, whole, worst):
    """bfloat16 against float64, and no further off than PyTorch's own autocast is."""
    model = model()
    ours, theirs, largest = gpu_case.training_errors(model, smooth(2, 64), 0.3)
    assert ours <= min(whole, 1.1 * theirs) and largest <= worst, (ours, theirs, largest)


@pytest.mark.parametrize("use_low, tolerance", [(False, 1e-4), (True, 0.25)], ids=["fp32", "bf16"])
def test_gradient_to_the_image(use_low, tolerance):
    """At full size. With random weights, that is: many ReLUs lie near 0 and fall the other way."""
    model, (x, other) = full_size(), torch.rand(2, 2, 3, 64, 64, generator=torch.manual_seed(1))
    with torch.no_grad():
        target = model.phi(other)
    weight = torch.full((512,), 1 / 512)
    with low(use_low):
        found = gpu_case.gradient_to_image(gpu.GPURunner(model), x, target, weight)
    want = gpu_case.exact_gradient(model, x, target, weight)
    for a, b in zip(found.double(), want, strict=True):
        assert float((a - b).norm() / b.norm()) <= tolerance


def test_a_match_takes_as_many_updates_and_leaves_as_much_noise():
    """In bfloat16 as in float32: updates within 5 %, σ̂ within 1 % (§4: Fig. 20)."""
    model, sigma, size = shipped(), 0.5, 32
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, 6, 3, size, size, generator=generator)
    start, other = 0.5 + sigma * z[0], smooth(6, size) + sigma * z[1]
    updates, noise = [], []
    for use_low in (False, True):
        runner = gpu.GPURunner(model)
        with low(use_low):
            target = runner.block_means(other, "mid")["mid"]
            weight = torch.full((target.shape[1],), 1 / target.shape[1])
            x, _, made, _ = runner.match(start, target, weight, 0.01, 60, 0.05)
            noise.append((x - runner.denoise(x)).square().mean((1, 2, 3)).sqrt())
        updates.append(made.double())
    assert 5 < updates[0].mean() < 60
    assert abs(updates[1].mean() / updates[0].mean() - 1) <= 0.05
    assert ((noise[1] / noise[0] - 1).abs() <= 0.01).all()


def test_weights_changed_behind_torch_are_told_at_the_call_after(caplog):
    model, x = UNet(UNetConfig(channels=(16, 32))).eval(), smooth(2, 8)
    runner, new = gpu.GPURunner(model), copy.deepcopy(model)
    for m in (model, new):
        with torch.no_grad():
            m.mid[-1].gamma.fill_(1.0)
    first = runner.denoise(x)
    assert torch.equal(runner.denoise(x), first) and not caplog.records
    for m in (model, new):
        m.mid[-1].weight.data[1] = 0.5
    assert torch.equal(runner.denoise(x), first)  # asked of the device, not waited for
    want = gpu.GPURunner(new).denoise(x)
    assert torch.equal(runner.denoise(x), want) and not torch.equal(want, first)
    assert "answered with the old ones" in caplog.text
    caplog.clear()
    with torch.no_grad():
        model.mid[-1].weight.mul_(2)  # torch counts this one: at once, and no word
    again = runner.denoise(x)
    assert not torch.equal(again, want) and torch.equal(runner.denoise(x), again)
    assert torch.equal(runner.denoise(x), again) and not caplog.records


def backward_cases():
    """Every op's gradient, with two sources and one; the first is not the smallest in any layout."""
    n, h, w, c, two = 2, 4, 6, 16, torch.ones(2)
    r, z = torch.randn(2, n, h, w, c, generator=torch.Generator().manual_seed(3))
    weight, gamma, image = torch.randn(24, c, 3, 3), torch.ones(24), torch.randn(n, h, w, 3)
    z = torch.randn(n, h, w, 24)
    rest = (z, two, torch.zeros(2), two)
    yield gpu_layer.layer_bwd, (z, two, r, two, None, None, weight, gamma, *rest)
    both = torch.cat([weight, weight], 1)
    yield gpu_layer.layer_bwd, (z, two, r, two, r, 2 * two, both, gamma, *rest)
    yield gpu_ends.first_layer_bwd, (r, image, torch.randn(c, 3, 3, 3), r.relu(), True)
    yield gpu_ends.first_layer_bwd, (r, image, torch.randn(c, 3, 3, 3), r.relu(), False)
    yield gpu_ends.last_layer_bwd, (torch.randn(n, 3, h, w), r, two, torch.randn(3, c, 3, 3))
    yield gpu_ends.upsample_bwd, (torch.randn(n, 2 * h, 2 * w, 8), r, torch.randn(c, 8, 2, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
@pytest.mark.parametrize("which", range(6))
def test_torch_compile_is_told_the_layouts_of_gradients(which):
    op, arguments = list(backward_cases())[which]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_torch_compile_asks_which_engine_serves_without_a_break(monkeypatch):
    """As on a GPU: torch.compile does not follow the question into the driver."""
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, int("0")))

    def ask(x: torch.Tensor) -> torch.Tensor:
        refused = gpu.refuses(UNetConfig(), torch.device("cuda", 0), BF16)
        return x + (1 if refused is None else 0)

    compiled = torch.compile(ask, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
