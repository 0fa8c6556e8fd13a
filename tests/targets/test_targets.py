"""Every kind of target: φ*(σ) against the plain reference, and what it depends on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastphi
from fastphi import noise, reference, targets
from fastphi.config import UNetConfig
from fastphi.unet import UNet

CONFIG = UNetConfig(channels=(4, 8), dec_layers=2)


def tiny(dtype: torch.dtype = torch.float64) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return UNet(CONFIG).to(dtype)


MODEL = tiny()
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def expected(i: int, sigma: float, draws: int, seed: int = 0) -> torch.Tensor:
    """φ of image i at σ by the reference; the noise is that of (seed, i, σ's bits, draw)."""
    bits = int(np.float32(sigma).view(np.uint32))

    def z(d: int) -> torch.Tensor:
        stream = noise.stream("target", d)
        return noise.normal(seed, [i], stream, bits, (3, 16, 16), dtype=torch.float64)

    def means(x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return MODEL.walk_means(reference.ReferenceOps(), x, "mid")

    return reference.extract_phi(means, IMAGES[i : i + 1], z, sigma, draws)["mid"][0]


class Store:
    """What `from_store` needs of a φ store: 3 levels, 5 rows, φ = row + 10 σ² + channel / 8."""

    sigmas = (0.0, 0.5, 1.0)
    reads = 0

    def __len__(self) -> int:
        return 5

    def phi(self, sigma: float, indices: np.ndarray) -> torch.Tensor:
        assert sigma in self.sigmas
        self.reads += 1
        rows = torch.as_tensor(np.asarray(indices), dtype=torch.float32)[:, None]
        return rows + 10 * sigma**2 + torch.arange(8) / 8


def test_images_give_the_mean_over_draws_at_each_rows_level() -> None:
    made = targets.from_images(MODEL, IMAGES, draws=3, seed=9)
    assert len(made) == 4 and made.shape == (3, 16, 16) and made.sigma_range is None
    levels = torch.tensor([0.5, 0.1, 0.0, 2.0], dtype=torch.float64)
    by_reference = torch.stack([expected(i, s, 3, seed=9) for i, s in enumerate(levels.tolist())])
    # float64; the engines differ in the order of their sums
    torch.testing.assert_close(made.phi(levels), by_reference, rtol=1e-10, atol=1e-14)
    one_level = made.phi(0.5)
    assert torch.equal(one_level[0], made.phi(levels)[0])
    assert not torch.equal(one_level, targets.from_images(MODEL, IMAGES, draws=3, seed=8).phi(0.5))


def test_a_row_does_not_depend_on_its_company() -> None:
    model, images = tiny(torch.float32), IMAGES.float()
    made = targets.from_images(model, images, draws=2)
    together = made.phi(np.array([0.3, 0.6, 0.3, 0.9]))
    assert torch.equal(made.phi([0.9, 0.6], rows=[3, 1]), together[[3, 1]])
    alone = targets.from_images(model, images[3:], draws=2, ids=[3])
    assert torch.equal(alone.phi(0.9)[0], together[3])
    other = targets.from_images(model, images[3:], draws=2, ids=[0])
    assert not torch.equal(other.phi(0.9)[0], together[3])


def test_noise_of_two_levels_is_independent() -> None:
    """With the same noise at both, φ(0.5) and φ(0.5 + 1e-6) would agree to about 1e-6."""
    made = targets.from_images(MODEL, IMAGES, draws=1)
    change = (made.phi(0.5 + 1e-6) - made.phi(0.5)).abs().mean() / made.phi(0.5).abs().mean()
    assert change > 1e-3


def test_copies_stand_together_and_share_their_target(monkeypatch: pytest.MonkeyPatch) -> None:
    made = targets.from_images(MODEL, IMAGES, draws=2, copies=3)
    assert len(made) == 12
    from fastphi.targets import images as target_images

    seen = []
    plain = target_images.mean_phi
    monkeypatch.setattr(
        target_images, "mean_phi", lambda m, x, *rest: seen.append(len(x)) or plain(m, x, *rest)
    )
    phi = made.phi(0.5)
    assert seen == [4]  # each image goes through the network once
    single = targets.from_images(MODEL, IMAGES, draws=2).phi(0.5)
    assert torch.equal(phi, single.repeat_interleave(3, 0))
    assert torch.equal(made.select([11, 0]).phi(0.5), single[[3, 0]])


def test_one_fixed_level() -> None:
    free = targets.from_images(MODEL, IMAGES, draws=2)
    held = targets.from_images(MODEL, IMAGES, draws=2, sigma=0.5, copies=2)
    assert held.shape == (3, 16, 16) and len(held) == 8
    for sigma in (0.01, 0.5, 3.0):
        assert torch.equal(held.phi(sigma), free.phi(0.5).repeat_interleave(2, 0))


def test_fixed() -> None:
    phi = torch.rand(2, 8)
    assert torch.equal(targets.fixed(phi).phi(0.7), phi)
    assert torch.equal(targets.fixed(phi.numpy()).phi([0.1, 0.2]), phi)
    assert torch.equal(targets.fixed(phi[0], copies=3).phi(0.7), phi[[0, 0, 0]])


@pytest.mark.parametrize("how", ["mean", "max"])
def test_centroid(how: str) -> None:
    made = targets.centroid(MODEL, IMAGES, how, draws=2, copies=2)
    assert len(made) == 2
    phi = made.phi([0.2, 0.8])
    for row, sigma in zip(phi, (0.2, 0.8), strict=True):
        each = torch.stack([expected(i, sigma, 2) for i in range(4)])
        by_hand = each.mean(0) if how == "mean" else each.amax(0)
        torch.testing.assert_close(row, by_hand, rtol=1e-10, atol=1e-14)
    held = targets.centroid(MODEL, IMAGES, how, draws=2, sigma=0.2)
    assert torch.equal(held.phi(0.9)[0], phi[0])


def test_store_is_exact_at_its_levels_and_linear_between() -> None:
    made = targets.from_store(Store(), [4, 1])
    channel = torch.arange(8) / 8
    for sigma, value in ((0.0, 0), (0.5, 2.5), (1.0, 10), (0.25, 1.25), (0.75, 6.25), (0.1, 0.5)):
        wanted = torch.tensor([[4.0], [1.0]]) + value + channel
        torch.testing.assert_close(made.phi(sigma), wanted, rtol=1e-6, atol=1e-6)
        if sigma in Store.sigmas:
            assert torch.equal(made.phi(sigma), Store().phi(sigma, [4, 1]))
    mixed = made.phi(torch.tensor([0.25, 0.75], dtype=torch.float64))
    torch.testing.assert_close(mixed[1], 1 + 6.25 + channel)
    assert len(targets.from_store(Store())) == 5


def test_store_outside_of_its_levels() -> None:
    made = targets.from_store(Store(), [2])
    assert made.sigma_range == (0.0, 1.0)
    for sigma in (1.2, [1.2]):
        with pytest.raises(ValueError, match=r"from 0 to 1, 1\.2 is asked for"):
            made.phi(sigma)
    with pytest.raises(ValueError, match=r"from 0 to 1, 1\.2 is asked for"):
        targets.from_store(Store(), [2], sigma=1.2)
    clipped = targets.from_store(Store(), [2], clip=True)
    assert clipped.sigma_range is None
    assert torch.equal(clipped.phi(1.2), made.phi(1.0))
    held = targets.from_store(Store(), [2], clip=True, sigma=1.2)
    assert torch.equal(held.phi(0.1), made.phi(1.0))


@pytest.mark.parametrize(("how", "row"), [("mean", 2.0), ("max", 3.0)])
def test_store_combined(how: str, row: float) -> None:
    made = targets.from_store(Store(), [1, 2, 3], how=how, copies=4)
    assert len(made) == 4
    torch.testing.assert_close(made.phi(0.5), (row + 2.5 + torch.arange(8) / 8).expand(4, 8))


def test_store_reads_only_the_levels_it_needs() -> None:
    store = Store()
    held = targets.from_store(store, [0, 3], sigma=0.25)
    assert store.reads == 2
    wanted = targets.from_store(Store(), [0, 3]).phi(0.25)
    assert torch.equal(held.phi(0.9), wanted)


def test_a_real_store(tmp_path: Path) -> None:
    model, clean = tiny(torch.float32), IMAGES.float()
    store = fastphi.extract(model, clean, tmp_path / "phi", sigmas=[0.2, 0.6], draws=2)
    for source in (store, tmp_path / "phi"):
        made = targets.from_store(source, [3, 0])
        assert torch.equal(made.phi(0.6), store.phi(0.6, [3, 0]))
        halfway = (store.phi(0.2, [3, 0]) + store.phi(0.6, [3, 0])) / 2
        torch.testing.assert_close(made.phi(0.4), halfway)
    result = fastphi.reconstruct(model, made, size=16, sigmas=(0.6, 0.2, 2), max_iter=1)
    assert len(result) == 2


def test_table_takes_levels_in_any_order() -> None:
    phi = torch.rand(3, 2, 8)
    made = targets.table([1.0, 0.2, 0.5], phi)
    assert torch.equal(made.phi([0.2, 1.0]), torch.stack([phi[1, 0], phi[0, 1]]))


def test_mix() -> None:
    a, b = torch.rand(2, 3, 8)
    A, B = targets.fixed(a), targets.fixed(b)
    torch.testing.assert_close(targets.mix(A, B, 0.25).phi(0.5), 0.75 * a + 0.25 * b)
    w = torch.tensor([[0.0], [0.5], [1.0]])
    got = targets.mix(A, B, [0, 0.5, 1])
    torch.testing.assert_close(got.phi(0.5), (1 - w) * a + w * b)
    assert torch.equal(got.phi(0.5, rows=[2, 0]), torch.stack([b[2], a[0]]))
    one = targets.mix(A, targets.fixed(b[0]), 1.0)
    assert len(one) == 3 and torch.equal(one.phi(0.5), b[[0, 0, 0]])
    store = targets.mix(targets.from_store(Store(), [0]), targets.fixed(b[0]))
    assert store.sigma_range == (0.0, 1.0)


def test_channels() -> None:
    phi = torch.rand(2, 8) + 1
    plain = targets.fixed(phi)
    subset = plain.with_channels([6, 1])
    authors = plain.with_channels([6, 1], zero_elsewhere=True)
    assert plain.channels is None and subset.channels == (6, 1) and not subset.zero_elsewhere
    assert torch.equal(subset.phi(0.5), phi)
    inside = torch.zeros(8, dtype=torch.bool)
    inside[[1, 6]] = True
    assert torch.equal(authors.phi(0.5), torch.where(inside, phi, 0.0))
    for derived in (
        authors.repeat(2),
        authors.select([1]),
        authors.at(0.5),
        authors.combined("max"),
    ):
        assert derived.channels == (6, 1) and derived.zero_elsewhere
        assert not derived.phi(0.5)[:, ~inside].any() and derived.phi(0.5)[:, inside].all()


def test_state_is_plain_and_tells_targets_apart() -> None:
    other = tiny()
    with torch.no_grad():
        other.mid[0].bias[0] += 1
    base = targets.from_images(MODEL, IMAGES, draws=2)
    makers = [
        base,
        targets.from_images(other, IMAGES, draws=2),
        targets.from_images(MODEL, IMAGES.flip(-1), draws=2),
        targets.from_images(MODEL, IMAGES, draws=3),
        targets.from_images(MODEL, IMAGES, draws=2, seed=1),
        targets.from_images(MODEL, IMAGES, draws=2, ids=[1, 2, 3, 4]),
        targets.from_images(MODEL, IMAGES, draws=2, sigma=0.5),
        base.repeat(2),
        base.combined("mean"),
        base.combined("max"),
        base.with_channels([1]),
        base.with_channels([1], zero_elsewhere=True),
        targets.mix(base, base, 0.5),
        targets.mix(base, base, 0.4),
        targets.from_store(Store(), [1]),
        targets.from_store(Store(), [1], clip=True),
        targets.from_store(Store(), [2]),
    ]
    texts = [json.dumps(t.state(), sort_keys=True) for t in makers]
    assert len(set(texts)) == len(texts)
    again = targets.from_images(tiny(), IMAGES.clone(), draws=2)
    assert json.dumps(again.state(), sort_keys=True) == texts[0]


def test_takes_what_open_images_takes() -> None:
    model = tiny(torch.float32)
    a = targets.from_images(model, IMAGES.float().numpy(), draws=1).phi(0.5)
    assert torch.equal(a, targets.from_images(model, IMAGES.float(), draws=1).phi(0.5))


def test_leaves_everything_as_it_was() -> None:
    model, images, rng = tiny(torch.float32), IMAGES.float(), torch.get_rng_state()
    kept = images.clone()
    model.train()
    made = targets.from_images(model, images, draws=2)
    with torch.inference_mode(), torch.autocast("cpu"):
        inside = made.phi(0.5)
    phi = made.phi(0.5)
    assert torch.equal(inside, phi) and not phi.requires_grad
    assert torch.equal(images, kept) and torch.equal(rng, torch.get_rng_state())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


PHI = torch.rand(2, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: targets.from_images(MODEL, IMAGES * 255), r"in \[0, 1\].*divide 8-bit"),
        (lambda: targets.from_images(MODEL, IMAGES[0]), "images: expected a non-empty tensor"),
        (lambda: targets.from_images(MODEL, IMAGES[:, :1]), "images: the model takes 3"),
        (lambda: targets.from_images(MODEL, IMAGES[..., :15]), "images: .* multiples of 2"),
        (lambda: targets.from_images(MODEL, IMAGES * torch.nan), "images: .* NaN"),
        (lambda: targets.from_images(MODEL, 3), "images: expected"),
        (lambda: targets.from_images(MODEL, IMAGES, draws=0), "draws: "),
        (lambda: targets.from_images(MODEL, IMAGES, draws=2.0), "draws: expected an integer"),
        (lambda: targets.from_images(MODEL, IMAGES, seed=0.5), "seed: expected an integer"),
        (lambda: targets.from_images(MODEL, IMAGES, seed=-1), "seed: "),
        (lambda: targets.from_images(MODEL, IMAGES, ids=[1]), "ids: expected 4"),
        (lambda: targets.from_images(MODEL, IMAGES, ids=[0, 1, 2, -1]), r"ids\[3\]: "),
        (lambda: targets.from_images(MODEL, IMAGES, copies=0), "copies: "),
        (lambda: targets.from_images(MODEL, IMAGES, sigma=-0.5), "sigma: "),
        (lambda: targets.centroid(MODEL, IMAGES, "median"), "how: expected one of max, mean"),
        (lambda: targets.fixed(PHI[None]), "phi: expected a floating point φ"),
        (lambda: targets.fixed(torch.ones(2, 8, dtype=torch.int64)), "phi: .* got torch.int64"),
        (lambda: targets.fixed(PHI * torch.nan), "phi: .* NaN"),
        (lambda: targets.fixed(PHI[:0]), "phi: .* at least 1"),
        (lambda: targets.table([0.1], PHI), r"phi: expected \(1, N, C\)"),
        (lambda: targets.table([0.1, 0.1], PHI[:, None]), "sigmas: .* distinct"),
        (lambda: targets.from_store(Store(), [5]), r"indices: expected numbers in \[0, 5\)"),
        (lambda: targets.from_store(Store(), []), "indices: expected whole numbers"),
        (lambda: targets.from_store(Store(), how="min"), "how: expected one of"),
        (lambda: targets.mix(targets.fixed(PHI), PHI), "b: expected targets"),
        (lambda: targets.mix(targets.fixed(PHI), targets.fixed(PHI[:, :3])), "b: φ has 3"),
        (lambda: targets.mix(*(targets.fixed(torch.rand(n, 8)) for n in (2, 3))), "b: 3 targets"),
        (lambda: targets.mix(*2 * [targets.fixed(PHI)], weight=2), "weight: expected"),
        (lambda: targets.mix(*2 * [targets.fixed(PHI).with_channels([1])]), "a: has channels"),
        (lambda: targets.fixed(PHI).with_channels([8]), "channels"),
        (lambda: targets.fixed(PHI).select([2]), r"rows: expected numbers in \[0, 2\)"),
        (lambda: targets.fixed(PHI).phi(-0.1), "sigma: expected finite noise levels >= 0"),
        (lambda: targets.fixed(PHI).phi(torch.nan), "sigma: expected finite"),
        (lambda: targets.fixed(PHI).phi([0.1, 0.2, 0.3]), r"sigma: .* per row \(2\)"),
        (lambda: targets.fixed(PHI).phi("0.5"), "sigma: expected a noise level"),
        (lambda: targets.fixed(PHI).phi(0.5, rows=[0.5]), "rows: expected whole numbers"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
