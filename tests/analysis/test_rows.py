"""Rows gone over a chunk at a time give the numbers of the whole array, and name what is wrong in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis as textbook_kurtosis

from fastphi.analysis import embedding as maps
from fastphi.analysis import rows as gone_over
from fastphi.analysis.channels import channels, kurtosis
from fastphi.analysis.clusters import agreement, clusters, separations
from fastphi.analysis.common import gaussian_like, principal
from fastphi.analysis.kmeans import kmeans
from fastphi.analysis.location import decode_position
from fastphi.analysis.memorisation import nearest_image
from fastphi.analysis.neighbours import distinct, label_agreement, nearest
from fastphi.analysis.probe import probe
from fastphi.analysis.ridge import ridge
from fastphi.analysis.rows import Pixels, chunks, gathered, moments, parts, some
from fastphi.analysis.selectivity import channel_ratios, exciting, faint, selectivity, top_channels
from fastphi.analysis.sparsity import participation_ratio, sparsity
from fastphi.analysis.stability import stability
from fastphi.analysis.subspaces import components, subspaces
from fastphi.data import MemoryImages

N, D = 211, 13
ROUNDING = 1e-9  # of sums of 211 numbers in another order, after a division by small differences


@pytest.fixture
def labels():
    return np.random.default_rng(1).integers(0, 5, N)


@pytest.fixture
def phi(labels):
    """Clusters, a channel and a row of zeros; float32, as a store has it."""
    rng = np.random.default_rng(0)
    rows = rng.gamma(0.5, size=(5, D))[labels] + 0.2 * rng.random((N, D))
    rows[:, 4] = rows[6] = 0
    return rows.astype(np.float32)


@pytest.fixture
def small_chunks(monkeypatch):
    """Of one row, or of a few: N is a multiple of none."""

    def make(values):
        monkeypatch.setattr(gone_over, "_VALUES", values)

    return make


def test_moments_are_those_of_the_whole(phi, small_chunks):
    small_chunks(7 * D)
    only = np.arange(N) % 3 != 1
    only[14:28] = False  # a chunk of which nothing is wanted
    for which in (None, only):
        x = (phi if which is None else phi[which]).astype(np.float64)
        found, full = moments(phi, only=which), moments(phi, products=True, only=which)
        assert found.n == len(x) and found.constant.tolist() == (np.ptp(x, axis=0) == 0).tolist()
        np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.scatter / len(x), x.var(axis=0), rtol=1e-11)
        np.testing.assert_allclose(full.scatter / len(x), np.cov(x.T, bias=True), atol=1e-13)
    # far from 0, where the difference of two large sums would be noise
    far = moments(phi.astype(np.float64) + 1e6).scatter
    np.testing.assert_allclose(far, moments(phi).scatter, rtol=1e-6)


def test_statistics_of_channels_follow_their_definitions(phi, small_chunks):
    small_chunks(5 * D)
    x, living = phi.astype(np.float64), np.arange(D) != 4
    ratio = np.abs(x[:, living]).sum(0) ** 2 / (N * (x[:, living] ** 2).sum(0))
    np.testing.assert_allclose(channel_ratios(phi)[living], ratio, rtol=1e-12)
    np.testing.assert_allclose(kurtosis(phi)[living], textbook_kurtosis(x)[living], rtol=1e-9)
    assert np.isnan([channel_ratios(phi)[4], kurtosis(phi)[4]]).all()
    other = np.sqrt(x + np.random.default_rng(2).random(x.shape))
    each = [np.corrcoef(x[:, c], other[:, c])[0, 1] for c in np.flatnonzero(living)]
    np.testing.assert_allclose(channels(phi, others={0.5: other}).noise[living], each, rtol=1e-9)


@pytest.mark.parametrize("sparse", [True, False])
def test_ridge_is_least_squares_of_the_whole(phi, labels, small_chunks, sparse):
    small_chunks(11 * D)
    only = np.arange(N) % 4 > 0
    dense = np.eye(5)[labels] if sparse else np.random.default_rng(0).random((N, 2)) + 3
    targets = gone_over.one_hot(labels, 5) if sparse else dense
    x = phi[only].astype(np.float64)
    scale = np.where(x.std(0) > 0, x.std(0), 1)
    z, y = (x - x.mean(0)) / scale, dense[only]
    root = np.sqrt(0.1 * len(z)) * np.eye(D)  # the penalty as further rows
    weight, *_ = np.linalg.lstsq(
        np.vstack([z, root]), np.vstack([y - y.mean(0), 0 * root[:, : y.shape[1]]])
    )
    expected = y.mean(0) + (phi - x.mean(0)) / scale @ weight
    found = ridge(phi, targets, only, 0.1)(phi.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def analyses(phi, labels):
    """{name: numbers} of everything that reads φ, without the draws of Gaussians."""
    other = np.sqrt(phi) + 0.1
    levels = {s: {"mid": s * phi + other, "enc1": other} for s in (0.1, 0.5, 1.0)}
    made = {
        "sparsity": sparsity({"mid": phi, "enc1": other}),
        "stability": stability(levels),
        "selectivity": selectivity(phi, controls={"other": other}, draws=20),
        "channels": channels(phi, others={0.1: other}),
        "subspaces": subspaces(phi, 9, queries=50),
        "neighbours": label_agreement(phi, labels, controls={"other": other}, k=4),
        "clusters": clusters(phi, 4, labels=labels, draws=2, starts=1),
        "agreement": agreement(phi, 4, others={"o": other}, labels=labels, seeds=2, starts=1),
        "probe": probe(phi, labels, controls={"other": other}),
        "decoding": decode_position({"mid": phi}, np.stack([other.sum(1), phi[:, 0]], axis=1)),
    }
    found = {name: flat(result.numbers()) for name, result in made.items()}
    index, sets = components(phi, [3, 8], 9)
    return found | {
        "ratios": {"": participation_ratio(phi)},
        "separations": {"": separations(phi, labels)},
        "faint": {"": faint(phi)},
        "exciting": {"": exciting(phi, 2, 9)},
        "top": {"": top_channels(phi, 5, np.arange(8))},
        "distinct": {"": distinct(phi, 5)},
        "components": {"": index, "sets": sets},
        "nearest": dict(enumerate(nearest(phi[:30], phi, 6, exclude=np.arange(30)))),
    }


def flat(numbers, path=""):
    """{path: number}; Gaussians are left out: chunks may mirror them (`gaussian_like`)."""
    if not isinstance(numbers, dict):
        return {path: np.asarray(numbers, np.float64)}
    parts = {k: v for k, v in numbers.items() if "gaussian" not in k.lower()}
    return {p: v for k, each in parts.items() for p, v in flat(each, f"{path}.{k}").items()}


@pytest.mark.parametrize("values", [1, 7 * D + 3, 40 * D])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_analysis_is_the_same_whatever_the_chunk(phi, labels, small_chunks, values):
    whole = analyses(phi, labels)
    small_chunks(values)
    assert len([*parts(N, D)]) > 5
    for name, numbers in analyses(phi, labels).items():
        assert numbers.keys() == whole[name].keys()
        for path, value in numbers.items():
            np.testing.assert_allclose(
                value, whole[name][path], rtol=ROUNDING, atol=1e-12, err_msg=f"{name}{path}"
            )


def test_the_gaussian_is_the_same_but_for_reflections(phi, small_chunks):
    whole = gaussian_like(phi)
    small_chunks(10 * D)
    mirrored = gaussian_like(phi)
    pairs = [np.linalg.norm(x[:, None] - x[None], axis=2) for x in (whole, mirrored)]
    np.testing.assert_allclose(*pairs, atol=1e-10)
    assert not whole[:, 4].any() and not mirrored[:, 4].any()


def test_rows_that_are_many_go_to_a_file_without_a_name(phi, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    held = gaussian_like(phi)
    monkeypatch.setattr(gone_over, "_HELD", 100)
    filed = gaussian_like(phi)
    assert isinstance(filed, np.memmap) and not [*tmp_path.iterdir()]
    np.testing.assert_allclose(filed, held, rtol=1e-6, atol=1e-7)  # float32
    assert gathered((3, 2), [np.ones((1, 2)), np.zeros((2, 2))]).tolist() == [
        [1, 1],
        [0, 0],
        [0, 0],
    ]


def test_components_of_a_sample_are_those_of_all(phi):
    """Of rows whose variance lies in two dimensions."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 2)) @ rng.normal(size=(2, 30)) + 1e-4 * rng.normal(size=(900, 30))
    whole, sampled = principal(x, 2), principal(x, 2, sample=300)
    assert sampled.shape == (900, 2) and sampled.dtype == np.float32
    each = [np.linalg.norm(s[:, None] - s[None], axis=2) for s in (whole, sampled)]
    np.testing.assert_allclose(*each, atol=2e-3)  # the same plane to the noise of 1e-4


