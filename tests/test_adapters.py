"""The model in the hands of other libraries: plenoptic, deepinv (where installed: the extra
`adapters`), and the calling convention of k-diffusion."""

from __future__ import annotations

import importlib.util

import pytest
import torch


@pytest.fixture
def deepinv():
    """deepinv imports torchvision, which without a matching binary lacks its operators.

    None of them is called here, so declaring their names is enough for it to import.
    """
    if importlib.util.find_spec("deepinv") is None:
        pytest.skip("deepinv is not installed")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms", "roi_align", "roi_pool"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor boxes) -> Tensor")
    return importlib.import_module("deepinv")


def test_k_diffusion_convention(make_model) -> None:
    """k-diffusion calls denoiser(x, sigma), sigma (N,), and steps along d = (x − x̂)/σ."""
    model = make_model()
    x = 0.5 + torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sigmas = [1.0, 0.5, 0.1, 0.0]
    with torch.no_grad():
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            per_image = torch.full((2,), sigma)
            d = (x - model(x, per_image)) / sigma
            torch.testing.assert_close(d, -sigma * model.score(x, per_image))
            x = x + (following - sigma) * d
    assert x.shape == (2, 3, 16, 16) and torch.isfinite(x).all()


@pytest.mark.filterwarnings("ignore")  # of the other library's own dependencies
def test_plenoptic_makes_metamers_of_phi(make_model) -> None:
    plenoptic = pytest.importorskip("plenoptic", reason="plenoptic is not installed")
    model = make_model()
    representation = model.representation().eval()
    plenoptic.remove_grad(model)
    plenoptic.validate.validate_model(representation, image_shape=(1, 3, 16, 16))
    g = torch.Generator().manual_seed(0)
    target, start = torch.rand(2, 1, 3, 16, 16, generator=g)
    metamer = plenoptic.Metamer(target, representation)
    metamer.setup(start)
    metamer.synthesize(max_iter=50)
    with torch.no_grad():
        before, after = (
            (model.phi(x) - model.phi(target)).norm() for x in (start, metamer.metamer)
        )
    assert after < 0.3 * before


@pytest.mark.filterwarnings("ignore")
def test_deepinv_takes_the_denoiser_as_a_prior(make_model, deepinv) -> None:
    """Three plug-and-play proximal gradient steps, against the same steps by hand."""
    model = make_model()
    physics = deepinv.physics.Denoising(deepinv.physics.GaussianNoise(0.1))
    y = physics(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    algorithm = deepinv.optim.optim_builder(
        iteration="PGD",
        prior=deepinv.optim.prior.PnP(denoiser=model),
        data_fidelity=deepinv.optim.data_fidelity.L2(),
        max_iter=3,
        params_algo={"stepsize": 0.5, "g_param": 0.1},
    )
    with torch.no_grad():
        found = algorithm(y, physics)
        expected = y
        for _ in range(3):
            expected = model(expected - 0.5 * (expected - y))
    torch.testing.assert_close(found, expected)
