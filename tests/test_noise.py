from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fastphi import noise, reference
from fastphi.engine import ops

PINNED = (
    "b9cd49b7 beb7b1af bfa443ce bedb61e6 bd04e1c7 3fd9cd62 bf0a9b39 be41a8bb bf3e93f7 bf81d7cd"
).split()

needs_compiled = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))


def words(seed, counter):
    """Philox of one counter (c0, c1, c2, c3), as hexadecimal."""
    c0, c1, c2, c3 = (np.array([c]) for c in counter)
    return " ".join(f"{int(w):08x}" for w in reference.philox(seed, c0, c1, int(c2[0]), c3)[0])


def test_philox_known_answers():
    """The three vectors of the generator's authors (Random123, kat_vectors, philox4x32 10)."""
    ones = 2**32 - 1
    assert words(0, (0, 0, 0, 0)) == "6627e8d5 e169c58d bc57ac4c 9b00dbd8"
    assert words(2**64 - 1, (ones,) * 4) == "408f276d 41c83b0e a20bc7c6 6d5451fd"
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(0x299F31D0A4093822, pi) == "d16cfe09 94fdcceb 5001e420 24126ea1"


def test_transform_is_box_muller():
    """Against the logarithm, sine and cosine of float64, over all octants and magnitudes."""
    rng = np.random.default_rng(0)
    xa = rng.integers(0, 2**32, 20_000, dtype=np.uint64)
    xa[:4] = 0, 2**32 - 1, 2**31, 511  # the ends of the logarithm
    xb = rng.integers(0, 2**32, 20_000, dtype=np.uint64)
    u = (2 * (xa >> np.uint64(9)).astype(np.float64) + 1) * 2.0**-24
    fraction = (2 * ((xb >> np.uint64(6)) & np.uint64(0x7FFFFF)).astype(np.float64) + 1) * 2.0**-24
    octant = (xb >> np.uint64(29)).astype(int)
    angle = fraction * np.pi / 4
    sin, cos = np.sin(angle), np.cos(angle)
    sin, cos = np.where(octant & 1, cos, sin), np.where(octant & 1, sin, cos)
    cos, sin = np.where(octant & 2, -cos, cos), np.where(octant & 4, -sin, sin)
    r = np.sqrt(-2 * np.log(u))
    for found, expected in zip(reference._box_muller(xa, xb), (r * cos, r * sin), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-6)


def test_bits_are_pinned():
    """Results in people's stores hang on them: these values never change."""
    z = noise.normal(2**63 - 1, [0, 2**32 - 1], 2**32 - 1, [3, 2**32 - 1], (1, 1, 5))
    found = [f"{int(b) & 0xFFFFFFFF:08x}" for b in z.flatten().view(torch.int32)]
    assert found == PINNED


@needs_compiled
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (3, 16, 16), (1, 2, 3)])
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_compiled_bits_are_those_of_the_reference(shape, seed):
    sample = torch.tensor([0, 5, 2**32 - 1, 2**31])
    draw = torch.tensor([0, 2**31, 7, 2**32 - 1])
    for stream in (0, noise.stream("extract", 2**24 - 1), 2**32 - 1):
        expected = reference.noise_normal(seed, sample, stream, draw, *shape)
        found = ops.noise_normal(seed, sample, stream, draw, *shape)
        assert found.dtype == torch.float32 and found.shape == (4, *shape)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@needs_compiled
def test_threads_change_no_bit():
    torch.set_num_threads(1)
    one = noise.normal(3, range(5), 0, 0, (3, 33, 31))
    torch.set_num_threads(2)
    assert torch.equal(noise.normal(3, range(5), 0, 0, (3, 33, 31)), one)


