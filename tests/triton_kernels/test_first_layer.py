"""The first layer in Triton against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_case import (
    DEVICE,
    STORED,
    SUMMED,
    close,
    each_dtype,
    guarded,
    nchw,
    need_kernels,
    nhwc,
    poisoned,
    random,
)

need_kernels()

from fastphi.triton_kernels import first_layer  # noqa: E402

CASES = {
    # (N, H, W, C, Cout)
    "3 to 64": (3, 16, 16, 3, 64),
    "grey, odd sizes": (2, 5, 3, 1, 20),
    "4 to 96, 10×10": (1, 10, 10, 4, 96),
    "2 to 16, 20×20": (2, 20, 20, 2, 16),
    "one pixel": (3, 1, 1, 3, 12),
}
# What two parts leave of a weight, at worst.
TWO_PARTS = {torch.float32: 0.0, torch.float16: 2.0**-22, torch.bfloat16: 2.0**-17}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make(case, image_dtype):
    n, h, w, c, c_out = case
    weight = random(1, c_out, c, 3, 3).float() / (9 * c) ** 0.5
    return nhwc(random(0, n, c, h, w), image_dtype), weight, random(2, c_out).float().to(DEVICE)


def launch(dtype, image, weight, bias, **options) -> dict[str, torch.Tensor]:
    n, h, w, _ = image.shape
    c_out = len(weight)
    boxes = first_layer.sums_per_image(c_out, h, w, dtype, DEVICE)
    out = dict(r_out=poisoned(n, h, w, c_out, dtype=dtype), sums=poisoned(n, boxes, c_out))
    if h % 2 == 0 and w % 2 == 0:
        out["pooled"] = poisoned(n, h // 2, w // 2, c_out, dtype=dtype)
    packed = guarded(first_layer.pack_first_weight(weight, dtype))
    first_layer.first_layer_fwd(image, packed, bias, **(out | options))
    return out


def oracle(dtype, image, weight, bias) -> torch.Tensor:
    """What the layer computes: on the image as `dtype` has it, with the weights as they are."""
    x = nchw(image).to(dtype).double()
    return F.relu(F.conv2d(x, weight.double(), bias.double().cpu(), padding=1))


@each_case
@each_dtype
@pytest.mark.parametrize("same", [True, False], ids=["image like weights", "image fp32"])
def test_values(case, dtype, same):
    x = make(case, dtype if same else torch.float32)
    y = oracle(dtype, *x)
    out = launch(dtype, *x)
    close(nchw(out["r_out"]), y, STORED[dtype])
    close(out["sums"].double().cpu().sum(dim=1), y.sum(dim=(2, 3)), max(SUMMED, TWO_PARTS[dtype]))
    if "pooled" in out:
        close(nchw(out["pooled"]), F.avg_pool2d(y, 2), STORED[dtype])


@each_dtype
def test_without_bias_or_relu(dtype):
    image, weight, bias = make((2, 4, 4, 3, 16), dtype)
    out = launch(dtype, image, weight, None, relu=False, sums=None, pooled=None)
    want = F.conv2d(nchw(image).double(), weight.double(), padding=1)
    close(nchw(out["r_out"]), want, STORED[dtype])
    assert out["sums"].isnan().all() and out["pooled"].isnan().all()


@each_dtype
def test_a_nan_is_not_hidden_and_stays_within_its_reach(dtype):
    image, weight, bias = make((2, 6, 7, 3, 16), dtype)
    image[0, 2, 3, 1] = torch.nan
    reach = torch.zeros(2, 16, 6, 7, dtype=torch.bool)
    reach[0, :, 1:4, 2:5] = True
    assert torch.equal(nchw(launch(dtype, image, weight, bias)["r_out"]).isnan(), reach)


@each_dtype
def test_bits_do_not_depend_on_company(dtype):
    image, weight, bias = make((7, 6, 4, 3, 20), torch.float32)
    whole = launch(dtype, image, weight, bias)
    for i in (0, 3, 6):
        for name, tensor in launch(dtype, image[i : i + 1], weight, bias).items():
            assert torch.equal(tensor[0], whole[name][i]), name


def test_errors_say_what_came_and_what_was_expected():
    image, weight, bias = make((2, 4, 3, 3, 16), torch.float16)
    packed = first_layer.pack_first_weight(weight, torch.float16).to(DEVICE)
    out = poisoned(2, 4, 3, 16, dtype=torch.float16)
    for message, args in {
        r"image has shape \(2, 4, 3, 16\), expected .* C from 1 to 4": (out, packed, bias, out),
        r"weight .* has shape \(16, 3, 3, 3\)": (image, weight.half().to(DEVICE), bias, out),
        "image is float64": (image.double(), packed, bias, out),
        "nothing to write": (image, packed, bias, None),
    }.items():
        with pytest.raises(ValueError, match="first_layer_fwd: " + message):
            first_layer.first_layer_fwd(*args)
    with pytest.raises(ValueError, match="C from 1 to 4"):
        first_layer.pack_first_weight(torch.zeros(4, 5, 3, 3), torch.float16)
