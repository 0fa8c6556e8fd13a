"""Averaged weights, a clipped gradient, a rate that warms up: values in float64, bits after a resume; and
those of several machines.
"""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from train_case import ROOT, at_scale, bits, config, images, log_of, train

from fastphi import checkpoint
from fastphi.checkpoint import fingerprint
from fastphi.support.world import World
from fastphi.train import TrainConfig, Trainer, average, psnr
from fastphi.train.step import Step


def flat(model: torch.nn.Module) -> np.ndarray:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()]).numpy()


# --- values ---


def shares(ema: str, steps: int, batch: int = 8) -> np.ndarray:
    """Of θ_0 … θ_steps in the average after the last step, from the papers' definitions."""
    if ema == "power":  # β_t = (1 − 1/t)^(γ+1): θ_t's is ∫ of (γ+1) τ^γ from (t−1)/T to t/T
        (gamma,) = [r.real for r in np.roots(cubic(0.15)) if abs(r.imag) < 1e-9 and r.real > 0]
        return np.diff((np.arange(-1, steps + 1).clip(0) / steps) ** (gamma + 1))
    out = np.eye(1, steps + 1)[0]
    for t in range(1, steps + 1):
        beta = 0.5 ** (batch / min(40, t * batch / 20))
        out *= beta
        out[t] += 1 - beta
    return out


def cubic(sigma_rel: float) -> list[float]:
    """(γ+2)² (γ+3) − (γ+1)/σ_rel², its coefficients (Karras et al. 2024)."""
    return [1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]


@pytest.mark.parametrize("ema", ["power", "exponential"])
def test_the_average_is_the_definition_s(tmp_path, ema):
    """Of every step's weights, in float64; evaluated, saved and returned."""
    trainer = Trainer(config(tmp_path, max_steps=12, **at_scale(ema)), images())
    weights = [flat(trainer.model)]

    def look(line: dict) -> None:
        if "loss" in line:
            weights.append(flat(trainer.model))
            found = flat(trainer.state.product)
            expected = shares(ema, line["step"]) @ np.stack(weights)
            # float32 rounds once a step, of numbers below 2
            np.testing.assert_allclose(found, expected, rtol=0, atol=12 * 2**-23)
        else:
            levels = [float(s) for s in line["psnr"]]
            held = psnr(trainer.state.product, images(), levels, indices=trainer.split.held)
            np.testing.assert_allclose([*line["psnr"].values()], [*held.values()], atol=1e-4)

    model = trainer.run(look, progress=False)
    assert model is trainer.state.product and model is not trainer.model
    assert np.abs(flat(model) - flat(trainer.model)).max() > 1e-3  # steps of some 3e-3
    assert fingerprint(checkpoint.load(tmp_path)) == fingerprint(model)
    assert checkpoint.load(tmp_path).training_info.steps == 12
    state = torch.load(tmp_path / "checkpoints" / "step-0000012.pt", weights_only=True)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(state["model"][name], value)
    again = train(tmp_path, max_steps=12, **at_scale(ema))  # a finished run
    assert fingerprint(again) == fingerprint(model)


@pytest.mark.parametrize("sigma_rel", [1e-3, 0.05, 0.1, 0.25, 12**-0.5])
def test_the_power_s_width_is_what_was_asked(tmp_path, sigma_rel):
    """The standard deviation of when the averaged weights were made, over the length of the run."""
    gamma = average.gamma(sigma_rel)
    assert abs(np.polyval(cubic(sigma_rel), gamma)) <= 1e-12 * sigma_rel**-3
    settings = TrainConfig(out=tmp_path, ema="power", ema_sigma_rel=sigma_rel)
    n = round(100 / sigma_rel)
    w = np.array([average.weight(settings, t) for t in range(1, n + 1)])
    share = w * np.append(np.cumprod(1 - w[:0:-1])[::-1], 1)
    at = (np.arange(n) + 0.5) / n
    width = math.sqrt(share @ (at - share @ at) ** 2)
    assert share.sum() == pytest.approx(1, abs=1e-9)
    assert width == pytest.approx(sigma_rel, rel=1e-3)  # steps are a hundredth of it


