"""Training: the algorithm against a hand-written step, and runs that are cut short in every way."""

from __future__ import annotations

import dataclasses
import errno
import functools
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from train_case import NETWORK, ROOT, at_scale, bits, config, images, log_of, train

from fastphi import checkpoint, noise, reference
from fastphi.config import UNetConfig
from fastphi.data import MemoryImages, pack
from fastphi.support import files
from fastphi.support.processes import prefetched
from fastphi.support.world import World
from fastphi.train import TrainConfig, Trainer, psnr
from fastphi.train.step import Step
from fastphi.unet import UNet

# --- the algorithm ---


@pytest.mark.parametrize("density", ["sqrt", "uniform", "log-uniform"])
def test_noise_levels_have_the_density_asked_for(tmp_path, density):
    low, high = 0.01, 2.0
    c = TrainConfig(out=tmp_path, sigma_min=low, sigma_max=high, sigma_density=density)
    n = 20_000
    sigma = np.sort(c.sigmas(noise.uniform(3, np.arange(n), noise.stream("sigma"), 5)))
    distribution = {  # integrals of σ^-½, 1 and 1/σ from low
        "sqrt": (np.sqrt(sigma) - math.sqrt(low)) / (math.sqrt(high) - math.sqrt(low)),
        "uniform": (sigma - low) / (high - low),
        "log-uniform": np.log(sigma / low) / math.log(high / low),
    }[density]
    # Kolmogorov-Smirnov: 1.63/√n is exceeded by chance once in a hundred seeds; this one is fixed
    assert np.abs(distribution - (np.arange(n) + 0.5) / n).max() < 1.63 / math.sqrt(n)


def test_default_range_of_noise_levels(tmp_path):
    assert TrainConfig(out=tmp_path).sigma_min == 0
    c = TrainConfig(out=tmp_path, sigma_density="log-uniform")
    assert c.sigma_min == 1 / 255
    levels = dataclasses.replace(c, sigma_max=0.5).evaluation_sigmas()
    np.testing.assert_allclose(levels, np.geomspace(0.01, 0.5, 10), rtol=1e-3)


@pytest.mark.parametrize("weight", ["none", "inverse-variance"])
def test_steps_are_those_of_the_paper(tmp_path, weight):
    """Three steps by hand: sum over pixels, mean over images, Adam; losses, gradient, parameters."""
    changes = {"backend": "reference", "sigma_min": 0.1, "max_steps": 3, "loss_weight": weight}
    x = images()
    trainer = Trainer(config(tmp_path / "a", **changes), x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet(NETWORK)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    indices = trainer.split.training[noise.permutation(0, 36, noise.stream("order"), 0)]
    sigma = noise.uniform(0, indices, noise.stream("sigma"), 0)
    sigma = (math.sqrt(0.1) + sigma * (1 - math.sqrt(0.1))) ** 2
    z = noise.normal(0, indices, noise.stream("train"), 0, (3, 8, 8))
    expected = []
    for k in range(3):
        part = slice(8 * k, 8 * k + 8)
        loss = 0.0
        for i, s, e in zip(indices[part], sigma[part], z[part], strict=True):
            denoised = model.walk(reference.ReferenceOps(), (x[i] + s * e)[None].float())
            error = ((denoised[0] - x[i]) ** 2).sum()
            loss = loss + (error / s**2 if weight != "none" else error) / 8
        adam.zero_grad()
        loss.backward()
        if k == 0:  # Adam would hide a wrong factor
            step = trainer._step()
            step.gradient(step.draw(0))
            for name, p in trainer.model.named_parameters():
                d_p = model.get_parameter(name).grad
                # float32 sums over 8 x 64 pixels in another order
                torch.testing.assert_close(
                    p.grad, d_p, rtol=1e-3, atol=1e-4 * float(d_p.abs().max())
                )
        adam.step()
        expected.append(loss.item() / (3 * 8 * 8))
    trained = trainer.run(progress=False)
    found = [line["loss"] for line in log_of(tmp_path / "a") if "loss" in line]
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32, another order of summation
    for name, p in model.named_parameters():
        # Adam divides by |gradient|, so a tiny gradient's rounding shows: 1 % of three steps of lr
        torch.testing.assert_close(trained.get_parameter(name), p, rtol=0, atol=1e-4, msg=name)


def test_it_learns_to_denoise(tmp_path):
    network = UNetConfig(channels=(8, 12), dec_layers=2)
    settings = {"sigma_max": 0.5, "lr": 1e-2, "evaluate_every": 1000, "model": network}
    train(tmp_path, images(132), epochs=20, **settings)
    lines = log_of(tmp_path)
    loss = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(loss[-20:]) < 0.2 * np.mean(loss[:5])
    assert lines[-1]["psnr"]["0.5"] > 20 * math.log10(1 / 0.5) + 5  # its input, and 5 dB


def test_an_epoch_is_every_image_once_and_no_partial_batch(tmp_path):
    trainer = Trainer(config(tmp_path), images(40))  # 36 to train on: 4 batches, 4 unused
    assert trainer.state.steps_per_epoch == 4
    epochs = [np.concatenate([trainer._share(4 * e + k).indices for k in range(4)]) for e in (0, 1)]
    for seen in epochs:
        assert len(set(seen)) == 32 and set(seen) <= set(trainer.split.training)
    assert not set(trainer.split.training) & set(trainer.split.held)
    assert (epochs[0] != epochs[1]).any()


def test_learning_rate_halves(tmp_path):
    train(tmp_path, lr_halve_every=2, epochs=5, holdout=0)  # 5 steps an epoch
    rates = [line["lr"] for line in log_of(tmp_path)]
    assert rates == [3e-3] * 10 + [1.5e-3] * 10 + [0.75e-3] * 5


def test_micro_batches_give_the_same_gradient(tmp_path):
    """Also of a size that does not divide the batch."""
    gradients = []
    for micro in (None, 3):
        trainer = Trainer(config(tmp_path, micro_batch=micro, backend="reference"), images())
        step = trainer._step()
        step.gradient(step.draw(0))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))


