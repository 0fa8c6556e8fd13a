"""The gradient of gain, ReLU and deferred norm, in Triton, against float64 autograd."""

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

from fastphi.triton_kernels import norm_bwd  # noqa: E402

EPS = 1e-5
CASES = {
    # (N, H, W, C)
    "64 channels": (2, 8, 8, 64),
    "512 channels": (3, 4, 4, 512),
    "10×10": (1, 10, 10, 32),
    "odd channels": (2, 6, 4, 20),
    "36 channels": (1, 2, 2, 36),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_form = pytest.mark.parametrize("form", norm_bwd.FORMS)


def make(case, dtype, form="full") -> dict[str, torch.Tensor]:
    """Upstream gradients of r and s, z, and its statistics; gains of both signs and a zero."""
    n, h, w, c = case
    shape = {"full": (n, c, h, w), "pooled": (n, c, h // 2, w // 2)}
    up = random(0, *shape.get(form, (n, c)))
    up = guarded(up.float()) if form == "means" else nhwc(up, dtype)
    z = nhwc(random(1, n, c, h, w) + 0.3, dtype)
    gamma = random(2, c)
    gamma[0], gamma[1] = 0, -1
    exact = nchw(z).double().flatten(1)
    mean, std = exact.mean(1), exact.std(1, correction=0)
    # as large as what the ReLU lets through, so that neither of the two terms is invisible
    d_s = guarded((3 * c * h * w * random(3, n, 5) / 5).float())
    vectors = dict(gamma=gamma, s=1 / (std + EPS), mean=mean, std=std)
    return dict(d_r=up, z=z, d_s=d_s, s_in=scalars(4, n)) | {
        name: guarded(v.float()) for name, v in vectors.items()
    }


def oracle(x, form: str) -> dict[str, torch.Tensor]:
    """d_z (with s_in) and the gradients of bias and gain, by autograd in float64."""
    z = nchw(x["z"]).double()
    n, c, h, w = z.shape
    bias = torch.zeros(n, c, 1, 1, dtype=torch.float64, requires_grad=True)
    gamma = x["gamma"].double().cpu()[:, None, None].expand(n, c, 1, 1).clone().requires_grad_(True)
    z = z.requires_grad_(True)
    shifted = z + bias
    r = F.relu(gamma * shifted)
    s = 1 / (shifted.std((1, 2, 3), correction=0) + EPS)
    if form == "means":
        out = (x["d_r"].double().cpu() * r.sum((2, 3))).sum()
    else:
        r = F.avg_pool2d(r, 2) if form == "pooled" else r
        out = (nchw(x["d_r"]).double() * r).sum()
    loss = out + (x["d_s"].double().cpu().sum(1) * s).sum()
    d_z, d_bias, d_gamma = torch.autograd.grad(loss, (z, bias, gamma))
    return dict(d_z=d_z * per_image(x["s_in"]), d_bias=d_bias, d_gamma=d_gamma)


def launch(x, **options) -> dict[str, torch.Tensor]:
    n, h, w, c = x["z"].shape
    parts = norm_bwd.sums_per_image(c, h, w)
    out = dict(d_z=poisoned(n, h, w, c, dtype=x["z"].dtype), sums=poisoned(n, parts, 2, c))
    norm_bwd.norm_bwd(**(x | out | options))
    return out


@each_case
@each_form
@each_dtype
def test_values(case, form, dtype):
    x = make(case, dtype, form)
    want, out = oracle(x, form), launch(x, form=form)
    for i in range(case[0]):  # per image: their scalars are of very different size
        close(nchw(out["d_z"])[i], want["d_z"][i], max(STORED[dtype], 5e-6))
    sums = out["sums"].double().cpu().sum(1)
    # parts of both signs: against the size of what is added
    for j, name in enumerate(("d_bias", "d_gamma")):
        size = want["d_z"].abs().sum((1, 2, 3)) / x["s_in"].double().cpu()
        error = (sums[:, j] - want[name].flatten(1)).abs().amax(1) / size
        assert error.max() <= 1e-5, name


@each_form
@each_dtype
def test_without_norm(form, dtype):
    """Below a ReLU alone (z may be r itself), and without even that."""
    x = make(CASES["odd channels"], dtype, form)
    x |= dict.fromkeys(("gamma", "s", "mean", "std", "d_s", "s_in"))
    up = nchw(x["d_r"]).double() if form != "means" else x["d_r"].double().cpu()[:, :, None, None]
    up = 0.25 * up.repeat_interleave(2, 2).repeat_interleave(2, 3) if form == "pooled" else up
    z = nchw(x["z"]).double()
    want = torch.where(z > 0, up, 0.0)
    x["z"] = guarded(F.relu(x["z"]))
    close(nchw(launch(x, form=form)["d_z"]), want, STORED[dtype])
    close(nchw(launch(x, form=form, relu=False)["d_z"]), up.expand_as(z), STORED[dtype])


def test_a_constant_image_has_no_second_term():
    x = make(CASES["64 channels"], torch.float32)
    for name, value in dict(z=0.25, mean=0.25, std=0.0, s=1 / EPS).items():
        x[name][0] = value
    want = torch.where(x["gamma"] > 0, x["gamma"], 0.0) * x["d_r"][0] * x["s_in"][0]
    out = launch(x)["d_z"]
    close(out[0], want.double().cpu(), 1e-6)
    assert out.isfinite().all()


@each_dtype
def test_bits_do_not_depend_on_company(dtype):
    x = make((5, 6, 4, 20), dtype)
    whole = launch(x)
    for i in (0, 3):
        alone = launch({k: v if k == "gamma" else v[i : i + 1] for k, v in x.items()})
        assert all(torch.equal(alone[name][0], whole[name][i]) for name in whole)


def test_images_that_take_no_part_are_left_out():
    x = make((3, 4, 4, 16), torch.bfloat16)
    active = torch.tensor([0, 1, 0], dtype=torch.int32, device=DEVICE)
    whole, out = launch(x), launch(x, active=active)
    for name, values in out.items():
        assert torch.equal(values[1], whole[name][1]) and values[[0, 2]].isnan().all()


def test_errors_say_what_came_and_what_was_expected():
    x = make((2, 4, 3, 16), torch.float16)
    for message, options in {
        "form is 'half', expected one of full, pooled, means": dict(form="half"),
        "pooled needs even height and width, got 4×3": dict(form="pooled"),
        r"d_r has shape .* expected \(2, 16\)": dict(form="means"),
        "std is None, expected a tensor, as there is a gamma": dict(std=None),
        r"s_in has shape \(1,\)": dict(s_in=x["s_in"][:1]),
        "d_z is float32, expected float16": dict(d_z=poisoned(2, 4, 3, 16)),
    }.items():
        with pytest.raises(ValueError, match="norm_bwd: " + message):
            launch(x, **options)
