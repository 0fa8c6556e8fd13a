"""φ, denoising, guidance and training on a CPU through the public API, contiguous NCHW in and out, beside
all that a user could run instead (cpu_peers.py), round by round in turn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import cpu_peers
import pytest
import support
import torch
from torch import Tensor

import fastphi
from fastphi import reference
from fastphi.config import UNetConfig
from fastphi.engine import cpu
from fastphi.unet import UNet

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers
CONFIG = UNetConfig()
SHAPES = [(8, 64), (1, 64), (64, 64), (8, 80)]  # images, size: what is asked for first
WAYS = [name for name in cpu_peers.WAYS if name != "authors"]
TOLERANCE = {
    True: 1e-5,
    False: 5e-6,
}  # of ours, denoised and φ: largest difference over largest value
BF16 = 3e-2  # of ours in bfloat16, likewise
LR = 0.01


@pytest.fixture(scope="module")
def model() -> UNet:
    return support.network(CONFIG)


def rounds(images: int) -> int:
    return 3 if images >= 64 else 10


@pytest.mark.parametrize(("images", "size"), SHAPES)
@pytest.mark.parametrize("what", ["phi", "denoise"])
def test_network(what: str, images: int, size: int, model: UNet, in_turn) -> None:
    x, decoder = support.images(images, CONFIG, size, "cpu"), what == "denoise"
    double = reference.ReferenceRunner(copy.deepcopy(model).double())
    with torch.no_grad():
        exact = x[:1].double()
        want = double.denoise(exact) if decoder else double.block_means(exact, "mid")["mid"]
        calls: dict[str, Callable[[], Any] | str] = {}
        errors = {}
        for name in [*WAYS, *(["authors"] if what == "phi" else [])]:
            try:
                call = cpu_peers.WAYS[name](model, decoder, x)
                found = call(x)[:1].reshape(want.shape).double()
            except cpu_peers.Absent as reason:
                calls[name] = str(reason)
                continue
            errors[name] = {"error": float((found - want).abs().max() / want.abs().max())}
            calls[name] = lambda call=call: call(x)
        assert errors["ours"]["error"] <= TOLERANCE[decoder]
        assert errors.get("ours bf16", {"error": 0})["error"] <= BF16
        flops = support.total_flops(CONFIG, size, decoder=decoder) * images
        case = {"what": what, "images": images, "size": size, "flops": flops}
        in_turn(case, calls, errors, rounds=rounds(images))


def guidance(network: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, steps: int) -> Tensor:
    """Algorithm 2 as one writes it in PyTorch, all images to the end."""
    x = x.clone().requires_grad_(True)
    adam = torch.optim.Adam([x], lr=LR)
    for _ in range(steps):
        adam.zero_grad(set_to_none=True)
        (network(x) - target).square().mean(dim=1).sum().backward()
        adam.step()
    return x.detach()


@pytest.mark.parametrize(
    ("what", "steps", "images", "size"),
    [
        *(("guidance", 10, images, size) for images, size in SHAPES),
        *(("match", 100, images, size) for images, size in SHAPES if images < 64),
    ],
)
def test_guidance(what: str, steps: int, images: int, size: int, model: UNet, in_turn) -> None:
    x, target = (support.images(images, CONFIG, size, "cpu", seed) for seed in (1, 2))
    with torch.no_grad():
        target = model.phi(target)
    torch._dynamo.reset()
    encoder = cpu_peers.plain(model, decoder=False)
    encoders = {"torch.compile": torch.compile(encoder, dynamic=False), "eager": encoder}
    if what == "match":  # the others' time is a hundred times that of an iteration
        encoders.pop("eager")
    elif images < 64:
        encoders["authors"] = cpu_peers.authors(model, False, x)

    def ours(dtype: torch.dtype | None = None) -> Tensor:
        options = {"lr": LR, "max_iter": steps, "tolerance": 0.0}
        return fastphi.match_phi(model, x, target, dtype=dtype, **options).x

    reason = cpu.refuses(CONFIG, x.device, torch.bfloat16)
    calls: dict[str, Callable[[], Any] | str] = {"ours": ours}
    calls["ours bf16"] = reason or (lambda: ours(torch.bfloat16))
    for name, network in encoders.items():
        calls[name] = lambda network=network: guidance(network, x, target, steps)
        guidance(network, x, target, 1)  # compiles
    if "eager" in encoders:  # a whole match spreads the rounding of its first gradients
        moved = (ours() - calls["eager"]()).abs()  # type: ignore[operator]
        assert float(moved.median()) < 1e-4
    case = {"what": what, "images": images, "size": size, "steps": steps}
    if what == "match" or images >= 64:
        in_turn(case, calls, rounds=2, warm=False)
    else:
        in_turn(case, calls, rounds=5)


@pytest.mark.parametrize("images", [8, 1, 64])
def test_training_step(images: int, in_turn) -> None:
    clean = support.images(images, CONFIG, 64, "cpu")
    noisy = clean + 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))

    def step(model: UNet, network: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

        def run() -> None:
            adam.zero_grad(set_to_none=True)
            (network(noisy) - clean).square().mean().backward()
            adam.step()

        return run

    torch._dynamo.reset()
    models = [support.network(CONFIG).requires_grad_(True) for _ in range(3)]
    peers = [support.Plain(model, decoder=True) for model in models]
    calls: dict[str, Callable[[], Any] | str] = {
        "ours": step(models[0], models[0]),
        "torch.compile": step(models[1], torch.compile(peers[1], dynamic=False)),
        "eager": step(models[2], peers[2]),
    }
    in_turn({"what": "train", "images": images, "size": 64}, calls, rounds=3)
