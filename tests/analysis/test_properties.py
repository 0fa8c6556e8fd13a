"""Known answers: what is planted is found, and a structureless Gaussian shows nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analysis_case import drawable_and_plain, structureless

import fastphi
from fastphi.analysis.common import blocks_of, exceeds, gaussian_like, plain, principal, untrained
from fastphi.analysis.dip import dip, dip_p_value
from fastphi.analysis.neighbours import label_agreement, nearest
from fastphi.analysis.selectivity import exciting, selectivity, top_channels
from fastphi.analysis.sparsity import block_inputs, sparsity
from fastphi.analysis.stability import stability

# --- controls -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(4000, 3), (20, 60)])
def test_the_gaussian_control_has_the_rows_mean_and_covariance(n, d):
    x = structureless(n, d)
    draws = np.concatenate([gaussian_like(x, seed) for seed in range(200 if n < 100 else 5)])
    assert gaussian_like(x).shape == x.shape
    np.testing.assert_array_equal(gaussian_like(x, 3), gaussian_like(x, 3))
    spread = x.std(axis=0)
    np.testing.assert_allclose(draws.mean(axis=0) / spread, x.mean(axis=0) / spread, atol=0.15)
    covariance = np.cov(x, rowvar=False, bias=True)
    difference = np.cov(draws, rowvar=False, bias=True) - covariance
    assert np.linalg.norm(difference) < 0.1 * np.linalg.norm(covariance)


def test_untrained_is_of_the_same_shape_and_leaves_the_global_generator(make_model):
    model = make_model()
    before = torch.random.get_rng_state()
    fresh = untrained(model, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert fresh.config == model.config
    assert not torch.equal(fresh.mid[0].weight, model.mid[0].weight)


def test_summaries_and_comparisons():
    found = plain({"a": np.array([1.0, 2.0, np.nan]), "b": (np.float32(2), float("nan"))})
    assert found["a"] == {
        "n": 2, "nan": 1, "median": 1.5, "q25": 1.25, "q75": 1.75, "mean": 1.5, "se": 0.5,
    }  # fmt: skip
    assert found["b"] == [2.0, None]
    assert exceeds(np.array([2.0, 2.1]), np.array([1.0, 1.0]))
    assert not exceeds(np.array([2.0, 0.0]), np.array([1.0, 0.9]))
    assert principal(structureless(), 5).shape == (400, 5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"mid": np.ones(3)}, r"mid: expected a non-empty array \(N, C\), got shape \(3,\)"),
        ({"mid": np.ones((3, 2)), "enc1": np.ones((4, 2))}, "of the same N"),
        ({"mid": np.array([["a"]])}, "expected numbers"),
        ({}, "blocks: expected arrays"),
    ],
)
def test_what_is_no_block_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        blocks_of(bad)


# --- sparsity -------------------------------------------------------------------------------------


def test_block_inputs_are_what_the_blocks_get(make_model):
    """The input's mean, calculated from outputs, against the mean of the maps that go in."""
    model = make_model(channels=(4, 6, 8), upsample_bias=True).double()
    seen = {}

    def watched(name):
        def hook(block, inputs):
            seen[name] = torch.cat(inputs, dim=1).mean((2, 3)).detach().numpy()

        return hook

    for name in model.config.block_names + ("dec1",):
        model.get_submodule(name).register_forward_pre_hook(watched(name))
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    model(x)
    means = {b: m.detach().numpy() for b, m in model.block_means(x).items()}
    found = block_inputs(model, means)
    assert sorted(found) == ["dec1", "dec2", "enc2", "mid"]
    for name, expected in found.items():
        np.testing.assert_allclose(expected, seen[name], rtol=1e-9, atol=1e-12)


def test_sparsity_with_controls(make_model):
    rng = np.random.default_rng(0)
    means = {b: rng.random((30, c)) for b, c in (("enc1", 4), ("enc2", 6), ("mid", 8), ("dec2", 6))}
    result = drawable_and_plain(sparsity(means, make_model(), controls={"untrained": means}))
    assert sorted(result.inputs) == ["dec1", "dec2", "enc2", "mid"]
    np.testing.assert_array_equal(result.outputs["mid"], result.controls["untrained"]["mid"])
    assert not result.shown