def test_standard_normal():
    """40 images of 3×64×64: moments within five standard errors, and Kolmogorov-Smirnov."""
    z = noise.normal(0, range(40), noise.stream("train"), 0, (3, 64, 64)).double().flatten().numpy()
    n = len(z)
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert 4.2 < np.abs(z).max() < 5.8
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_samples_streams_draws_seeds_and_neighbours_are_independent():
    shape = (1, 64, 64)
    z = [noise.normal(0, [0], 0, 0, shape), noise.normal(1, [0], 0, 0, shape)]
    z += [noise.normal(2**32, [0], 0, 0, shape), noise.normal(0, [1], 0, 0, shape)]
    z += [noise.normal(0, [0], 1, 0, shape), noise.normal(0, [0], 0, 1, shape)]
    z += [noise.normal(0, [0], noise.stream("sigma"), 0, shape)]
    z += [z[0].roll(1), z[0].roll(2), z[0].roll(64), z[0].abs(), z[0].square()]
    rows = torch.stack([v.flatten() for v in z]).double()
    correlation = torch.corrcoef(rows) - torch.eye(len(z))
    correlation[-2:, -2:] = 0  # |z| and z² do go together
    assert correlation.abs().max() < 5 / 64


def test_an_image_is_a_function_of_its_own_counters():
    whole = noise.normal(7, range(6), 3, [0, 1, 0, 1, 0, 1], (3, 4, 4))
    few = noise.normal(7, [4, 1], 3, [0, 1], (3, 4, 4))
    assert torch.equal(few, whole[[4, 1]])
    # elements are counted through the image, whatever its shape
    assert torch.equal(noise.normal(7, [2], 3, 0, (1, 6, 8)).flatten(), whole[2].flatten())
    state = torch.get_rng_state()
    noise.normal(7, [0], 0, 0, (1, 4, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_dtype_and_empty():
    z = noise.normal(0, [1], 0, 0, (1, 2, 2))
    wide = noise.normal(0, [1], 0, 0, (1, 2, 2), dtype=torch.float64)
    assert wide.dtype == torch.float64 and torch.equal(wide, z.double())
    assert noise.normal(0, [], 0, 0, (1, 2, 2)).shape == (0, 1, 2, 2)


def test_streams_are_distinct():
    found = {noise.stream(p, i) for p in noise._PURPOSES for i in (0, 1, 2**24 - 1)}
    assert len(found) == 3 * len(noise._PURPOSES) and all(0 <= s < 2**32 for s in found)
    for index in (-1, 2**24):
        with pytest.raises(ValueError, match="index"):
            noise.stream("train", index)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((-1, [0], 0, 0), ValueError, "seed"),
        ((2**63, [0], 0, 0), ValueError, "seed"),
        ((0.5, [0], 0, 0), TypeError, "seed"),
        ((0, [-1], 0, 0), ValueError, "sample"),
        ((0, [2**32], 0, 0), ValueError, "sample"),
        ((0, [0], 0, -1), ValueError, "draw"),
        ((0, [0, 1], 0, [0, 2**32]), ValueError, "draw"),
    ],
)
def test_refuses(arguments, error, match):
    with pytest.raises(error, match=match):
        noise.normal(*arguments, (1, 2, 2))


def test_uniform():
    u = noise.uniform(0, np.arange(20_000), noise.stream("sigma"), 3)
    assert u.dtype == np.float64 and 0 < u.min() and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    np.testing.assert_array_equal(noise.uniform(0, [7, 3], noise.stream("sigma"), 3), u[[7, 3]])
    other = noise.uniform(0, np.arange(20_000), noise.stream("sigma"), 4)
    assert abs(np.corrcoef(u, other)[0, 1]) < 5 / 20_000**0.5


def test_permutation():
    order = noise.permutation(0, 5000, noise.stream("order"), 1)
    assert order.dtype == np.int64 and sorted(order) == list(range(5000))
    np.testing.assert_array_equal(noise.permutation(0, 5000, noise.stream("order"), 1), order)
    for other in (
        noise.permutation(1, 5000, 0, 1),
        noise.permutation(0, 5000, 0, 2),
        np.arange(5000),
    ):
        assert abs(np.corrcoef(order, other)[0, 1]) < 5 / 5000**0.5
    # every place is as likely for every number: chi-square over 6 permutations of 3
    counts = np.unique(
        [str(noise.permutation(0, 3, 0, d)) for d in range(600)], return_counts=True
    )[1]
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-3
    assert len(noise.permutation(0, 0)) == 0
