"""The transposed convolution of a layer's gradient, in Triton, against float64 autograd."""

from __future__ import annotations

from typing import NamedTuple

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

from fastphi.triton_kernels import conv_bwd  # noqa: E402

CASES = {
    # (N, H, W, C of d_z, Cin)
    "64 channels": (2, 8, 8, 64, 64),
    "128 to 64, odd batch": (3, 4, 4, 128, 64),
    "64 to 128": (1, 8, 4, 64, 128),
    "20×20": (1, 20, 20, 16, 32),
    "10×10": (1, 10, 10, 16, 16),
    "odd channels": (2, 6, 5, 20, 12),
    "one pixel": (3, 1, 1, 36, 52),
}
WIDE = {"512 channels": (3, 2, 2, 512, 512), "512 to 256": (1, 4, 4, 512, 256)}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Inputs(NamedTuple):
    d_z: torch.Tensor  # with s folded in
    r: torch.Tensor
    s: torch.Tensor
    weight: torch.Tensor  # in the dtype, torch's layout


def make(case, dtype) -> Inputs:
    n, h, w, c, c_in = case
    weight = (random(2, c, c_in, 3, 3) / (9 * c) ** 0.5).to(dtype)
    r = nhwc(F.relu(random(1, n, c_in, h, w)), dtype)
    return Inputs(nhwc(random(0, n, c, h, w), dtype), r, scalars(3, n), weight)


def oracle(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_r, d_s) of L = Σ conv(s r, W) · d_z/s by autograd, in float64."""
    r = nchw(x.r).double().requires_grad_(True)
    s = per_image(x.s).requires_grad_(True)
    upstream = nchw(x.d_z).double() / per_image(x.s)
    loss = (F.conv2d(s * r, x.weight.double().cpu(), padding=1) * upstream).sum()
    d_r, d_s = torch.autograd.grad(loss, (r, s))
    return d_r, d_s.flatten()


def launch(x: Inputs, **options) -> dict[str, torch.Tensor]:
    n, h, w, c = x.d_z.shape
    c_in, dtype = x.r.shape[3], x.d_z.dtype
    slots = conv_bwd.d_s_per_image(c, c_in, h, w, dtype, DEVICE)
    out = dict(d_r=poisoned(n, h, w, c_in, dtype=dtype), d_s=poisoned(n, slots)) | options
    packed = guarded(conv_bwd.pack_transposed_weight(x.weight, dtype))
    conv_bwd.conv_bwd(x.d_z, packed, **(dict(r=x.r, s=x.s) | out))
    return out


def check_outputs(x: Inputs, out) -> None:
    d_r, d_s = oracle(x)
    for i in range(len(d_r)):
        close(nchw(out["d_r"])[i], d_r[i], STORED[x.r.dtype])
    # against the size of what is added: d_s is a sum of both signs
    size = (d_r * nchw(x.r).double()).abs().sum((1, 2, 3)) / x.s.double().cpu()
    error = (out["d_s"].double().cpu().sum(1) - d_s).abs() / size
    assert error.max() <= SUMMED, error


@each_case
@each_dtype
def test_values(case, dtype):
    x = make(case, dtype)
    check_outputs(x, launch(x))


@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_values_of_wide_layers(case):
    x = make(case, torch.bfloat16)
    check_outputs(x, launch(x))


def test_values_by_pointers(monkeypatch):
    """What an sm_80 GPU runs."""
    monkeypatch.setattr(conv_bwd, "capability", lambda device: 80)
    x = make(CASES["128 to 64, odd batch"], torch.float16)
    check_outputs(x, launch(x))


@each_dtype
def test_under_a_relu_without_norm(dtype):
    """d_r is masked; the scalar is 1 and has no gradient."""
    x = make(CASES["20×20"], dtype)
    x = x._replace(s=torch.ones_like(x.s))
    d_r, _ = oracle(x)
    out = launch(x, masked=True, d_s=None)
    close(nchw(out["d_r"]), torch.where(nchw(x.r) > 0, d_r, 0.0), STORED[dtype])


@each_dtype
def test_of_the_second_source(dtype):
    """Whose scalars are not those that d_z was made with."""
    x = make(CASES["odd channels"], dtype)
    other = scalars(9, len(x.s))
    want, want_s = oracle(x._replace(d_z=x.d_z, s=other))
    # the oracle divides d_z by its own s: make it that of the first source
    ratio = (other / x.s).double().cpu()
    out = launch(x._replace(s=other), s_z=x.s)
    for i in range(len(want)):
        close(nchw(out["d_r"])[i], want[i] * ratio[i], STORED[dtype])
    size = (want * nchw(x.r).double()).abs().sum((1, 2, 3)) / other.double().cpu()
    error = (out["d_s"].double().cpu().sum(1) / ratio - want_s).abs() / size
    assert error.max() <= 2 * SUMMED


@pytest.mark.parametrize("case", [(7, 4, 4, 16, 32), (5, 6, 6, 12, 20)], ids=["boxes", "odd"])
@each_dtype
def test_bits_do_not_depend_on_company(case, dtype):
    x = make(case, dtype)
    whole = launch(x)
    for i in (0, 3, case[0] - 1):
        alone = launch(Inputs(*(v[i : i + 1] for v in x[:3]), x.weight))
        assert all(torch.equal(alone[name][0], whole[name][i]) for name in whole)


def test_images_that_take_no_part_are_left_out():
    """Whole boxes of them; an idle image beside an active one may be computed."""
    x = make((5, 16, 16, 16, 16), torch.bfloat16)
    active = torch.tensor([1, 0, 0, 1, 0], dtype=torch.int32, device=DEVICE)
    whole, out = launch(x), launch(x, active=active)
    for name in ("d_r", "d_s"):
        assert torch.equal(out[name][[0, 3]], whole[name][[0, 3]])
        assert out[name][[1, 2, 4]].isnan().all()


def test_a_nan_is_not_hidden():
    """By the ReLU's mask it is: whatever comes from above, nothing passes there."""
    x = make((1, 6, 7, 16, 16), torch.float16)
    x.d_z[0, 2, 3, 3] = torch.nan
    reach = torch.zeros(1, 16, 6, 7, dtype=torch.bool)
    reach[0, :, 1:4, 2:5] = True
    assert torch.equal(nchw(launch(x)["d_r"]).isnan(), reach)
    masked = nchw(launch(x, masked=True, d_s=None)["d_r"]).isnan()
    assert torch.equal(masked, reach & (nchw(x.r) > 0))


def test_errors_say_what_came_and_what_was_expected():
    x = make((2, 4, 3, 16, 32), torch.float16)
    for message, options in {
        r"s has shape \(1,\), expected \(2,\)": dict(s=x.s[:1]),
        "r and d_s belong together, got only r": dict(d_s=None),
        "masked takes r, and no d_s": dict(masked=True),
        "s is None": dict(s=None),
        "d_r is float32, expected float16": dict(d_r=poisoned(2, 4, 3, 32)),
        r"active has shape \(1,\)": dict(active=torch.ones(1, dtype=torch.int32, device=DEVICE)),
    }.items():
        with pytest.raises(ValueError, match="conv_bwd: " + message):
            launch(x, **options)
    with pytest.raises(ValueError, match="pack_transposed_weight: weight has shape"):
        conv_bwd.pack_transposed_weight(torch.zeros(3, 3), torch.float16)