def bad_calls():
    return {
        "selectivity": lambda x: selectivity(x),
        "channels": lambda x: channels(x),
        "subspaces": lambda x: gaussian_like(x),
        "clusters": lambda x: clusters(x, 3),
        "separations": lambda x: separations(x, np.arange(N) % 2),
        "kmeans": lambda x: kmeans(x, 3),
        "probe": lambda x: probe(x, np.arange(N) % 2),
        "embedding": lambda x: maps.embedding(x),
        "ridge": lambda x: ridge(x, np.ones((N, 1)), np.ones(N, bool), 0.1),
        "chunks": lambda x: [*chunks(x)],
    }


@pytest.mark.parametrize("name", bad_calls())
def test_errors_name_the_row(phi, small_chunks, name):
    small_chunks(10 * D)
    phi[137, 2] = np.nan
    with pytest.raises(ValueError, match="phi: expected finite values, got NaN or Inf in row 137"):
        bad_calls()[name](phi)


def test_errors_name_the_argument(phi, labels, small_chunks):
    small_chunks(10 * D)
    bad = phi.copy()
    bad[137, 2] = np.inf
    with pytest.raises(ValueError, match="means: expected finite values, .* row 137"):
        participation_ratio(bad)
    with pytest.raises(ValueError, match="pixels: expected finite values, .* row 137"):
        probe(phi, labels, controls={"pixels": bad})
    with pytest.raises(ValueError, match="other: expected finite values, .* row 137"):
        selectivity(phi, controls={"other": bad})
    with pytest.raises(ValueError, match="others: expected finite values, .* row 137"):
        channels(phi, others={0.1: bad})


