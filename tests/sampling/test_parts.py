"""A run that ranks share: cut, interrupted, cut anew for another number of them, joined: the same bits."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fastphi import targets
from fastphi.config import TrainingInfo
from fastphi.sampling import Reconstruction, parts, reconstruct
from fastphi.sampling.plan import make_plan
from fastphi.sampling.record import run_settings
from fastphi.sampling.run import _part
from fastphi.sampling.sampler import Sampler
from fastphi.support.world import World
from fastphi.unet import UNet

SCHEDULE = {"form": "schedule", "sigmas": (0.8, 0.05, 9), "max_iter": 3, "store_progress": 2}
ADAPTIVE = {
    "form": "adaptive",
    "h0": 0.1,
    "sigma_0": 0.8,
    "sigma_last": 0.35,
    "max_steps": 25,
    "max_iter": 3,
    "store_progress": 3,
}
FORMS = pytest.mark.parametrize("options", [SCHEDULE, ADAPTIVE], ids=["schedule", "adaptive"])
N = 7


@pytest.fixture
def model(make_model) -> UNet:
    model = make_model(channels=(4, 6, 8))
    model.training_info = TrainingInfo(mean=(0.4, 0.5, 0.6))
    return model


@pytest.fixture
def made(model) -> targets.Targets:
    x = torch.rand(N, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return targets.from_images(model, x, 1)


def same(a: Reconstruction, b: Reconstruction) -> None:
    assert a.settings == b.settings and a.finished and b.finished
    names = ("images", "samples", "sigma", "losses_first", "losses_last", "updates", "converged")
    for name in (*names, "sigma_hat", "progress"):
        x, y = getattr(a, name), getattr(b, name)
        np.testing.assert_array_equal(x, y, err_msg=name)  # NaN where NaN


class Ranks:
    """Of one job, one after the other, of which some are stopped on the way."""

    def __init__(self, model: UNet, made: targets.Targets, path: Path, options: dict) -> None:
        plan = make_plan(model, N, targets=made, seed=0, samples=None, size=None, **rest(options))
        self.sampler, self.path = Sampler(model, made, plan, None), path
        self.settings = run_settings(model, made, plan)

    def job(self, size: int, stops: dict[int, int]) -> list[list[range]]:
        """stops: the rank → the step after which it is killed, in its first part."""
        shares = parts.cut(self.path, self.settings, self.sampler.plan, size, True)
        for rank, share in enumerate(shares):
            for part in share:
                try:
                    self._make(part, stops.get(rank))
                except KeyboardInterrupt:
                    break
        return shares

    def join(self, size: int) -> None:
        """By a job that ends; beside its parts one that an earlier job's rank has put back."""
        old = {p: p.read_bytes() for p in parts.folder(self.path).glob("*.npz")}
        wanted = sum(self.job(size, {}), [])
        for path, content in old.items():
            if not path.exists():
                path.write_bytes(content)
        parts.join(self.path, self.settings, wanted)

    def _make(self, part: range, stop: int | None) -> None:
        def callback(info) -> None:
            assert set(info.rows) <= set(part)
            if info.step == stop:
                raise KeyboardInterrupt

        how = {"callback": callback, "progress": False, "save_every": 3}
        _part(self.sampler.of(part), self.settings, self.path, World(), how)


def rest(options: dict) -> dict:
    defaults = {"sigmas": None, "h0": 0.01, "beta": 0.01, "sigma_0": None, "sigma_last": None}
    defaults |= {"fixed_h": False, "max_steps": 10_000, "lr": 0.01, "tolerance": 0.01}
    return defaults | options


@FORMS
@pytest.mark.parametrize("seed", range(3))
def test_any_number_goes_on_from_what_any_number_left(model, made, options, seed, tmp_path):
    whole = reconstruct(model, made, **options)
    ranks, rng = Ranks(model, made, tmp_path / "x.npz", options), random.Random(seed)
    if seed == 0:  # a run by one process is the beginning
        with pytest.raises(KeyboardInterrupt):
            reconstruct(model, made, save=ranks.path, callback=stop_at(4), **options)
    for _ in range(4):
        size = rng.randint(1, 5)
        stops = {rank: rng.randint(1, 9) for rank in range(size)}
        shares = ranks.job(size, stops)
        covered = sorted((part for share in shares for part in share), key=lambda part: part.start)
        assert [i for part in covered for i in part] == [*range(N)] and len(shares) == size
    ranks.join(2)
    same(Reconstruction.load(ranks.path), whole)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def stop_at(step: int):
    def callback(info) -> None:
        if info.step == step:
            raise KeyboardInterrupt

    return callback


@FORMS
def test_one_process_goes_on_from_the_parts_of_several(model, made, options, tmp_path):
    whole = reconstruct(model, made, **options)
    ranks = Ranks(model, made, tmp_path / "x.npz", options)
    ranks.job(3, {0: 2, 2: 5})
    same(reconstruct(model, made, save=ranks.path, **options), whole)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_what_is_left_to_do_is_shared(model, made, tmp_path):
    """One rank is done with its images; the others' are divided."""
    ranks = Ranks(model, made, tmp_path / "x.npz", SCHEDULE)
    first = ranks.job(2, {1: 1})
    assert first == [[range(0, 3)], [range(3, 7)]]
    assert ranks.job(2, {0: 1, 1: 1}) == [[range(0, 3), range(3, 5)], [range(5, 7)]]


def test_a_cut_that_is_interrupted_loses_nothing(model, made, tmp_path, monkeypatch):
    """New files are there before the old ones go; of two that have a row the one that is further counts."""
    whole = reconstruct(model, made, **SCHEDULE)
    ranks = Ranks(model, made, tmp_path / "x.npz", SCHEDULE)
    ranks.job(2, {0: 6, 1: 3})
    with monkeypatch.context() as patch:
        unlink = Path.unlink
        patch.setattr(
            Path, "unlink", lambda p, **k: p.suffix == ".npz" and interrupt() or unlink(p, **k)
        )
        with pytest.raises(KeyboardInterrupt):
            parts.cut(ranks.path, ranks.settings, ranks.sampler.plan, 3, True)
    assert len([*parts.folder(ranks.path).glob("*-*.npz")]) > 3
    ranks.join(4)
    same(Reconstruction.load(ranks.path), whole)


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_parts_of_another_run_are_refused(model, made, tmp_path):
    ranks = Ranks(model, made, tmp_path / "x.npz", SCHEDULE)
    ranks.job(2, {0: 1, 1: 1})
    with pytest.raises(ValueError, match="save: .*holds a run with other settings: seed"):
        reconstruct(model, made, save=ranks.path, seed=3, **SCHEDULE)
    got = reconstruct(model, made, save=ranks.path, seed=3, resume=False, **SCHEDULE)
    same(got, reconstruct(model, made, seed=3, **SCHEDULE))


def test_ranks_need_a_file(model, made, monkeypatch):
    monkeypatch.setattr(World, "here", classmethod(lambda cls: World(0, 2)))
    with pytest.raises(
        ValueError, match="ranks: 2 bring their images together in a file; give save"
    ):
        reconstruct(model, made, ranks=True, **SCHEDULE)
