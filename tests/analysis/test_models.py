"""What needs the network: channel statistics, location, divergence, noise level, likeness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analysis_case import Planted, drawable_and_plain, structureless

from fastphi.analysis.channels import (
    channels,
    gratings,
    kurtosis,
    map_statistics,
    tuning,
)
from fastphi.analysis.divergence import conditional_divergence, divergence, integrate
from fastphi.analysis.generation import Generation, generation
from fastphi.analysis.likeness import likeness
from fastphi.analysis.location import decode_objects, decode_position, dots, shifts
from fastphi.analysis.noise_level import NoiseLevel, noise_level


def test_block_maps_have_the_block_means(make_model):
    model = make_model()
    x = torch.rand(2, 3, 16, 16)
    for block, means in model.block_means(x).items():
        maps = model.block_maps(x, block)
        torch.testing.assert_close(maps.mean((2, 3)), means, rtol=1e-4, atol=1e-5)


# --- channels -------------------------------------------------------------------------------------


def test_kurtosis_of_known_samples():
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(size=20000), rng.laplace(size=20000), np.ones(20000)], axis=1)
    found = kurtosis(x)
    assert abs(found[0]) < 0.1 and found[1] == pytest.approx(3, abs=0.5) and np.isnan(found[2])


def test_map_statistics_of_planted_maps():
    """One channel is active at one place of 16, the same or any; one everywhere alike."""
    rng = np.random.default_rng(0)

    def maps(x):
        out = torch.zeros(len(x), 4, 16, dtype=torch.float64)
        strength = torch.from_numpy(rng.random(len(x)) + 0.5)
        out[:, 0, 3] = strength
        out[torch.arange(len(x)), 1, torch.from_numpy(rng.integers(0, 16, len(x)))] = strength
        out[:, 2] = strength[:, None]
        return out.reshape(len(x), 4, 4, 4)

    spatial, dimension = map_statistics(Planted(maps), torch.rand(300, 3, 8, 8))
    np.testing.assert_allclose(spatial[:3], [1 / 16, 1 / 16, 1], rtol=1e-6)
    np.testing.assert_allclose(dimension[[0, 2]], 1 / 16, rtol=1e-6)
    assert dimension[1] > 0.8 and np.isnan(spatial[3])


def test_tuning_of_planted_channels():
    """A channel for one grating, one for all of them alike but for orientation, one for all."""

    def means(x):
        power = torch.fft.fft2(x[:, 0]).abs()
        narrow = power[:, 4, 0]  # 4 cycles, horizontal bars
        across = power.flatten(1)[:, 1:].amax(1) * (power[:, :, 0].amax(1) > 5)
        return torch.stack([narrow, across], dim=1)

    frequency, orientation = tuning(Planted(means=means), 32)
    assert frequency[0] < 0.3 < frequency[1] and orientation[0] < 0.3
    x = gratings(16, 2.0, np.array([0.0, np.pi / 2]), 4, 0.25)
    assert x.shape == (8, 1, 16, 16) and 0.25 <= x.min() < x.max() <= 0.75
    torch.testing.assert_close(x[0].mean(), torch.tensor(0.5, dtype=x.dtype))
    assert x[0, 0].std(dim=0).max() < 1e-9 < x[0, 0].std(dim=1).min()  # varies along x at angle 0


def test_channel_statistics_of_a_network(make_model):
    model, images = make_model(), torch.rand(20, 3, 16, 16)
    phi = model.phi(images).detach()
    result = drawable_and_plain(
        channels(
            phi,
            model=model,
            images=images,
            others={0.1: phi * 2},
            sigma=0.1,
            untrained=(phi, model),
        )
    )
    assert list(result.controls) == ["Gaussian", "untrained"]
    np.testing.assert_array_equal(result.controls["untrained"].spatial, result.spatial)
    np.testing.assert_array_equal(result.controls["untrained"].frequency, result.frequency)
    assert not len(result.controls["Gaussian"].spatial)
    np.testing.assert_allclose(result.noise[np.isfinite(result.noise)], 1)
    assert len(result.correlations) == 6 and not result.shown


def test_structureless_channels_are_not_shown():
    result = channels(structureless(d=60))
    assert not result.shown and not result.controls["Gaussian"].shown


def test_planted_heavy_tails_are_found():
    rng = np.random.default_rng(0)
    rare = 1 / np.arange(2, 62)
    phi = 0.002 + (rng.random((2000, 60)) < rare) * rng.random((2000, 60))
    result = channels(phi)
    assert result.as_expected == {"kurtosis": True} and result.shown
    assert not result.controls["Gaussian"].shown


# --- location -------------------------------------------------------------------------------------


def test_position_is_decoded_where_it_is_planted():
    rng = np.random.default_rng(0)
    places = rng.random((200, 2))
    known = places @ rng.normal(size=(2, 8)) + 0.01 * rng.normal(size=(200, 8))
    none = rng.normal(size=(200, 8))
    result = drawable_and_plain(
        decode_position({"mid": known, "enc1": none}, places, controls={"mean colour": none})
    )
    assert result.shown and result.r2["mid"] > 0.98 and result.r2["enc1"] < 0.2
    assert not decode_position(none, places).shown


def test_shifts_and_dots(make_model):
    model = make_model()
    images = torch.rand(6, 3, 16, 16)
    result = drawable_and_plain(shifts(model, images, controls={"twin": model}))
    assert result.shifts == (1, 2, 4, 8) and list(result.change) == list(model.config.block_names)
    np.testing.assert_array_equal(result.controls["twin"], result.change["mid"])
    # noise that is shifted is other noise
    np.testing.assert_allclose(result.controls["pixels"], 1, atol=0.1)
    still = shifts(model, images[:, :, :, :1].expand(-1, -1, -1, 16)).controls["pixels"]
    assert not still.any()
    x, places = dots(32, 50)
    assert x.shape == (50, 3, 32, 32) and places.shape == (50, 2)
    darkest = np.stack(np.unravel_index(x[:, 0].flatten(1).argmin(1).numpy(), (32, 32)), axis=1)
    assert np.abs(darkest - places).max() < 4
    assert "mean colour" in decode_objects(model, 16, 40, control=model).controls


# --- divergence -----------------------------------------------------------------------------------


def test_divergence_of_gaussians_is_the_closed_form():
    """p_k = N(m_k, s²I): the scores differ by (m₁ − m₂)/(s² + σ²) everywhere, so that
    d² = ‖m₁ − m₂‖² (1/(s² + σ_min²) − 1/(s² + σ_max²))."""
    s2, sigmas = 0.04, np.geomspace(0.03, 1, 200)
    means = np.random.default_rng(0).normal(size=(5, 7))
    pairs = [(a, b) for a in range(5) for b in range(a)]
    distance = np.array([((means[a] - means[b]) ** 2).sum() for a, b in pairs])
    squares = distance[None, :, None, None] / (s2 + sigmas[:, None, None, None] ** 2) ** 2
    result = divergence(sigmas, squares * np.ones((1, 1, 2, 3)), distance, pairs=pairs)
    drawable_and_plain(result)
    expected = distance * (1 / (s2 + 0.03**2) - 1 / (s2 + 1))
    np.testing.assert_allclose(result.squared, expected, rtol=1e-3)
    assert result.bounds["B/A"] == pytest.approx(1) and result.shown
    np.testing.assert_allclose(result.error, 0, atol=1e-9 * expected.max())
    assert integrate([1.0, 2.0], [1.0, 1.0]) == pytest.approx(1.5, rel=0.2)


def test_structureless_divergence_is_not_shown():
    rng = np.random.default_rng(0)
    squares = rng.random((4, 15, 2, 2))
    assert not divergence([0.1, 0.2, 0.5, 1.0], squares, rng.random(15)).shown


def test_divergence_error_is_that_of_its_paths():
    rng = np.random.default_rng(0)
    each = [divergence([0.5, 1], rng.random((2, 1, 2, 8)), [1.0]) for _ in range(400)]
    spread = np.std([e.squared[0] for e in each])
    assert np.mean([e.error[0] for e in each]) == pytest.approx(spread, rel=0.1)


def test_conditional_divergence_of_a_network(make_model):
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[1] *= 0.3  # darker, so that their φ differ by more than the noise does
    images[2] = images[0]  # the same condition: no divergence between the two
    model, options = make_model(), {"paths": 2, "steps": 4, "max_iter": 5, "draws": 40}
    result = conditional_divergence(model, images, **options, controls={"twin": model})
    np.testing.assert_array_equal(result.controls["twin"], result.distance)
    assert result.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert len(result.sigmas) == 4 and (result.squared >= 0).all()
    assert result.distance[1] < result.distance[0]


def test_divergence_refuses():
    with pytest.raises(ValueError, match="squares, distance: expected"):
        divergence([0.1, 1], np.ones((2, 3)), np.ones(3))
    with pytest.raises(ValueError, match="sigmas: expected two or more levels > 0"):
        integrate([0.0, 1.0], [1.0, 1.0])


# --- noise level, likeness ------------------------------------------------------------------------


def test_noise_level_is_measured_before_and_after(make_model):
    model = make_model()
    result = drawable_and_plain(
        noise_level(model, torch.rand(3, 3, 8, 8), (0.1, 0.5), max_iter=3, controls={"twin": model})
    )
    assert result.before.shape == result.after.shape == (2, 3)
    assert np.median(result.loss_ratio) < 1  # three iterations: most images are nearer already
    np.testing.assert_array_equal(result.controls["twin"].after, result.after)


def test_noise_level_is_shown_where_matching_keeps_it():
    rng = np.random.default_rng(0)
    before = 0.2 + 0.01 * rng.normal(size=(3, 16))
    matched, unmatched = np.full((3, 16), 0.1), np.ones((3, 16))
    assert NoiseLevel((0.1, 0.2, 0.4), before, 1.01 * before, matched).shown
    assert not NoiseLevel((0.1, 0.2, 0.4), before, before, unmatched).shown  # nothing was matched
    # structureless: what comes out knows nothing of what went in
    after = 0.2 + 0.05 * rng.normal(size=(3, 16))
    assert not NoiseLevel((0.1, 0.2, 0.4), before, after, matched).shown


def test_copies_are_alike_and_noise_is_not(make_model):
    model = make_model()
    smooth = torch.rand(6, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    samples = (smooth[:, None] + 0.25 * torch.randn(6, 4, 3, 32, 32)).clamp(0, 1)
    result = drawable_and_plain(likeness(model, smooth, samples))
    assert result.keeps_layout and result.varied and result.layout.mean() > 0.9
    random = likeness(model, smooth, torch.rand(6, 4, 3, 32, 32))
    assert not random.keeps_layout and not random.shown
    # a Gaussian of the pixels' mean and standard deviation
    gaussian = smooth.mean() + smooth.std() * torch.randn(6, 4, 3, 32, 32)
    assert not likeness(model, smooth, gaussian).shown
    copies = likeness(model, smooth, smooth[:, None].expand(-1, 4, -1, -1, -1))
    assert copies.keeps_phi and not copies.varied and not copies.shown
    with pytest.raises(ValueError, match="targets, samples: expected"):
        likeness(model, smooth[:1], samples[:1])


# --- generation -----------------------------------------------------------------------------------


def test_generation_makes_images_of_every_kind(make_model):
    groups = {
        "clusters": [torch.rand(3, 3, 8, 8), torch.rand(2, 3, 8, 8)],
        "pairs": [torch.rand(2, 3, 8, 8)],
    }
    options = {"copies": 2, "prior": 3, "sigmas": (1.0, 0.1, 2), "how": {"pairs": "max"}}
    result = drawable_and_plain(generation(make_model(), groups, **options))
    assert result.samples["clusters"].shape == (2, 2, 3, 8, 8)
    assert result.prior.shape == (3, 3, 8, 8) and len(result.cosine["clusters"]) == 4
    assert np.isnan(result.cosine_other["pairs"]).all()  # there is no other
    assert "samples" not in result.numbers()
    with pytest.raises(ValueError, match="groups: expected images .* of one size"):
        generation(make_model(), {"a": [torch.rand(1, 3, 8, 8), torch.rand(1, 3, 4, 4)]})


@pytest.mark.parametrize(("gain", "shown"), [(0.3, True), (0.0, False)])
def test_generation_is_shown_where_it_was_planted(gain, shown):
    rng = np.random.default_rng(0)
    near, far, prior = (0.5 + 0.1 * rng.random(16) for _ in range(3))
    one, empty = {"clusters": near + gain}, np.zeros((1, 3, 8, 8))
    result = Generation(
        {"clusters": empty[None]}, empty, one, {"clusters": far}, {"clusters": prior}
    )
    assert result.shown is shown
    alone = {"clusters": np.full(16, np.nan)}
    assert Generation({}, empty, one, alone, {"clusters": prior}).shown is shown
