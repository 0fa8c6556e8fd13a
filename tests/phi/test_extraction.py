from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastphi
from fastphi import checkpoint, noise, reference
from fastphi.data import MemoryImages
from fastphi.phi import AUTHORS_SIGMAS, PhiStore, extract
from fastphi.phi import chunk as phi_chunk
from fastphi.phi import store as phi_store
from fastphi.phi.store import done_file, phi_file
from fastphi.support import files

N = 7


@pytest.fixture
def images():
    return torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(make_model):
    return make_model(backend="reference")


def arrays(store: PhiStore) -> dict:
    return {(s, b): np.array(store.array(s, b)) for s in store.sigmas for b in store.blocks}


def same(a: PhiStore, b: PhiStore) -> None:
    x, y = arrays(a), arrays(b)
    assert x.keys() == y.keys()
    for key in x:
        np.testing.assert_array_equal(x[key], y[key], err_msg=str(key))


def test_mean_over_draws_of_the_reference(model, images):
    """Every block, against the plain loop of the reference in float64 on the same noise."""
    store = extract(model, images, sigmas=[0.5, 0.0], draws=3, blocks="all", seed=5)
    assert store.sigmas == (0.0, 0.5) and store.blocks == model.config.block_names
    oracle = model.double()
    for i in range(N):
        for sigma, draws in ((0.0, 1), (0.5, 3)):

            def z(d, i=i, sigma=sigma):
                stream, draw = phi_chunk.counters(sigma, d)
                return noise.normal(5, [i], stream, draw, (3, 8, 8)).double()

            with torch.no_grad():
                expected = reference.extract_phi(
                    oracle.block_means, images[i : i + 1].double(), z, sigma, draws
                )
            for block in store.blocks:
                torch.testing.assert_close(
                    torch.from_numpy(np.array(store.array(sigma, block)[i])),
                    expected[block][0].float(),
                    rtol=2e-5,  # float32 against float64 through ten layers
                    atol=2e-6,
                )


def test_batch_order_and_company_change_no_bit(make_model, images, backend):
    model = make_model(backend=backend)
    whole = extract(model, images, sigmas=[0.3], draws=2, blocks="all")
    same(whole, extract(model, images, sigmas=[0.3], draws=2, blocks="all", batch=3))
    picked = [5, 0, 6]
    few = extract(model, images, sigmas=[0.3], draws=2, indices=picked, batch=2)
    np.testing.assert_array_equal(few.array(0.3), whole.array(0.3)[picked])
    np.testing.assert_array_equal(few.indices, picked)
    more = extract(model, images, sigmas=[0.1, 0.3, 0.7], draws=2)
    np.testing.assert_array_equal(more.array(0.3), whole.array(0.3))


def test_noise_of_levels_and_draws_is_independent(model):
    """At levels one float32 step apart the draws share nothing; so they do within a level."""
    near = float(np.nextafter(np.float32(0.5), np.float32(1)))
    levels = [0.0, 1e-30, 0.5, near, 1.0, 2.0, 3.0, 1e6]
    counters = {phi_chunk.counters(s, d) for s in levels for d in (0, 1, phi_chunk.MAX_DRAWS)}
    assert len(counters) == 3 * len(levels)
    assert all(0 <= d < 1 << 32 and 0 <= s < 1 << 32 for s, d in counters)
    z = [
        noise.normal(0, [0], *phi_chunk.counters(s, d), (3, 64, 64)).flatten()
        for s in (0.5, near)
        for d in (0, 1)
    ]
    correlation = torch.corrcoef(torch.stack(z)) - torch.eye(4)
    assert correlation.abs().max() < 5 / len(z[0]) ** 0.5


def test_store_on_disk(model, images, tmp_path):
    out = tmp_path / "phi"
    store = extract(model, images, out, sigmas=[0.5, 0.0], draws=2, blocks=["mid", "enc1"])
    same(store, extract(model, images, sigmas=[0.0, 0.5], draws=2, blocks=["enc1", "mid"]))
    opened = PhiStore(out)
    assert opened.complete and not opened.missing() and len(opened) == N
    assert opened.blocks == ("enc1", "mid") and opened.draws == 2
    plain = np.load(out / phi_file(0.5, "mid"), mmap_mode="r")
    np.testing.assert_array_equal(plain, opened.array(0.5))
    assert plain.dtype == np.float32 and plain.shape == (N, 8)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"] == checkpoint.fingerprint(model)
    assert manifest["data"] == MemoryImages(images).sha256
    assert sorted(p.name for p in out.iterdir() if p.name != ".lock") == sorted(
        ["manifest.json", done_file(0.0), done_file(0.5)]
        + [phi_file(s, b) for s in (0.0, 0.5) for b in ("enc1", "mid")]
    )


