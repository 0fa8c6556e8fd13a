"""Clusters, subspaces, probes, memorisation: known answers, and nothing in a structureless Gaussian."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analysis_case import drawable_and_plain, structureless

from fastphi.analysis.clusters import agreement, clusters, kmeans, purity, separations
from fastphi.analysis.embedding import embedding
from fastphi.analysis.memorisation import memorisation, nearest_image
from fastphi.analysis.probe import probe
from fastphi.analysis.subspaces import components, subspaces


def planted(k=6, each=40, d=12, spread=0.15, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(k), each)
    return rng.normal(size=(k, d))[labels] + spread * rng.normal(size=(k * each, d)), labels


def test_separations_follow_their_definition():
    phi, labels = planted(3)
    found = separations(phi, labels)
    a, b = phi[labels == 0], phi[labels == 2]
    line = a.mean(0) - b.mean(0)
    unit = line / np.linalg.norm(line)
    variance = ((a @ unit).var() + (b @ unit).var()) / 2
    assert found[0, 2] == pytest.approx(np.linalg.norm(line) / variance**0.5)
    np.testing.assert_allclose(found, found.T)
    assert np.isnan(np.diag(found)).all()
    alone = separations(phi[:41], labels[:41])  # a group of one has no variance
    assert np.isnan(alone).all()


def test_planted_clusters_are_found():
    phi, labels = planted()
    result = drawable_and_plain(clusters(phi, 6, labels=labels, starts=4))
    assert result.shown and result.purity == 1 and result.purity_chance < 0.4
    assert not result.better_than_classes  # they are the classes
    np.testing.assert_allclose(np.sort(result.random), np.sort(result.class_random))
    assert set(labels[result.clusters.members(2, 5)]) == {labels[result.clusters.labels == 2][0]}
    same = drawable_and_plain(agreement(phi, 6, others={"σ": phi * 3}, labels=labels, starts=4))
    assert same.shown and all(v.min() == 1 for v in same.found.values())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_structureless_clusters_are_not_shown(seed):
    """Though K-means separates it: by more than two standard deviations."""
    phi = structureless(300, 16, seed)
    result = clusters(phi, 6, starts=3, seed=seed)
    assert np.nanmedian(result.random) > 2 and not result.shown
    assert not agreement(phi, 6, starts=3, seeds=3).shown


def test_kmeans_of_many_rows_goes_by_mini_batches(monkeypatch):
    monkeypatch.setattr("fastphi.analysis.kmeans._MINI_BATCH_FROM", 100)
    phi, labels = planted(spread=0.05)
    assert purity(kmeans(phi, 6, starts=10).labels, labels) == 1


def test_purity():
    assert purity([0, 0, 1, 1], np.array([5, 5, 7, 5])) == 0.75


def test_planted_subspaces_are_found():
    """Each group uses 5 channels of 30: a local dimension of a sixth."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 60)
    phi = rng.random((360, 30)) * 0.02
    for c in range(6):
        phi[labels == c, 5 * c : 5 * c + 5] += rng.random((60, 5)) + 0.5
    result = drawable_and_plain(subspaces(phi, 20, queries=60))
    assert result.shown
    np.testing.assert_allclose(result.dimension, 1 / 6, atol=0.03)
    assert (result.shared > 0.6).all() and result.shared_random.mean() < 0.35
    channels, sets = components(phi, [0, 359], 20)
    assert sets.shape == (2, 20, 3)
    assert channels[0] < 5 and channels[1] >= 25


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_structureless_subspaces_are_not_shown(seed):
    assert not subspaces(structureless(seed=seed), 20, queries=60).shown


def test_probe_reads_what_is_there():
    phi, labels = planted(each=60, spread=0.8)
    noise = np.random.default_rng(1).normal(size=phi.shape)
    result = drawable_and_plain(probe(phi, labels, controls={"pixels": noise}))
    assert result.shown and result.accuracy["φ"] > 0.8 > 0.35 > result.accuracy["pixels"]
    assert not probe(noise, labels).shown
    with pytest.raises(ValueError, match="test: expected a share"):
        probe(phi, labels, test=1.0)


def test_copies_are_told_from_new_images():
    images = torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    training, heldout, new = images[:60], images[60:160], images[160:]
    copies = (training[[7, 3]] + 0.001).clamp(0, 1)
    result = drawable_and_plain(memorisation(copies, training, heldout))
    assert result.index.tolist() == [7, 3] and result.copies == 1 and not result.shown
    fresh = memorisation(new, training, heldout)
    assert fresh.shown and fresh.copies <= 0.05
    assert not memorisation(copies, training).shown  # nothing to compare with: nothing is shown


def test_nearest_image_is_exact_whatever_the_chunk():
    training, images = torch.rand(30, 1, 4, 4), torch.rand(5, 1, 4, 4)
    rms = (training[None] - images[:, None]).square().flatten(2).mean(2).sqrt()
    for chunk in (7, 100):
        distance, index = nearest_image(images, training, chunk)
        np.testing.assert_array_equal(index, rms.argmin(1))
        np.testing.assert_allclose(distance, rms.min(1).values, rtol=1e-6)
    with pytest.raises(ValueError, match="pixels, the training images have"):
        nearest_image(torch.rand(2, 1, 8, 8), training)


def test_the_map_keeps_planted_clusters_together():
    phi, labels = planted(3, each=30)
    result = drawable_and_plain(embedding(phi, labels=labels))
    centre = np.array([result.places[labels == c].mean(0) for c in range(3)])
    distance = np.linalg.norm(result.places[:, None] - centre, axis=2)
    assert (distance.argmin(1) == labels).all()


def test_the_map_of_rows_that_are_all_the_same():
    """A dead middle block's: one place, not t-SNE's crash on NaN."""
    from fastphi.analysis.embedding import embedding

    assert (embedding(np.zeros((10, 5))).places == 0.5).all()
