"""The CPU engine in bfloat16: AMX against float64 and what it promises; elsewhere float32, to the bit.

Each instruction set runs in a process of its own, since FASTPHI_ISA is looked at once; one that this
processor does not have is skipped, saying so.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastphi
from fastphi import engine, reference
from fastphi.config import UNetConfig
from fastphi.engine import ops
from fastphi.engine.cpu import bf16 as cpu_bf16
from fastphi.sampling import match_phi
from fastphi.unet import UNet

BUILD = json.loads(torch.ops.fastphi.build_info()) if ops.missing() is None else {"amx": False}
here = pytest.mark.skipif(BUILD["isa"] != "amx", reason="no AMX in the instruction set in use")
# Activations and weights are rounded to 8 bits (2^-9 of a value on average, signs at random), sums are
# float32: a dozen layers leave a few 1e-3 of a mean over space and under 1e-2 of an image.
MEANS, IMAGE, GRADIENT, COSINE = 2e-2, 2e-2, 2e-2, 0.9995

# channels, other options, (N, H, W): panels not full, one block and several, images folded into 2, 4, 8
# and 16 and not, units that end within a row, a bias in the up-sampling, grey images, more layers
CASES = [
    ((12, 20, 36, 52), {}, (2, 16, 24)),
    ((32, 64), {"upsample_bias": True, "image_channels": 1}, (3, 6, 34)),
    ((24, 48, 96), {"residual": True, "dec_layers": (3, 2)}, (2, 12, 8)),
    ((64, 128, 256, 512), {"dec_layers": (2, 1, 1)}, (1, 32, 16)),
    ((4, 70), {"enc_layers": (3,), "upsample_bias": True}, (1, 2, 2)),
    ((40, 8), {"image_channels": 5}, (2, 10, 6)),
    ((8, 8), {}, (2, 40, 8)),
    ((8, 8), {}, (1, 64, 2)),
]


def low(x: Tensor):
    return torch.autocast("cpu", torch.bfloat16)


def network(channels, seed=0, **options) -> UNet:
    """Gains and biases of a size that no term of the layer is invisible."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet(UNetConfig(channels=channels, **options), backend="cpu")
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "gamma")):
                parameter.data.normal_(0.1, 0.3)
    return model.requires_grad_(False)


def exact(model: UNet) -> UNet:
    model = copy.deepcopy(model).double()
    model.backend = "reference"
    return model


def images(n, c, h, w, seed=1) -> Tensor:
    """Smooth with noise on it."""
    g = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(n, c, 4, 4, generator=g), (h, w), mode="bilinear")
    return smooth + 0.1 * torch.randn(n, c, h, w, generator=g)


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_network(channels, options, shape) -> None:
    model = network(channels, **options)
    n, h, w = shape
    x = images(n, model.config.image_channels, h, w)
    want, want_means = exact(model)(x.double()), exact(model).block_means(x.double())
    with low(x):
        image, means = model(x), model.block_means(x)
    assert image.dtype == torch.float32 and far(image, want) < IMAGE
    for name, mean in means.items():
        assert mean.dtype == torch.float32 and far(mean, want_means[name]) < MEANS, name
        assert F.cosine_similarity(mean.double(), want_means[name]).min() > COSINE, name


def gradient(model: UNet, x: Tensor, target: Tensor) -> Tensor:
    """Of each image's own loss, from Adam's first moment after one update."""
    runner, c = engine.cpu.CPURunner(model), model.config.channels[-1]
    channels, enc, mid, _, eps, packed = runner._network(False, torch.float32, True)
    m, v, weight = torch.zeros_like(x), torch.zeros_like(x), torch.full((c,), 1 / c)
    losses, updates = x.new_zeros(2, len(x)), torch.zeros(len(x), dtype=torch.int64)
    state = (x.clone(), m, v, losses, updates, updates == 0, target, weight)
    network = (
        channels,
        enc,
        mid,
        eps,
        packed,
        runner._parameters("transposed", torch.float32, True),
    )
    torch.ops.fastphi.match_steps_bf16(*state, *network, 0.01, 0.0, 0, 1)
    assert updates.tolist() == [1] * len(x)
    return m * 10


