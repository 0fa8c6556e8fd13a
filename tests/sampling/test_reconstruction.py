"""Algorithm 1 against the plain loops; what a result depends on; going on after a kill."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastphi import noise, reference, targets
from fastphi.config import TrainingInfo, UNetConfig
from fastphi.sampling import Reconstruction, reconstruct, sample
from fastphi.sampling.record import Record
from fastphi.unet import UNet

CONFIG = UNetConfig(channels=(4, 8), dec_layers=2)
MEAN = (0.4, 0.5, 0.6)
SCHEDULE = {"form": "schedule", "sigmas": (1.0, 0.1, 5), "max_iter": 4}
# A random network does not denoise; this much of the noise taken away makes images stop within 30
# steps, apart from each other.
ADAPTIVE = {
    "form": "adaptive",
    "beta": 0.2,
    "h0": 0.3,
    "sigma_0": 0.5,
    "sigma_last": 0.15,
    "max_iter": 2,
    "lr": 0.001,
    "max_steps": 60,
}
FORMS = pytest.mark.parametrize("options", [SCHEDULE, ADAPTIVE], ids=["schedule", "adaptive"])


def tiny(dtype: torch.dtype = torch.float64) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = UNet(CONFIG).to(dtype)
    model.training_info = TrainingInfo(mean=MEAN)
    return model


def images(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 16, 16, generator=g, dtype=torch.float64).to(dtype)


def same(a: Reconstruction, b: Reconstruction) -> bool:
    """Bit for bit, NaN where NaN."""
    names = ("images", "samples", "sigma", "losses_first", "losses_last", "updates", "converged")
    pairs = [(getattr(a, name), getattr(b, name)) for name in (*names, "sigma_hat", "progress")]
    return all(
        (x is None and y is None) or np.array_equal(x, y, equal_nan=x.dtype.is_floating_point)
        for x, y in pairs
    )


class Plain:
    """The parts of the reference loops for one sample, on the plain network."""

    def __init__(self, model: UNet, made: targets.Targets | None, i: int, options: dict) -> None:
        self.model, self.made, self.i, self.options = model, made, i, options

    def z(self, k: int) -> torch.Tensor:
        stream = noise.stream("step", k)
        return noise.normal(4, [self.i], stream, 0, (3, 16, 16), dtype=torch.float64)

    def phi(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.walk_means(reference.ReferenceOps(), x, "mid")["mid"]

    @torch.no_grad()
    def denoise(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.walk(reference.ReferenceOps(), x)

    def match(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        if self.made is None:
            return x
        target = self.made.phi(sigma, rows=[self.i])
        weight = torch.full((8,), 1 / 8, dtype=x.dtype)
        lr, most = self.options.get("lr", 0.01), self.options["max_iter"]
        return reference.match_one(self.phi, x, target, weight, lr, most)[0]

    def mean(self) -> torch.Tensor:
        mean = torch.tensor(MEAN, dtype=torch.float64)
        return mean[None, :, None, None].expand(1, 3, 16, 16)


def plain_adaptive(part: Plain, options: dict) -> tuple[torch.Tensor, int]:
    names = ("sigma_0", "sigma_last", "h0", "beta", "fixed_h", "max_steps")
    chosen = {name: options[name] for name in names if name in options}
    return reference.reconstruct_adaptive(part.denoise, part.match, part.z, part.mean(), **chosen)


def test_schedule_is_the_reference_loop() -> None:
    model, made = tiny(), targets.from_images(tiny(), images(3), draws=2)
    got = reconstruct(model, made, seed=4, **SCHEDULE)
    levels = reference.schedule(1.0, 0.1, 5)
    for i in range(3):
        part = Plain(model, made, i, SCHEDULE)
        x = reference.reconstruct_schedule(part.denoise, part.match, part.z, part.mean(), levels)
        # float64; Adam divides by √v, which magnifies rounding where a gradient is small
        torch.testing.assert_close(got.images[i], x[0], rtol=0, atol=1e-7)
    assert got.sigma.tolist() == [[pytest.approx(s)] * 3 for s in levels]
    assert got.sigma[-1, 0] == 0.1  # exactly, so that a store whose lowest level it is will do
    assert got.steps.tolist() == [5] * 3 and got.finished


@pytest.mark.parametrize("fixed_h", [False, True])
def test_adaptive_is_the_reference_loop(fixed_h: bool) -> None:
    model, made = tiny(), targets.from_images(tiny(), images(3), draws=2)
    options = ADAPTIVE | {"fixed_h": fixed_h}
    got = reconstruct(model, made, seed=4, **options)
    steps = []
    for i in range(3):
        x, n = plain_adaptive(Plain(model, made, i, options), options)
        steps.append(n + 1)  # the reference does not count the step that finds σ̂ < σ_L
        torch.testing.assert_close(got.images[i], x[0], rtol=0, atol=1e-7)
    assert got.steps.tolist() == steps and max(steps) < 60
    assert (got.sigma_hat < 0.15).all()


def test_sample_is_the_loop_without_matching() -> None:
    model = tiny()
    options = {k: v for k, v in ADAPTIVE.items() if k not in ("max_iter", "lr")}
    got = sample(model, 3, size=16, seed=4, **options)
    for i in range(3):
        x, _ = plain_adaptive(Plain(model, None, i, ADAPTIVE), ADAPTIVE)
        torch.testing.assert_close(got.images[i], x[0], rtol=0, atol=1e-10)
    assert got.losses_first.isnan().all() and not got.updates.any()
    scheduled = sample(model, 2, size=(16, 8), form="schedule", sigmas=(1.0, 0.5, 3))
    assert scheduled.images.shape == (2, 3, 16, 8)


def test_default_is_adaptive_from_the_top_of_the_training_range() -> None:
    model = tiny()
    model.training_info = TrainingInfo(sigma_max=0.4)
    got = sample(model, 1, size=16, max_steps=2)
    assert got.settings["form"] == "adaptive" and got.settings["sigmas"] == [0.4, 0.01]
    assert got.settings["mean"] == [0.5] * 3  # unknown


@FORMS
def test_an_image_is_a_function_of_seed_and_id(options: dict) -> None:
    model, clean = tiny(torch.float32), images(4, torch.float32)
    made = targets.from_images(model, clean, draws=2)
    together = reconstruct(model, made, seed=2, **options)
    chunked = reconstruct(model, made, seed=2, batch=3, **options)
    assert same(together, chunked)
    order = [2, 0, 3, 1]
    permuted = reconstruct(model, made.select(order), samples=order, seed=2, **options)
    assert torch.equal(permuted.images, together.images[order])
    alone = reconstruct(model, made.select([3]), samples=[3], seed=2, **options)
    assert torch.equal(alone.images[0], together.images[3])
    n = int(together.steps[3])
    assert len(alone.sigma) == n and torch.equal(alone.updates[:, 0], together.updates[:n, 3])
    other = reconstruct(model, made.select([3]), samples=[5], seed=2, **options)
    assert not torch.equal(other.images[0], together.images[3])


def test_a_stopped_image_costs_nothing_and_keeps_its_result() -> None:
    model, made = tiny(), targets.from_images(tiny(), images(4), draws=1)
    seen = []
    got = reconstruct(model, made, callback=seen.append, store_progress=True, **ADAPTIVE)
    assert len(set(got.steps.tolist())) > 1  # they stop apart
    for i in range(4):
        n = int(got.steps[i])
        assert [i in info.rows for info in seen] == [True] * n + [False] * (len(seen) - n)
        assert got.progress[n - 1 :, i].eq(got.images[i]).all()
        assert got.sigma[n:, i].isnan().all() and got.losses_first[n:, i].isnan().all()


@FORMS
def test_callback_sees_each_step(options: dict) -> None:
    model, made = tiny(), targets.from_images(tiny(), images(2), draws=1)
    seen = []
    got = reconstruct(model, made, samples=[7, 9], callback=seen.append, **options)
    assert [info.step for info in seen] == list(range(1, len(got.sigma) + 1))
    for k, info in enumerate(seen):
        assert info.samples.tolist() == [[7, 9][i] for i in info.rows]
        assert np.array_equal(info.sigma, got.sigma[k][info.rows])
        assert torch.equal(info.match.updates, got.updates[k][info.rows])
        torch.testing.assert_close(info.match.first, got.losses_first[k][info.rows])
        assert info.noisy.shape == info.matched.shape == info.x.shape
        assert not torch.equal(info.noisy, info.matched)
    assert torch.equal(seen[-1].x, got.images[seen[-1].rows])


def test_stored_progress() -> None:
    model, made = tiny(), targets.from_images(tiny(), images(2), draws=1)
    every = reconstruct(model, made, store_progress=True, **SCHEDULE)
    second = reconstruct(model, made, store_progress=2, **SCHEDULE)
    assert every.progress.shape == (5, 2, 3, 16, 16)
    assert torch.equal(every.progress[[1, 3]], second.progress)
    assert torch.equal(every.progress[-1], every.images)
    assert reconstruct(model, made, **SCHEDULE).progress is None


def test_record_of_the_losses() -> None:
    model, made = tiny(), targets.from_images(tiny(), images(2), draws=1)
    got = reconstruct(model, made, **SCHEDULE | {"max_iter": 30, "tolerance": 0.3})
    assert got.converged.any()
    ratio = got.losses_last / got.losses_first
    assert torch.equal(got.converged, ratio <= 0.3)
    assert (got.updates[got.converged] < 30).all() and (got.updates[~got.converged] == 30).all()


def test_channels_reach_the_loss() -> None:
    model, made = tiny(), targets.from_images(tiny(), images(1), draws=1)
    by_form = [
        reconstruct(model, t, **SCHEDULE).images
        for t in (made, made.with_channels([2]), made.with_channels([2], zero_elsewhere=True))
    ]
    assert not torch.equal(by_form[0], by_form[1]) and not torch.equal(by_form[1], by_form[2])
    seen = []
    reconstruct(model, made.with_channels([2]), callback=seen.append, **SCHEDULE)
    phi = model.phi(seen[0].noisy).detach()
    wanted = (phi - made.phi(1.0))[:, 2] ** 2
    torch.testing.assert_close(seen[0].match.first, wanted, rtol=1e-9, atol=0)


def test_phi_cosine() -> None:
    model = tiny()
    made = targets.from_images(model, images(2), draws=3, seed=1)
    got = reconstruct(model, made, **SCHEDULE)
    phi = targets.from_images(model, got.images.clamp(0, 1), draws=3, seed=1).phi(0.5)
    inside = Reconstruction(**vars(got) | {"images": got.images.clamp(0, 1)})
    cosine = torch.cosine_similarity(phi, made.phi(0.5))
    torch.testing.assert_close(inside.phi_cosine(model, made, 0.5, draws=3, seed=1), cosine)
    subset = inside.phi_cosine(model, made.with_channels([0, 3]), 0.5, draws=3, seed=1)
    cosine = torch.cosine_similarity(phi[:, [0, 3]], made.phi(0.5)[:, [0, 3]])
    torch.testing.assert_close(subset, cosine)
    zero = targets.fixed(torch.zeros(2, 8, dtype=torch.float64))
    assert got.phi_cosine(model, zero).isnan().all()
    with pytest.raises(ValueError, match="targets: expected 2"):
        got.phi_cosine(model, made.select([0]))


@FORMS
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    options: dict, error: type[BaseException], tmp_path: Path
) -> None:
    model, made = (
        tiny(torch.float32),
        targets.from_images(tiny(torch.float32), images(3).float(), 1),
    )
    options = options | {"store_progress": 2, "save_every": 2}
    whole = reconstruct(model, made, **options)
    path = tmp_path / "result.npz"

    def stop_at(step: int):
        def callback(info) -> None:
            if info.step == step:
                raise error

        return callback

    # Interrupted twice, at random steps, each time after the state that was stored last.
    stops = sorted(random.Random(0).sample(range(1, len(whole.sigma)), 2))
    for stop in stops:
        with pytest.raises(error):
            reconstruct(model, made, save=path, callback=stop_at(stop), **options)
        stored = Reconstruction.load(path)
        assert not stored.finished and len(stored.sigma) == stop
    steps = []
    got = reconstruct(model, made, save=path, callback=lambda i: steps.append(i.step), **options)
    assert steps[0] == stops[-1] + 1 and same(got, whole)
    assert same(Reconstruction.load(path), whole)

    steps.clear()
    again = reconstruct(model, made, save=path, callback=lambda i: steps.append(i.step), **options)
    assert not steps and same(again, whole) and again.finished


def test_interrupted_between_recording_a_step_and_taking_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = tiny(), targets.from_images(tiny(), images(2), 1)
    options = SCHEDULE | {"store_progress": 2, "save": tmp_path / "result.npz"}
    plain = Record.add

    def add(record: Record, info, after) -> None:
        plain(record, info, after)
        if info.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Record, "add", add)
        reconstruct(model, made, **options)
    stored = Reconstruction.load(options["save"])
    assert len(stored.sigma) == 3 and len(stored.progress) == 1
    whole = reconstruct(model, made, store_progress=2, **SCHEDULE)
    assert same(reconstruct(model, made, **options), whole)


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
from test_reconstruction import ADAPTIVE, SCHEDULE, images, reconstruct, targets, tiny
import torch
torch.set_num_threads(1)
options = {"schedule": SCHEDULE, "adaptive": ADAPTIVE}[sys.argv[4]]
def callback(info):
    if info.step == int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)
reconstruct(tiny(), targets.from_images(tiny(), images(2), 1), save=sys.argv[3], save_every=2,
            callback=callback, **options)
"""