def test_structureless_sparsity_is_not_shown(make_model):
    means = {b: structureless(d=c) for b, c in (("enc1", 4), ("enc2", 6), ("mid", 8), ("dec2", 6))}
    assert not sparsity(means, make_model()).shown


def test_sparsity_is_shown_where_it_was_planted(make_model):
    """Constant means: PR 1 out of the encoder, one channel of many out of middle and decoder."""
    noise = np.random.default_rng(0).random((30, 8)) * 0.01
    one = np.eye(8)[0] + noise
    spread = 1 + noise[:, :6]
    means = {"enc1": np.eye(4)[0] + noise[:, :4], "enc2": spread, "mid": one, "dec2": one[:, :6]}
    assert sparsity(means, make_model()).shown


# --- stability ------------------------------------------------------------------------------------


def test_stability_of_planted_blocks():
    rng = np.random.default_rng(0)
    base = rng.random((50, 20))
    means = {
        s: {"mid": base * (0.1 + s), "enc1": base + s * rng.random((50, 20))}
        for s in (0.0, 0.1, 0.5, 1.0)
    }
    means[0.0] = {"mid": 0 * base, "enc1": base}
    result = drawable_and_plain(stability(means, controls={"twin": means}))
    np.testing.assert_allclose(result.same["mid"][1:], 1)
    assert np.isnan(result.same["mid"][0]).all()  # a row of zeros has no direction
    assert (result.other["mid"][1:] < 0.95).all()
    assert result.shown and result.collapse["mid"] == 0


def test_structureless_stability_is_not_shown():
    means = {
        s: {"mid": structureless(seed=i), "enc1": structureless(seed=9 + i)}
        for i, s in enumerate((0.1, 0.5, 1.0))
    }
    assert not stability(means).shown


def test_stability_refuses():
    with pytest.raises(ValueError, match="reference: 0.5 is not among the levels"):
        stability({0.1: np.ones((2, 2)), 1.0: np.ones((2, 2))})
    with pytest.raises(ValueError, match="two noise levels"):
        stability({0.5: np.ones((2, 2))})


def test_stability_of_a_store(make_model):
    images = torch.rand(5, 3, 16, 16)
    store = fastphi.extract(make_model(), images, sigmas=[0.1, 0.5], draws=2, blocks="all")
    result = stability(store)
    assert result.same["mid"].shape == (1, 5) and list(result.same) == list(store.blocks)


# --- selectivity ----------------------------------------------------------------------------------


def test_dip_of_known_samples():
    for n in (2, 10, 100):
        assert dip(np.arange(n)) == pytest.approx(1 / (2 * n))  # the least there can be
    assert dip([0] * 50 + [1] * 50) == pytest.approx(0.25)  # two masses: the most
    assert dip([3.0] * 5) == 0
    rng = np.random.default_rng(0)
    uniform = [dip(rng.random(100)) for _ in range(200)]
    assert 0.034 < np.median(uniform) < 0.039  # 0.0364 in Hartigan and Hartigan's table
    assert dip_p_value(rng.normal(size=150)) > 0.1
    assert dip_p_value(np.r_[rng.normal(size=75), rng.normal(6, size=75)]) < 0.01
    x = rng.random(60)
    assert dip(x) == pytest.approx(dip(7 - 3 * x))  # neither scale, place nor mirror matters


def test_dip_against_all_unimodal_distributions():
    """Against a linear programme over distributions with each possible mode."""
    from scipy.optimize import linprog

    rng = np.random.default_rng(1)
    for _ in range(5):
        x = np.sort(np.r_[rng.random(5), 2 + rng.random(6)])
        assert dip(x) == pytest.approx(_dip_by_programme(x, linprog), abs=1e-7)


