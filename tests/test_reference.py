"""The reference against formulas written out another way: by hand, by NumPy, by torch.optim."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastphi import reference
from fastphi.reference import ReferenceOps


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_std_norm():
    """y = γ_c z / (std(z) + ε): std over channels too, biased, ε outside the root, no mean."""
    z, gamma, eps = randn(2, 3, 4, 5) + 3, randn(3, seed=1), 0.1
    found = reference.std_norm(z, gamma, eps)
    for i in range(2):
        values = z[i].numpy().ravel()
        std = np.sqrt(np.mean((values - values.mean()) ** 2))
        expected = gamma.numpy()[:, None, None] * z[i].numpy() / (std + eps)
        np.testing.assert_allclose(found[i], expected, rtol=1e-13)
    wrong = torch.nn.functional.layer_norm(z, z.shape[1:], eps=eps)
    assert not torch.allclose(found, wrong * gamma[:, None, None], rtol=1e-2)


def test_std_norm_of_a_constant_image():
    z = torch.full((1, 2, 2, 2), 3.0, dtype=torch.float64, requires_grad=True)
    gamma = torch.ones(2, dtype=torch.float64)
    y = reference.std_norm(z, gamma, 0.5)
    torch.testing.assert_close(y, torch.full_like(z, 6.0))
    (gradient,) = torch.autograd.grad(y.sum(), z)
    torch.testing.assert_close(gradient, torch.full_like(z, 2.0))  # κ = 0 where std = 0


def test_layer_norm_is_the_textbook_one():
    z, gamma, beta = randn(2, 3, 4, 5) + 3, randn(3, seed=1), randn(3, seed=2)
    found = reference.layer_norm(z, gamma, beta, 0.1)
    plain = torch.nn.functional.layer_norm(z, z.shape[1:], eps=0.1)
    expected = gamma[:, None, None] * plain + beta[:, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def convolved(x, weight, bias):
    """3×3, stride 1, zero padding, by NumPy loops over the taps."""
    n, _, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((n, len(weight), h, w))
    for dy in range(3):
        for dx in range(3):
            taps = padded[:, :, dy : dy + h, dx : dx + w]
            out += np.einsum("nihw,oi->nohw", taps, weight[:, :, dy, dx])
    return out + bias[:, None, None]


def test_layer_with_skip():
    """concat([h, skip]) → conv → norm → ReLU, h's channels first."""
    h, skip, weight = randn(2, 2, 4, 6), randn(2, 3, 4, 6, seed=1), randn(5, 5, 3, 3, seed=2)
    bias, gamma, eps = randn(5, seed=3), randn(5, seed=4), 1e-5
    ops = ReferenceOps()
    z = convolved(np.concatenate([h, skip], axis=1), weight.numpy(), bias.numpy())
    std = z.reshape(2, -1).std(axis=1)[:, None, None, None]
    y = gamma.numpy()[:, None, None] * z / (std + eps)
    np.testing.assert_allclose(
        ops.layer(h, weight, bias, gamma, eps, skip=skip), np.maximum(y, 0), rtol=1e-11, atol=1e-12
    )
    np.testing.assert_allclose(
        ops.layer(h, weight, bias, gamma, eps, False, skip=skip), y, rtol=1e-11, atol=1e-12
    )
    plain = ops.layer(h, weight[:, :2], bias, None, eps, True)
    np.testing.assert_allclose(
        plain, np.maximum(convolved(h, weight[:, :2].numpy(), bias.numpy()), 0), atol=1e-12
    )


def test_pool_upsample_and_mean():
    h, weight, bias = randn(2, 3, 4, 6), randn(3, 5, 2, 2, seed=1), randn(5, seed=2)
    ops, x = ReferenceOps(), h.numpy()
    pooled = x.reshape(2, 3, 2, 2, 3, 2).mean(axis=(3, 5))
    np.testing.assert_allclose(ops.pool(h), pooled, rtol=1e-13, atol=1e-14)
    up = np.einsum("nihw,ioyx->nohywx", x, weight.numpy()).reshape(2, 5, 8, 12)
    np.testing.assert_allclose(ops.upsample(h, weight, None), up, rtol=1e-12, atol=1e-13)
    up = up + bias.numpy()[:, None, None]
    np.testing.assert_allclose(ops.upsample(h, weight, bias), up, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(ops.mean(h), x.mean(axis=(2, 3)), rtol=1e-13)


def test_low_precision_statistics_are_taken_in_float32():
    z = (randn(1, 8, 32, 32) * 0.01 + 1).to(torch.bfloat16)
    weight = torch.zeros(8, 8, 3, 3, dtype=torch.bfloat16)
    weight[range(8), range(8), 1, 1] = 1  # the identity
    y = ReferenceOps().layer(z, weight, None, torch.ones(8, dtype=torch.bfloat16), 1e-5, False)
    expected = z.double() / (z.double().std(correction=0) + 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-6)


# --- matching -------------------------------------------------------------------------------------


def phi(x):
    """A smooth stand-in: three features of an image."""
    return torch.stack([x.mean(dim=(1, 2, 3)), (x**2).mean(dim=(1, 2, 3)), x[:, 0, 0, 0] ** 3], 1)


@pytest.mark.parametrize("weight", [torch.full((3,), 1 / 3).double(), torch.tensor([0, 0.5, 0.5])])
def test_match_one_is_adam(weight):
    x, target = randn(1, 2, 3, 3), phi(randn(1, 2, 3, 3, seed=1))
    found, losses, updates, converged = reference.match_one(phi, x, target, weight, 0.02, 30, 0.0)
    assert (updates, converged, len(losses)) == (30, False, 31)
    leaf = x.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=0.02, betas=(0.9, 0.999), eps=1e-8)
    for expected in losses[:30]:
        adam.zero_grad()
        loss = (weight * (phi(leaf) - target) ** 2).sum()
        assert loss.item() == pytest.approx(expected, rel=1e-9)
        loss.backward()
        adam.step()
    torch.testing.assert_close(found, leaf.detach(), rtol=1e-9, atol=1e-11)
    assert losses[30] == pytest.approx((weight * (phi(found) - target) ** 2).sum().item())


