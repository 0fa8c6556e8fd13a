"""The contract (docs/contract.md) in numbers: stale weights, memory that is gone, values out of range."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from contract_case import same

import fastphi
from fastphi import engine, ops, reference
from fastphi.engine.cpu import pack as cpu_pack

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))


@pytest.fixture
def x():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_data(p):
    p.data[-1] = 0.7


def by_numpy(p):
    p.detach().numpy()[-1] *= -2


def by_dlpack(p):
    np.from_dlpack(p.detach())[0] += 1


def by_storage(p):
    torch.tensor([], dtype=p.dtype).set_(p.untyped_storage(), 0, p.shape, p.stride()).mul_(0.5)


def by_swap(p):
    """Two outputs change places: the same values."""
    p.data[[0, 1]] = p.data[[1, 0]]


def by_fused_adam(p):
    p.grad = torch.zeros_like(p)
    p.grad.flatten()[7 % p.numel()] = 1
    torch.optim.Adam([p], lr=0.5, fused=True).step()


def by_fused_sgd(p):
    p.grad = torch.zeros_like(p)
    p.grad.flatten()[-1] = 1
    torch.optim.SGD([p], lr=0.5, fused=True).step()


def by_data_pointer(p):
    p.data = p.detach() * 1.5


WRITES = [by_data, by_numpy, by_dlpack, by_storage, by_swap, by_fused_adam, by_fused_sgd]
WRITES.append(by_data_pointer)


@pytest.mark.parametrize("name", ["mid.1.weight", "enc1.0.bias", "mid.2.gamma", "dec1.1.weight"])
@pytest.mark.parametrize("write", WRITES, ids=lambda w: w.__name__)
def test_weights_are_never_stale(make_model, x, write, name):
    model, x = make_model(), x.float()
    plain = reference.ReferenceRunner(model)
    with torch.no_grad():
        before = model(x)
        runner = engine.runner(model, x)  # held on to
    write(model.get_parameter(name))
    with torch.no_grad():
        found, expected = model(x), plain.denoise(x)
        assert not torch.equal(found, before)
        same(found, expected, 1e-4)
        assert torch.equal(runner.denoise(x), found)


def test_a_store_has_the_means_of_the_weights_it_names(make_model, x, tmp_path):
    model, x = make_model(), x.float()
    with torch.no_grad():
        model.phi(x)
    model.mid[-1].weight.data[1] = 0.5
    store = fastphi.extract(model, x, tmp_path / "store", sigmas=[0.0], draws=1)
    again = fastphi.extract(copy.deepcopy(model), x, sigmas=[0.0], draws=1)
    assert np.array_equal(store.array(0.0), again.array(0.0))


def test_frozen_looks_once_and_at_what_torch_sees(make_model, x):
    model, x = make_model(), x.float()
    with torch.no_grad():
        model.phi(x)
        model.mid[-1].weight.data[1] = 0.5
        with fastphi.frozen(model):
            first = model.phi(x)  # a job's start: looked at
            torch.testing.assert_close(
                first, reference.ReferenceRunner(model).block_means(x)["mid"]
            )
            model.mid[-1].weight.data[1] = 0.7
            assert torch.equal(model.phi(x), first)  # vouched for
            model.mid[-1].weight.mul_(2)
            assert not torch.equal(model.phi(x), first)  # torch counted this one
            with fastphi.frozen(model):
                assert engine.runner(model, x).vouched
            assert engine.runner(model, x).vouched
        assert engine.runner(model, x).vouched is None
        model.mid[-1].weight.data[1] = -0.7
        torch.testing.assert_close(
            model.phi(x), reference.ReferenceRunner(model).block_means(x)["mid"]
        )


@pytest.mark.parametrize("job", ["extract", "match_phi", "sample", "reconstruct"])
def test_jobs_look_once(make_model, x, job, monkeypatch):
    model, x = make_model(), x.float()
    checksums = []
    true = cpu_pack.checksum
    monkeypatch.setattr(cpu_pack, "checksum", lambda t: checksums.append(len(t)) or true(t))
    if job == "extract":
        fastphi.extract(model, x, sigmas=[0.1, 0.2], draws=3, batch=1)
    elif job == "match_phi":
        fastphi.match_phi(model, x, torch.zeros(2, 8), max_iter=2)
    elif job == "sample":
        fastphi.sample(model, 2, size=8, max_steps=4)
    else:
        targets = fastphi.targets.from_images(model, x)
        checksums.clear()
        fastphi.reconstruct(model, targets, sigmas=(1.0, 0.1, 4), max_iter=2, size=8)
    assert 0 < len(checksums) <= 3  # encoder, decoder, transposed


# --- memory and range -----------------------------------------------------------------------------


def test_a_storage_that_was_taken_away_is_an_error(make_model, x):
    model = make_model(dtype=torch.float64)
    gone = x.clone()
    gone.untyped_storage().resize_(0)
    with torch.no_grad():
        for call in (model, model.phi, lambda t: model.score(t, 0.1)):
            with pytest.raises((RuntimeError, ValueError), match="x: its storage has 0 bytes"):
                call(gone)
        model.mid[0].weight.untyped_storage().resize_(8)
        with pytest.raises((RuntimeError, ValueError), match="storage has 8 bytes"):
            model(x)
    with pytest.raises((RuntimeError, ValueError), match="x: its storage has 0 bytes"):
        model(gone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e9, 0.9e12, 1e13, 1e18, 1e20])
def test_images_beyond_the_range(make_model, x, dtype, scale):
    model = make_model(dtype=dtype)
    plain = copy.deepcopy(model)
    plain.backend = "reference"
    x = (x * scale).to(dtype)
    with torch.no_grad():
        same(model(x), plain(x), 2e-5)
        same(model.phi(x), plain.phi(x), 2e-5)
    found, expected = (
        torch.autograd.grad(m(y := x.clone().requires_grad_()).sum(), y)[0] for m in (model, plain)
    )
    same(found, expected, 1e-3)


def test_the_largest_value_is_found_whatever_the_layout():
    largest = torch.ops.fastphi.largest_magnitude
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        t = torch.randn(3, 5, 7, dtype=torch.float64).to(dtype)
        t[1, 2, 3] = -9
        t[0, 0, 0] = torch.nan
        assert largest(t) == largest(t.transpose(0, 2)) == 9
        t[2, 1, 1] = torch.inf
        assert largest(t) == float("inf")


def test_what_is_read_again_and_again_moves_and_keeps_its_place_and_bits(x):
    """Weights of 8 MB, which are looked at whole at each call, go into large pages at the second one."""
    model = fastphi.UNet(fastphi.UNetConfig(channels=(32, 512))).requires_grad_(False)
    weights = list(model.parameters())
    places, bits = [p.data_ptr() for p in weights], [p.clone() for p in weights]
    want = model(x.float())
    runner = engine.runner(model, x.float())
    for seen in (False, True, True):
        assert [have.moved for have in runner._packed.values()] == [seen, seen]
        assert torch.equal(model(x.float()), want)
    assert [p.data_ptr() for p in weights] == places
    assert all(map(torch.equal, weights, bits))
    weights[3].data[0] += 1  # and a write to where they are now is seen
    assert not torch.equal(model(x.float()), want)
    with pytest.raises(RuntimeError, match="dense"):
        torch.ops.fastphi.move_to_large_pages([torch.ones(2, 3).t()])


def test_only_a_model_can_be_frozen():
    with (
        pytest.raises(TypeError, match="model: expected a fastphi.UNet, got int"),
        fastphi.frozen(3),
    ):
        pass


def test_tied_layers_are_packed_each(make_model, x):
    model = make_model(dtype=torch.float64)
    model.mid[1].weight = model.mid[2].weight
    with torch.no_grad():
        same(model.phi(x), reference.ReferenceRunner(model).block_means(x)["mid"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gpu_s_sum_of_the_weights_sees_any_number(dtype):
    """Its op on the CPU; tools/gpu_static_threads.py has the kernel against it."""
    parts = [torch.randn(3, 5, 3, 3), torch.randn(0), torch.randn(2049)]
    parts = [p.to(dtype) for p in parts]

    def content() -> torch.Tensor:
        lanes = torch.full((3, 1024), -1)
        ops.weights_content(parts, lanes)
        return lanes.sum(dim=1)

    before = content()
    assert torch.equal(content(), before)
    rng = np.random.default_rng(0)
    for _ in range(200):
        part = rng.choice([0, 2])
        at = rng.integers(parts[part].numel())
        flat = parts[part].view(-1)
        old = flat[at].clone()
        flat[at] = old + 1
        changed = content() != before
        assert changed.tolist() == [i == part for i in range(3)]
        flat[at] = old
    parts[2][[0, 1]] = parts[2][[1, 0]]
    assert content()[2] != before[2]