def test_processes_share_the_same_batch(tmp_path):
    whole = Trainer(config(tmp_path), images())
    shares = []
    for rank in range(2):
        trainer = Trainer(config(tmp_path), images())
        trainer.world = World(rank, 2)
        step = Step(trainer.state, trainer.model, trainer._share, trainer.world, False)
        shares.append(step.draw(6))
    for name, value in vars(whole._step().draw(6)).items():
        joined = np.concatenate([np.asarray(getattr(share, name)) for share in shares])
        np.testing.assert_array_equal(joined, np.asarray(value))


def test_an_image_meets_other_noise_in_each_epoch(tmp_path):
    trainer = Trainer(config(tmp_path), images())
    seen: dict[int, list] = {}
    for step in range(8):  # two epochs
        batch = trainer._step().draw(step)
        for i, s, z in zip(batch.indices, batch.sigma.flatten(), batch.noise, strict=True):
            seen.setdefault(int(i), []).append((float(s), z))
    twice = [v for v in seen.values() if len(v) == 2]
    assert len(twice) >= 28  # of 36, each epoch leaves out four
    for (s0, z0), (s1, z1) in twice:
        assert s0 != s1 and abs(float((z0 * z1).mean())) < 5 / math.sqrt(z0.numel())


def test_psnr_is_the_mean_of_each_images_own():
    torch.manual_seed(0)
    model, x = UNet(NETWORK), images(5)
    found = psnr(model, x, [0.1, 0.4], indices=[4, 1, 2], seed=7, batch=2)
    for k, sigma in enumerate((0.1, 0.4)):
        each = []
        for i in (4, 1, 2):
            z = noise.normal(7, [i], noise.stream("evaluate", k), 0, (3, 8, 8))
            with torch.no_grad():
                error = model.walk(reference.ReferenceOps(), x[i : i + 1] + sigma * z) - x[i]
            each.append(-10 * math.log10(float((error.double() ** 2).mean())))
        assert found[sigma] == pytest.approx(np.mean(each), abs=1e-4)  # dB


def test_bf16_follows_float32(tmp_path):
    """The same first loss to bf16's 3 digits; parameters stay float32."""
    for amp in ("off", "bf16"):
        model = train(tmp_path / amp, amp=amp, max_steps=2, backend="reference")
        assert all(p.dtype == torch.float32 for p in model.parameters())
    a, b = (log_of(tmp_path / amp)[0]["loss"] for amp in ("off", "bf16"))
    assert a != b and a == pytest.approx(b, rel=0.01)


