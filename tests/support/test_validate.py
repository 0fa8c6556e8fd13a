from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastphi.config import UNetConfig
from fastphi.support import validate

CONFIG = UNetConfig(channels=(2, 2, 2))
GOOD = torch.rand(2, 3, 8, 4)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (np.zeros((1, 3, 8, 8)), TypeError, r"photo: expected a tensor .* got ndarray"),
        (GOOD[0], ValueError, r"photo: .* got shape \(3, 8, 4\)"),
        (GOOD[:0], ValueError, r"photo: .* non-empty .* got shape \(0, 3, 8, 4\)"),
        ((GOOD * 255).byte(), ValueError, "photo: expected floating point .* got torch.uint8"),
        (GOOD[:, :1], ValueError, r"photo: the model takes 3 channel\(s\), got 1"),
        (GOOD[..., :3], ValueError, "photo: height and width must be multiples of 4 .* got 8x3"),
        (GOOD[..., :2], ValueError, "photo: .* got 8x2"),
    ],
)
def test_images(x, error, match):
    assert validate.images(GOOD, CONFIG, "photo") is GOOD
    with pytest.raises(error, match=match):
        validate.images(x, CONFIG, "photo")


def test_clean_images_lie_in_0_1_and_noisy_ones_need_not():
    assert validate.clean_images(GOOD) is GOOD
    assert validate.images(GOOD * 9 - 4) is not None
    validate.clean_images(torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2))
    for x, match in (
        (GOOD * 255, r"x: clean images must lie in \[0, 1\].*divide 8-bit values by 255"),
        (GOOD - 1, r"x: clean images must lie in \[0, 1\], got \[-[^;]*$"),
        (
            GOOD.clone().index_put_((torch.tensor(1),) * 4, torch.tensor(math.nan)),
            r"\(1, 1, 1, 1\)",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            validate.clean_images(x)


def test_finite_names_the_first():
    x = torch.zeros(3, 4)
    assert validate.finite(x, "a") is x
    x[1, 2], x[2, 0] = math.inf, math.nan
    with pytest.raises(
        ValueError, match=r"a: 2 values are NaN or Inf, the first at index \(1, 2\)"
    ):
        validate.finite(x, "a")


def test_like_model():
    validate.like_model(GOOD, torch.zeros(1))
    for parameter, match in (
        (torch.zeros(1).double(), r"x: torch\.float32 on cpu, .* torch\.float64 on cpu"),
        (torch.zeros(1, device="meta"), "on meta"),
    ):
        with pytest.raises(ValueError, match=match):
            validate.like_model(GOOD, parameter)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.25), torch.tensor(0.75), np.int64(1)])
def test_number(value):
    found = validate.number(value, "n", low=0, high=1)
    assert type(found) is float and found == float(value)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (True, TypeError, "n: expected a number, got bool"),
        ("1", TypeError, "n: expected a number, got str '1'"),
        (None, TypeError, "NoneType"),
        (torch.ones(2), TypeError, "Tensor"),
        (1j, TypeError, "complex"),
        (math.nan, ValueError, "nan"),
        (math.inf, ValueError, "inf"),
        (-0.1, ValueError, r"in \[0, 1\], got -0\.1"),
        (1.1, ValueError, "got 1.1"),
    ],
)
def test_not_a_number(value, error, match):
    with pytest.raises(error, match=match):
        validate.number(value, "n", low=0, high=1)


def test_open_interval():
    assert validate.number(1e-300, "n", low=0, open_low=True) == 1e-300
    with pytest.raises(ValueError, match=r"in \(0, inf\], got 0"):
        validate.number(0, "n", low=0, open_low=True)
    assert validate.sigma(0) == 0
    with pytest.raises(ValueError, match="sigma"):
        validate.sigma(0, allow_zero=False)


def test_integer():
    assert validate.integer(np.int32(3), "k", low=1) == 3
    assert type(validate.integer(np.int32(3), "k")) is int
    for value, error, match in (
        (3.0, TypeError, "k: expected an integer, got float 3.0"),
        (True, TypeError, "bool"),
        ("3", TypeError, "str"),
        (0, ValueError, "k: expected an integer at least 1, got 0"),
    ):
        with pytest.raises(error, match=match):
            validate.integer(value, "k", low=1)
    with pytest.raises(ValueError, match=r"in \[1, 5\], got 6"):
        validate.integer(6, "k", low=1, high=5)
    assert validate.seed(2**63 - 1) == 2**63 - 1
    for value in (-1, 2**63):
        with pytest.raises(ValueError, match="seed"):
            validate.seed(value)


def test_sigmas():
    assert validate.sigmas(np.array([0.5, 0])) == (0.5, 0.0)
    assert validate.sigmas(s / 10 for s in range(2)) == (0.0, 0.1)
    for values, error, match in (
        (0.5, TypeError, "expected a list of noise levels, got float"),
        ("0.5", TypeError, "str"),
        ([], ValueError, "at least one"),
        ([0.1, 0.1], ValueError, "distinct"),
        ([0.1, -1], ValueError, r"sigmas\[1\]"),
        ([None], TypeError, r"sigmas\[0\]"),
    ):
        with pytest.raises(error, match=match):
            validate.sigmas(values)


def test_batch_sigma():
    for value, expected in (
        (2, [2.0]),
        ([1, 2], [1.0, 2.0]),
        (torch.tensor([[3.0], [4.0]]), [3.0, 4.0]),
    ):
        found = validate.batch_sigma(value, 2, GOOD.double())
        assert found.dtype == torch.float64 and found.shape == (len(expected), 1, 1, 1)
        assert found.flatten().tolist() == expected
    for value in ([1, 2, 3], 0, [1, 0], -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma"):
            validate.batch_sigma(value, 2, GOOD)


def test_choice_and_channel_subset():
    assert validate.choice("a", "letter", ("a", "b")) == "a"
    with pytest.raises(ValueError, match="letter: expected one of a, b; got 'c'"):
        validate.choice("c", "letter", ("b", "a"))
    assert validate.channel_subset(None, 4) is None
    assert validate.channel_subset(torch.tensor([3, 0]), 4) == (3, 0)
    for channels in ([], [0, 0], [4], [-1]):
        with pytest.raises(ValueError, match="channels"):
            validate.channel_subset(channels, 4)


@pytest.mark.parametrize("channels", [3, "03", [0.5]])
def test_channel_subset_of_the_wrong_type(channels):
    with pytest.raises(TypeError, match="channels"):
        validate.channel_subset(channels, 4)
