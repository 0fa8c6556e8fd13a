"""Nearest rows by the angle between them."""

from __future__ import annotations

import numpy as np
import pytest

from fastphi.analysis.neighbours import nearest


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