def plain_gradient(model: UNet, x: Tensor, target: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_(True)
    mean = model.walk_means(reference.ReferenceOps(), leaf, "mid")["mid"]
    return torch.autograd.grad(((mean - target) ** 2).mean(dim=1).sum(), leaf)[0]


def gradient_errors(channels, options, shape) -> list[float]:
    """Of each image, where few z lie near 0: a rounded one may fall the other way through its ReLU, and
    then neither this gradient nor PyTorch's in bfloat16 has a bound."""
    model = network(channels, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(8 * parameter.sign())
    n, h, w = shape
    x = images(n, model.config.image_channels, h, w)
    g = torch.Generator().manual_seed(9)
    target = exact(model).phi(x.double()).float()
    target = target * (1 + 0.5 * torch.randn(target.shape, generator=g))
    want = plain_gradient(exact(model), x.double(), target.double())
    return [far(*both) for both in zip(gradient(model, x, target), want, strict=True)]


def check_batch_and_threads() -> None:
    """The same bits for an image in any batch, at any place, on any number of threads."""
    model, x = network((32, 64, 96)), images(7, 3, 36, 20)
    with low(x):
        torch.set_num_threads(1)
        want, means = model(x), model.block_means(x)
        torch.set_num_threads(3)
        assert torch.equal(model(x), want)
        for name, mean in model.block_means(x).items():
            assert torch.equal(mean, means[name])
        for i in range(7):
            assert torch.equal(model(x[i : i + 1])[0], want[i])
        assert torch.equal(model(x.flip(0)), want.flip(0))
        assert torch.equal(model.phi(x[2:5]), means["mid"][2:5])
    target = 2 * means["mid"]
    torch.set_num_threads(1)
    match = match_phi(model, x, target, max_iter=2, tolerance=0, dtype=torch.bfloat16)
    torch.set_num_threads(3)
    for part in (slice(0, 7), slice(2, 5), slice(6, 7)):
        again = match_phi(
            model, x[part], target[part], max_iter=2, tolerance=0, dtype=torch.bfloat16
        )
        assert torch.equal(again.x, match.x[part])
        assert torch.equal(again.losses, match.losses[:, part])


def check_nan() -> None:
    """Passes through to the image it is in, and to no other."""
    model, x = network((32, 64)), images(3, 3, 8, 8)
    x[1, 0, 3, 3] = torch.nan
    with low(x):
        image, phi = model(x), model.phi(x)
    assert image[1].isnan().all() and phi[1].isnan().all()
    assert not image[::2].isnan().any() and not phi[::2].isnan().any()


def main() -> None:
    """Everything, on AMX."""
    for case in CASES:
        check_network(*case)
    errors = sorted(error for case in CASES for error in gradient_errors(*case))
    assert errors[len(errors) // 2] < GRADIENT and errors[-1] < 8 * GRADIENT, errors
    check_batch_and_threads()
    check_nan()
    print(torch.ops.fastphi.build_info())


@pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))
def test_amx():
    run = in_form("amx", "import test_bf16; test_bf16.main()")
    if "this processor does not have" in run.stderr:
        pytest.skip(run.stderr.strip().splitlines()[-1])
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["isa"] == "amx"


def in_form(form: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTPHI_ISA": form, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )


def rounded_float32() -> None:
    """Without AMX: float32's own bits, of parameters and image widened, rounded at the ends."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model, x = network((12, 16)).to(dtype), images(2, 3, 12, 8).to(dtype)
        wide, y = copy.deepcopy(model).float(), x.float()
        with low(x):
            assert torch.equal(model(x), wide(y).to(dtype))
            means = model.block_means(x)
        assert all(torch.equal(means[name], m) for name, m in wide.block_means(y).items())
        target = 2 * wide.phi(y)  # of 16 channels: their weight in the loss is exact in bfloat16
        options = {"max_iter": 3, "tolerance": 0}
        found = match_phi(model, x, target.to(dtype), dtype=torch.bfloat16, **options)
        want = match_phi(wide, y, target.to(dtype).float(), **options)
        assert torch.equal(found.x, want.x.to(dtype)) and torch.equal(found.losses, want.losses)
    model = network((12, 16)).bfloat16().requires_grad_(True)
    wide, x = copy.deepcopy(model).float(), images(2, 3, 12, 8).bfloat16()
    for one, y in ((model, x), (wide, x.float())):
        out = one(y)
        assert out.dtype == y.dtype
        out.float().square().sum().backward()
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        # the image is rounded before the loss is taken of it, and the gradient after
        assert far(p.grad.float(), q.grad) < 2e-2
    store = fastphi.extract(wide, images(3, 3, 12, 8).clamp(0, 1), sigmas=[0.2], draws=2)
    same = fastphi.extract(wide, images(3, 3, 12, 8).clamp(0, 1), sigmas=[0.2], draws=2,
                           dtype=torch.bfloat16)  # fmt: skip
    assert torch.equal(store.phi(0.2), same.phi(0.2))
    print(torch.ops.fastphi.build_info())


@pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))
@pytest.mark.parametrize("form", ["avx512", "avx2", "plain"])
def test_without_amx_float32_serves_and_says_so(form):
    run = in_form(form, "import test_bf16; test_bf16.rounded_float32()")
    if "this processor does not have" in run.stderr:
        pytest.skip(run.stderr.strip().splitlines()[-1])
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["isa"] == form
    told = f"the cpu engine runs: bfloat16 is computed in float32, .* {form} has no AMX"
    assert len(re.findall(told, run.stderr)) == 1, run.stderr


@here
@pytest.mark.parametrize("sigma", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_the_shipped_model(sigma):
    """φ to 5e-3, PSNR to 0.05 dB, from clean images to the top of its range."""
    model = fastphi.load_pretrained(backend="cpu").requires_grad_(False)
    clean = F.interpolate(images(4, 3, 8, 8), 64, mode="bicubic").clamp(0, 1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    x = clean + sigma * noise
    with low(x):
        image, phi = model(x), model.phi(x)
    want, full = exact(model).phi(x.double()), model(x)
    assert far(phi, want) < 5e-3 < MEANS
    assert F.cosine_similarity(phi.double(), want).min() > COSINE
    psnr = [-10 * float((y - clean).square().mean().log10()) for y in (image, full)]
    assert abs(psnr[0] - psnr[1]) < 0.05, psnr


@here
def test_matching_follows_float32():
    """The shipped model: as many updates, and losses that fall alike; images and losses stay float32."""
    model = fastphi.load_pretrained(backend="cpu").requires_grad_(False)
    clean = F.interpolate(images(2, 3, 8, 8), 32, mode="bicubic").clamp(0, 1)
    noise = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    x, other = clean + 0.3 * noise[0], clean.flip(0) + 0.3 * noise[1]
    options = {"max_iter": 40, "tolerance": 0.1}
    full = match_phi(model, x, model.phi(other), **options)
    found = match_phi(model, x, model.phi(other), dtype=torch.bfloat16, **options)
    assert found.x.dtype == found.losses.dtype == torch.float32
    assert (found.updates - full.updates).abs().max() <= 1
    assert not torch.equal(found.x, full.x)
    both = min(len(found.losses), int(full.updates.min()))
    torch.testing.assert_close(found.losses[:both], full.losses[:both], rtol=0.05, atol=0)
    with pytest.raises(ValueError, match="dtype: expected the model's own"):
        match_phi(model, x, model.phi(other), dtype=torch.float16)


@here
def test_matching_a_bfloat16_model():
    model, x = network((32, 64)).bfloat16(), images(2, 3, 16, 16).bfloat16()
    result = match_phi(model, x, 2 * model.phi(x), max_iter=3, tolerance=0)
    assert result.x.dtype == torch.bfloat16 and result.updates.tolist() == [3, 3]
    assert (result.last < result.first).all()


@here
def test_asked_for_by_the_models_dtype():
    """Images of its dtype, means float32; the same weights, rounded once."""
    model, x = network((32, 64)).bfloat16(), images(2, 3, 16, 16).bfloat16()
    image, means = model(x), model.block_means(x)
    assert image.dtype == torch.bfloat16 and means["mid"].dtype == torch.float32
    wide = model.float()
    with low(x):
        assert torch.equal(wide.block_means(x.float())["mid"], means["mid"])
        assert torch.equal(wide(x.float()).bfloat16(), image)


@here
def test_never_silently():
    """float32 and float64 stay what they are, and a gradient is not taken in bfloat16."""
    model, x = network((32, 64)), images(2, 3, 16, 16)
    want = model(x)
    with low(x):
        model(x)
    assert torch.equal(model(x), want) and far(want, exact(model)(x.double())) < 1e-5
    with low(x), pytest.raises(RuntimeError, match="where a gradient is needed"):
        model(x.requires_grad_())


@here
def test_a_changed_weight_is_seen():
    model, x = network((32, 64)), images(2, 3, 16, 16)
    with low(x):
        before = model.phi(x)
        model.mid[0].weight.mul_(2)
        model.mid[0].bias.mul_(2)
        model.mid[0].gamma.mul_(3)
        assert not torch.equal(model.phi(x), before)


@here
def test_more_image_channels_than_amx_takes(caplog):
    model, x = network((4, 8), image_channels=9), images(1, 9, 8, 8)
    with low(x):
        found = model(x)
    assert torch.equal(found, model(x))  # float32's bits
    assert "AMX takes images of at most 8 channels, not 9" in caplog.text


@here
def test_packed_weights_that_do_not_fit():
    model, x = network((32, 64)), images(1, 3, 8, 8)
    runner = engine.cpu.CPURunner(model)
    sizes = runner._network(True, torch.float32, True)
    bad = list(sizes[-1])
    bad[3] = bad[3][:-1]
    with pytest.raises(RuntimeError, match=r"packed: expected a dense BFloat16 .* as \[3 \+ 0\]"):
        torch.ops.fastphi.unet_fwd_bf16(x, *sizes[:-1], bad, 0)
    with pytest.raises(RuntimeError, match="x: expected float32, got Double"):
        torch.ops.fastphi.unet_fwd_bf16(x.double(), *sizes, 0)
    with pytest.raises(RuntimeError, match="blocks: expected 0"):
        torch.ops.fastphi.unet_fwd_bf16(x, *sizes, 5)


def test_packing():
    """Every weight is in its place once, and what is beyond is zero."""
    weight = torch.arange(1.0, 1 + 5 * 3 * 9).view(5, 3, 3, 3)
    packed = cpu_bf16.conv(weight.sign(), 2)  # a block for each of two sources
    assert packed.dtype == torch.bfloat16 and packed.numel() == 1 * 2 * 9 * 1024
    assert packed.float().sum() == weight.numel()
    tiles = packed.view(1, 2, 9, 2, 16, 16, 2)  # panel, block, tap, half, pair, output, 2
    assert (
        tiles[0, 0, :, 0, 0, :5].float().sum() == 5 * 2 * 9
        and (tiles[0, 1, :, 0, 0, :5, 0] == 1).all()
    )
    rows = cpu_bf16.first(weight).view(1, 1, 3, 2, 16, 16, 2)[0, 0, :, 0].float()
    assert torch.equal(rows[0], rows[1])  # of the image and of its rest
    found = (rows[0] + rows[2]).transpose(0, 1).reshape(16, 32)[:5, :27].view(5, 3, 3, 3)
    assert torch.equal(found.permute(0, 3, 1, 2), weight)
    parts = cpu_bf16.last(weight).view(1, 9, 16, 16, 2).float()
    found = (parts[..., :5, :] + parts[..., 5:10, :])[0].permute(2, 1, 3, 0).reshape(5, 32, 9)
    assert torch.equal(found[:, :3], weight.flatten(2))
