"""Guidance on a GPU: an iteration, a match to 1 %, reconstruction, replays; and the peers: torch.compile
with graphs on encoder and middle block, eager, and the authors' way (the whole network, every image
updated until the slowest has converged).

Peers run the paper's network on random weights, equally many updates. How many a match takes is for
trained weights to say: to 1 % it is timed on the network that comes with fastphi, in both forms of the
loop (engine/gpu/loop.json), and beside it the spread of updates. More: benchmarks/guidance_spread.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import bench_gpu_network as networks
import gpu_case
import gpu_sizes
import pytest
import support
import torch

import fastphi
from fastphi import engine, targets
from fastphi.engine.gpu import loop as gpu_loop
from fastphi.engine.gpu import match as gpu_match
from fastphi.engine.gpu import runner as gpu
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
        options = {"triton.cudagraphs": True, "max_autotune_pointwise": True}
        walk = torch.compile(walk, dynamic=False, options=options)
    return lambda i: walk(i.to(BF16).contiguous(memory_format=torch.channels_last)).float()


def time_iteration(way: str, n: int, model: UNet, timed, peaks) -> None:
    """Seconds of an iteration: a match of `UPDATES` updates and one last loss, divided."""
    n = gpu_sizes.batch(n)
    x, target = support.images(n, CONFIG, SIZE, DEVICE), target_of(model, n)
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if way == "ours":
        call, iterations = ours(model, x, target), UPDATES + 1
        assert (call()[2] == UPDATES).all()
    else:
        call, iterations = plain(peer_phi(model, way), x, target), UPDATES
    times = [t / iterations for t in support.gpu_times(call, rounds=10, least=0.03)]
    case = {"what": "guidance iteration", "way": way, "images": n, "flops": n * FLOPS}
    case |= {"bound": n * FLOPS / peaks["flops"], "peak_bytes": torch.cuda.max_memory_allocated()}
    timed(case, call, times)


@pytest.mark.filterwarnings("ignore")  # torch's own, of peers
@pytest.mark.parametrize("way, n", [(w, n) for n in BATCHES for w in ("ours", "eager", "authors")])
def test_iteration(way, n, model, timed, peaks):
    time_iteration(way, n, model, timed, peaks)


# --- until every image has stopped ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> UNet:
    network = fastphi.load_pretrained("natural64-small", device=DEVICE)
    network.backend = "cuda"
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """(256, 3, 64, 64), patches of two photographs."""
    generator = torch.Generator().manual_seed(3)
    return gpu_case.patches(gpu_case.photographs(DEVICE), SIZE, max(BATCHES), generator)


def noisy(x: torch.Tensor, sigma: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return x + sigma * torch.randn(x.shape, generator=generator).to(x)


def until_all_stop(
    model: UNet, x: torch.Tensor, target: torch.Tensor, tolerance: float, low: bool = True
) -> tuple[Callable, dict[str, float]]:
    """A match of at most 100 updates by a runner of its own, and how its updates spread."""
    runner = gpu.GPURunner(model)
    weight = torch.full(target.shape[1:], 1 / target.shape[1], device=DEVICE)

    def call():
        with torch.autocast("cuda", BF16, enabled=low):
            return runner.match(x, target, weight, 0.01, 100, tolerance)

    _, _, updates, converged = call()
    updates, mean = updates.double(), float(updates.double().mean())
    spread = {
        "mean_updates": mean,
        "max_updates": float(updates.max()),
        "cv_updates": float(updates.std(correction=0)) / max(mean, 1),
        "converged": float(converged.double().mean()),
    }
    return call, spread


def in_loop(loop: str, monkeypatch) -> dict[str, str]:
    """Asks for a form of the loop; a case's way."""
    if loop == "while" and (reason := gpu_loop.missing()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("FASTPHI_MATCH_LOOP", loop)
    return {"way": "ours" if loop == "poll" else "ours, loop on the device", "loop": loop}


@pytest.mark.parametrize("loop", gpu_loop.FORMS)
@pytest.mark.parametrize("n", BATCHES)
def test_match_to_1_percent(n, loop, trained, photographs, timed, monkeypatch):
    """Trained weights, from noise of σ = 0.5 to another image's φ at that σ."""
    way, n = in_loop(loop, monkeypatch), gpu_sizes.batch(n)
    clean = photographs[:n]
    with torch.no_grad(), torch.autocast("cuda", BF16):
        target = trained.phi(noisy(clean, 0.5, seed=1))
    start = noisy(clean.mean((2, 3), keepdim=True).expand_as(clean), 0.5, seed=2)
    call, spread = until_all_stop(trained, start, target, 0.01)
    timed({"what": "match to 1 %", "images": n} | way | spread, call, rounds=5, least=0.0)


@pytest.mark.parametrize("loop", gpu_loop.FORMS)
@pytest.mark.parametrize("n", BATCHES)
def test_match_that_stops(n, loop, model, timed, monkeypatch):
    """The paper's network, random: to 30 %, which its images reach apart from each other."""
    way, n = in_loop(loop, monkeypatch), gpu_sizes.batch(n)
    x, target = support.images(n, CONFIG, SIZE, DEVICE), target_of(model, n)
    call, spread = until_all_stop(model, x, target, 0.3)
    timed({"what": "match to 30 %", "images": n} | way | spread, call, rounds=5, least=0.0)


@pytest.mark.parametrize("sigma", [1.0, 0.5, 0.03])
@pytest.mark.parametrize("low", [True, False], ids=["bf16", "fp32"])
def test_updates_to_1_percent(low, sigma, trained, photographs, timed):
    """Of the same trained weights and images in both; within 5 % of each other is what is wanted."""
    clean = photographs[: gpu_sizes.batch(64)]
    with torch.no_grad(), torch.autocast("cuda", BF16, enabled=low):
        target = trained.phi(noisy(clean, sigma, seed=1))
    start = noisy(clean.mean((2, 3), keepdim=True).expand_as(clean), sigma, seed=2)
    call, spread = until_all_stop(trained, start, target, 0.01, low)
    case = {"what": f"updates to 1 % at σ = {sigma}", "way": "bf16" if low else "fp32"}
    timed(case | {"images": len(clean)} | spread, call, rounds=3, least=0.0)


# --- replays, reconstruction ------------------------------------------------------------------------


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
    """The schedule form from end to end, 100 levels, at most 20 updates each; the paper's network."""
    clean = support.images(64, CONFIG, SIZE, DEVICE)

    def call():
        with torch.autocast("cuda", BF16):
            chosen = targets.from_images(model, clean, draws=1)
            return fastphi.reconstruct(model, chosen, max_iter=UPDATES, tolerance=0.0)

    time_reconstruction("reconstruct, 100 levels of 20 updates", call, timed)


def test_reconstruction_to_1_percent(trained, photographs, timed):
    """The same on trained weights, with the paper's stop, at most 100 updates a level."""

    def call():
        with torch.autocast("cuda", BF16):
            chosen = targets.from_images(trained, photographs[:64], draws=10)
            return fastphi.reconstruct(trained, chosen)

    time_reconstruction("reconstruct, 100 levels to 1 %", call, timed)


def time_reconstruction(what: str, call: Callable, timed) -> None:
    torch.cuda.reset_peak_memory_stats()
    updates = call().updates.double()  # compiles and captures, too
    times = support.wall_times(call, rounds=2, least=0.0, warm=0)
    case = {"what": what, "way": "ours", "images": 64, "mean_updates": float(updates.mean())}
    case |= {"max_updates": float(updates.max()), "peak_bytes": torch.cuda.max_memory_allocated()}
    timed(case, call, times)


# --- the slowest peer -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch's own, of peers
@pytest.mark.parametrize("n", (64, 8))
def test_compiled_iteration(n, model, timed, peaks):
    """Only at batches of 64 and 8: each takes minutes to tune."""
    time_iteration("torch.compile", n, model, timed, peaks)
