"""The last layer in Triton against float64."""

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
    per_image,
    poisoned,
    random,
    scalars,
)

need_kernels()

from fastphi.triton_kernels import fused_layer, last_layer  # noqa: E402

CASES = {
    # (N, H, W, C, Cout)
    "64 to 3": (3, 8, 8, 64, 3),
    "grey, odd": (2, 5, 3, 20, 1),
    "16 to 4, 10×10": (1, 10, 10, 16, 4),
    "48 to 4": (2, 4, 4, 48, 4),
    "16 to 2": (5, 4, 6, 16, 2),
    "one pixel": (3, 1, 1, 12, 3),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make(case, dtype):
    n, h, w, c, c_out = case
    weight = (random(1, c_out, c, 3, 3) / (9 * c) ** 0.5).to(dtype)
    bias = random(3, c_out).float().to(DEVICE)
    return nhwc(random(0, n, c, h, w), dtype), scalars(2, n), weight, bias


def launch(r, s, weight, bias, dtype) -> torch.Tensor:
    n, h, w, _ = r.shape
    out = poisoned(n, len(weight), h, w, dtype=dtype)
    packed = guarded(fused_layer.pack_weight(weight, None, r.dtype))
    last_layer.last_layer_fwd(r, s, packed, bias, out)
    return out.cpu()


@each_case
@each_dtype
def test_values(case, dtype):
    r, s, weight, bias = make(case, dtype)
    x = per_image(s) * nchw(r).double()
    y = F.conv2d(x, weight.double(), bias.double().cpu(), padding=1)
    plain = launch(r, s, weight, bias, torch.float32)
    rounded = launch(r, s, weight, bias, dtype)
    for i in range(len(r)):  # the images' scalars are of very different size
        close(plain[i], y[i], SUMMED)
        close(rounded[i], y[i], STORED[dtype])
    without = launch(r, s, weight, None, torch.float32)
    close(without, y - bias.double().cpu()[:, None, None], SUMMED)


def test_values_by_pointers(monkeypatch):
    """What an sm_80 GPU runs."""
    monkeypatch.setattr(last_layer, "capability", lambda device: 80)
    r, s, weight, bias = make(CASES["64 to 3"], torch.float16)
    x = per_image(s) * nchw(r).double()
    y = F.conv2d(x, weight.double(), bias.double().cpu(), padding=1)
    close(launch(r, s, weight, bias, torch.float32), y, SUMMED)


@each_dtype
def test_bits_do_not_depend_on_company(dtype):
    r, s, weight, bias = make((7, 4, 4, 32, 3), dtype)
    whole = launch(r, s, weight, bias, torch.float32)
    for i in (0, 3, 6):
        alone = launch(r[i : i + 1], s[i : i + 1], weight, bias, torch.float32)
        assert torch.equal(alone[0], whole[i])


def test_errors_say_what_came_and_what_was_expected():
    r, s, weight, bias = make((2, 4, 3, 16, 3), torch.float16)
    packed = fused_layer.pack_weight(weight, None, torch.float16).to(DEVICE)
    many = torch.zeros(5, 144, dtype=torch.float16, device=DEVICE)
    out = poisoned(2, 3, 4, 3)
    for message, args in (
        ("weight has 5 output channels, expected 1 to 4", (r, s, many, None, out)),
        (r"out has shape \(2, 4, 3, 3\)", (r, s, packed, bias, poisoned(2, 4, 3, 3))),
        ("out is bfloat16, expected float32 or float16", (r, s, packed, bias, out.bfloat16())),
    ):
        with pytest.raises(ValueError, match="last_layer_fwd: " + message):
            last_layer.last_layer_fwd(*args)