def test_pixels_are_read_when_they_are_asked_for(small_chunks):
    images = MemoryImages(torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    flat = images.batch(range(40)).flatten(1).numpy()
    asked = []

    class Watched(MemoryImages):
        def _read(self, indices):
            asked.append(len(indices))
            return super()._read(indices)

    rows = np.arange(5, 40, 2)
    pixels = Pixels(Watched(images.batch(range(40))), rows)
    assert pixels.shape == (18, 48) and len(pixels) == 18 and not asked
    np.testing.assert_array_equal(pixels[2:5], flat[[9, 11, 13]])
    np.testing.assert_array_equal(pixels[[3, 0]], flat[[11, 5]])
    asked.clear()
    small_chunks(4 * 48)
    found = nearest(pixels[[0, 7]], pixels, 5)
    for a, b in zip(found, nearest(flat[rows][[0, 7]], flat[rows], 5), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert max(asked) <= 4


def test_a_sample_of_queries_where_there_are_many(phi, labels):
    few = label_agreement(phi, labels, queries=20, k=3)
    assert few.numbers()["shares"]["φ"]["n"] + few.numbers()["shares"]["φ"]["nan"] == 20
    at = some(N, 20)
    same = label_agreement(phi, labels, queries=at, k=3)
    np.testing.assert_array_equal(few.shares["φ"], same.shares["φ"])
    assert some(5, 5).tolist() == [0, 1, 2, 3, 4] and len(set(some(100, 30))) == 30


def test_nearest_images_go_by_tiles_of_both():
    images, training = torch.rand(9, 1, 4, 4), torch.rand(23, 1, 4, 4)
    whole, tiled = nearest_image(images, training), nearest_image(images, training, chunk=4)
    np.testing.assert_array_equal(whole[1], tiled[1])
    np.testing.assert_array_equal(whole[0], tiled[0])


def test_the_map_of_a_sample_takes_in_the_others():
    pytest.importorskip("openTSNE")
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 3
    phi = rng.normal(size=(3, 12))[labels] + 0.1 * rng.normal(size=(600, 12))
    found = maps.embedding(phi, labels=labels, sample=150)
    assert found.numbers() == {"n": 600, "sample": 150}
    centre = np.array([np.median(found.places[labels == c], axis=0) for c in range(3)])
    distance = np.linalg.norm(found.places[:, None] - centre, axis=2)
    assert (distance.argmin(1) == labels).all()
    assert maps.embedding(phi[:90]).numbers() == {"n": 90, "sample": 90}