def test_automatic_precision_on_a_cpu(tmp_path, monkeypatch):
    """bf16 only by torch.compile on AMX, or on the PyTorch path where hardware multiplies it."""

    def chosen(**changes):
        return config(tmp_path, amp="auto", **changes).mixed_precision(torch.device("cpu"))

    for isa, hardware in (("amx", True), ("avx512", True), ("avx2", False)):
        monkeypatch.setattr("fastphi.engine.cpu.runner._isa", lambda isa=isa: isa)
        monkeypatch.setattr("fastphi.train.config._fast_bf16", lambda hardware=hardware: hardware)
        assert (
            not chosen() and not chosen(backend="cpu") and not chosen(backend="cpu", compile=True)
        )
        assert chosen(compile=True) == (isa == "amx")
        assert chosen(backend="reference") == hardware


def test_compiled_training_is_the_same_training(tmp_path, monkeypatch):
    """Traced, but not code-generated, which takes a minute and a C++ compiler."""
    traced = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", traced)
    network = UNetConfig(channels=(4, 6), dec_layers=2, mid_layers=1, enc_layers=1)
    for name, on in (("a", False), ("b", True)):
        train(tmp_path / name, model=network, compile=on, max_steps=2, backend="reference")
    a, b = ([x["loss"] for x in log_of(tmp_path / run) if "loss" in x] for run in "ab")
    np.testing.assert_allclose(a, b, rtol=1e-4)  # float32, in another order


# --- what a run leaves ---


def test_a_finished_run(tmp_path):
    torch.manual_seed(12345)  # a state that no training run would leave
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    lines = []
    with torch.no_grad():  # whatever the caller's mode
        model = train(tmp_path, callback=lines.append)
    assert torch.equal(state[0], torch.get_rng_state())
    np.testing.assert_array_equal(state[1], np.random.get_state()[1])
    assert lines == log_of(tmp_path)
    info = checkpoint.load(tmp_path).training_info
    assert (info.sigma_min, info.sigma_max, info.steps) == (0, 1, 16) and info.data
    np.testing.assert_allclose(info.mean, images().mean(dim=(0, 2, 3)), rtol=1e-5)
    assert checkpoint.fingerprint(checkpoint.load(tmp_path)) == checkpoint.fingerprint(model)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["batch"] == 8
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-0000012.pt", "step-0000015.pt", "step-0000016.pt"]
    assert [line["step"] for line in lines if "psnr" in line] == [5, 10, 15, 16]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    again = train(tmp_path, callback=lambda line: pytest.fail("a finished run trained on"))
    assert checkpoint.fingerprint(again) == checkpoint.fingerprint(model)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}


def test_a_run_can_be_extended(tmp_path):
    train(tmp_path / "a", epochs=6)
    train(tmp_path / "b", epochs=6, max_steps=5)
    train(tmp_path / "b", epochs=3, evaluate_every=7, keep=1)
    train(tmp_path / "b", epochs=6, checkpoint_every=50)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    steps = [line["step"] for line in log_of(tmp_path / "b") if "loss" in line]
    assert steps == list(range(1, 25))


def test_another_config_is_refused(tmp_path):
    train(tmp_path, max_steps=2)
    before = bits(tmp_path)
    with pytest.raises(ValueError, match="lr was 0.003, is 0.001; seed was 0, is 1"):
        train(tmp_path, lr=1e-3, seed=1)
    with pytest.raises(ValueError, match="other settings: data was"):
        train(tmp_path, x=images().flip(0))
    assert bits(tmp_path) == before


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"someone's")
    with pytest.raises(ValueError, match="no checkpoint to go on from"):
        train(tmp_path)
    assert bits(tmp_path) == b"someone's"


def test_one_run_per_folder(tmp_path):
    with files.locked(tmp_path, "other"), pytest.raises(ValueError, match="another process"):
        train(tmp_path)


