"""The GPU engine's ops under autograd, against float64: every gradient of the whole network.

Without a GPU the kernels run in Triton's interpreter, and the library's part in torch's on the CPU.
"""

from __future__ import annotations

import functools

import gpu_case
import pytest
import torch
from triton_case import DEVICE, INTERPRETED, need_kernels

from fastphi import reference
from fastphi.config import UNetConfig
from fastphi.engine import ops
from fastphi.engine.gpu import runner as gpu  # noqa: E402
from fastphi.unet import UNet

need_kernels()
if (reason := ops.missing() if INTERPRETED else gpu.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fastphi.engine.gpu import ends as gpu_ends  # noqa: E402
from fastphi.engine.gpu import layer as gpu_layer  # noqa: E402
from fastphi.engine.gpu import ops as gpu_ops  # noqa: E402

pytestmark = pytest.mark.usefixtures("exact_products")

NETWORKS = {
    "two blocks": (
        UNetConfig(channels=(16, 24, 16), dec_layers=2, mid_layers=1, residual=True),
        (2, 3, 4, 4),
    ),
    # grey, odd channels, a bias in the up-sampling alone, where it ends the deferral
    "odd": (
        UNetConfig(
            channels=(12, 20, 36),
            image_channels=1,
            bias=False,
            upsample_bias=True,
            enc_layers=(1, 2),
            mid_layers=1,
            dec_layers=(2, 1),
        ),
        (1, 1, 4, 8),
    ),
}
each_network = pytest.mark.parametrize("name", NETWORKS)
OPS = gpu_ops.GPUOps()


@functools.cache
def network(name: str) -> UNet:
    return gpu_case.network(NETWORKS[name][0], seed=0).train().to(DEVICE)


def exact(model: UNet) -> UNet:
    return gpu_case.exact(model).cpu()


def case(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and the gradient that comes from above."""
    g = torch.Generator().manual_seed(1)
    x, upstream = torch.randn(2, *NETWORKS[name][1], generator=g)
    return x.to(DEVICE), upstream.to(DEVICE)


def gradients(model: UNet, out: torch.Tensor, upstream, x: torch.Tensor) -> dict:
    named = {"x": x, **dict(model.named_parameters())}
    found = torch.autograd.grad((out * upstream).sum(), list(named.values()), allow_unused=True)
    return {k: v for k, v in zip(named, found, strict=True) if v is not None}


def expected(name: str, x, upstream, means: bool = False) -> tuple[torch.Tensor, dict]:
    double, leaf = exact(network(name)), x.detach().double().cpu().requires_grad_(True)
    plain = reference.ReferenceOps()
    out = double.walk_means(plain, leaf, "mid")["mid"] if means else double.walk(plain, leaf)
    return out.detach(), gradients(double, out, upstream.double().cpu(), leaf)


def check(found: dict, want: dict, tolerance: float) -> None:
    assert found.keys() == want.keys()
    for name, value in found.items():
        error = (value.double().cpu() - want[name]).norm() / want[name].norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


@each_network
def test_image_and_every_gradient(name):
    x, upstream = case(name)
    leaf = x.requires_grad_(True)
    out = network(name).walk(OPS, leaf)
    want, gradient = expected(name, x, upstream)
    assert out.dtype == torch.float32
    assert (out.detach().double().cpu() - want).norm() <= 1e-6 * want.norm()
    check(gradients(network(name), out, upstream, leaf), gradient, 5e-6)


@each_network
def test_gradients_of_phi(name):
    x, _ = case(name)
    leaf = x.requires_grad_(True)
    phi = network(name).walk_means(OPS, leaf, "mid")["mid"]
    upstream = torch.randn(phi.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    want, gradient = expected(name, x, upstream, means=True)
    assert (phi.detach().double().cpu() - want).norm() <= 1e-6 * want.norm()
    check(gradients(network(name), phi, upstream, leaf), gradient, 5e-6)


def test_autocast_computes_in_bfloat16_with_master_weights_in_float32():
    """Rounded to 8 bits at every layer, forward and backward; in a small network little averages out."""
    name = "two blocks"
    x, upstream = case(name)
    leaf = x.requires_grad_(True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = network(name).walk(OPS, leaf)
    want, gradient = expected(name, x, upstream)
    assert (out.detach().double().cpu() - want).norm() <= 2e-2 * want.norm()
    found = gradients(network(name), out, upstream, leaf)
    assert all(g.dtype == torch.float32 for g in found.values())
    check(found, gradient, 0.15)


def test_under_torch_compile_without_a_break():
    model, (x, upstream) = network("two blocks"), case("two blocks")
    leaf = x.requires_grad_(True)
    walk = torch.compile(lambda i: model.walk(OPS, i), backend="aot_eager", fullgraph=True)
    eager = gradients(model, model.walk(OPS, leaf), upstream, leaf)
    found = gradients(model, walk(leaf), upstream, leaf)
    assert all(torch.equal(found[k], eager[k]) for k in eager)


def test_only_what_is_asked_for_has_a_gradient():
    model = UNet(NETWORKS["two blocks"][0]).to(DEVICE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "mid.0.gamma")
    model.walk(OPS, case("two blocks")[0].detach()).sum().backward()
    grads = [name for name, p in model.named_parameters() if p.grad is not None]
    assert grads == ["mid.0.gamma"]


def test_second_derivatives_are_refused():
    x, _ = case("two blocks")
    leaf = x.requires_grad_(True)
    phi = network("two blocks").walk_means(OPS, leaf, "enc1")["enc1"]
    (first,) = torch.autograd.grad(phi.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        torch.autograd.grad(first.square().sum(), leaf)


def op_cases():
    r, z = torch.randn(2, 2, 4, 2, 16, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    r, s = r.relu().requires_grad_(True), torch.ones(2, device=DEVICE, requires_grad=True)
    weight = torch.full((16, 16, 3, 3), 0.1, device=DEVICE, requires_grad=True)
    bias = torch.zeros(16, device=DEVICE, requires_grad=True)
    image = z[..., :3].contiguous()
    yield gpu_layer.layer_fwd, (r, s, None, None, weight, bias, bias + 1, 1e-5)
    yield gpu_ends.first_layer_fwd, (image, weight[:, :3].detach(), bias, torch.float32)
    yield gpu_ends.last_layer_fwd, (r, s, weight[:3].detach(), bias[:3].detach())
    yield gpu_ends.upsample_fwd, (r, weight[:, :, :2, :2].detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
@pytest.mark.parametrize("which", range(4), ids=["layer", "first", "last", "upsample"])
def test_opcheck(which):
    op, arguments = list(op_cases())[which]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, arguments, test_utils=utils)
