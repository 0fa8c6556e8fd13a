from __future__ import annotations

import numpy as np
import pytest

from fastphi.analysis.neighbours import nearest
from fastphi.analysis.sparsity import participation_ratio


def test_participation_ratio_of_k_equal_channels_is_k_over_d():
    a = np.zeros((4, 20))
    for row, k in enumerate((1, 5, 20)):
        a[row, :k] = -3.0 if row == 1 else 7.0  # the sign and the scale do not matter
    pr = participation_ratio(a)
    np.testing.assert_allclose(pr[:3], [1 / 20, 5 / 20, 1.0], rtol=1e-14)
    assert np.isnan(pr[3])  # a row of zeros has no sparsity


def test_participation_ratio_survives_extreme_scales():
    a = np.array([[1.0, 2.0, 3.0]])
    expected = 36 / (3 * 14)
    for scale in (1e-200, 1.0, 1e200):
        np.testing.assert_allclose(participation_ratio(a * scale), expected, rtol=1e-13)


@pytest.mark.parametrize("bad", [np.ones(3), np.ones((0, 3)), np.array([[1.0, np.nan]])])
def test_participation_ratio_refuses(bad):
    with pytest.raises(ValueError, match="means"):
        participation_ratio(bad)


@pytest.mark.parametrize("chunk", [3, 7, 1000])
def test_nearest_is_exact_whatever_the_chunk(chunk):
    rng = np.random.default_rng(0)
    q, r = rng.normal(size=(5, 6)), rng.normal(size=(40, 6)) * rng.uniform(0.1, 10, (40, 1))
    cosine = np.array([[a @ b / np.sqrt(a @ a * (b @ b)) for b in r] for a in q])
    index, value = nearest(q, r, k=4, chunk=chunk)
    np.testing.assert_array_equal(index, np.argsort(-cosine, axis=1)[:, :4])
    np.testing.assert_allclose(value, -np.sort(-cosine, axis=1)[:, :4], rtol=1e-12)


def test_nearest_puts_directionless_rows_last_and_finds_itself():
    r = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    index, value = nearest(r[1:], r, k=3)
    np.testing.assert_array_equal(index, [[1, 2, 0], [2, 1, 0]])
    assert np.isnan(value[:, 2]).all()


def test_nearest_refuses():
    with pytest.raises(ValueError, match="k"):
        nearest(np.ones((1, 2)), np.ones((3, 2)), k=4)
    with pytest.raises(ValueError, match="queries, rows"):
        nearest(np.ones((1, 2)), np.ones((3, 4)))