def test_phi_of_rows(model, images):
    store = extract(model, images, sigmas=[0.5], draws=1)
    rows = store.phi(0.5, [4, 1])
    assert rows.dtype == torch.float32
    np.testing.assert_array_equal(rows.numpy(), store.array(0.5)[[4, 1]])
    rows.zero_()  # a copy: the store is as it was
    assert store.phi(0.5).abs().sum() > 0
    for sigma, indices, match in (
        (0.4, None, "0.4 is not stored; the store has 0.5"),
        (0.5, [N], r"\[0, 7\)"),
        (0.5, [], "non-empty"),
        (0.5, [0.5], "whole"),
    ):
        with pytest.raises(ValueError, match=match):
            store.phi(sigma, indices)
    with pytest.raises(ValueError, match="block: expected one of mid"):
        store.array(0.5, "enc1")


class Stops(MemoryImages):
    """Images that fail at the given number of reads."""

    def __init__(self, x, reads):
        super().__init__(x)
        self.left = reads

    def _read(self, indices):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super()._read(indices)


@pytest.mark.parametrize("reads", [0, 1, 5])
def test_interrupted_and_resumed(model, images, tmp_path, reads):
    options = {"sigmas": [0.2, 0.6], "draws": 2, "batch": 2}  # four chunks a level
    with pytest.raises(KeyboardInterrupt):
        extract(model, Stops(images, reads), tmp_path, **options)
    partial = PhiStore(tmp_path)
    done = {0.2: min(2 * reads, N), 0.6: max(0, 2 * (reads - 4))}
    assert {s: N - len(rows) for s, rows in partial.missing().items()} == {
        s: n for s, n in done.items() if n < N
    }
    with pytest.raises(ValueError, match=r"rows at sigma 0\.6 are missing"):
        partial.array(0.6)
    with pytest.raises(ValueError, match=r"row 6 at sigma 0\.6 is missing"):
        partial.phi(0.6, [6])
    resumed = extract(model, Stops(images, 8 - reads), tmp_path, **options)  # only what is missing
    same(resumed, extract(model, images, **options))


def test_finished_store_reads_no_image(model, images, tmp_path):
    extract(model, images, tmp_path, sigmas=[0.2], draws=1)
    extract(model, Stops(images, 0), tmp_path, sigmas=[0.2], draws=1)


def test_one_draw_without_noise(model, images, monkeypatch):
    calls = []
    true = model.block_means
    monkeypatch.setattr(model, "block_means", lambda *a, **k: calls.append(1) or true(*a, **k))
    store = extract(model, images, sigmas=[0.0], draws=20)
    assert len(calls) == 1
    with torch.no_grad():
        np.testing.assert_array_equal(store.array(0.0), model.phi(images).numpy())


def test_leftovers_of_a_killed_writer_go(model, images, tmp_path):
    """An array is made under another name first: a kill at that moment leaves it, however large."""
    (tmp_path / f".{phi_file(0.2, 'mid')}.x1y2.tmp").write_bytes(b"half")
    (tmp_path / phi_file(0.2, "mid")).write_bytes(b"made before the manifest was")
    store = extract(model, images, tmp_path, sigmas=[0.2], draws=1)
    assert store.complete and not list(tmp_path.glob(".*.tmp"))


def test_levels_may_be_added(model, images, tmp_path):
    extract(model, images, tmp_path, sigmas=[0.5], draws=1)
    store = extract(model, Stops(images, 1), tmp_path, sigmas=[0.1], draws=1)
    assert store.sigmas == (0.1, 0.5) and store.complete
    same(store, extract(model, images, sigmas=[0.1, 0.5], draws=1))


