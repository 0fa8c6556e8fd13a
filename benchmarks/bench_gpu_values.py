"""What the engine computes on a GPU at full size: how far from float64, and the bits, so that what two
assemblers (ptxas) make of the same kernels can be compared. Layers in bf16 come first.

It times nothing: tools/gpu_first.py runs it beside others.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import bench_gpu_layers as layers
import gpu_case
import gpu_lines
import gpu_sizes
import pytest
import support
import torch
from torch import Tensor

from fastphi import engine, reference
from fastphi.engine.gpu import loop as gpu_loop
from fastphi.unet import UNet

pytestmark = gpu_case.marks()

CONFIG, SIZE, DEVICE = gpu_sizes.CONFIG, gpu_sizes.SIZE, gpu_sizes.DEVICE
N = gpu_sizes.batch(8)
# Relative, of an image in the 2-norm: a layer's is one rounding of bf16 (2^-9) and the sums'; a network's
# is what test_runner.py allows at this size.
LAYER = layers.TOLERANCE
NETWORK = {"bf16": 2e-2, "tf32": 1e-2, "ieee": 3e-6}


def keep(what: str, tolerance: float, call: Callable[[], Tensor], want: Tensor | None) -> None:
    """The value's line, then what is wrong with it. Called twice: the same bits are promised."""
    first, second = (call().detach().clone() for _ in range(2))
    bits = [hashlib.sha256(t.cpu().view(torch.uint8).numpy().tobytes()) for t in (first, second)]
    repeats = bits[0].digest() == bits[1].digest()
    error = None if want is None else support.relative_error(first[: len(want)], want)
    if gpu_lines.wanted():
        found = {"error": error, "bits": bits[0].hexdigest()[:16], "repeats": repeats}
        gpu_lines.append("value", what=what, **found)
    assert not first.isnan().any(), f"{what}: values were left unwritten"
    assert error is None or error <= tolerance, f"{what}: relative error {error:.1e}"
    assert repeats, f"{what}: two calls gave different bits"


@pytest.mark.parametrize("shape", layers.SHAPES, ids=lambda s: s.name)
@torch.no_grad()
def test_layer(shape):
    x = layers.make(shape, N)
    way = layers.ours(shape, x)

    def call() -> Tensor:
        way.launch()
        assert way.out is not None
        return way.out.contiguous()

    keep(f"{shape.name}, bf16", LAYER, call, layers.reference(shape, x, N))


@pytest.fixture(scope="module")
def model() -> UNet:
    return support.network(CONFIG, backend="cuda").to(DEVICE)


@pytest.fixture
def products(request) -> Any:
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee" if request.param == "ieee" else "tf32"
    yield request.param
    convolutions.fp32_precision = before


@pytest.mark.parametrize("products", NETWORK, indirect=True)
@pytest.mark.parametrize("work", ["denoise", "phi"])
@torch.no_grad()
def test_network(work, products, model):
    x = support.images(N, CONFIG, SIZE, DEVICE)

    def call() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=products == "bf16"):
            return model(x) if work == "denoise" else model.phi(x)

    runner = reference.ReferenceRunner(copy.deepcopy(model).double())
    double = x[:2].double()
    want = runner.denoise(double) if work == "denoise" else runner.block_means(double, "mid")["mid"]
    keep(f"{work}, {products}", NETWORK[products], call, want)


@pytest.mark.parametrize("loop", gpu_loop.FORMS)
@pytest.mark.parametrize("products", ["bf16", "ieee"], indirect=True)
def test_match(products, loop, model, monkeypatch):
    """Three updates; Adam magnifies where a gradient is near 0, so bits alone are kept."""
    if loop == "while" and (reason := gpu_loop.missing()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("FASTPHI_MATCH_LOOP", loop)
    x, low = support.images(N, CONFIG, SIZE, DEVICE), products == "bf16"
    weight = torch.full((CONFIG.channels[-1],), 1 / CONFIG.channels[-1], device=DEVICE)
    with torch.autocast("cuda", torch.bfloat16, enabled=low):
        with torch.no_grad():
            target = model.phi(support.images(N, CONFIG, SIZE, DEVICE, seed=2))

        def call() -> Tensor:
            return engine.runner(model, x).match(x, target, weight, 0.01, 3, 0.0)[0]

        keep(f"match by {loop}, {products}", 0.0, call, None)


@pytest.mark.parametrize("products", ["bf16", "ieee"], indirect=True)
def test_training_gradients(products, model):
    """Errors are test_training.py's; weight gradients are partly cuDNN's, which promises no bits: they
    are kept, a difference is no failure."""
    trained = copy.deepcopy(model).requires_grad_(True)
    x = support.images(N, CONFIG, SIZE, DEVICE)

    def call() -> Tensor:
        trained.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=products == "bf16"):
            out = trained(x)
        (out.float() - x).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in trained.parameters() if p.grad is not None])

    first, second = call(), call()
    assert first.isfinite().all()
    assert (first - second).norm() <= 1e-3 * first.norm()
    if gpu_lines.wanted():
        bits = hashlib.sha256(first.cpu().numpy().tobytes()).hexdigest()[:16]
        same = torch.equal(first, second)
        what = f"training gradients, {products}"
        gpu_lines.append("value", what=what, error=None, bits=bits, repeats=same)
