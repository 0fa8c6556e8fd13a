"""The guidance step's small operators: on the CPU always, and on CUDA tensors where a GPU is.

Against float64, and torch's own Adam. make gpu-static compares the CUDA kernels' bits with the CPU's.
"""

from __future__ import annotations

import gpu_case
import pytest
import torch

from fastphi.engine import ops

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))
DEVICES = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=gpu_case.marks(whole_engine=False))]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settings(tolerance=0.5, max_iter=7, lr=0.01, device="cpu") -> torch.Tensor:
    return torch.tensor([lr, tolerance, max_iter], dtype=torch.float64, device=device)


class Loss:
    """The arguments of match_loss: n images, all of them about to make update 0."""

    def __init__(self, n=5, c=70, rows=8, device="cpu", **options):
        self.phi, self.target = random(0, n, c).to(device), random(1, n, c).to(device)
        self.weight, self.s = random(2, c).abs().to(device), random(3, n).abs().to(device) + 0.1
        self.pixels, self.settings = 64, settings(device=device, **options)
        self.losses = torch.full((rows, n), torch.nan, device=device)
        self.updates = torch.zeros(n, dtype=torch.int64, device=device)
        self.active = torch.ones(n, dtype=torch.int32, device=device)
        self.converged = torch.zeros(n, dtype=torch.int32, device=device)
        self.d_r = torch.full((n, c), torch.nan, device=device)
        self.d_s = torch.full((n, 1), torch.nan, device=device)

    def run(self):
        ops.match_loss(*self.arguments())
        return self

    def arguments(self):
        return tuple(vars(self).values())


@DEVICES
def test_loss_and_seed(device):
    """φ = s·mean(r): the gradients of every pixel of r and of s, by autograd."""
    a = Loss(device=device).run()
    s = a.s.double().cpu().requires_grad_(True)
    mean = (a.phi.double() / a.s[:, None].double()).cpu().requires_grad_(True)
    loss = (a.weight.cpu() * (s[:, None] * mean - a.target.double().cpu()) ** 2).sum(1)
    torch.testing.assert_close(a.losses[0].cpu().double(), loss.detach(), rtol=1e-6, atol=0)
    d_s, d_mean = torch.autograd.grad(loss.sum(), (s, mean))
    torch.testing.assert_close(a.d_r.cpu().double(), d_mean / 64, rtol=1e-6, atol=0)
    error = (a.d_s[:, 0].cpu() - d_s).abs() / (d_mean * mean).abs().sum(1)
    assert error.max() <= 1e-6
    assert a.updates.tolist() == [1] * 5 and a.active.tolist() == [1] * 5
    assert a.losses[1:].isnan().all() and not a.converged.any()


@DEVICES
def test_each_image_stops_on_its_own(device):
    """One goes on, one has fallen far enough, one is at its last update, one had stopped, one is NaN."""
    a = Loss(device=device, tolerance=0.5, max_iter=3)
    first = Loss(device=device).run().losses[0]
    a.losses[0] = first * 3
    a.losses[0, 0] = first[0] * 1.5
    a.updates.copy_(torch.tensor([1, 2, 3, 2, 2]))
    a.losses[0, 2] = first[2]
    a.active[3] = 0
    a.phi[4, 0] = torch.nan
    a.run()
    assert a.active.tolist() == [1, 0, 0, 0, 1]
    assert a.converged.tolist() == [0, 1, 0, 0, 0]
    assert a.updates.tolist() == [2, 2, 3, 2, 3]
    assert torch.equal(a.losses[[1, 2, 3], [0, 1, 2]], first[:3])
    assert a.losses[1:, 3].isnan().all() and a.d_r[3].isnan().all()  # nothing written
    left = torch.zeros(1, dtype=torch.int32, device=device)
    ops.match_remaining(a.active, left)
    assert left.item() == 2


@DEVICES
def test_tolerance_0_never_stops_and_1_stops_at_once(device):
    zero = Loss(device=device, tolerance=0)
    zero.target.copy_(zero.phi)
    assert zero.run().losses[0].eq(0).all() and zero.active.all() and not zero.converged.any()
    one = Loss(device=device, tolerance=1).run()
    assert one.converged.all() and not one.active.any() and not one.updates.any()
    none = Loss(device=device, tolerance=0, max_iter=0).run()
    assert not none.converged.any() and not none.active.any() and none.losses[0].isfinite().all()


