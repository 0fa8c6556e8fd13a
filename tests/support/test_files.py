"""Outputs: whole or absent, through links, into pipes and devices; one writer, whatever the locks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import fastphi
from fastphi import targets
from fastphi.support import files


def put(path: Path, text: str) -> None:
    with files.atomic_write(path) as temporary:
        temporary.write_text(text)


def test_a_link_stays_one(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "real")
    for text in ("first", "second"):  # of a file that is not there yet, and of one that is
        put(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "real").read_text() == text
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["far", "link", "real"]


def test_a_pipe_is_written_into(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    put(pipe, "through")
    reader.join(10)
    assert got == ["through"] and pipe.is_fifo()


def test_a_device_is_not_replaced(tmp_path):
    put(Path("/dev/null"), "nothing")
    assert Path("/dev/null").is_char_device()


def test_own_output_is_not_begun_anew(tmp_path):
    code = """
from fastphi.support import files
print("before")
with files.atomic_write("/dev/stdout") as path: path.write_text("between\\n")
print("after")
"""
    with open(tmp_path / "out", "w") as f:
        subprocess.run([sys.executable, "-c", code], stdout=f, check=True)
    assert (tmp_path / "out").read_text() == "before\nbetween\nafter\n"


def test_a_block_that_fails_leaves_nothing(tmp_path):
    put(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), files.atomic_write(tmp_path / "a") as path:
        path.write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# --- one writer ------------------------------------------------------------------------------------


def test_one_writer_of_a_folder_and_of_a_file(tmp_path):
    for hold, path in ((files.locked, tmp_path / "folder"), (files.owned, tmp_path / "file")):
        with hold(path, "out"), pytest.raises(ValueError, match="out: another .* is writing"):
            with hold(path, "out"):
                pass
        with hold(path, "out"):  # given back
            pass
    assert not (tmp_path / ".file.lock").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, number):
    fcntl = pytest.importorskip("fcntl")

    def none(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with files.locked(tmp_path, "out"), pytest.raises(ValueError, match="another process"):
        with files.locked(tmp_path, "out"):
            pass
    with files.locked(tmp_path, "out"):
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    code = """
import errno, fcntl, os, signal, sys
def none(*arguments): raise OSError(errno.ENOLCK, "none")
fcntl.flock = none
from fastphi.support import files
with files.locked(sys.argv[1], "out"): os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert killed.returncode == -9, killed.stderr

    def none(*arguments):
        raise OSError(errno.ENOLCK, "none")

    monkeypatch.setattr(fcntl, "flock", none)
    with files.locked(tmp_path, "out"):
        pass


def test_why_a_folder_cannot_be_held(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out: .*file is a file; give a folder"):
        with files.locked(tmp_path / "file", "out"):
            pass

    def refused(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "somewhere")

    monkeypatch.setattr(files.filelock, "FileLock", refused)
    with pytest.raises(OSError, match="Read-only file system"), files.locked(tmp_path, "out"):
        pass


def test_another_kind_of_folder_is_left_alone(tmp_path):
    for mark, kind in (("manifest.json", "pack"), ("study.json", "study"), ("checkpoints", "run")):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / mark).touch()
        with pytest.raises(ValueError, match=rf"out: .* is a .*{kind}"):
            with files.locked(folder, "out", mark="another"):
                pass
        assert [p.name for p in folder.iterdir()] == [mark]
        with files.locked(folder, "out", mark=mark):
            pass


# --- what users do with it -------------------------------------------------------------------------

LOOP = {"size": 16, "form": "schedule", "sigmas": (0.5, 0.1, 3)}


def test_two_runs_into_one_file(make_model, tmp_path):
    model, path = make_model(), tmp_path / "result.npz"
    refused = []

    def second(info) -> None:
        with pytest.raises(ValueError, match="save: another run is writing"):
            fastphi.sample(model, 2, save=path, resume=False, **LOOP)
        refused.append(info.step)

    first = fastphi.sample(model, 2, save=path, callback=second, **LOOP)
    assert refused == [1, 2, 3]
    assert torch.equal(fastphi.Reconstruction.load(path).images, first.images)
    assert [p.name for p in tmp_path.iterdir()] == ["result.npz"]


def test_a_result_into_a_device(make_model):
    model = make_model()
    for _ in range(2):  # nothing is gone on from
        result = fastphi.sample(model, 2, save="/dev/null", save_every=1, **LOOP)
        assert result.finished


def test_the_folder_may_change_while_a_job_runs(make_model, tmp_path, monkeypatch):
    model, x = make_model(), torch.rand(4, 3, 16, 16)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    fastphi.sample(
        model,
        2,
        save="result.npz",
        callback=lambda info: os.chdir(tmp_path / "elsewhere"),
        **LOOP,
    )
    os.chdir(tmp_path)
    store = fastphi.extract(model, x, "phi", sigmas=[0.1], draws=1)
    os.chdir("elsewhere")
    assert len(store.phi(0.1)) == 4 and (tmp_path / "result.npz").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_finished_work_is_read_where_nothing_can_be_written(make_model, tmp_path, monkeypatch):
    model, x = make_model(), torch.rand(4, 3, 16, 16)
    made = targets.fixed(np.zeros(8, np.float32))
    options = {"sigmas": [0.1], "draws": 1}
    before = fastphi.extract(model, x, tmp_path / "phi", **options)
    result = fastphi.reconstruct(model, made, save=tmp_path / "r.npz", **LOOP)

    def refused(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "somewhere")

    monkeypatch.setattr(files, "_held", refused)
    monkeypatch.setattr(files.tempfile, "mkstemp", refused)
    again = fastphi.extract(model, x, tmp_path / "phi", **options)
    assert torch.equal(again.phi(0.1), before.phi(0.1))
    again = fastphi.reconstruct(model, made, save=tmp_path / "r.npz", **LOOP)
    assert torch.equal(again.images, result.images)
    with pytest.raises(OSError, match="Read-only"):  # what is not finished says why it cannot go on
        fastphi.extract(model, x, tmp_path / "phi", sigmas=[0.1, 0.2], draws=1)