@pytest.mark.parametrize("harm", ["truncated", "empty", "bit"])
def test_a_broken_checkpoint_is_passed_over(tmp_path, caplog, harm):
    train(tmp_path / "a", epochs=3)
    train(tmp_path / "b", epochs=2)
    newest = sorted((tmp_path / "b" / "checkpoints").iterdir())[-1]
    content = bytearray(newest.read_bytes())
    if harm == "bit":
        content[content.index(b"data/0") + 100] ^= 1  # within the first tensor
    else:
        del content[0 if harm == "empty" else len(content) // 2 :]
    newest.write_bytes(content)
    with open(tmp_path / "b" / "log.jsonl", "a") as f:
        f.write('{"step": 8, "lo')  # as a kill leaves it
    train(tmp_path / "b", epochs=3)
    assert newest.name in caplog.text
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    steps = [line["step"] for line in log_of(tmp_path / "b") if "loss" in line]
    assert steps == list(range(1, 13))


def test_only_broken_checkpoints_are_an_error(tmp_path):
    train(tmp_path, max_steps=2, keep=1)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no checkpoint .* can be read"):
        train(tmp_path)


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    train(tmp_path / "a")
    real = os.fsync

    def full(handle):
        if "step-0000006" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="earlier ones are intact.*step-0000006"):
        train(tmp_path / "b")
    monkeypatch.undo()
    kept = sorted(p.name for p in (tmp_path / "b" / "checkpoints").iterdir())
    assert kept == ["step-0000000.pt", "step-0000003.pt"]
    train(tmp_path / "b")
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


class _Poisoned(MemoryImages):
    """Image 7 is NaN when it is read."""

    def _read(self, indices):
        x = super()._read(indices)
        x[indices == 7] = torch.nan
        return x


def test_nan_stops_before_the_parameters_change(tmp_path):
    trainer = Trainer(config(tmp_path, holdout=0), _Poisoned(images()))
    message = r"the loss is NaN or Inf \(image 7 at σ = 0\.\d+\);"
    with pytest.raises(FloatingPointError, match=message) as e:
        trainer.run(progress=False)
    assert f"step {trainer.state.step + 1}:" in str(e.value)
    assert trainer.state.step < 5 and all(
        torch.isfinite(p).all() for p in trainer.model.parameters()
    )
    assert not [n for n, s in trainer.optimizer.state.items() if s["step"] != trainer.state.step]


# --- runs that are cut short ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["gradient", "optimizer", "evaluate", "callback"])
def test_interrupted_and_resumed_gives_the_same_bits(tmp_path, monkeypatch, caplog, number, where):
    train(tmp_path / "a")
    trainer = Trainer(config(tmp_path / "b"), images())
    calls = []

    def interrupting(real):
        def call(*args, **kwargs):
            calls.append(where)
            if len(calls) == (1 if where == "evaluate" else 5):
                signal.raise_signal(number)
            return real(*args, **kwargs)

        return call

    owner, name = {
        "gradient": (Step, "gradient"),
        "optimizer": (trainer.optimizer, "step"),
        "evaluate": (trainer, "_evaluate"),
        "callback": (None, ""),
    }[where]
    if owner:
        monkeypatch.setattr(owner, name, interrupting(getattr(owner, name)))
    handler = signal.getsignal(number)
    kind = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(kind):
        trainer.run(interrupting(len) if where == "callback" else None, progress=False)
    assert signal.getsignal(number) is handler
    done = 4 if where == "gradient" else 5  # a step that changes parameters is finished
    assert trainer.state.step == done and f"after step {done};" in caplog.text
    assert sorted((tmp_path / "b" / "checkpoints").iterdir())[-1].name == f"step-000000{done}.pt"
    monkeypatch.undo()
    train(tmp_path / "b")
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    without_time = [
        [{k: v for k, v in line.items() if "second" not in k} for line in log_of(tmp_path / run)]
        for run in "ab"
    ]
    assert without_time[0] == without_time[1]


KILLED = """
    import os, signal, sys, torch
    sys.path[:0] = [{root!r}, {tests!r}]
    torch.set_num_threads(1)
    import test_trainer
    from pathlib import Path

    def life(out, moment):
        '''Train in a child process that dies at its moment-th write to disk or optimiser step.'''
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        count = 0

        def deadly(real):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return call

        os.replace, os.fsync = deadly(os.replace), deadly(os.fsync)
        Path.unlink, torch.optim.Adam.step = deadly(Path.unlink), deadly(torch.optim.Adam.step)
        test_trainer.train(Path(out), **{options})
        os._exit(0)

    assert life(sys.argv[1], 0) == 0
    ends = [life(sys.argv[2], moment) for moment in (3, 7, 16, 21, 30, 12, 27, 23, 14, 0)]
    print(ends)
    assert ends[0] == -9 and ends[-1] == 0, ends
"""


