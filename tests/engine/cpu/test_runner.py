"""The CPU runner against the plain reference in float64, and its promises: same bits whoever shares the
batch, weights packed anew when they change.

test_golden.py compares every engine with the authors' network; here are the cases that it lacks.
"""

from __future__ import annotations

import pytest
import torch
from golden_case import NAMES, load_golden

from fastphi import engine
from fastphi.engine import ops

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))

# sizes that are no multiple of a vector or of a tile, one block and three, grey and colour
CONFIGS = {
    "one block": dict(channels=(5, 9), image_channels=1, mid_layers=1, dec_layers=2),
    "odd": dict(channels=(7, 18, 35), image_channels=2, enc_layers=(1, 3), dec_layers=(2, 4)),
    "residual": dict(channels=(4, 6, 8), residual=True, bias=False),
    "three": dict(channels=(3, 5, 17, 33), upsample_bias=True, mid_layers=2, dec_layers=2),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def image(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, want, tolerance) -> None:
    error = (got.double() - want).abs().max() / want.abs().max()
    assert got.shape == want.shape and error <= tolerance, f"{error:.2e} > {tolerance}"


def phi_target(model, x):
    return model.phi(x.flip(0).flip(3))


@each_config
@pytest.mark.parametrize(
    # float64 differs by the order of sums; float32 by what a dozen layers make of 6e-8 each
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 2e-5)],
    ids=["float64", "float32"],
)
@torch.no_grad()
def test_images_and_means(make_model, config, dtype, tolerance):
    oracle = make_model(backend="reference", **config).double()
    model = make_model(backend="cpu", **config).to(dtype)
    x = image(1, 3, model.config.image_channels, 24, 40)
    close(model(x.to(dtype)), oracle(x), tolerance)
    means, want = model.block_means(x.to(dtype)), oracle.block_means(x)
    assert list(means) == list(want) == list(model.config.block_names)
    for name in want:
        close(means[name], want[name], tolerance)
        assert torch.equal(model.block_means(x.to(dtype), until=name)[name], means[name])


@each_config
def test_match(make_model, config):
    """Five updates in float64: the same iterates as autograd and Adam on the reference give."""
    results = []
    for backend in ("reference", "cpu"):
        model = make_model(backend=backend, dtype=torch.float64, **config)
        x = image(2, 2, model.config.image_channels, 16, 24)
        with torch.no_grad():
            target = phi_target(model, x)
        weight = torch.linspace(0, 1, target.shape[1], dtype=torch.float64)
        results.append(engine.runner(model, x).match(x, target, weight, 0.01, 5, 0.0))
    (x0, losses0, updates0, converged0), (x1, losses1, updates1, converged1) = results
    # Adam divides by the gradient's own size: pixels without a gradient amplify its last digit
    close(x1, x0, 1e-6)
    close(losses1, losses0, 1e-9)
    assert torch.equal(updates0, updates1) and torch.equal(converged0, converged1)


def match(model, x, target, max_iter=25, tolerance=0.3):
    weight = torch.full((target.shape[1],), 1 / target.shape[1])
    return engine.runner(model, x).match(x, target, weight, 0.02, max_iter, tolerance)


@pytest.fixture
def batch():
    """A golden model and five images of which some stop early."""
    model, arrays = load_golden(NAMES[0], "cpu")
    x = image(3, 5, 3, 32, 32).float()
    with torch.no_grad():
        target = model.phi(image(4, 5, 3, 32, 32).float())
        target[1] = 0.98 * model.phi(x)[1]
    return model, x, target


def test_match_bits_do_not_depend_on_company(batch):
    model, x, target = batch
    x1, losses, updates, converged = match(model, x, target)
    assert converged.any() and updates.unique().numel() > 1, "images were meant to stop apart"
    for i in range(len(x)):
        alone = match(model, x[i : i + 1], target[i : i + 1])
        assert torch.equal(alone[0][0], x1[i]) and alone[2][0] == updates[i]
        torch.testing.assert_close(alone[1][:, 0], losses[:, i], rtol=0, atol=0, equal_nan=True)


