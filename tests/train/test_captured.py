"""Training on a GPU: steps as one graph have the bits of the same launches one by one, ask nothing else of
the device, and leave what a run on a CPU leaves, however they end.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_case
import numpy as np
import pytest
import torch

from fastphi import checkpoint, data
from fastphi.config import UNetConfig
from fastphi.support.world import World
from fastphi.train import TrainConfig, Trainer, average, psnr
from fastphi.train.captured import CapturedStep
from fastphi.train.step import Step
from fastphi.unet import UNet

pytestmark = [*gpu_case.marks(), pytest.mark.usefixtures("exact_products")]

NETWORK = UNetConfig(channels=(16, 32), enc_layers=1, mid_layers=1, dec_layers=2)
SIZE = 16
KINDS = ("kernel", "emulated", "memset", "graph launch", "host function")
AT_SCALE = {"ema": "power", "ema_sigma_rel": 0.1, "clip": 100.0}
ONE_BY_ONE = "training steps run launch by launch"


def pixels(n: int) -> np.ndarray:
    """(n, SIZE, SIZE, 3) uint8: blocks of uniform colour."""
    shades = np.random.default_rng(1).integers(0, 256, (n, 4, 4, 3), np.uint8)
    return shades.repeat(SIZE // 4, 1).repeat(SIZE // 4, 2)


def images(n: int = 40) -> torch.Tensor:
    return torch.from_numpy(pixels(n)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture
def packed(tmp_path) -> data.Images:
    np.save(tmp_path / "pixels.npy", pixels(40))
    return data.pack(tmp_path / "pixels.npy", tmp_path / "pack", size=SIZE, progress=False)


def config(out: Path, **changes: Any) -> TrainConfig:
    settings = {"batch": 8, "epochs": 2, "holdout": 4, "checkpoint_every": 3, "evaluate_every": 5}
    settings |= {"model": NETWORK, "lr": 3e-3, "lr_halve_every": 1, "device": "cuda"}
    return TrainConfig(out=out, **(settings | changes))


def train(out: Path, x: Any = None, callback: Any = None, **changes: Any) -> UNet:
    x = images() if x is None else x
    return Trainer(config(out, **changes), x).run(callback, progress=False)


def log_of(out: Path) -> list[dict]:
    """Without what depends on time."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def bits(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.fixture
def one_by_one(monkeypatch):
    """one_by_one(): from then on nothing is captured."""
    why = "the test asks for it"
    return lambda: monkeypatch.setattr(CapturedStep, "_why_not", lambda self: why)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch": 3},
        {"loss_weight": "inverse-variance", "sigma_min": 0.1, "amp": "off"},
        AT_SCALE,
    ],
    ids=["plain", "micro", "weighted", "at-scale"],
)
def test_the_bits_of_launches_one_by_one(tmp_path, caplog, one_by_one, changes):
    """Eight steps, the rate halved after four; and cut in two, the one half captured and the other not."""
    train(tmp_path / "a", **changes)
    train(tmp_path / "b", max_steps=3, **changes)
    assert ONE_BY_ONE not in caplog.text
    one_by_one()
    train(tmp_path / "b", **changes)
    assert caplog.text.count(ONE_BY_ONE) == 1 and "the test asks for it" in caplog.text
    train(tmp_path / "c", **changes)
    assert bits(tmp_path / "a") == bits(tmp_path / "b") == bits(tmp_path / "c")
    log = log_of(tmp_path / "a")
    assert log == log_of(tmp_path / "c")
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["lr"] for line in steps] == [3e-3] * 4 + [1.5e-3] * 4
    assert len({line["loss"] for line in steps}) == 8
    assert [line for line in log_of(tmp_path / "b") if "loss" in line] == steps


@pytest.mark.parametrize(
    "ema", [{"ema_sigma_rel": 0.1}, {"ema_halflife": 16}], ids=["power", "exp"]
)
def test_the_average_and_the_bound_are_those_of_a_cpu(tmp_path, ema):
    """Each average follows the weights that its own device makes; the gradient is bounded there."""
    kind = "power" if "ema_sigma_rel" in ema else "exponential"
    settings = config(tmp_path, clip=100.0, warmup=3, amp="off", ema=kind, **ema)
    trainer = Trainer(settings, images())
    expected = [p.detach().cpu().double() for p in trainer.model.parameters()]
    norms = []

    def look(line: dict) -> None:
        if "loss" in line:
            w = average.weight(settings, line["step"])
            for mean, p in zip(expected, trainer.model.parameters(), strict=True):
                mean.lerp_(p.detach().cpu().double(), w)
            grads = [p.grad.cpu() for p in trainer.model.parameters()]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))

    model = trainer.run(look, progress=False)
    assert len(norms) == 8 and model is trainer.state.product
    for mean, p in zip(expected, model.parameters(), strict=True):
        # float32 rounds once a step, of numbers below 2
        torch.testing.assert_close(p.detach().cpu().double(), mean, rtol=0, atol=8 * 2**-23)
    assert max(norms) == pytest.approx(100, rel=1e-5)  # what Adam leaves is what it took


