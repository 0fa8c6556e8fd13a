"""Ranks: what their launcher tells them, what they tell each other, and that one that is gone is missed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastphi.support.device import find
from fastphi.support.interrupts import RESUMABLE, Interrupts, Stopped
from fastphi.support.world import World, first_host

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1(x2)",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09],big1",
}


def environment(monkeypatch, values):
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in (
            "RANK",
            "WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        ):
            monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_srun_tells_rank_size_and_where_to_meet(monkeypatch):
    environment(monkeypatch, SRUN)
    world = World.here()
    assert world == World(rank=5, size=6, local_rank=0, local_size=1)
    host, port = world.address
    assert host == "gpu07" and 20000 <= port < 40000
    environment(monkeypatch, SRUN | {"SLURM_STEP_ID": "3"})
    assert World.here().address[1] != port  # two steps of a job at once
    environment(
        monkeypatch, SRUN | {"SLURM_NODEID": "1", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    )
    assert World.here() == World(3, 6, 1, 2)
    environment(monkeypatch, SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "77"})
    assert World.here().address == ("here", 77)


def test_one_process_of_slurm_is_no_rank(monkeypatch):
    """A batch script itself, or srun of one task."""
    environment(monkeypatch, SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert World.here() == World()
    environment(monkeypatch, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"})
    assert World.here() == World()


def test_torchrun_comes_before_srun(monkeypatch):
    """srun torchrun ...: the ranks are torchrun's."""
    mine = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    environment(monkeypatch, SRUN | mine | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert World.here() == World(1, 4, 1, 2)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            {"RANK": "4", "WORLD_SIZE": "4"},
            "RANK, WORLD_SIZE: expected 0 <= rank < size, got 4 of 4",
        ),
        (
            {"RANK": "x", "WORLD_SIZE": "4"},
            "RANK: expected a whole number from the launcher, got 'x'",
        ),
    ],
)
def test_a_launcher_that_cannot_be_believed(monkeypatch, values, match):
    environment(monkeypatch, values | {"MASTER_ADDR": "a", "MASTER_PORT": "1"})
    with pytest.raises(ValueError, match=match):
        World.here()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu[003-007,9],other", "gpu003"),
        ("rack[2,4]-gpu", "rack2-gpu"),
        ("tux-[12]", "tux-12"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_one_rank_needs_no_other():
    world = World()
    with world.job():
        assert world.gather(3) == [3] and world.first(lambda: 4) == 4
        assert [*world.deal(3)] == [0, 1, 2]
        world.check()


# --- several processes ----------------------------------------------------------------------------

RANK = """
import os, signal, sys, time
from fastphi.support import link
from fastphi.support.world import Gone, World, told
link._BEAT = 0.2  # gone after 4 seconds
world = World.here()
def say(text):
    os.write(1, f"{world.rank} {text}\\n".encode())
try:
    with world.job():
        BODY
except Exception as error:
    say(f"{type(error).__name__} {'says' if told(error) else 'knows'} {error}")
    sys.exit(75 if isinstance(error, Gone) else 2)
"""


def ranks(
    body: str, size: int, port: int, only: int | None = None, code: str = RANK
) -> list[subprocess.Popen]:
    code = code.replace("BODY", body.replace("\n", "\n        "))
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    common |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": os.pathsep.join(sys.path)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (range(size) if only is None else [only])
    ]


def ends(processes) -> tuple[list[int], list[str]]:
    out = [process.communicate(timeout=120)[0] for process in processes]
    return [p.returncode for p in processes], [line for text in out for line in text.splitlines()]


@pytest.fixture
def port() -> int:
    """One that is free now."""
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_ranks_tell_each_other(port):
    """Values larger than the store takes at once; errors; numbers dealt once each."""
    body = """
large = bytes(9 << 20)
assert [len(v) + r for v, r in world.gather((large[world.rank:], world.rank))] == [9 << 20] * 3
assert world.first(lambda: large) == large
try:
    world.first(lambda: 1 / 0)
except ZeroDivisionError:
    say("all")
dealt = world.gather([*world.deal(20)])
assert sorted(sum(dealt, [])) == [*range(20)]
with world.job():
    pass
world.agree({"seed": 3, "mine": world.rank // 2}, "ranks")
"""
    codes, lines = ends(ranks(body, 3, port))
    assert codes == [2, 2, 2]
    told = [line for line in lines if "ValueError" in line]
    assert len(told) == 3 and sum("says" in line for line in told) == 1
    assert "ranks: rank 2 has another mine than rank 0 (1; 0)" in told[0]
    assert sorted(line for line in lines if line not in told) == ["0 all", "1 all", "2 all"]