@pytest.mark.parametrize("clip", [None, 1000.0])
def test_steps_are_adam_s_of_the_clipped_gradient(tmp_path, clip):
    """In float64, at a rate that warms up and is halved."""
    settings = config(tmp_path, clip=clip, warmup=5, lr_halve_every=1)
    trainer = Trainer(settings, images())
    step, parameters = trainer._step(), [*trainer.model.parameters()]
    m = v = np.zeros_like(flat(trainer.model))
    lengths = []
    for k in range(1, 9):
        before = flat(trainer.model)
        batch = step.draw(k - 1)
        step.gradient(batch)
        g = torch.cat([p.grad.double().flatten() for p in parameters]).numpy()
        step.update(batch)
        trainer.state.step += 1
        lengths.append(np.linalg.norm(g))
        if clip is not None:
            g = g * min(1, clip / lengths[-1])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        lr = 3e-3 * min(1, k / 5) * 0.5 ** ((k - 1) // 4)
        move = lr * (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
        # float32 moments: 1e-6 of a step; float32 weights below 2: half of 2^-23
        np.testing.assert_allclose(flat(trainer.model), before - move, rtol=0, atol=2e-7)
    assert min(lengths) < 1000 < max(lengths)


def test_a_bound_that_is_never_reached_changes_nothing(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", clip=1e9)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


def test_the_average_leaves_the_training_alone(tmp_path):
    losses = []
    for name, ema in (("a", {}), ("b", {"ema": "power", "ema_sigma_rel": 0.1})):
        train(tmp_path / name, **ema)
        losses.append([line["loss"] for line in log_of(tmp_path / name) if "loss" in line])
    assert losses[0] == losses[1]


# --- runs that are cut short ---


@pytest.mark.parametrize("ema", ["power", "exponential"])
def test_a_run_goes_on_to_the_same_bits(tmp_path, ema):
    """From within the warm-up, by a run that was to be shorter, and past it."""
    options = at_scale(ema)
    train(tmp_path / "a", **options)
    for steps in (2, 3, 11, None):
        train(tmp_path / "b", max_steps=steps, **options)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


def edit(out: Path, change) -> Path:
    """The newest checkpoint, changed."""
    newest = sorted((out / "checkpoints").iterdir())[-1]
    state = torch.load(newest, weights_only=True)
    change(state)
    torch.save(state, newest)
    return newest


def test_a_checkpoint_of_before_these_options(tmp_path):
    """It goes on where they are off, to the same bits, and is of other settings where they are not."""
    train(tmp_path / "a")
    train(tmp_path / "b", max_steps=3)

    def age(state: dict) -> None:
        identity = json.loads(state["identity"])
        for name in ("warmup", "clip", "ema", "ema_halflife", "ema_sigma_rel"):
            del identity[name]
        state["identity"] = json.dumps(identity)

    edit(tmp_path / "b", age)
    with pytest.raises(
        ValueError, match=r"warmup was 0, is 5; clip was None, is 1000\.0; ema was none"
    ):
        train(tmp_path / "b", **at_scale())
    train(tmp_path / "b")
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


def test_a_checkpoint_without_its_average_is_passed_over(tmp_path, caplog):
    train(tmp_path / "a", **at_scale())
    train(tmp_path / "b", max_steps=6, **at_scale())
    newest = edit(tmp_path / "b", lambda state: state.pop("average"))
    train(tmp_path / "b", **at_scale())
    assert f"{newest}" in caplog.text and "lacks average" in caplog.text
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


# --- several machines ---

RANK = """
    import sys
    sys.path[:0] = [{root!r}, {tests!r}]
    import json, torch
    from pathlib import Path
    torch.set_num_threads(1)
    import train_case
    from fastphi.checkpoint import fingerprint
    from fastphi.support.world import World
    here, out, options = World.here(), Path(sys.argv[1]), train_case.at_scale()
    options |= dict(batch=9, epochs=2, backend="reference")
    for steps in sys.argv[2:]:
        model = train_case.train(out, max_steps=int(steps), **options)
    place = [here.rank, here.local_rank, here.local_size]
    (out / f"rank{{here.rank}}").write_text(json.dumps([fingerprint(model), place]))
"""


def launchers(script: Path, each: list[int], *arguments: object) -> list[subprocess.Popen]:
    """One per node, as on as many machines, of `each` ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(port), "--nnodes", str(len(each))]
    rest = [str(script), *map(str, arguments)]
    return [
        subprocess.Popen(
            [*command, "--node-rank", str(node), "--nproc-per-node", str(n), *rest],
            stderr=subprocess.PIPE,
            text=True,
        )
        for node, n in enumerate(each)
    ]


def test_two_machines_have_the_bits_of_one(tmp_path):
    """Of as many ranks, with every option, after a resume too. (Of two alone any sum has one order.)"""
    script = tmp_path / "rank.py"
    text = RANK.format(root=str(ROOT), tests=str(Path(__file__).parent))
    script.write_text(textwrap.dedent(text))
    started = launchers(script, [3], tmp_path / "one", 8)
    started += launchers(script, [2, 1], tmp_path / "two", 3, 8)
    options = at_scale() | {"batch": 9, "epochs": 2, "backend": "reference"}
    alone = train(tmp_path / "alone", max_steps=8, **options)
    for launcher in started:
        error = launcher.communicate(timeout=120)[1]
        assert launcher.returncode == 0, error[-3000:]
    ends = {
        job: [json.loads((tmp_path / job / f"rank{k}").read_text()) for k in range(3)]
        for job in ("one", "two")
    }
    assert [place for _, place in ends["one"]] == [[0, 0, 3], [1, 1, 3], [2, 2, 3]]
    assert [place for _, place in ends["two"]] == [[0, 0, 2], [1, 1, 2], [2, 0, 1]]
    assert len({found for job in ends.values() for found, _ in job}) == 1
    assert bits(tmp_path / "one") == bits(tmp_path / "two")
    # Adam turns a rounding difference in a tiny gradient into a share of lr = 3e-3
    np.testing.assert_allclose(flat(checkpoint.load(tmp_path / "two")), flat(alone), atol=1e-3)


def test_ranks_clip_by_the_one_gradient_that_they_share(tmp_path):
    """The norm of each is summed over all, so that the same number divides everywhere."""
    trainer = Trainer(config(tmp_path, clip=2.0), images())
    step = Step(trainer.state, trainer.model, trainer._share, World(1, 4), False)
    excess = step._excess(torch.tensor([0.0, 4 * 6.0, 0.0], dtype=torch.float64))
    assert float(excess) == 3 and excess.dtype == torch.float32
    assert float(step._excess(torch.tensor([0.0, 4 * 1.5, 0.0], dtype=torch.float64))) == 1


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 0}, r"clip: expected a number in \(0, inf\], got 0"),
        ({"clip": -1.0}, "clip: expected a number .* got -1"),
        ({"clip": math.nan}, "clip: expected a number .* got nan"),
        ({"clip": math.inf}, "clip: expected a number .* got inf"),
        ({"clip": "1"}, "clip: expected a number, got str"),
        ({"warmup": -1}, "warmup: expected an integer at least 0, got -1"),
        ({"warmup": 1.5}, "warmup: expected an integer, got float"),
        ({"ema": "mean"}, "ema: expected one of exponential, none, power; got 'mean'"),
        (
            {"ema": "power"},
            r"ema_sigma_rel: with ema power expected a number \(0.1, say\); got None",
        ),
        ({"ema": "exponential"}, r"ema_halflife: with ema exponential expected .*; got None"),
        (
            {"ema_halflife": 9},
            "ema_halflife: with ema none expected none, it is exponential's; got 9",
        ),
        (
            {"ema": "exponential", "ema_halflife": 9, "ema_sigma_rel": 0.1},
            "ema_sigma_rel: with ema exponential expected none, it is power's; got 0.1",
        ),
        ({"ema": "exponential", "ema_halflife": 0}, "ema_halflife: expected an integer at least 1"),
        ({"ema": "power", "ema_sigma_rel": 0.3}, r"ema_sigma_rel: expected .*0\.288675\], got 0.3"),
        ({"ema": "power", "ema_sigma_rel": 0}, "ema_sigma_rel: expected a number .* got 0"),
        ({"ema": "power", "ema_sigma_rel": math.nan}, "ema_sigma_rel: expected .* got nan"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig(out=tmp_path, **changes)
