"""Guidance on a GPU: an iteration, a match to 1 %, reconstruction, replays; and the peers: torch.compile
with graphs on encoder and middle block, eager, and the authors' way (the whole network, every image
updated until the slowest has converged).

A trained model's φ decides how many updates a match takes; here the weights are random, and what is
compared is the time of equally many. The spread on a trained model: benchmarks/guidance_spread.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import bench_gpu_network as networks
import gpu_case
import pytest
import support
import torch

import fastphi
from fastphi import engine, gpu_match, targets
from fastphi.unet import UNet

pytestmark = gpu_case.marks()

CONFIG, SIZE, DEVICE, BF16 = networks.CONFIG, networks.SIZE, networks.DEVICE, networks.BF16
BATCHES = (64, 8, 256, 1)  # what is asked for first
UPDATES = 20  # of a match that is timed
FLOPS = 3.95e9  # of an image's iteration: forward, and backward to the image
model = networks.model  # a fixture


def target_of(model: UNet, n: int) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cuda", BF16):
        return model.phi(support.images(n, CONFIG, SIZE, DEVICE, seed=2))


def weights() -> torch.Tensor:
    return torch.full((CONFIG.channels[-1],), 1 / CONFIG.channels[-1], device=DEVICE)


def ours(model: UNet, x: torch.Tensor, target: torch.Tensor, tolerance: float = 0.0) -> Callable:
    def call():
        with torch.autocast("cuda", BF16):
            runner = engine.runner(model, x)
            return runner.match(x, target, weights(), 0.01, UPDATES, tolerance)

    return call


def plain(phi: Callable, x: torch.Tensor, target: torch.Tensor) -> Callable:
    """Algorithm 2 as one writes it in PyTorch; every image updated as often."""

    def call():
        image = x.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([image], 0.01, fused=True)
        for _ in range(UPDATES):
            optimizer.zero_grad(set_to_none=True)
            (phi(image) - target).square().mean(1).sum().backward()
            optimizer.step()
        return image.detach()

    return call


class Authors(support.Plain):
    """Their program runs the whole network and takes φ on the way."""

    phi: torch.Tensor

    def _block(self, name: str, h: torch.Tensor) -> torch.Tensor:
        h = super()._block(name, h)
        if name == "mid":
            self.phi = h.mean(dim=(2, 3))
        return h


def peer_phi(model: UNet, way: str) -> Callable:
    if way == "authors":  # float32 with TF32 products, torch's default
        network = Authors(copy.deepcopy(model), decoder=True)
        return lambda i: (network(i), network.phi)[1]
    walk = support.Plain(networks.low(model), decoder=False)
    if way == "torch.compile":
        walk = torch.compile(walk, mode="max-autotune")
    return lambda i: walk(i.to(BF16).contiguous(memory_format=torch.channels_last)).float()


@pytest.mark.filterwarnings("ignore")  # torch's own, of peers
@pytest.mark.parametrize(
    "way, n",
    [(way, n) for way in ("ours", "eager", "authors", "torch.compile") for n in BATCHES],
)
def test_iteration(way, n, model, timed, peaks):
    """Seconds of an iteration: a match of `UPDATES` updates and one last loss, divided."""
    if way == "torch.compile" and n not in (8, 64):
        pytest.skip("each takes minutes to tune")
    x, target = support.images(n, CONFIG, SIZE, DEVICE), target_of(model, n)
    torch.compiler.reset()
    if way == "ours":
        call, iterations = ours(model, x, target), UPDATES + 1
        assert (call()[2] == UPDATES).all()
    else:
        call, iterations = plain(peer_phi(model, way), x, target), UPDATES
    times = [t / iterations for t in support.gpu_times(call, rounds=10, least=0.03)]
    bound = n * FLOPS / peaks["flops"]
    case = {"what": "guidance iteration", "way": way, "images": n, "bound": bound}
    torch.cuda.reset_peak_memory_stats()
    timed(case | {"flops": n * FLOPS}, call, times)


@pytest.mark.parametrize("n", (1, 8, 64, 256))
def test_match_that_stops(n, model, timed):
    """Images that stop apart from each other: the time against that of all of them to the end."""
    x, target = support.images(n, CONFIG, SIZE, DEVICE), target_of(model, n)
    updates = ours(model, x, target, 0.3)()[2].double()
    case = {"what": "match to 30 %", "way": "ours", "images": n}
    case |= {"mean_updates": float(updates.mean()), "max_updates": float(updates.max())}
    timed(case, ours(model, x, target, 0.3), rounds=10, least=0.03)


@pytest.mark.parametrize("low", [True, False], ids=["bf16", "fp32"])
def test_updates_to_30_percent(low, model, timed):
    """Of the same images in both; within 5 % of each other is what is wanted."""
    x, target = support.images(16, CONFIG, SIZE, DEVICE), target_of(model, 16)

    def call():
        with torch.autocast("cuda", BF16, enabled=low):
            return engine.runner(model, x).match(x, target, weights(), 0.01, 100, 0.3)

    updates = float(call()[2].double().mean())
    case = {"what": f"updates, {'bf16' if low else 'fp32'}", "way": "ours", "images": 16}
    timed(case | {"mean_updates": updates}, call, rounds=3, least=0.0)


def test_ten_thousand_replays(model, timed):
    """With flat memory; seconds of one."""
    x, target = support.images(8, CONFIG, SIZE, DEVICE), target_of(model, 8)

    def call():
        with torch.autocast("cuda", BF16):
            return engine.runner(model, x).match(x, target, weights(), 0.01, 120, 0.0)

    call()
    before, replays = torch.cuda.memory_allocated(), 121 // gpu_match.STEPS + 1
    times = []
    while len(times) * replays < 10_000:
        times += [t / replays for t in support.wall_times(call, rounds=1, least=0.0, warm=0)]
    after = torch.cuda.memory_allocated()
    case = {"what": "10,000 replays", "way": "ours", "images": 8}
    timed(case | {"bytes_before": before, "bytes_after": after}, call, times)
    assert after <= before + (1 << 20)


def test_reconstruction(model, timed):
    """The schedule form from end to end, 100 levels, at most 20 updates each."""
    clean = support.images(64, CONFIG, SIZE, DEVICE)

    def call():
        with torch.autocast("cuda", BF16):
            chosen = targets.from_images(model, clean, draws=1)
            return fastphi.reconstruct(model, chosen, max_iter=UPDATES, tolerance=0.0)

    times = support.wall_times(call, rounds=2, least=0.0)
    case = {"what": "reconstruct, 100 levels of 20 updates", "way": "ours", "images": 64}
    timed(case, call, times)