def _dip_by_programme(x, linprog):
    """min over modes m of the least t with |F − G| <= t, G convex before x[m], concave after."""
    n, best = len(x), 1.0
    gaps = np.diff(x)
    for mode in range(n):
        rows, limits = [], []
        # Unknown: G just before and just after each point (a jump only at the mode), and t.
        for i in range(n):
            before, after = np.zeros(2 * n + 1), np.zeros(2 * n + 1)
            before[i], after[n + i] = 1, 1
            for side, value in ((before, i / n), (after, (i + 1) / n)):
                for sign in (1, -1):
                    row = sign * side
                    row[-1] = -1
                    rows.append(row)
                    limits.append(sign * value)
            # F is constant between points, so G is also bounded by the other side of each step.
            for side, value in ((before, (i + 1) / n), (after, i / n)):
                if i != mode:
                    for sign in (1, -1):
                        row = sign * side
                        row[-1] = -1
                        rows.append(row)
                        limits.append(sign * value)
            row = np.zeros(2 * n + 1)
            row[i], row[n + i] = 1, -1  # G does not fall
            rows.append(row)
            limits.append(0)
            if i != mode:
                rows.append(-row)
                limits.append(0)
        slope = np.zeros((n - 1, 2 * n + 1))
        for i, gap in enumerate(gaps):
            slope[i, i + 1], slope[i, n + i] = 1 / gap, -1 / gap
        rows += list(-slope)  # monotone
        limits += [0] * (n - 1)
        for i in range(n - 2):
            change = slope[i + 1] - slope[i]  # at the point i + 1
            if i + 1 != mode:
                rows.append(-change if i + 1 < mode else change)
                limits.append(0)
        cost = np.zeros(2 * n + 1)
        cost[-1] = 1
        found = linprog(cost, A_ub=np.array(rows), b_ub=limits, bounds=[(None, None)] * (2 * n + 1))
        best = min(best, found.fun)
    return best


def test_planted_selectivity_is_found():
    """Half of the channels excited by a tenth of the images each, half by all."""
    rng = np.random.default_rng(0)
    phi = np.abs(rng.normal(1, 0.1, (500, 60)))
    owners = [rng.choice(500, 50, replace=False) for _ in range(30)]
    for c, own in enumerate(owners):
        phi[:, c] *= 0.01
        phi[own, c] += 1
    result = drawable_and_plain(selectivity(phi, controls={"pixels": structureless(500)}))
    assert result.shown
    assert not selectivity(phi, controls={"twin": phi}).shown  # a control that has it too
    assert set(result.specialised()) < set(range(30))
    assert set(result.common()) < set(range(30, 60))
    assert set(exciting(phi, 3, 50)) == set(owners[3])
    image = owners[0][0]
    assert set(top_channels(phi, image, np.arange(60), 2)) <= {
        c for c, own in enumerate(owners) if image in own
    }


def test_structureless_selectivity_is_not_shown():
    assert not any(selectivity(structureless(d=80, seed=s)).shown for s in range(5))


def test_dead_channels_are_counted_not_measured():
    phi = structureless()
    phi[:, 2] = 0
    result = selectivity(phi)
    assert np.isnan(result.ratios[2]) and 2 not in result.specialised(1.0)
    assert result.numbers()["ratios"]["nan"] == 1
    phi[:, 3] *= 1e-3
    assert selectivity(phi).faint == 2 and selectivity(structureless()).faint == 0


# --- neighbours -----------------------------------------------------------------------------------


def test_nearest_leaves_out_and_keeps_order_of_equals():
    rows = np.tile([[1.0, 0.0]], (7, 1))
    index, _ = nearest(rows[:2], rows, k=3, chunk=2, exclude=[0, 1])
    np.testing.assert_array_equal(index, [[1, 2, 3], [0, 2, 3]])


def test_neighbours_of_planted_classes_share_labels():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 30)
    phi = rng.normal(size=(10, 12))[labels] + 0.3 * rng.normal(size=(300, 12))
    result = label_agreement(phi, labels, controls={"pixels": rng.normal(size=(300, 12))})
    drawable_and_plain(result)
    assert result.shown and result.shares["φ"].mean() > 0.9
    assert result.chance == pytest.approx(29 / 299)
    assert not label_agreement(rng.normal(size=(300, 12)), labels).shown
    with pytest.raises(ValueError, match="labels: expected 300 whole numbers"):
        label_agreement(phi, labels[:-1])
