"""The compiled CPU engine among other processes and threads: Ctrl-C, DataLoader workers, several ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastphi import UNet, UNetConfig, match_phi
from fastphi.engine import cpu, ops

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))

SMALL = UNetConfig(channels=(16, 32, 48))


def network(config: UNetConfig = SMALL) -> UNet:
    torch.manual_seed(0)
    return UNet(config, backend="cpu").eval().requires_grad_(False)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on POSIX")
def test_ctrl_c_ends_a_match():
    """A match of minutes ends within moments, and leaves the image as it was."""
    # which a parent may have had ignored: a shell does for what it starts in the background
    before_test = signal.signal(signal.SIGINT, signal.default_int_handler)
    model, x = network(), torch.rand(4, 3, 64, 64)
    before, target = x.clone(), model.phi(torch.rand(4, 3, 64, 64))
    ctrl_c = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    ctrl_c.start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            match_phi(model, x, target, max_iter=20_000, tolerance=0.0)
    finally:
        signal.signal(signal.SIGINT, before_test)
    assert time.monotonic() - start < 30
    assert torch.equal(x, before)
    # and the engine serves on
    assert match_phi(model, x, target, max_iter=2).losses.isfinite().all()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on POSIX")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_match_is_one_call_and_goes_on_where_a_handler_lets_it(dtype, monkeypatch):
    """C++ comes back for each Ctrl-C, Python's handler decides, and no bit tells."""
    model, x = network(), torch.rand(2, 3, 64, 64)
    if (said := cpu.remark(SMALL, dtype)) is not None:
        pytest.skip(said)
    target = model.phi(torch.rand(2, 3, 64, 64))
    updates = 1500  # a second or two
    name = "match_steps_bf16" if dtype == torch.bfloat16 else "match_steps"
    run, reached, pressed = getattr(torch.ops.fastphi, name), [], []

    def counted(*arguments):
        reached.append(run(*arguments))
        return reached[-1]

    monkeypatch.setattr(torch.ops.fastphi, name, counted)
    want = match_phi(model, x, target, max_iter=updates, tolerance=0.0, dtype=dtype)
    assert reached == [updates + 1]
    reached.clear()
    before_test = signal.signal(signal.SIGINT, lambda *_: pressed.append(len(reached)))

    def press() -> None:
        for seen in range(2):  # the second once the first was handled: two at once are one
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            while len(pressed) == seen:
                time.sleep(0.001)

    presses = threading.Thread(target=press)
    try:
        presses.start()
        got = match_phi(model, x, target, max_iter=updates, tolerance=0.0, dtype=dtype)
        presses.join()
        os.kill(os.getpid(), signal.SIGINT)  # Python's own handler is back
    finally:
        signal.signal(signal.SIGINT, before_test)
    assert len(pressed) == 3 and 1 < len(reached) <= 3 and reached[-1] == updates + 1
    assert reached == sorted(reached) and reached[0] < updates
    assert torch.equal(got.x, want.x) and torch.equal(got.losses, want.losses)


def test_the_lock_is_released():
    """Other Python threads run while C++ matches."""
    model, x = network(), torch.rand(8, 3, 64, 64)
    target = model.phi(torch.rand(8, 3, 64, 64))
    running, times = True, []

    def tick() -> None:
        while running:
            times.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    match_phi(model, x, target, max_iter=9, tolerance=0.0)  # one call into C++
    end = time.monotonic()
    running = False
    thread.join()
    inside = [t for t in times if start < t < end]
    assert len(inside) > 3, f"{len(inside)} turns in {end - start:.3f} s"


class Means(Dataset):
    """φ computed in the worker, as in a pipeline that filters images by it."""

    def __init__(self, model: UNet, images: torch.Tensor) -> None:
        self.model, self.images = model, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        with torch.no_grad():
            return self.model.phi(self.images[i : i + 1])[0], torch.get_num_threads()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
def test_in_forked_workers():
    """After this process has used its threads: in the workers, one each, and the same bits."""
    model, x = network(), torch.rand(6, 3, 64, 64)
    want = model.phi(x)
    loader = DataLoader(
        Means(model, x), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    found, threads = zip(*loader, strict=True)
    assert torch.equal(torch.cat(found), want)
    assert torch.cat(threads).tolist() == [1] * 6


RANK = """
import os, torch
from fastphi import UNet, UNetConfig
model = UNet(UNetConfig(channels=(16, 32, 48)), backend="cpu").eval()
before = len(os.listdir("/proc/self/task"))
with torch.no_grad():
    model.phi(torch.rand(8, 3, 64, 64))
started = len(os.listdir("/proc/self/task")) - before
# One write, whole: print makes two under PYTHONUNBUFFERED, and the ranks share the pipe.
os.write(1, f"{os.environ['RANK']} {torch.get_num_threads()} {started}\\n".encode())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
def test_ranks_share_the_cores(tmp_path):
    """torchrun gives each rank one thread, and the engine starts no more."""
    (tmp_path / "rank.py").write_text(RANK)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(tmp_path / "rank.py")],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == ["0 1 0", "1 1 0"]  # rank, threads, threads started
