"""The participation ratio."""

from __future__ import annotations

import numpy as np
import pytest

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