def test_match_bits_do_not_depend_on_threads(batch):
    model, x, target = batch
    want = match(model, x, target)
    torch.set_num_threads(1)
    alone = match(model, x, target)
    for a, b in zip(want, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_what_match_reports(batch):
    """A stopped image keeps its loss at the stop and NaN after it; without updates there is one loss."""
    model, x, target = batch
    before = x.clone()
    x1, losses, updates, converged = match(model, x, target)
    assert torch.equal(x, before)
    assert losses.shape == (26, 5)
    for i, n in enumerate(updates.tolist()):
        assert torch.isfinite(losses[: n + 1, i]).all() and losses[n + 1 :, i].isnan().all()
        assert bool(converged[i]) == bool(losses[n, i] <= 0.3 * losses[0, i])
    x0, losses, updates, converged = match(model, x, target, max_iter=0)
    assert torch.equal(x0, x) and losses.shape == (1, 5) and updates.sum() == 0
    assert not converged.any()


@torch.no_grad()
def test_denoise_bits_do_not_depend_on_company_or_threads(batch):
    model, x, _ = batch
    want, means = model(x), model.block_means(x)
    torch.set_num_threads(1)
    for i in (0, 3):
        assert torch.equal(model(x[i : i + 1])[0], want[i])
        for name, a in model.block_means(x[i : i + 1]).items():
            assert torch.equal(a[0], means[name][i])


@torch.no_grad()
def test_many_images_are_worked_on_in_parts(make_model):
    """More pixels than are worked on at once, and a last part that is smaller."""
    model, oracle = make_model(backend="cpu"), make_model(backend="reference")
    x = image(5, 19, 3, 64, 64).float()
    close(model(x), oracle(x).double(), 2e-5)
    close(model.phi(x), oracle.phi(x).double(), 2e-5)


@pytest.mark.parametrize("name", ["enc1.0.weight", "mid.0.gamma", "up1.weight", "dec1.1.bias"])
@torch.no_grad()
def test_weights_are_packed_anew_when_they_change(make_model, name):
    model, oracle = make_model(backend="cpu"), make_model(backend="reference")
    x = image(6, 1, 3, 8, 8).float()
    before = model(x)
    for m in (model, oracle):
        m.get_parameter(name).mul_(1.5)
    close(model(x), oracle(x).double(), 2e-5)
    assert not torch.equal(model(x), before)
    close(model.double()(x.double()), oracle.double()(x.double()), 1e-12)


@pytest.mark.parametrize("name", ["enc2.0.weight", "up1.weight"])
@torch.no_grad()
def test_a_change_that_torch_does_not_count_is_seen(make_model, name):
    """As optimisers and averages write, some of them: through `.data`; and a weight of any layout."""
    model, oracle = make_model(backend="cpu"), make_model(backend="reference")
    x = image(6, 1, 3, 8, 8).float()
    model(x)
    for m in (model, oracle):
        m.get_parameter(name).data.mul_(1.5)
    close(model(x), oracle(x).double(), 2e-5)
    model.to(memory_format=torch.channels_last)
    for m in (model, oracle):
        m.get_parameter(name).data.mul_(1.5)
    close(model(x), oracle(x).double(), 2e-5)


def test_match_after_a_change_of_weights(make_model):
    model = make_model(backend="cpu")
    x = image(7, 1, 3, 8, 8).float()
    with torch.no_grad():
        target = phi_target(model, x)
    match(model, x, target, max_iter=2)
    fresh = make_model(backend="cpu")
    for m in (model, fresh):
        with torch.no_grad():
            m.get_parameter("enc2.0.weight").mul_(1.5)
    for a, b in zip(
        match(model, x, target, max_iter=3), match(fresh, x, target, max_iter=3), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_the_operators_name_what_does_not_fit(make_model):
    model = make_model(backend="cpu")
    network = engine.runner(model, torch.zeros(1, 3, 8, 8))._network(True, torch.float32)
    unet_fwd = torch.ops.fastphi.unet_fwd
    with pytest.raises(RuntimeError, match="x: height and width must be multiples of 4"):
        unet_fwd(torch.zeros(1, 3, 8, 6), *network, 0)
    with pytest.raises(RuntimeError, match="packed: expected .* tensors, got"):
        unet_fwd(torch.zeros(1, 3, 8, 8), *network[:-1], network[-1][:-1], 0)
    with pytest.raises(RuntimeError, match="blocks: expected 0 .* got 9"):
        unet_fwd(torch.zeros(1, 3, 8, 8), *network, 9)
    with pytest.raises(RuntimeError, match=r"packed\[0\]: expected Double like the first argument"):
        unet_fwd(torch.zeros(1, 3, 8, 8).double(), *network, 0)
