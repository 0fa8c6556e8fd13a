"""The up-sampling in Triton against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_case import (
    DEVICE,
    STORED,
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

from fastphi.triton_kernels import upsample  # noqa: E402

CASES = {
    # (N, H, W, C, Cout)
    "64 to 32": (3, 8, 8, 64, 32),
    "128 to 64": (1, 4, 4, 128, 64),
    "20 to 12, odd size": (2, 5, 3, 20, 12),
    "one pixel": (3, 1, 1, 16, 16),
    "10×10": (5, 10, 10, 16, 24),
    "48 to 48": (1, 4, 4, 48, 48),
    "256 to 128": (1, 2, 2, 256, 128),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make(case, dtype):
    n, h, w, c, c_out = case
    weight = (random(1, c, c_out, 2, 2) / c**0.5).to(dtype)
    return nhwc(random(0, n, c, h, w), dtype), scalars(2, n), weight, random(3, c_out).float()


def launch(r, s, weight, bias) -> torch.Tensor:
    n, h, w, _ = r.shape
    out = poisoned(n, 2 * h, 2 * w, weight.shape[1], dtype=r.dtype)
    packed = guarded(upsample.pack_upsample_weight(weight, r.dtype))
    upsample.upsample_fwd(r, s, packed, None if bias is None else guarded(bias), out)
    return out


@each_case
@each_dtype
def test_values(case, dtype):
    r, s, weight, bias = make(case, dtype)
    up = F.conv_transpose2d(nchw(r).double(), weight.double(), stride=2)
    close(nchw(launch(r, None, weight, None)), up, STORED[dtype])
    want = per_image(s) * up + bias.double()[:, None, None]
    got = nchw(launch(r, s, weight, bias))
    for i in range(len(r)):  # the images' scalars are of very different size
        close(got[i], want[i], STORED[dtype])


@pytest.mark.parametrize(
    "case", [CASES["64 to 32"], CASES["48 to 48"], CASES["20 to 12, odd size"]]
)
def test_values_by_pointers(case, monkeypatch):
    """What an sm_80 GPU runs."""
    monkeypatch.setattr(upsample, "capability", lambda device: 80)
    r, _, weight, _ = make(case, torch.float16)
    want = F.conv_transpose2d(nchw(r).double(), weight.double(), stride=2)
    close(nchw(launch(r, None, weight, None)), want, STORED[torch.float16])


@each_dtype
def test_bits_do_not_depend_on_company(dtype):
    r, s, weight, bias = make((7, 4, 4, 32, 16), dtype)
    whole = launch(r, s, weight, bias)
    for i in (0, 3, 6):
        assert torch.equal(launch(r[i : i + 1], s[i : i + 1], weight, bias)[0], whole[i])


def test_errors_say_what_came_and_what_was_expected():
    r, s, weight, bias = make((2, 2, 2, 16, 8), torch.float16)
    packed = upsample.pack_upsample_weight(weight, r.dtype).to(DEVICE)
    out, bias = poisoned(2, 4, 4, 8, dtype=torch.float16), bias.to(DEVICE)
    for message, args in {
        r"out has shape \(2, 4, 4, 4\), expected \(2, 4, 4, 8\)": (
            r,
            s,
            packed,
            bias,
            out[..., :4],
        ),
        "s is None, expected the images' scalars": (r, None, packed, bias, out),
        r"r has shape \(2, 2, 16\)": (r[0], s, packed, bias, out),
        "out is float32, expected float16": (r, s, packed, bias, out.float()),
    }.items():
        with pytest.raises(ValueError, match="upsample_fwd: " + message):
            upsample.upsample_fwd(*args)
    with pytest.raises(ValueError, match=r"expected \(C, Cout, 2, 2\)"):
        upsample.pack_upsample_weight(weight[..., :1], torch.float16)