@pytest.mark.parametrize("options", [{}, at_scale()], ids=["paper", "at-scale"])
def test_killed_again_and_again_gives_the_same_bits(tmp_path, options):
    tests = str(Path(__file__).parent)
    code = textwrap.dedent(KILLED).format(root=str(ROOT), tests=tests, options=options)
    command = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("-9") >= 4  # the others had finished before their moment came
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    a, b = ([line["step"] for line in log_of(tmp_path / run)] for run in "ab")
    assert a == b
    assert not list((tmp_path / "b").rglob("*.tmp"))


DISTRIBUTED = """
    import sys
    sys.path[:0] = [{root!r}, {tests!r}]
    import pytest, torch
    torch.set_num_threads(1)
    import test_trainer
    from pathlib import Path
    out = Path(sys.argv[1])
    test_trainer.train(out / "two", backend="reference")
    with pytest.raises(ValueError, match="cannot be divided among 2"):
        test_trainer.train(out / "odd", batch=9)
    with pytest.raises(ValueError, match="lr was"):  # on both, found by one
        test_trainer.train(out / "two", backend="reference", lr=1.0)
    poisoned = test_trainer._Poisoned(test_trainer.images())
    with pytest.raises(FloatingPointError, match="image 7"):  # on both, though one has it
        test_trainer.train(out / "nan", poisoned, holdout=0)
"""


def test_two_processes_agree_with_one(tmp_path):
    one = train(tmp_path / "one", backend="reference")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(DISTRIBUTED).format(root=str(ROOT), tests=str(Path(__file__).parent))
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    two = checkpoint.load(tmp_path / "two")
    a, b = ([x["loss"] for x in log_of(tmp_path / run) if "loss" in x] for run in ("one", "two"))
    np.testing.assert_allclose(a, b, rtol=1e-4)  # float32 sums in another order, 16 steps on
    for name, p in one.named_parameters():
        # Adam turns a rounding difference in a tiny gradient into a share of lr = 3e-3
        torch.testing.assert_close(two.get_parameter(name), p, rtol=0, atol=1e-3, msg=name)