@FORMS
def test_a_killed_process_goes_on_to_the_same_bits(options: dict, tmp_path: Path) -> None:
    path, here = tmp_path / "result.npz", Path(__file__).parent
    import fastphi

    package = Path(fastphi.__file__).parent.parent
    command = [sys.executable, "-c", KILLED, package, here, path, options["form"], "3"]
    killed = subprocess.run([str(c) for c in command], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    stored = Reconstruction.load(path)
    assert len(stored.sigma) == 2 and not stored.finished  # step 3 was lost, as it should be
    model, made = tiny(), targets.from_images(tiny(), images(2), 1)
    assert same(reconstruct(model, made, save=path, **options), reconstruct(model, made, **options))
    assert [p.name for p in tmp_path.iterdir()] == ["result.npz"]


def test_a_file_of_another_run_is_not_touched(tmp_path: Path) -> None:
    model, made = tiny(), targets.from_images(tiny(), images(2), 1)
    path = tmp_path / "result.npz"
    first = reconstruct(model, made, save=path, **SCHEDULE)
    other = tiny()
    with torch.no_grad():
        other.dec1[0].bias += 1
    changed = targets.from_images(model, images(2).flip(-1), 1)
    for arguments, message in [
        ((other, made, SCHEDULE), "other settings: model"),
        ((model, changed, SCHEDULE), r"other settings: targets\.images"),
        (
            (model, made.with_channels([1]), SCHEDULE),
            r"targets\.channels \(None there, \[1\] here\)",
        ),
        ((model, made, SCHEDULE | {"seed": 1}), r"other settings: seed \(0 there, 1 here\)"),
        ((model, made, SCHEDULE | {"lr": 0.02, "max_iter": 5}), r"lr \(.*; max_iter \(4 there, 5"),
        ((model, made, SCHEDULE | {"samples": [4, 5]}), "other settings: samples"),
    ]:
        with pytest.raises(ValueError, match=message):
            reconstruct(*arguments[:2], save=path, **arguments[2])
    assert same(Reconstruction.load(path), first)
    # What does not decide the result does not matter.
    reconstruct(model, made, save=path, batch=1, save_every=3, progress=True, **SCHEDULE)
    new = reconstruct(model, made, save=path, resume=False, **SCHEDULE | {"seed": 1})
    assert same(Reconstruction.load(path), new) and not torch.equal(new.images, first.images)


@pytest.mark.parametrize("content", [b"", b"junk", "cut", "array", "other"])
def test_a_file_that_is_no_result_is_named(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "result.npz"
    model, made = tiny(), targets.from_images(tiny(), images(1), 1)
    if content == "cut":
        reconstruct(model, made, save=path, **SCHEDULE)
        path.write_bytes(path.read_bytes()[:-40])
    elif content in ("array", "other"):
        with open(path, "wb") as f:
            np.save(f, np.ones(3)) if content == "array" else np.savez(f, a=np.ones(3))
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    for name, attempt in (
        ("path", lambda: Reconstruction.load(path)),
        ("save", lambda: reconstruct(model, made, save=path, **SCHEDULE)),
    ):
        match = rf"{name}: .*result\.npz is not a whole fastphi reconstruction"
        with pytest.raises(ValueError, match=match):
            attempt()
    assert path.read_bytes() == before


def test_save_and_load(tmp_path: Path) -> None:
    model, made = tiny(), targets.from_images(tiny(), images(2), 1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        got = reconstruct(model, made, store_progress=2, **SCHEDULE)
        settings = got.settings | {"dtype": str(dtype).removeprefix("torch.")}
        parts = {"images": got.images.to(dtype), "progress": got.progress.to(dtype)}
        got = Reconstruction(**vars(got) | parts | {"settings": settings})
        got.save(tmp_path / "a")
        loaded = Reconstruction.load(tmp_path / "a")
        assert loaded.images.dtype == dtype and torch.equal(loaded.images, got.images)
        assert torch.equal(loaded.progress, got.progress) and loaded.settings == got.settings


def test_nan_is_reported_with_step_sigma_and_sample(tmp_path: Path) -> None:
    model, made = tiny(), targets.from_images(tiny(), images(2), 1)

    def poison(info) -> None:
        if info.step == 2:
            with torch.no_grad():
                model.dec1[-1].bias[0] = torch.nan

    path = tmp_path / "result.npz"
    with pytest.raises(FloatingPointError, match=r"step 3: NaN or Inf .* sample 6 .* σ = 0\.55"):
        reconstruct(model, made, samples=[6, 8], callback=poison, save=path, **SCHEDULE)
    assert len(Reconstruction.load(path).sigma) == 2  # the steps before it are kept


def test_levels_and_the_training_range(caplog: pytest.LogCaptureFixture) -> None:
    model, made = tiny(), targets.fixed(torch.rand(1, 8, dtype=torch.float64))

    def warnings() -> list[str]:
        lines = [r.message for r in caplog.records if "training range" in r.message]
        caplog.clear()
        return lines

    with caplog.at_level(logging.WARNING, "fastphi"):
        model.training_info = TrainingInfo(sigma_min=0.1, sigma_max=0.7)
        got = reconstruct(model, made, size=16, max_iter=0)
        assert got.sigma[[0, -1], 0].tolist() == [0.7, pytest.approx(0.1)] and len(got.sigma) == 100
        assert len(warnings()) == 1
        reconstruct(model, made, size=16, max_iter=0, sigmas=(0.8, 0.3, 2))
        assert len(warnings()) == 1
        reconstruct(model, made, size=16, max_iter=0, sigmas=(0.7, 0.1, 2))
        sample(model, 1, size=16, max_steps=1)
        assert not warnings()
        sample(model, 1, size=16, max_steps=1, sigma_0=0.8)
        assert len(warnings()) == 1


def test_running_out_of_steps_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    with caplog.at_level(logging.WARNING, "fastphi"):
        seen = []
        got = sample(model, 2, size=16, max_steps=3, callback=seen.append)
    assert any("2 of 2 images had not reached" in r.message for r in caplog.records)
    with torch.no_grad():
        torch.testing.assert_close(got.images, model(seen[-1].x), rtol=1e-10, atol=1e-12)


def test_a_store_must_cover_the_levels() -> None:
    model = tiny()
    made = targets.table([0.1, 0.5], torch.rand(2, 1, 8, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"targets: φ\* is known .* from 0\.1 to 0\.5, the schedule"
    ):
        reconstruct(model, made, size=16, sigmas=(0.6, 0.2, 3))
    reconstruct(model, made, size=16, sigmas=(0.5, 0.1, 3), max_iter=1)
    # The adaptive form may stray beyond σ_0 and below σ_L by itself: that takes the end's φ*.
    got = reconstruct(
        model, made, size=16, form="adaptive", sigma_0=0.5, sigma_last=0.1, max_steps=9
    )
    assert got.sigma_hat.max() > 0.5 or got.sigma.nan_to_num(0).max() > 0.5


def test_leaves_everything_as_it_was() -> None:
    model, clean = tiny(torch.float32), images(2, torch.float32)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made, rng = targets.from_images(model, clean, 1), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    with torch.inference_mode(), torch.autocast("cpu"):
        inside = reconstruct(model, made, **SCHEDULE)
    got = reconstruct(model, made, **SCHEDULE)
    assert same(inside, got) and not got.images.requires_grad
    assert torch.equal(clean, images(2, torch.float32)) and torch.equal(rng, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


FIXED = targets.fixed(torch.rand(2, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.rand(2, 8)}, r"targets: expected .* targets\.fixed"),
        ({"targets": targets.fixed(torch.rand(2, 5))}, r"targets: φ\* has 5 channels.* model 8"),
        ({"form": "both"}, "form: expected one of adaptive, schedule"),
        ({"size": None}, "size: these targets come from no images"),
        ({"size": 15}, "size: height and width must be multiples of 2"),
        ({"size": 16.0}, "size: expected an integer"),
        ({"size": (16, 16, 3)}, "size: expected pixels"),
        ({"samples": [1]}, "samples: expected 2 ids"),
        ({"samples": [1, -1]}, r"samples\[1\]: "),
        ({"samples": [1, 2**32]}, r"samples\[1\]: "),
        ({"samples": [1, 0.5]}, r"samples\[1\]: expected an integer"),
        ({"seed": 1.0}, "seed: expected an integer"),
        ({"seed": -1}, "seed: "),
        ({"sigmas": 0.5}, r"sigmas: expected \(first, last, steps\)"),
        ({"sigmas": (1.0, 0.1)}, r"sigmas: expected \(first, last, steps\)"),
        ({"sigmas": (-1.0, 0.1, 5)}, "sigmas: first"),
        ({"sigmas": (1.0, -0.1, 5)}, "sigmas: last"),
        ({"sigmas": (1.0, 0.1, 0)}, "sigmas: steps"),
        ({"sigmas": (0.1, 1.0, 5)}, "sigmas: expected levels that fall"),
        ({"sigma_0": 1.0}, "sigma_0: belongs to the adaptive form"),
        ({"sigma_last": 0.1}, "sigma_last: belongs to the adaptive form"),
        ({"form": "adaptive", "sigmas": (1.0, 0.1, 5)}, "sigmas: belongs to the schedule"),
        ({"form": "adaptive", "sigma_0": 0}, "sigma_0: "),
        ({"form": "adaptive", "sigma_last": 1.5}, "sigma_last: expected less than sigma_0"),
        ({"form": "adaptive", "h0": 0}, "h0: "),
        ({"form": "adaptive", "beta": 1.1}, "beta: "),
        ({"form": "adaptive", "fixed_h": 1}, "fixed_h: "),
        ({"form": "adaptive", "max_steps": 0}, "max_steps: "),
        ({"lr": -1.0}, "lr: "),
        ({"max_iter": 2.0}, "max_iter: expected an integer"),
        ({"tolerance": torch.nan}, "tolerance: "),
        ({"batch": 0}, "batch: "),
        ({"store_progress": -1}, "store_progress: "),
        ({"callback": 3}, "callback: expected a function"),
        ({"save_every": 0}, "save_every: "),
        ({"save": 3}, "save: expected a path"),
        ({"save": "."}, "save: . is a folder"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str) -> None:
    arguments = {"targets": FIXED, "size": 16} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        reconstruct(tiny(), arguments.pop("targets"), **arguments)


@pytest.mark.parametrize("n", [0, -1, 1.5, "2"])
def test_sample_wants_a_number_of_images(n) -> None:
    with pytest.raises((ValueError, TypeError), match="n: expected"):
        sample(tiny(), n, size=16)


# --- progress is appended -------------------------------------------------------------------------


def test_images_on_the_way_are_appended_to_a_file(tmp_path: Path) -> None:
    """A state that is stored every few steps holds none of them; the result holds all."""
    made, path = targets.from_images(tiny(), images(3), 1), tmp_path / "x.npz"
    options = SCHEDULE | {"store_progress": 1, "save_every": 1}
    sizes, beside = [], tmp_path / ".x.npz.progress"

    def look(info) -> None:
        sizes.append((path.stat().st_size, beside.stat().st_size))

    got = reconstruct(tiny(), made, save=path, callback=look, **options)
    assert same(got, reconstruct(tiny(), made, **options)) and same(Reconstruction.load(path), got)
    states, frames = zip(*sizes, strict=True)
    one = images(3).nbytes
    assert frames == tuple(one * (k + 1) for k in range(len(frames)))
    assert max(states) - min(states) < one and not beside.exists()


def test_images_on_the_way_that_are_lost_are_named(tmp_path: Path) -> None:
    made, path = targets.from_images(tiny(), images(3), 1), tmp_path / "x.npz"
    options = SCHEDULE | {"store_progress": 2}

    def stop(info) -> None:
        if info.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(tiny(), made, save=path, callback=stop, **options)
    assert len(Reconstruction.load(path).progress) == 2
    (tmp_path / ".x.npz.progress").write_bytes(b"")
    with pytest.raises(ValueError, match="save: .*progress beside it lacks images of 2 steps"):
        reconstruct(tiny(), made, save=path, **options)
