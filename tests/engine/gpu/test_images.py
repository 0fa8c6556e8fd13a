"""Noise and images on the GPU: on the CPU always, and on CUDA tensors where a GPU is.

The noisy image's bits are compared with the definition of the noise and with the decoding of
fastphi/data/images.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_ops_case import DEVICES, DTYPES, GPU, poisoned, random, same_bits

from fastphi import data, noise, reference
from fastphi.engine import ops

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))


# The GPU has a kernel for H W a multiple of 8 and 1 or 3 channels, and one for all else; a block of
# the generator that ends in the next channel; an image of less than one block.
SIZES = [
    (1, 8, 8),
    (3, 16, 24),
    (3, 64, 64),
    (3, 5, 7),
    (4, 8, 8),
    (2, 3, 5),
    (1, 1, 1),
    (20, 4, 4),
]
SEED, STREAM = 2**63 - 5, 2**32 - 1
SIGMA = (0.0, 0.5, 2.55, 1e-3, 0.0)
ROWS = (2, 0, 2, 1, 2)
SAMPLE, DRAW = (7, 2**32 - 1, 0, 3, 5), (0, 1, 2**32 - 1, 7, 3)


def expected_noisy(clean: torch.Tensor) -> torch.Tensor:
    """NCHW, from the definition: product and sum rounded each."""
    z = reference.noise_normal(
        SEED, torch.tensor(SAMPLE), STREAM, torch.tensor(DRAW), *clean.shape[1:]
    )
    product = torch.tensor(SIGMA)[:, None, None, None] * z
    return clean[list(ROWS)] + product


def make_noisy(images, dtype, device, rows=ROWS):
    c, h, w = images.shape[1:]
    if images.dtype == torch.uint8:
        h, w, c = images.shape[1:]
    out = poisoned(len(SIGMA), h, w, c, dtype=dtype, device=device)
    ids = [torch.tensor(v, device=device) for v in (SAMPLE, DRAW)]
    sigma = torch.tensor(SIGMA, device=device)
    which = None if rows is None else torch.tensor(rows, device=device)
    ops.noisy_image(images.to(device), which, sigma, SEED, ids[0], STREAM, ids[1], out)
    return out


@DEVICES
@DTYPES
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_noisy_image_has_the_defined_bits(kind, size, dtype, device):
    c, h, w = size
    if kind == "uint8":
        pixels = np.random.default_rng(0).integers(0, 256, (3, h, w, c), np.uint8)
        images = torch.from_numpy(pixels)
        clean = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
    else:
        images = clean = random(7, 3, *size)
    got = make_noisy(images, dtype, device)
    same_bits(got, expected_noisy(clean).to(dtype).permute(0, 2, 3, 1))


@DEVICES
def test_noisy_image_of_a_pack_is_what_the_package_computes(tmp_path, device):
    """Every byte, decoded by fastphi.data and by the operator; noise by fastphi.noise."""
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    clean = decoded(tmp_path, pixels)
    z = noise.normal(3, [11], noise.stream("extract"), 4, (3, 16, 16))
    out = poisoned(1, 16, 16, 3, device=device)
    one = {"device": device, "dtype": torch.int64}
    ops.noisy_image(
        torch.from_numpy(pixels).to(device),
        None,
        torch.tensor([0.3], device=device),
        3,
        torch.tensor([11], **one),
        noise.stream("extract"),
        torch.tensor([4], **one),
        out,
    )
    same_bits(out, (clean + 0.3 * z).permute(0, 2, 3, 1))


def decoded(folder, pixels: np.ndarray) -> torch.Tensor:
    """What a pack of these pixels gives out, by way of its own reader."""
    np.save(folder / "images.npy", pixels)
    pack = object.__new__(data.PackedImages)
    pack.images = np.load(folder / "images.npy", mmap_mode="r")
    pack.shape = (pixels.shape[3], *pixels.shape[1:3])
    return pack._read(np.arange(len(pixels)))


@DEVICES
def test_sigma_0_adds_nothing_and_no_rows_is_every_image(device):
    """Not even to a negative zero, which a sum with zero would turn."""
    clean = random(8, 5, 3, 8, 8)
    clean[0, 0, 0, 0] = -0.0
    same_bits(make_noisy(clean, torch.float32, device, rows=None)[0], clean[0].permute(1, 2, 0))


@DEVICES
def test_rows_that_are_not_there(device):
    """The CPU says so; a GPU, whose rows cannot be looked at without waiting, answers NaN."""
    images = random(9, 3, 3, 8, 8)
    rows = (2, 0, 3, 1, -1)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=r"rows: expected numbers in \[0, 3\), got 3"):
            make_noisy(images, torch.float32, device, rows)
    else:
        got = make_noisy(images, torch.float32, device, rows).isnan().flatten(1).cpu()
        assert got[[2, 4]].all() and not got[[0, 1, 3]].any()


@DEVICES
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_noise_normal_has_the_defined_bits(size, device):
    sample, draw = torch.tensor(SAMPLE), torch.tensor(DRAW)
    want = reference.noise_normal(SEED, sample, STREAM, draw, *size)
    got = ops.noise_normal(SEED, sample.to(device), STREAM, draw.to(device), *size)
    assert got.device.type == device
    same_bits(got, want)


# --- image_to_nhwc, image_to_nchw ------------------------------------------------------------------


@DEVICES
@DTYPES
@pytest.mark.parametrize("source", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_image_layouts(size, source, dtype, device):
    c, h, w = size
    x = random(10, 2, c, h, w)
    x[0, 0, 0, 0] = 1 + 2.0**-8  # half way between two numbers of bfloat16: to the even one
    x[-1, -1, -1, -1] = torch.inf
    if source == torch.uint8:
        x = (x.nan_to_num(0, 1).abs() * 100).clamp(0, 255)
    x = x.to(source)
    want = (x.float() / 255 if source == torch.uint8 else x).to(dtype)
    out = poisoned(2, h, w, c, dtype=dtype, device=device)
    ops.image_to_nhwc(x.to(device), out)
    same_bits(out, want.permute(0, 2, 3, 1))
    back = poisoned(2, c, h, w, dtype=dtype, device=device)
    ops.image_to_nchw(x.permute(0, 2, 3, 1).contiguous().to(device), back)
    same_bits(back, want)


@DEVICES
def test_nan_becomes_torchs(device):
    x = torch.tensor([torch.nan, -torch.nan, 1e39, -0.0]).reshape(1, 1, 2, 2)
    out = poisoned(1, 2, 2, 1, dtype=torch.bfloat16, device=device)
    ops.image_to_nhwc(x.to(device), out)
    assert out.cpu().flatten().isnan().tolist() == [True, True, False, False]
    assert out.cpu().flatten()[2:].view(torch.int16).tolist() == [0x7F80, -0x8000]


@GPU
@DTYPES
def test_buffers_that_start_anywhere(dtype):
    """A view one element into its memory: no 16-byte words there."""
    clean = random(11, 5, 3, 8, 8)
    whole = poisoned(5 * 3 * 64 + 1, dtype=dtype, device="cuda")
    out = whole[1:].view(5, 8, 8, 3)
    ops.image_to_nhwc(clean.cuda(), out)
    same_bits(out, clean.to(dtype).permute(0, 2, 3, 1))
    back = poisoned(5, 3, 8, 8, dtype=dtype, device="cuda")
    ops.image_to_nchw(out, back)
    same_bits(back, clean.to(dtype))