def test_the_optimiser_s_settings_are_of_the_device_it_runs_on(tmp_path):
    """An older checkpoint has Adam in several passes, which rounds otherwise."""
    train(tmp_path / "a")
    train(tmp_path / "b", max_steps=3)
    newest = sorted((tmp_path / "b" / "checkpoints").iterdir())[-1]
    state = torch.load(newest, weights_only=True)
    state["optimizer"]["param_groups"][0] |= {"fused": False, "lr": 1.0}
    torch.save(state, newest)
    train(tmp_path / "b")
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer at least 1"),
        ({"batch": 2.5}, "batch: expected an integer"),
        ({"lr": 0}, "lr: expected a number"),
        ({"lr": math.nan}, "lr: expected a number"),
        ({"sigma_min": -0.1}, "sigma_min: expected a number"),
        ({"sigma_min": 1.0}, "sigma_min: expected < sigma_max = 1"),
        ({"sigma_density": "cubic"}, "sigma_density: expected one of"),
        ({"sigma_density": "log-uniform", "sigma_min": 0.0}, "log-uniform needs sigma_min > 0"),
        ({"loss_weight": "inverse-variance"}, "inverse-variance needs sigma_min > 0"),
        ({"seed": -1}, "seed"),
        ({"keep": 0}, "keep"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"amp": "fp16"}, "amp: expected one of"),
        ({"device": "tpu"}, "device: expected auto, cpu, cuda"),
        ({"model": {"channels": (4, 8)}}, "model: expected a UNetConfig"),
        ({"compile": 1}, "compile: expected True or False"),
        ({"holdout": 3, "heldout": "pack"}, "holdout: give heldout or holdout"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig(out=tmp_path, **changes)


@pytest.mark.parametrize(
    ("x", "changes", "message"),
    [
        (images(), {"batch": 37}, r"batch: 37 images, but only 36 .*\(40, of which 4"),
        (images(), {"holdout": 40}, "holdout: expected an integer"),
        (images()[:, :1], {}, "data: the model takes 3 channel"),
        (images()[:, :, :7, :7], {}, "multiples of 2"),
        (images() * 255, {}, "divide 8-bit values by 255"),
        (images(), {"data": "pack"}, "data: give either"),
        (None, {}, "data: give either"),
        (images(), {"heldout": "/no/such/pack", "holdout": None}, "no folder /no/such/pack"),
        (images(), {"device": "cuda:99"}, "device: "),
    ],
)
def test_bad_images(tmp_path, x, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Trainer(config(tmp_path / "run", **changes), x)
    assert not (tmp_path / "run").exists()  # found before any work


def test_tensorboard_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard: the package is not installed"):
        Trainer(config(tmp_path, tensorboard=True), images())


def test_an_engine_that_cannot_serve_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="'cpu' was asked for but cannot serve"):
        network = UNetConfig(channels=(4, 6), norm="layer")
        Trainer(config(tmp_path, backend="cpu", model=network), images())


# --- the thread that draws the batches ---


def test_prefetched_is_in_order_and_raises_what_the_thread_raised():
    assert list(prefetched(lambda i: i * i, range(9))) == [i * i for i in range(9)]
    taken = prefetched(lambda i: 1 // (2 - i), range(9))
    assert next(taken) == 0 and next(taken) == 1
    with pytest.raises(ZeroDivisionError):
        next(taken)


@pytest.mark.parametrize("how", ["close", "drop"])
def test_prefetched_ends_its_thread(how):
    before = threading.active_count()
    taken = prefetched(lambda i: i, itertools.count())
    next(taken)
    if how == "close":
        taken.close()
    del taken
    assert threading.active_count() == before


def test_every_unreadable_checkpoint_is_passed_over(tmp_path, caplog):
    """The newest ones, each damaged in another way; the one that is whole goes on to the same bits."""
    train(tmp_path / "a", epochs=3)
    train(tmp_path / "b", epochs=2, keep=5)
    *_, one, two, three = sorted((tmp_path / "b" / "checkpoints").iterdir())
    three.write_bytes(three.read_bytes()[1000:])  # a negative place in the file
    two.write_bytes(torch_bytes({"format": 1, "step": -3}))
    train(tmp_path / "b", epochs=3, keep=5)
    assert all(str(path) in caplog.text for path in (two, three)) and str(one) not in caplog.text
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


def torch_bytes(value) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def test_a_newer_checkpoint_is_not_passed_over(tmp_path):
    train(tmp_path, max_steps=2)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    newest.write_bytes(torch_bytes({"format": 99}))
    with pytest.raises(ValueError, match="format 99, this fastphi reads 1"):
        train(tmp_path)


def test_the_folder_may_change_while_it_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    train(Path("run"), callback=lambda line: os.chdir(tmp_path / "elsewhere"), max_steps=4)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_the_default_dtype_is_not_the_run_s(tmp_path):
    train(tmp_path / "a")
    torch.set_default_dtype(torch.float64)
    try:
        train(tmp_path / "b", max_steps=7)
        train(tmp_path / "b")
    finally:
        torch.set_default_dtype(torch.float32)
    a, b = (checkpoint.load(tmp_path / name).state_dict() for name in "ab")
    assert all(v.dtype == torch.float32 for v in b.values())
    assert a.keys() == b.keys()


def test_a_pack_s_folder_is_no_run_s(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8))
    packed = pack(tmp_path / "x.npy", tmp_path / "pack", size=8, progress=False)
    before = sorted(p.name for p in packed.path.iterdir())
    with pytest.raises(ValueError, match="out: .*pack is a pack"):
        train(packed.path)
    assert sorted(p.name for p in packed.path.iterdir()) == before


def test_a_finished_run_that_cannot_be_written_to_is_read(tmp_path, monkeypatch):
    model = train(tmp_path, max_steps=3)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))
    monkeypatch.setattr(files, "locked", None)
    again = train(tmp_path, max_steps=3)
    assert again.training_info.steps == 3
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