def test_another_store_is_refused_naming_what_differs(make_model, model, images, tmp_path):
    extract(model, images, tmp_path, sigmas=[0.5], draws=2)
    other = make_model(seed=1, backend="reference")
    for word, arguments, options in (
        ("draws .there 2, now 3", (model, images), {"draws": 3}),
        ("seed", (model, images), {"draws": 2, "seed": 1}),
        ("model", (other, images), {"draws": 2}),
        ("data", (model, images.flip(0)), {"draws": 2}),
        ("blocks .there mid of", (model, images), {"draws": 2, "blocks": "enc1"}),
        ("rows .there 7, now 2.*indices", (model, images), {"draws": 2, "indices": [0, 1]}),
    ):
        with pytest.raises(ValueError, match=f"is of another .*{word}"):
            extract(*arguments, tmp_path, sigmas=[0.5], **options)
    assert PhiStore(tmp_path).complete


def test_folder_with_other_files_is_left_alone(model, images, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files.*thesis"):
        extract(model, images, tmp_path, sigmas=[0.5], draws=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]


def test_one_writer(model, images, tmp_path):
    held = files.claimed(tmp_path, "test", range(3, 4), lambda: None, mark="manifest.json")
    with held, pytest.raises(ValueError, match="another process is writing rows 3 to 3"):
        extract(model, images, tmp_path, sigmas=[0.5], draws=1)


def test_damaged_stores_are_named(model, images, tmp_path):
    extract(model, images, tmp_path, sigmas=[0.5], draws=1)
    array = tmp_path / phi_file(0.5, "mid")
    content = array.read_bytes()
    array.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=f"{array.name} is not a whole .npy .truncated"):
        PhiStore(tmp_path)
    array.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{array.name} is not a whole .npy"):
        PhiStore(tmp_path)
    np.save(array, np.zeros((N, 9), np.float32))
    with pytest.raises(ValueError, match=r"\(7, 9\), expected float32 \(7, 8\)"):
        PhiStore(tmp_path)
    array.unlink()
    with pytest.raises(ValueError, match=f"{array.name} is missing"):
        extract(model, images, tmp_path, sigmas=[0.5], draws=1)
    array.write_bytes(content)
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text()
    for broken, match in (
        (text[:50], "not valid JSON"),
        ("[]", "expected an object, got list"),
        (text.replace('"version": 1', '"version": 2'), "version 2"),
        (text.replace('"rows"', '"row"'), "lacks rows"),
    ):
        manifest.write_text(broken)
        with pytest.raises(ValueError, match=match):
            PhiStore(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        PhiStore(tmp_path / "nowhere")


def test_nan_is_reported_with_image_and_sigma(model, images, tmp_path, monkeypatch):
    true = model.block_means

    def broken(x, until=None):
        means = true(x, until)
        means["mid"][1, 3] = torch.nan
        return means

    monkeypatch.setattr(model, "block_means", broken)
    with pytest.raises(FloatingPointError, match=r"block mid: image 5, sigma 0\.5"):
        extract(model, images, tmp_path, sigmas=[0.5], draws=2, indices=[2, 5])
    assert len(PhiStore(tmp_path).missing()[0.5]) == 2  # nothing of the chunk counts as done


def test_default_levels_stop_at_the_training_range(model, images, caplog):
    with caplog.at_level(logging.WARNING):
        store = extract(model, images[:1], draws=1)
    assert store.sigmas == AUTHORS_SIGMAS[:15] and store.sigmas[-1] == 1.0
    assert [r.message for r in caplog.records if "left out" in r.message] == [
        "sigmas: 5 levels above the training range's 1 are left out"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert extract(model, images[:1], sigmas=[1.5, 2, 0], draws=1).sigmas == (0.0, 1.5, 2.0)
    assert sum("1.5, 2 outside" in r.message for r in caplog.records) == 1


def test_authors_levels():
    assert len(AUTHORS_SIGMAS) == 20 and list(AUTHORS_SIGMAS) == sorted(set(AUTHORS_SIGMAS))
    assert AUTHORS_SIGMAS[0] == 0 and AUTHORS_SIGMAS[-1] == 3 and 10 / 255 in AUTHORS_SIGMAS


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"sigmas": []}, ValueError, "at least one"),
        ({"sigmas": [0.5, 0.5]}, ValueError, "distinct"),
        ({"sigmas": [0.5, 0.5 + 1e-12]}, ValueError, "differ in float32"),
        ({"sigmas": [-0.1]}, ValueError, "sigmas"),
        ({"sigmas": [float("nan")]}, ValueError, "sigmas"),
        ({"sigmas": [1e39]}, ValueError, "sigmas"),
        ({"sigmas": 0.5}, TypeError, "list of noise levels"),
        ({"draws": 0}, ValueError, "draws"),
        ({"draws": 1.5}, TypeError, "draws"),
        ({"blocks": "dec1"}, ValueError, "blocks"),
        ({"blocks": []}, ValueError, "blocks"),
        ({"seed": -1}, ValueError, "seed"),
        ({"batch": 0}, ValueError, "batch"),
        ({"workers": 0}, ValueError, "workers"),
        ({"indices": [7]}, ValueError, r"\[0, 7\)"),
        ({"indices": [1, 1]}, ValueError, "distinct"),
        ({"indices": []}, ValueError, "non-empty"),
        ({"images": torch.rand(2, 1, 8, 8)}, ValueError, "1 channel.* takes 3"),
        ({"images": torch.rand(2, 3, 8, 10)}, ValueError, "multiples of 4"),
        ({"images": torch.rand(2, 3, 8, 8) * 255}, ValueError, r"\[0, 1\]"),
        ({"images": torch.rand(3, 8, 8)}, ValueError, "N, C, H, W"),
        ({"images": 3}, TypeError, "images"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model"),
    ],
)
def test_refuses(model, images, tmp_path, options, error, match):
    arguments = {"model": model, "images": images, "sigmas": [0.5], "draws": 1} | options
    with pytest.raises(error, match=match):
        extract(arguments.pop("model"), arguments.pop("images"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_leaves_model_inputs_and_random_state_alone(model, images):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept, state = images.clone(), torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # not the model's own dtype: not followed
        within = extract(model, images, sigmas=[0.5], draws=1)
    same(within, extract(model, images, sigmas=[0.5], draws=1))
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(images, kept) and torch.equal(torch.get_rng_state(), state)


_SCRIPT = """
import os, sys, time, torch
from fastphi import checkpoint, phi
from fastphi.data import MemoryImages

class Slow(MemoryImages):
    def _read(self, indices):
        os.write(1, b"chunk\\n")  # whole: print writes its line's end apart where nothing is buffered
        time.sleep(0.05)  # so that whoever reads this can kill before the last one
        return super()._read(indices)

if __name__ == "__main__":
    folder, workers = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    model = checkpoint.load(folder + "/model.safetensors", backend=sys.argv[3])
    images = Slow(torch.load(folder + "/images.pt"))
    phi.extract(model, images, folder + "/store", sigmas=[0.2, 0.6], draws=3, batch=1,
                workers=workers)
"""


@pytest.fixture
def folder(model, images, tmp_path):
    (tmp_path / "script.py").write_text(_SCRIPT)
    checkpoint.save(model, tmp_path / "model.safetensors")
    torch.save(images, tmp_path / "images.pt")
    return tmp_path


def start(folder: Path, workers: int, backend: str, script: str = "script.py") -> subprocess.Popen:
    source = str(Path(fastphi.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, str(folder / script), str(folder), str(workers), backend],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def threads(backend: str) -> int:
    """How many the rest of a killed process's work may be done by: any number with an engine, its own
    one on the PyTorch path, whose library shares out a sum differently among more."""
    return 1 if backend == "reference" else 2


@pytest.mark.parametrize("chunk", [1, 9])
def test_killed_at_any_moment_and_resumed(make_model, images, folder, backend, chunk):
    with start(folder, 1, backend) as process:
        for _ in range(chunk):
            assert process.stdout.readline() == "chunk\n"
        process.kill()
    out, levels = folder / "store", (0.2, 0.6)
    written = sum(int(np.count_nonzero(np.load(out / done_file(s)))) for s in levels)
    assert chunk - 4 <= written < 2 * N  # three are read ahead
    model, options = make_model(backend=backend), {"sigmas": levels, "draws": 3, "batch": 1}
    torch.set_num_threads(threads(backend))
    rest = Stops(images, 2 * N - written)  # what was written is kept
    same(extract(model, rest, out, **options), extract(model, images, **options))


@pytest.mark.skipif(not Path("/proc/sys/kernel/random/boot_id").exists(), reason="needs Linux")
@pytest.mark.parametrize("stopped", [False, True])
def test_rows_on_their_way_to_the_disk(model, images, tmp_path, monkeypatch, stopped):
    """A writer that is killed leaves them with the system; a machine that stops loses them."""
    options = {"sigmas": [0.2], "draws": 2, "batch": 2}
    whole = extract(model, images, **options)

    def killed(writer, *_):
        for file in (*writer._phi.values(), writer._done):
            file.close()

    monkeypatch.setattr(phi_store.Writer, "__exit__", killed)
    for name in ("_SECONDS", "_BYTES"):
        monkeypatch.setattr(phi_store, name, 1 << 40)
    with pytest.raises(KeyboardInterrupt):
        extract(model, Stops(images, 2), tmp_path, **options)
    monkeypatch.undo()
    assert np.load(tmp_path / done_file(0.2)).tolist() == [2, 2, 2, 2, 0, 0, 0]
    opened = PhiStore(tmp_path)
    assert opened.lacking(0.2) == N and len(opened.missing()[0.2]) == N
    with pytest.raises(ValueError, match=r"row 0 at sigma 0\.2 is missing"):
        opened.phi(0.2, [0])
    if stopped:
        (tmp_path / ".written-on-0-7").write_text("another time")
    same(extract(model, Stops(images, 4 if stopped else 2), tmp_path, **options), whole)
    assert not list(tmp_path.glob(".written-on*"))


@pytest.mark.parametrize("subset", [None, [6, 0, 3, 5, 2]])
def test_shards_in_any_order(model, images, tmp_path, subset):
    """Into one store, at other levels too; a plain call goes on from what they left."""
    rows = N if subset is None else len(subset)
    options = {"draws": 2, "batch": 2, "indices": subset}
    whole = extract(model, images, sigmas=[0.2, 0.6], **options)
    for i in (2, 0):
        part = range(i * rows // 3, (i + 1) * rows // 3)
        left = extract(model, images, tmp_path, sigmas=[0.2], shard=(i, 3), **options)
        written = [r for r in range(rows) if r not in left.missing()[0.2]]
        assert set(part) <= set(written)
    assert not left.complete and len(written) == rows - len(range(rows // 3, 2 * rows // 3))
    extract(model, Stops(images, 0), tmp_path, sigmas=[0.2], shard=(2, 3), **options)  # is done
    extract(model, images, tmp_path, sigmas=[0.6], shard=(1, 2), **options)
    same(extract(model, images, tmp_path, sigmas=[0.2, 0.6], **options), whole)
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith((".rows", ".written"))]


def test_shards_at_once(make_model, images, folder, backend):
    """Processes that begin together; rows that one writes are refused to others by name, other rows not."""
    script = (folder / "script.py").read_text()
    for i in range(3):
        mine = script.replace("workers=", f"shard=({i}, 3), workers=")
        (folder / f"script{i}.py").write_text(mine)
    out = folder / "store"
    started = [start(folder, 1, backend, f"script{i}.py") for i in range(3)]
    assert started[1].stdout.readline() == "chunk\n"
    model = make_model(backend=backend)
    options = {"sigmas": [0.2, 0.6], "draws": 3, "batch": 1}
    torch.set_num_threads(threads(backend))
    with pytest.raises(ValueError, match="another process is writing rows"):
        extract(model, images, out, **options)
    for process in started:
        process.communicate()
        assert process.returncode == 0
    opened = PhiStore(out)
    assert opened.complete
    same(opened, extract(model, images, **options))


@pytest.mark.parametrize("killed", [0, 2])
def test_a_killed_shard_leaves_its_rows_to_whoever_comes(
    make_model, images, folder, backend, killed
):
    script = (folder / "script.py").read_text()
    (folder / "script.py").write_text(script.replace("workers=", f"shard=({killed}, 3), workers="))
    with start(folder, 1, backend) as process:
        assert process.stdout.readline() == "chunk\n"
        process.kill()
    model, options = make_model(backend=backend), {"sigmas": [0.2, 0.6], "draws": 3, "batch": 1}
    torch.set_num_threads(threads(backend))
    out = folder / "store"
    extract(model, images, out, shard=(1, 2), **options)
    same(extract(model, images, out, **options), extract(model, images, **options))
    assert not [p.name for p in out.iterdir() if p.name.startswith((".rows", ".written"))]


@pytest.mark.parametrize(
    ("shard", "match"),
    [
        ((3, 3), "0 <= i < n"),
        ((-1, 2), "0 <= i < n"),
        ((0, 8), "8 shards of 7"),
        (2, "which of how many"),
    ],
)
def test_bad_shards(model, images, tmp_path, shard, match):
    with pytest.raises(ValueError, match=match):
        extract(model, images, tmp_path, shard=shard)
    with pytest.raises(ValueError, match="give out"):
        extract(model, images, shard=(0, 2))
    assert not list(tmp_path.iterdir())


def test_chunks_are_listed_as_they_are_asked_for(monkeypatch):
    """Of what is missing, whatever is done already, at most `batch` rows each and all but the last full."""
    monkeypatch.setattr(phi_store, "_WINDOW", 64)
    rng = np.random.default_rng()
    for batch in (1, 7, 64, 100, 1000):
        done = (rng.random(777) < 0.4).astype(np.uint8)
        manifest = {"rows": 777, "sigmas": [0.5, 1.0]}
        arrays = {done_file(0.5): done, done_file(1.0): np.zeros(777, np.uint8)}
        store = PhiStore.in_memory(manifest, arrays)
        for sigma, wanted in ((0.5, np.flatnonzero(done == 0)), (1.0, np.arange(777))):
            found = [rows for s, rows in store.chunks([0.5, 1.0], batch) if s == sigma]
            np.testing.assert_array_equal(np.concatenate(found), wanted)
            assert all(len(rows) == batch for rows in found[:-1]) and store.lacking(sigma) == len(
                wanted
            )
    assert (
        list(
            PhiStore.in_memory(manifest, {done_file(0.5): np.ones(777, np.uint8)}).chunks([0.5], 3)
        )
        == []
    )


def test_worker_processes_give_the_same_bits_and_end_with_a_killed_parent(
    make_model, images, folder, backend
):
    with start(folder, 2, backend) as process:
        assert process.stdout.readline() == "chunk\n"  # printed by a worker
        process.kill()
        group = process.pid
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(group, signal.SIGKILL)
        pytest.fail("workers outlived their parent")
    model, options = make_model(backend=backend), {"sigmas": [0.2, 0.6], "draws": 3}
    torch.set_num_threads(2)  # one in each worker
    store = extract(model, images, folder / "store", workers=2, batch=2, **options)
    torch.set_num_threads(threads(backend))
    same(store, extract(model, images, **options))


def test_a_full_disk_is_an_error_before_any_work_and_the_store_goes_on(
    model, images, tmp_path, monkeypatch
):
    out, real = tmp_path / "phi", os.posix_fallocate

    def full(handle, offset, size):
        if phi_file(0.5, "mid") in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle, offset, size)

    extract(model, images, out, sigmas=[0.1], draws=2)
    before = np.array(PhiStore(out).array(0.1))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"No space left.*{phi_file(0.5, 'mid')}"):
        extract(model, images, out, sigmas=[0.1, 0.5], draws=2)
    assert PhiStore(out).sigmas == (0.1,) and not list(out.glob(".*.tmp"))
    np.testing.assert_array_equal(PhiStore(out).array(0.1), before)
    monkeypatch.undo()
    same(
        extract(model, images, out, sigmas=[0.1, 0.5], draws=2),
        extract(model, images, sigmas=[0.1, 0.5], draws=2),
    )


def test_a_script_without_its_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import fastphi, torch\n"
        "x = torch.rand(4, 3, 16, 16)\n"
        "m = fastphi.UNet(fastphi.UNetConfig(channels=(4, 8)))\n"
        "fastphi.extract(m, x, 'phi', sigmas=[0.1], draws=1, batch=2, workers=2)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and 'does the script lack `if __name__ == "__main__":`?' in last


def test_what_differs_is_said_where_it_differs(model, images, tmp_path):
    extract(model, images, tmp_path, sigmas=[0.5], draws=1)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"mid": 8', '"mid": 9'))
    with pytest.raises(ValueError, match=r"\(7, 8\), expected float32 \(7, 9\)"):
        PhiStore(tmp_path)
    for name in tmp_path.glob("phi_*.npy"):
        np.save(name, np.zeros((N, 9), np.float32))
    with pytest.raises(ValueError, match="blocks .there mid of 9, now mid of 8"):
        extract(model, images, tmp_path, sigmas=[0.5], draws=1)