def test_an_error_of_one_rank_ends_all(port):
    body = """
if world.rank == 1:
    raise OSError(28, "No space left on device", "phi.npy")
world.gather(None)
"""
    codes, lines = ends(ranks(body, 3, port))
    assert codes == [75, 2, 75]
    assert "1 OSError says [Errno 28] No space left on device: 'phi.npy'" in lines
    for rank in (0, 2):
        assert any(line.startswith(f"{rank} Gone knows rank 1: OSError") for line in lines)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_that_is_killed_is_missed(port, victim):
    """Whatever the others do: wait for it, or compute."""
    body = """
world.gather(None)
say(f"process {os.getpid()}")
if world.rank == VICTIM:
    os.kill(os.getpid(), signal.SIGKILL)
if world.rank == (VICTIM + 1) % 3:
    time.sleep(100)
world.gather(None)
"""
    began = time.monotonic()
    codes, lines = ends(ranks(body.replace("VICTIM", str(victim)), 3, port))
    assert time.monotonic() - began < 90  # not the 100 seconds of the one that computes
    assert codes == [-9 if rank == victim else RESUMABLE for rank in range(3)]
    waits = next(line for line in lines if line.startswith(f"{(victim + 2) % 3} Gone"))
    if victim == 0:  # which kept the store
        assert "rank 0 (on localhost), which kept the store, is gone" in waits
    else:
        process = next(line.split()[-1] for line in lines if line.startswith(f"{victim} process"))
        assert f"rank {victim} (" in waits and f"process {process}) is gone" in waits


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_not_waited_for(port, rank):
    code = RANK.replace("world.job()", "world.job(patience=5)")
    codes, lines = ends(ranks("world.gather(None)", 2, port, only=rank, code=code))
    late = "rank 1 has not come" if rank == 0 else f"rank 0 has not come to localhost, port {port},"
    assert codes == [RESUMABLE] and lines == [f"{rank} Gone says {late} in 5 seconds"]


def test_a_port_that_is_taken_is_named(port):
    import socket

    with socket.socket() as taken:
        taken.bind(("localhost", port))
        taken.listen()
        codes, lines = ends(ranks("pass", 2, port, only=0))
    assert codes == [2] and lines[0].startswith(f"0 ValueError says MASTER_PORT: {port} cannot be")


def test_who_keeps_the_store_leaves_last(port):
    """The first rank is done at once; the others read what it told late."""
    body = """
if world.rank:
    link.time.sleep = lambda s, sleep=time.sleep: sleep(min(10 * s, 2))
"""
    assert ends(ranks(body, 3, port))[0] == [0, 0, 0]


def test_a_stopped_job_goes_on(port):
    """All ranks stopped for longer than one may be silent: nobody is missed."""
    processes = ranks("world.gather(None)\nsay('go')\ntime.sleep(4)\nworld.gather(None)", 2, port)
    for process in processes:
        assert process.stdout.readline().endswith("go\n")
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    for process in processes:
        process.send_signal(signal.SIGCONT)
    assert ends(processes)[0] == [0, 0]


# --- signals, devices -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signals_end_a_run_with_a_code_of_their_own(name):
    with pytest.raises(Stopped, match=f"stopped by {name}") as ended, Interrupts():
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(1)
    assert ended.value.code == RESUMABLE == 75


def test_a_signal_waits_for_what_must_be_whole():
    done = False
    with pytest.raises(Stopped), Interrupts() as interrupts, interrupts.hold():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        done = True
    assert done


def test_ranks_are_asked_first():
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        interrupts.ask()
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.1)
        assert interrupts.asked == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGINT)  # impatient
        time.sleep(1)


def test_find_device():
    assert find("cpu").type == "cpu" and find("auto").type in ("cpu", "cuda")
    with pytest.raises(
        ValueError, match="device: 'warp' cannot be used .*expected auto, cpu, cuda"
    ):
        find("warp")