def test_match_one_freezes_without_a_further_update():
    x, target = randn(1, 2, 3, 3), phi(randn(1, 2, 3, 3, seed=1))
    weight = torch.full((3,), 1 / 3).double()
    x_all, losses, _, _ = reference.match_one(phi, x, target, weight, max_iter=60, tolerance=0.0)
    stop = next(t for t, loss in enumerate(losses) if loss <= 0.3 * losses[0])
    assert 0 < stop < 60
    found, short, updates, converged = reference.match_one(
        phi, x, target, weight, max_iter=60, tolerance=0.3
    )
    assert (updates, converged, short) == (stop, True, losses[: stop + 1])
    same, *_ = reference.match_one(phi, x, target, weight, max_iter=stop, tolerance=0.0)
    assert torch.equal(found, same) and not torch.equal(found, x_all)


def test_match_one_at_the_target_and_without_iterations():
    x = randn(1, 2, 3, 3)
    found, losses, updates, converged = reference.match_one(phi, x, phi(x), torch.ones(3).double())
    assert (losses, updates, converged) == ([0.0], 0, True) and torch.equal(found, x)
    found, losses, updates, converged = reference.match_one(
        phi, x, phi(2 * x), torch.ones(3).double(), max_iter=0
    )
    assert (len(losses), updates, converged) == (1, 0, False) and torch.equal(found, x)


# --- sampling -------------------------------------------------------------------------------------


def test_schedule():
    levels = reference.schedule()
    np.testing.assert_allclose(levels, np.linspace(1, 0.03, 100), rtol=1e-14)
    assert reference.schedule(0.7, 0.1, 1) == [0.7]


def test_reconstruct_schedule_by_hand():
    """x ← denoised(match(x + σz)), with functions that leave a trace of their calls."""
    mean, z = torch.zeros(1, 1, 1, 2).double(), randn(2, 1, 1, 2)
    found = reference.reconstruct_schedule(
        denoise=lambda x: 0.5 * x,
        match=lambda x, sigma: x + 10 * sigma,
        noise=lambda k: z[k : k + 1],
        mean=mean,
        sigmas=[1.0, 0.5],
    )
    first = 0.5 * (mean + 1.0 * z[:1] + 10.0)
    torch.testing.assert_close(found, 0.5 * (first + 0.5 * z[1:] + 5.0))


def test_adaptive_form_with_a_point_prior():
    """Where all images are c, denoised(x) = c: σ̂ follows Π(1 − βh_t) down to σ_L."""
    c = torch.full((1, 1, 64, 64), 0.3).double()
    seen = []

    def match(x, sigma):
        seen.append(sigma)
        return x

    found, steps = reference.reconstruct_adaptive(
        lambda x: c, match, lambda k: randn(1, 1, 64, 64, seed=k), c, sigma_0=1.0, beta=0.05
    )
    torch.testing.assert_close(found, c)
    t = np.arange(1, 400)
    sigma = np.cumprod(1 - 0.05 * 0.01 * t / (1 + 0.01 * (t - 1)))
    assert steps == pytest.approx(np.argmax(sigma < 0.01) + 1, abs=8) and len(seen) == steps + 1
    np.testing.assert_allclose(seen[2:], sigma[: steps - 1], rtol=0.2)  # a random walk around it


@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0])
def test_adaptive_form_lowers_the_noise_as_beta_says(beta):
    """σ_{t+1} = (1 − βh)σ_t in expectation, for any β (Kadkhodaie & Simoncelli 2021, eq. 8)."""
    c = torch.zeros(1, 3, 64, 64).double()
    seen = []

    def match(x, sigma):
        seen.append(float((x**2).mean().sqrt()))
        return x

    reference.reconstruct_adaptive(
        lambda x: c, match, lambda k: randn(1, 3, 64, 64, seed=k), c, 1.0, h0=0.2, beta=beta,
        fixed_h=True, max_steps=5,
    )  # fmt: skip
    ratios = np.array(seen[1:]) / np.array(seen[:-1])
    np.testing.assert_allclose(ratios, 1 - beta * 0.2, rtol=0.02)


def test_extract_phi_is_a_mean_over_draws():
    x, z = torch.rand(2, 1, 2, 2), randn(3, 2, 1, 2, 2).float()
    found = reference.extract_phi(
        lambda y: {"a": y.mean(dim=(2, 3)), "b": (y**2).mean(dim=(2, 3))}, x, lambda d: z[d], 0.5, 3
    )
    noisy = x.double() + 0.5 * z.double()
    expected = {"a": noisy.mean(dim=(0, 3, 4)), "b": (noisy**2).mean(dim=(0, 3, 4))}
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
