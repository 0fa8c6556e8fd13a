"""Channels that are 0 for every image: NaN where the channel itself is measured, no change elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from analysis_case import Planted, structureless

from fastphi.analysis.channels import channels, kurtosis, tuning
from fastphi.analysis.clusters import clusters, separations
from fastphi.analysis.common import gaussian_like
from fastphi.analysis.kmeans import kmeans
from fastphi.analysis.neighbours import distinct, nearest
from fastphi.analysis.probe import probe
from fastphi.analysis.selectivity import faint, pictured, selectivity
from fastphi.analysis.sparsity import participation_ratio
from fastphi.analysis.stability import stability
from fastphi.analysis.subspaces import subspaces

DEAD = [0, 9, 17]


@pytest.fixture
def living():
    rng = np.random.default_rng(0)
    return np.abs(structureless(300, 20)) * rng.gamma(0.3, size=20)


@pytest.fixture
def phi(living):
    """The same with three channels of zeros among them."""
    wide = np.zeros((300, 23))
    wide[:, np.setdiff1d(np.arange(23), DEAD)] = living
    return wide


def test_statistics_of_a_channel_are_nan_for_it_and_the_same_for_others(phi, living):
    alive = np.setdiff1d(np.arange(23), DEAD)
    result, plain = selectivity(phi), selectivity(living)
    assert np.isnan(result.ratios[DEAD]).all() and np.isnan(kurtosis(phi)[DEAD]).all()
    np.testing.assert_allclose(result.ratios[alive], plain.ratios)
    np.testing.assert_allclose(kurtosis(phi)[alive], kurtosis(living))
    assert (result.dip, result.p) == (plain.dip, plain.p)
    assert not set(DEAD) & {*result.specialised(1.0), *result.common(1.0), *pictured(phi, 1.0)}
    assert faint(phi)[DEAD].all() and result.faint == plain.faint + 3
    found = channels(phi, others={0.5: phi * 2})
    assert np.isnan(found.noise[DEAD]).all()
    same = channels(living, others={0.5: living * 2}).correlations
    for name, value in found.correlations.items():
        assert value == pytest.approx(same[name])
    json.dumps(found.numbers(), allow_nan=False)


def test_a_channel_that_no_grating_excites_has_no_tuning():
    def means(x):
        return x.mean((2, 3))[:, :2] * x.new_tensor([0.0, 1.0]) + x[:, 0, :1, 0] * x.new_tensor(
            [0.0, 1]
        )

    frequency, orientation = tuning(Planted(means=means), 16)
    assert np.isnan([frequency[0], orientation[0]]).all()
    assert np.isfinite([frequency[1], orientation[1]]).all()


def test_ratios_of_an_image_count_dead_channels_in_d(phi, living):
    np.testing.assert_allclose(participation_ratio(phi) * 23, participation_ratio(living) * 20)
    found, plain = subspaces(phi, 20, queries=30), subspaces(living, 20, queries=30)
    np.testing.assert_allclose(found.dimension * 23, plain.dimension * 20)
    np.testing.assert_allclose(found.shared, plain.shared)


def test_geometry_does_not_change(phi, living):
    index, cosine = nearest(phi, phi, k=5)
    plain, same = nearest(living, living, k=5)
    np.testing.assert_array_equal(index, plain)
    np.testing.assert_allclose(cosine, same)
    np.testing.assert_array_equal(distinct(phi, 4), distinct(living, 4))
    labels = kmeans(living, 3, starts=2).labels
    np.testing.assert_array_equal(kmeans(phi, 3, starts=2, init=phi[:3]).labels,
                                  kmeans(living, 3, starts=2, init=living[:3]).labels)  # fmt: skip
    np.testing.assert_allclose(separations(phi, labels), separations(living, labels))
    assert np.isfinite(clusters(phi, 3, starts=2).gaussian_random).all()
    right = [probe(x, labels).correct["φ"] for x in (phi, living)]
    np.testing.assert_array_equal(*right)
    levels = [{0.1: {"mid": x}, 0.5: {"mid": x + x[::-1]}} for x in (phi, living)]
    np.testing.assert_allclose(*(stability(of).same["mid"] for of in levels))


@pytest.mark.parametrize("n", [300, 15])
def test_the_gaussian_control_keeps_them_dead(phi, n):
    drawn = gaussian_like(phi[:n])
    assert (drawn[:, DEAD] == 0).all() and (np.ptp(drawn, axis=0) > 0).sum() == 20


def test_nothing_but_dead_channels():
    result = selectivity(np.zeros((50, 6)))
    assert np.isnan(result.ratios).all() and not result.shown and result.faint == 6
    assert len(result.specialised()) == len(pictured(np.zeros((50, 6)))) == 0
    assert not channels(np.zeros((50, 6))).shown
