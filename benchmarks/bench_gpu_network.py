"""φ and denoising on a GPU through the public API, contiguous NCHW in and out, and the peers: eager and
torch.compile in bf16 and channels_last, and the authors' way (the whole network, TF32, eager).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import gpu_case
import gpu_sizes
import pytest
import support
import torch

from fastphi import reference
from fastphi.unet import UNet

pytestmark = gpu_case.marks()

CONFIG, SIZE = gpu_sizes.CONFIG, gpu_sizes.SIZE
DEVICE, BF16 = gpu_sizes.DEVICE, gpu_sizes.BF16
TOLERANCE = 2e-2  # relative, of bf16; a peer that errs more is timed all the same, and shown


@pytest.fixture(scope="module")
def model() -> UNet:
    return support.network(CONFIG, backend="cuda").to(DEVICE)


def low(model: UNet) -> UNet:
    """A copy in bf16 and channels_last, for the peers."""
    peer = copy.deepcopy(model).to(BF16).to(memory_format=torch.channels_last)
    peer.backend = "reference"
    return peer


def ours(model: UNet, decoder: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", BF16):
            return model(x) if decoder else model.phi(x)

    return call


def eager(model: UNet, decoder: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    peer = support.Plain(low(model), decoder=decoder)
    return lambda x: peer(x.to(BF16).contiguous(memory_format=torch.channels_last)).float()


def compiled(model: UNet, decoder: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """With CUDA graphs; what is no matrix product is tuned to the utmost, convolutions are cuDNN's, which
    tries its algorithms out: to tune Inductor's own takes minutes a batch."""
    options = {"triton.cudagraphs": True, "max_autotune_pointwise": True}
    walk = support.Plain(low(model), decoder=decoder)
    peer = torch.compile(walk, dynamic=False, options=options)
    return lambda x: peer(x.to(BF16).contiguous(memory_format=torch.channels_last)).float()


def authors(model: UNet, decoder: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Their program runs the whole network, with a hook where φ is; TF32 is torch's default."""
    peer = copy.deepcopy(model)
    peer.backend = "reference"
    mean: list[torch.Tensor] = []
    peer.mid[-1].register_forward_hook(lambda *call: mean.append(call[2].mean(dim=(2, 3))))

    def call(x: torch.Tensor) -> torch.Tensor:
        mean.clear()
        out = peer.walk(None, x)  # by its modules, with their hooks
        return out if decoder else mean[0]

    return call


WAYS = {"ours": ours, "eager": eager, "authors": authors, "torch.compile": compiled}


@pytest.fixture(scope="module")
def exact(model) -> Callable[[torch.Tensor, bool], torch.Tensor]:
    """Two images in float64."""
    double = copy.deepcopy(model).double()

    def run(x: torch.Tensor, decoder: bool) -> torch.Tensor:
        runner = reference.ReferenceRunner(double)
        x = x[:2].double()
        return runner.denoise(x) if decoder else runner.block_means(x, "mid")["mid"]

    return run


@pytest.fixture(autouse=True)
def _tried_out():
    """cuDNN's algorithms, for peers."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    yield
    torch.backends.cudnn.benchmark = before


@pytest.mark.filterwarnings("ignore")  # torch's own, of peers
@pytest.mark.parametrize("way, n", [(way, n) for n in gpu_sizes.BATCHES for way in WAYS])
@pytest.mark.parametrize("work", ["phi", "denoise"])
@torch.no_grad()
def test_network(work, way, n, model, exact, timed, peaks):
    decoder, n = work == "denoise", gpu_sizes.batch(n)
    x = support.images(n, CONFIG, SIZE, DEVICE)
    torch.compiler.reset()  # a peer's graphs keep their memory
    call = WAYS[way](model, decoder)
    error = support.relative_error(call(x)[:2].clone(), exact(x, decoder))
    assert way != "ours" or error <= TOLERANCE, f"relative error {error:.1e}: no time for that"
    flops = n * support.total_flops(CONFIG, SIZE, decoder=decoder)
    case = {
        "what": work,
        "way": way,
        "images": n,
        "flops": flops,
        "bound": flops / peaks["flops"],
        "relative_error": error,
    }
    torch.cuda.reset_peak_memory_stats()
    found = timed(case, lambda: call(x), rounds=15, least=0.03)
    assert found["seconds"]["median"] > 0
