"""Shared by the tests of the GPU engine at full size: the one place where those that need a GPU are
skipped for want of one, and the gradients that are compared.
"""

from __future__ import annotations

import ctypes
import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from fastphi import reference
from fastphi.config import UNetConfig
from fastphi.engine import ops
from fastphi.engine.gpu import match as gpu_match
from fastphi.engine.gpu import ops as gpu_ops
from fastphi.engine.gpu import runner as gpu
from fastphi.unet import UNet


def why_no_gpu(whole_engine: bool = True) -> str | None:
    """Why nothing can be tested on a GPU, or None. Not the whole engine: the compiled operators."""
    if not torch.cuda.is_available():
        return "no GPU is visible"
    return gpu.missing() if whole_engine else ops.missing("cuda")


# On the pretended GPU (tools/pretend_gpu), which computes on the host, the same on a network that it can.
PRETENDED = torch.cuda.is_available() and torch.cuda.get_device_name(0).startswith("pretended")
CONFIG = UNetConfig(channels=(16, 32, 48, 64)) if PRETENDED else UNetConfig()  # the paper's network
SIZE = 16 if PRETENDED else 64


def marks(whole_engine: bool = True) -> list[Any]:
    """Of a test on a GPU: `-m gpu` chooses it, and without one it is skipped."""
    reason = why_no_gpu(whole_engine)
    return [
        pytest.mark.gpu,
        pytest.mark.skipif(reason is not None, reason=f"needs a GPU: {reason}"),
    ]


counted = pytest.mark.skipif(not PRETENDED, reason="counted on the pretended GPU")


def counts() -> dict[str, int]:
    """What was asked of the pretended GPU since the last look: {"graph launch": 2, ...}."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.pretend_counts.restype = ctypes.c_char_p
    return json.loads(driver.pretend_counts(1).decode())


def photographs(device: Any) -> Tensor:
    """scikit-learn's two, (2, 3, 427, 640) in [0, 1]."""
    from sklearn.datasets import load_sample_images

    shots = [torch.tensor(image) for image in load_sample_images().images]
    return torch.stack(shots).permute(0, 3, 1, 2).float().div(255).to(device)


def patches(shots: Tensor, size: int, n: int, generator: torch.Generator) -> Tensor:
    """(n, 3, size, size): of either photograph, anywhere."""

    def draw(limit: int) -> list[int]:
        return torch.randint(limit, (n,), generator=generator).tolist()

    height, width = shots.shape[2:]
    places = zip(draw(2), draw(height - size + 1), draw(width - size + 1), strict=True)
    return torch.stack([shots[i, :, y : y + size, x : x + size] for i, y, x in places])


def network(config: UNetConfig, seed: int, backend: str = "auto") -> UNet:
    """Gains of both signs and biases other than 0, so that no term of a layer is invisible."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet(config, backend=backend)
        with torch.no_grad():
            for name, values in model.named_parameters():
                if name.endswith("bias"):
                    values.normal_(0, 0.1)
                elif name.endswith("gamma"):
                    values.normal_(0.3, 1.0)
    return model.eval()


def exact(model: UNet) -> UNet:
    """In float64, by plain PyTorch."""
    double = UNet(model.config, backend="reference").double()
    double.load_state_dict(model.state_dict())
    return double.to(next(model.parameters()).device).eval()


def gradient_to_image(runner: gpu.GPURunner, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Of the loss at x, by the launches of one iteration."""
    runner.match(x, target, weight, 0.01, 0, 0.0)
    (plan,) = runner._plans.values()
    plan.start(x, target, weight, 0.01, gpu_match.STEPS, 0.0)
    for launch in plan.launches[: len(plan.launches) // gpu_match.STEPS]:
        launch()
    return plan.gradient[: len(x)].clone()


def exact_gradient(model: UNet, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    leaf = x.double().requires_grad_(True)
    phi = exact(model).walk_means(reference.ReferenceOps(), leaf, "mid")["mid"]
    loss = (weight.double() * (phi - target.double()) ** 2).sum()
    return torch.autograd.grad(loss, leaf)[0]


def training_errors(
    model: UNet, clean: Tensor, sigma: float, low: bool = True
) -> tuple[float, float, float]:
    """Relative errors of the gradients of training against float64: of all of them as one vector, by
    the GPU engine's ops and by plain PyTorch's; and of the parameter that ours serve worst."""
    generator = torch.Generator().manual_seed(4)
    noisy = clean + sigma * torch.randn(clean.shape, generator=generator).to(clean)

    def gradients(network: UNet, walk: Any, to: torch.dtype) -> list[Tensor]:
        loss = (walk(noisy.to(to)).to(to) - clean.to(to)).square().sum()
        return list(torch.autograd.grad(loss, list(network.parameters())))

    double = exact(model)
    want = gradients(double, double, torch.float64)
    wholes, worst = [], 0.0
    for walk_ops in (gpu_ops.GPUOps(), reference.ReferenceOps()):
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=low):
            found = gradients(model, functools.partial(model.walk, walk_ops), torch.float32)
        pairs = list(zip(found, want, strict=True))
        off = sum(float((a - b).norm()) ** 2 for a, b in pairs)
        wholes.append((off / sum(float(b.norm()) ** 2 for b in want)) ** 0.5)
        worst = worst or max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return wholes[0], wholes[1], worst