@pytest.mark.parametrize("source", ["pack", "memory"])
def test_images_and_noise_are_those_of_the_cpu(tmp_path, packed, source):
    """The same losses and gradient, to the bit, from images decoded and noise made there."""
    x = packed if source == "pack" else images()
    trainer = Trainer(config(tmp_path / "run"), x)
    found = []
    for kind in (Step, CapturedStep):
        step = kind(trainer.state, trainer.model, trainer._share, World(), True)
        batch = step.draw(5)
        if kind is Step:
            found.append(step._backward([batch]))
        else:
            step.reason = "the launches are called below"
            step.gradient(batch)
            step._launches()
            found.append(step.told[3:].float())
        found.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert found[0].isfinite().all() and found[1].abs().max() > 0


@gpu_case.counted
@pytest.mark.parametrize(
    ("batch", "changes"),
    [(1, {}), (8, {}), (64, {}), (7, AT_SCALE)],
    ids=["1", "8", "64", "at-scale"],
)
def test_what_a_step_asks_of_the_device(tmp_path, packed, batch, changes):
    """One graph and at most four launches or copies of its own, no wait, nothing pageable."""
    x = packed if batch < 40 else images(80)
    trainer = Trainer(config(tmp_path / "run", batch=batch, **changes), x)
    step = trainer._step()
    for k in range(6):
        upload = step.draw(k)
        if k == 3:  # steady by now
            gpu_case.counts()
        step.gradient(upload)
        step.update(upload)
        trainer.state.step += 1
        list(step.losses(wait=False))
    counted = gpu_case.counts()
    asked = {what: n / 3 for what, n in counted.items() if what in KINDS or what[:5] == "copy "}
    assert asked == {"graph launch": 1, "copy pinned2d": 2, "copy d2pinned": 1}
    assert not [w for w in counted if w in ("synchronize", "malloc", "host alloc", "stream")]
    step.close()


class Poisoned(data.MemoryImages):
    """One image is NaN when it is read."""

    bad = -1

    def _read(self, indices):
        x = super()._read(indices)
        x[indices == self.bad] = torch.nan
        return x


@pytest.mark.parametrize("changes", [{}, AT_SCALE], ids=["plain", "at-scale"])
def test_nan_is_reported_where_it_arose(tmp_path, changes):
    """Though the step after it, whose images are good, has been launched by then."""
    poisoned = Poisoned(images())
    trainer = Trainer(config(tmp_path / "a", batch=4, **changes), poisoned)
    poisoned.bad = int(trainer._share(4).indices[2])  # in the fifth step
    message = rf"step 5: the loss is NaN or Inf \(image {poisoned.bad} at σ = 0\.\d+\); .* step 4,"
    with pytest.raises(FloatingPointError, match=message):
        trainer.run(progress=False)
    assert trainer.state.step == 4
    assert [line["step"] for line in log_of(tmp_path / "a")] == [1, 2, 3, 4]
    assert all(int(s["step"]) == 4 for s in trainer.optimizer.state.values())
    good = train(tmp_path / "b", batch=4, max_steps=4, **changes)
    for p, q in zip(trainer.state.product.parameters(), good.parameters(), strict=True):
        assert torch.equal(p, q)
    assert sorted((tmp_path / "a" / "checkpoints").iterdir())[-1].name == "step-0000003.pt"
    train(
        tmp_path / "b", batch=4, **changes
    )  # the folder is whole: with a good image it goes on from there
    poisoned.bad = -1
    train(tmp_path / "a", batch=4, **changes)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