@DEVICES
@DTYPES
def test_adam_is_torchs(dtype, device):
    """Ten updates; Adam divides by the size of the gradient, so rounding shows as 1e-6 of a step."""
    n, shape = 3, (3, 3, 6, 4)
    start = random(4, *shape)
    leaf = start.double().requires_grad_(True)
    theirs = torch.optim.Adam([leaf], lr=0.01)
    x, image = start.to(device), torch.full((3, 6, 4, 3), torch.nan, dtype=dtype, device=device)
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    active = torch.tensor([1, 0, 1], dtype=torch.int32, device=device)
    for t in range(10):
        gradient = random(5 + t, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None, None]
        leaf.grad = gradient.double()
        theirs.step()
        updates = torch.full((n,), t + 1, device=device)
        given = settings(device=device)
        ops.match_adam(gradient.to(device), active, updates, given, x, m, v, image)
    assert torch.equal(x[1].cpu(), start[1]) and not m[1].any() and image[1].isnan().all()
    torch.testing.assert_close(x[[0, 2]].cpu().double(), leaf.detach()[[0, 2]], rtol=0, atol=1e-6)
    assert torch.equal(image[[0, 2]], x[[0, 2]].permute(0, 2, 3, 1).to(dtype))


@DEVICES
def test_bits_do_not_depend_on_the_batch(device):
    whole, part = Loss(device=device).run(), Loss(device=device)
    for name in ("phi", "target", "s", "updates", "active", "converged", "d_r", "d_s"):
        setattr(part, name, getattr(part, name)[3:4].contiguous())
    part.losses = part.losses[:, 3:4].contiguous()
    part.run()
    assert torch.equal(part.losses[0], whole.losses[0, 3:4])
    assert torch.equal(part.d_r[0], whole.d_r[3]) and torch.equal(part.d_s[0], whole.d_s[3])


def op_cases(device: str):
    yield "match_loss", Loss(2, 3, device=device).arguments()
    x = [random(i, 2, 3, 4, 5).to(device) for i in range(4)]
    a = Loss(2, 3, device=device)
    image = torch.zeros(2, 4, 5, 3, device=device)
    yield "match_adam", (x[0], a.active, a.updates + 1, a.settings, x[1], x[2], x[3].abs(), image)
    yield "match_remaining", (a.active, torch.zeros(1, dtype=torch.int32, device=device))
    s = torch.ones(3, 2, device=device)
    yield "combine_moments", (torch.ones(2, 4, 3, device=device), 1e-5, *s)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
@DEVICES
@pytest.mark.parametrize("which", range(4), ids=["loss", "adam", "remaining", "moments"])
def test_opcheck(which, device):
    name, arguments = list(op_cases(device))[which]
    torch.library.opcheck(getattr(torch.ops.fastphi, name).default, arguments)


BAD = {
    "target: expected shape": ("match_loss", 1, torch.zeros(2, 4)),
    "pixels: expected a positive number, got 0": ("match_loss", 4, 0),
    "settings: expected .*(Double|float64)": ("match_loss", 5, torch.zeros(3)),
    "losses: expected shape": ("match_loss", 6, torch.zeros(8, 3)),
    "updates: expected .*(Long|int64)": ("match_loss", 7, torch.zeros(2)),
    "active: expected .*(Int|int32)": ("match_loss", 8, torch.zeros(2)),
    "d_s: expected shape": ("match_loss", 11, torch.zeros(2)),
    "gradient: expected shape": ("match_adam", 0, torch.zeros(2, 3, 4, 4)),
    "v: expected .*(Float|float32)": ("match_adam", 6, torch.zeros(2, 3, 4, 5).double()),
    "image: expected shape": ("match_adam", 7, torch.zeros(2, 3, 4, 5)),
    "remaining: expected shape": ("match_remaining", 1, torch.zeros(2, dtype=torch.int32)),
    "std: expected shape": ("combine_moments", 4, torch.zeros(3)),
}


@pytest.mark.parametrize("meta", [False, True], ids=["data", "fake"])
@pytest.mark.parametrize("words, bad", BAD.items(), ids=[w.split(":")[0] for w in BAD])
def test_bad_arguments_are_named(words, bad, meta):
    name, place, value = bad
    arguments = list(dict(op_cases("cpu"))[name])
    arguments[place] = value
    if meta:
        arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match=words):
        getattr(ops, name)(*arguments)
