"""A training step on a GPU, in bf16 with float32 master weights: ours, torch.compile and eager, both in
channels_last; and what the paper's 1000 epochs of ImageNet64 would take.
"""

from __future__ import annotations

import bench_gpu_network as networks
import gpu_case
import gpu_sizes
import pytest
import support
import torch

from fastphi.unet import UNet

pytestmark = gpu_case.marks()

CONFIG, SIZE, DEVICE, BF16 = networks.CONFIG, networks.SIZE, networks.DEVICE, networks.BF16
FLOPS = 24.7e9  # of an image's step


def stepper(way: str, n: int):
    torch.manual_seed(0)
    model = UNet(CONFIG, backend="cuda").to(DEVICE)
    denoiser: torch.nn.Module = model
    if way != "ours":
        denoiser = support.Plain(model.to(memory_format=torch.channels_last), decoder=True)
    if way == "torch.compile":
        denoiser = torch.compile(denoiser)  # type: ignore[assignment]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    clean = support.images(n, CONFIG, SIZE, DEVICE)
    noisy = clean + 0.3 * torch.randn_like(clean)
    noisy = noisy.contiguous(memory_format=torch.channels_last)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", BF16):
            out = denoiser(noisy)
        loss = (out.float() - clean).square().sum((1, 2, 3)).mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


@pytest.mark.filterwarnings("ignore")  # torch's own, of peers
@pytest.mark.parametrize("n", [512, 64])
@pytest.mark.parametrize("way", ["ours", "eager", "torch.compile"])
def test_step(way, n, timed, peaks):
    n = gpu_sizes.batch(n)
    torch.compiler.reset()
    torch.cuda.empty_cache()
    step = stepper(way, n)
    losses = [float(step().detach()) for _ in range(10)]
    assert losses[-1] < losses[0], "it does not learn: no time for that"
    torch.cuda.reset_peak_memory_stats()
    case = {"what": "training step", "way": way, "images": n, "flops": n * FLOPS}
    case["bound"] = n * FLOPS / peaks["flops"]
    times = support.gpu_times(step, rounds=10, least=0.05)
    case["peak_bytes"] = torch.cuda.max_memory_allocated()
    epochs = 1000 * support.IMAGENET / n * support.summary(times)["median"] / 3600
    timed(case | {"hours_for_1000_epochs_of_imagenet": epochs}, step, times)