@pytest.mark.parametrize("where", ["gradient", "update"])
def test_interrupted_and_resumed_gives_the_same_bits(tmp_path, monkeypatch, caplog, where):
    train(tmp_path / "a")
    real, calls = getattr(CapturedStep, where), []

    def interrupting(*args):
        calls.append(where)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(CapturedStep, where, interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b")
    done = 4 if where == "gradient" else 5
    assert f"after step {done};" in caplog.text
    assert sorted((tmp_path / "b" / "checkpoints").iterdir())[-1].name == f"step-000000{done}.pt"
    assert [x["step"] for x in log_of(tmp_path / "b") if "loss" in x] == list(range(1, done + 1))
    monkeypatch.undo()
    train(tmp_path / "b")
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def reference_of(model: UNet) -> UNet:
    plain = UNet(model.config, backend="reference")
    plain.load_state_dict({k: v.cpu() for k, v in model.state_dict().items()})
    return plain


def test_answers_are_of_the_weights_as_they_are(tmp_path):
    """φ and PSNR in the middle of a run, by an engine that keeps a form of the weights, and after it."""
    x, seen = images(4), []
    trainer = Trainer(config(tmp_path / "run", amp="off", lr=1e-2), images())

    def look(line: dict) -> None:
        model, plain = trainer.model, reference_of(trainer.model)
        with torch.no_grad():
            want = plain.phi(x)
            seen.append(float((model.phi(x.cuda()).cpu() - want).norm() / want.norm()))
        if "psnr" in line:
            held = trainer.split.held
            found = psnr(plain, images(), [float(s) for s in line["psnr"]], indices=held)
            np.testing.assert_allclose([*line["psnr"].values()], [*found.values()], atol=1e-3)

    model = trainer.run(look, progress=False)
    look({})
    assert len(seen) == 8 + 2 + 1  # losses, evaluations, the end
    # float32 in another order; a step of this rate changes φ by some percent
    assert max(seen) <= 1e-4, seen
    saved = checkpoint.load(tmp_path / "run")
    for p, q in zip(model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(p.cpu(), q)


def test_a_run_goes_on_on_another_device(tmp_path, caplog):
    """Its settings of the optimiser are then that device's."""
    for first, then in (("cuda", "cpu"), ("cpu", "cuda")):
        out = tmp_path / first
        train(out, device=first, max_steps=3)
        state = torch.load(out / "checkpoints" / "step-0000003.pt", weights_only=True)
        (group,) = state["optimizer"]["param_groups"]
        assert type(group["lr"]) is float and not group["capturable"]
        trainer = Trainer(config(out, device=then), images())
        trainer.run(progress=False)
        assert all(int(s["step"]) == 8 for s in trainer.optimizer.state.values())
    assert "resuming elsewhere" in caplog.text and ONE_BY_ONE not in caplog.text
    a, b = ([x["loss"] for x in log_of(tmp_path / d) if "loss" in x] for d in ("cuda", "cpu"))
    np.testing.assert_allclose(a, b, rtol=0.02)  # bf16 for three steps, and for five


def test_a_capture_that_fails(tmp_path, monkeypatch, caplog):
    """The run goes on launch by launch, to the same bits, and says so once; another can capture."""
    train(tmp_path / "a")
    real = CapturedStep._launches

    def waits(self):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()
        real(self)

    monkeypatch.setattr(CapturedStep, "_launches", waits)
    train(tmp_path / "b")
    assert (
        caplog.text.count(ONE_BY_ONE) == 1
        and "launch by launch, not as a CUDA graph: the capture failed" in caplog.text
    )
    if gpu_case.PRETENDED:
        import emulate

        assert "of a stream that captures" in emulate.complaints()[0]
    monkeypatch.undo()
    caplog.clear()
    train(tmp_path / "c")
    assert ONE_BY_ONE not in caplog.text
    assert bits(tmp_path / "a") == bits(tmp_path / "b") == bits(tmp_path / "c")


def test_why_steps_are_not_captured(tmp_path):
    trainer = Trainer(config(tmp_path), images())
    assert trainer._step().reason is None

    def reason(trainer: Trainer, world: World) -> str | None:
        return CapturedStep(trainer.state, trainer.model, trainer._share, world, True).reason

    assert reason(trainer, World(0, 2)) == "2 processes exchange their gradients"
    hook = next(trainer.model.parameters()).register_hook(lambda g: None)
    assert "has a hook" in trainer._step().reason
    hook.remove()
    hook = trainer.model.mid.register_forward_hook(lambda *args: None)
    assert trainer._step().reason == "mid has a hook"
    hook.remove()
    assert trainer._step().reason is None
    compiled = Trainer(config(tmp_path, compile=True), images())
    assert reason(compiled, World()) == "torch.compile runs the network"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_gpu_than_the_current_one(tmp_path):
    for index in (0, 1):
        train(tmp_path / str(index), device=f"cuda:{index}", max_steps=5)
    assert bits(tmp_path / "0") == bits(tmp_path / "1")
    assert log_of(tmp_path / "0") == log_of(tmp_path / "1")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path):
    """A rank each, as torchrun starts them, with the gradients exchanged."""
    here = Path(__file__).with_name("ddp_on_gpus.py")
    found = []
    for name, ranks in (("one", 1), ("two", 2)):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, f"--nproc-per-node={ranks}", str(here), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(tmp_path / name / "weights.pt", weights_only=True))
    for name, value in found[0].items():
        # Adam turns a rounding difference in a tiny gradient into a share of lr = 1e-3, 6 steps on
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-3, msg=name)
