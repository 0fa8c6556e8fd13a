"""Packing, reading and reading ahead: every kind of source, every way to be interrupted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from images_case import SIZE, encoded, lines, pixels, quiet_pack, reasons, save
from PIL import Image, ImageFile

import fastphi
from fastphi.data import MemoryImages, PackedImages, open_images, shards
from fastphi.data.images import FORMAT, VERSION
from fastphi.support import files


@pytest.fixture
def folder(tmp_path):
    """Three classes, one of them nested, in no sorted order, 14 images."""
    for i, name in enumerate(("b/x", "b/deep/er/y", "a/z", "c/w")):
        for k in range(3):
            save(tmp_path / "in" / f"{name}{k}.png", pixels(10 * i + k))
    save(tmp_path / "in" / "loose.png", pixels(90))
    save(tmp_path / "in" / "c" / "UPPER.PNG", pixels(91))
    save(tmp_path / "in" / ".hidden" / "h.png", pixels(92))
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    return tmp_path / "in"


def test_folder(folder, tmp_path):
    packed = quiet_pack(folder, tmp_path / "out")
    items = lines(tmp_path / "out" / "items.jsonl")
    names = [item["name"] for item in items]
    assert names == sorted(names) and len(names) == len(packed) == 14
    assert packed.class_names == ["a", "b", "c"]
    expected = [-1 if n == "loose.png" else "abc".index(n[0]) for n in names]
    assert packed.labels.tolist() == [item["label"] for item in items] == expected
    for i, name in enumerate(names):
        np.testing.assert_array_equal(packed.images[i], np.asarray(Image.open(folder / name)))
    plain = np.load(tmp_path / "out" / "images.npy", mmap_mode="r")
    assert plain.dtype == np.uint8 and plain.shape == (14, SIZE, SIZE, 3)
    np.testing.assert_allclose(packed.mean, plain.mean((0, 1, 2)) / 255, rtol=1e-12)
    assert packed.sha256 == files.sha256(tmp_path / "out" / "images.npy")
    assert not (tmp_path / "out" / ".parts").exists()
    packed.verify()


def test_flat_folder_has_no_labels(tmp_path):
    save(tmp_path / "in" / "1.png", pixels(1))
    packed = quiet_pack(tmp_path / "in", tmp_path / "out")
    assert packed.labels is None and packed.class_names is None
    assert not (tmp_path / "out" / "labels.npy").exists()


def test_linked_folders_and_loops(tmp_path):
    save(tmp_path / "real" / "1.png", pixels(1))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "class").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "real" / "dangling.png").symlink_to(tmp_path / "nowhere")
    assert len(quiet_pack(tmp_path / "in", tmp_path / "out")) == 1


def one(tmp_path, name, save_to, **options):
    """The packed pixels of a single image file."""
    path = tmp_path / "in" / name
    path.parent.mkdir()
    save_to(path)
    return np.array(quiet_pack(tmp_path / "in", tmp_path / "out", **options).images[0])


def test_jpeg_and_webp(tmp_path):
    smooth = np.asarray(Image.fromarray(pixels(1, 4, 4)).resize((SIZE, SIZE)))
    save(tmp_path / "in" / "a.jpg", smooth, quality=95)
    save(tmp_path / "in" / "b.webp", smooth, lossless=True)
    images = quiet_pack(tmp_path / "in", tmp_path / "out").images
    expected = np.asarray(Image.open(tmp_path / "in" / "a.jpg"))
    np.testing.assert_array_equal(images[0], expected)
    np.testing.assert_array_equal(images[1], smooth)


def test_centre_crop_then_area_mean(tmp_path):
    wide = pixels(1, 2 * SIZE, 2 * SIZE + 10)
    image = one(tmp_path, "a.png", lambda p: save_array(p, wide))
    square = wide[:, 5:-5].astype(float).reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3))
    assert np.abs(image - square).max() <= 1  # two passes, each rounded to 8 bits


def save_array(path, array, **options):
    Image.fromarray(array).save(path, **options)


def test_grey_becomes_colour_and_back(tmp_path):
    grey, colour = pixels(1, channels=1), pixels(2)
    save(tmp_path / "in" / "a.png", grey)
    save(tmp_path / "in" / "b.png", colour)
    rgb = quiet_pack(tmp_path / "in", tmp_path / "rgb").images
    luma = quiet_pack(tmp_path / "in", tmp_path / "luma", color=False).images
    np.testing.assert_array_equal(rgb[0], np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(luma[0, ..., 0], grey)
    assert np.abs(luma[1, ..., 0] - colour @ [0.299, 0.587, 0.114]).max() <= 1


def test_palette(tmp_path):
    image = Image.fromarray(pixels(1)).quantize(16)
    packed = one(tmp_path, "a.png", image.save)
    np.testing.assert_array_equal(packed, np.asarray(image.convert("RGB")))


def test_alpha_is_composed_over_white(tmp_path):
    rgba = pixels(1, channels=4)
    packed = one(tmp_path, "a.png", lambda p: save_array(p, rgba))
    alpha = rgba[..., 3:] / 255
    assert np.abs(packed - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_transparent_palette_entry_is_white(tmp_path):
    index = np.zeros((SIZE, SIZE), np.uint8)
    index[3:] = 1
    image = Image.fromarray(index)
    image.putpalette([200, 0, 0, 0, 0, 200])
    packed = one(tmp_path, "a.png", lambda p: image.save(p, transparency=0))
    assert (packed[:3] == 255).all() and (packed[3:] == [0, 0, 200]).all()


def test_cmyk(tmp_path):
    flat = Image.new("CMYK", (SIZE, SIZE), (255, 0, 0, 0))
    packed = one(tmp_path, "a.jpg", lambda p: flat.save(p, quality=100))
    assert np.abs(packed.astype(int) - [0, 255, 255]).max() <= 3  # JPEG's own loss


def test_sixteen_bit_grey(tmp_path):
    deep = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint16)
    packed = one(tmp_path, "a.png", lambda p: save_array(p, deep), color=False)
    assert np.abs(packed[..., 0] - deep / 257).max() <= 0.5 + 1e-6


def test_exif_orientation(tmp_path):
    array = pixels(1, SIZE, SIZE)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    packed = one(tmp_path, "a.png", lambda p: save_array(p, array, exif=exif))
    np.testing.assert_array_equal(packed, np.rot90(array, -1))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (SIZE, SIZE), c) for c in ("red", "blue")]
    packed = one(
        tmp_path, "a.gif", lambda p: frames[0].save(p, save_all=True, append_images=frames[1:])
    )
    assert (packed == [255, 0, 0]).all()


def test_skipped_images_are_listed(tmp_path, monkeypatch):
    source = tmp_path / "in"
    jpeg = encoded(pixels(1, 64, 64), format="JPEG")
    png = encoded(pixels(2, 64, 64), format="PNG")
    save(source / "a.png", pixels(3))
    save(source / "b_same.bmp", pixels(3))
    save(source / "c_small.png", pixels(4, SIZE, SIZE - 1))
    (source / "d_noise.jpg").write_bytes(np.random.default_rng(0).bytes(500))
    (source / "e_empty.png").write_bytes(b"")
    (source / "f_cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (source / "g_cut.png").write_bytes(png[: len(png) // 2])
    (source / "h_broken.png").write_bytes(png[:60] + b"junk" * 20 + png[140:])
    save_array(source / "i_float.tif", np.ones((SIZE, SIZE), np.float32))
    save(source / "j_good.png", pixels(5))
    monkeypatch.setattr(
        ImageFile, "LOAD_TRUNCATED_IMAGES", True
    )  # a user's setting changes nothing
    packed = quiet_pack(source, tmp_path / "out")
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    assert [i["name"] for i in lines(tmp_path / "out" / "items.jsonl")] == ["a.png", "j_good.png"]
    found = reasons(tmp_path / "out")
    assert found["b_same.bmp"] == "duplicate of a.png"
    assert found["c_small.png"] == f"too small: {SIZE - 1}x{SIZE}"
    assert found["d_noise.jpg"] == found["e_empty.png"] == "unreadable: not an image"
    assert found["f_cut.jpg"].startswith("truncated: ")
    assert found["g_cut.png"].startswith("truncated: ")
    assert found["h_broken.png"].startswith("unreadable: ")
    assert found["i_float.tif"].startswith("unreadable: ")
    counts = {"unreadable": 4, "truncated": 2, "too small": 1, "duplicate": 1}
    assert packed.manifest["skipped"] == counts


def test_allow_upscale(tmp_path):
    save(tmp_path / "in" / "a.png", pixels(1, 4, 6))
    packed = quiet_pack(tmp_path / "in", tmp_path / "out", allow_upscale=True)
    assert packed.images.shape == (1, SIZE, SIZE, 3)


@pytest.mark.parametrize("shape", [(5, SIZE, SIZE), (5, SIZE, SIZE, 1), (5, SIZE, SIZE, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_npy(tmp_path, shape, dtype):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    np.save(tmp_path / "a.npy", array if dtype == np.uint8 else array / dtype(255))
    packed = quiet_pack(tmp_path / "a.npy", tmp_path / "out", color=shape[3:] == (3,))
    np.testing.assert_array_equal(packed.images, array.reshape(*shape[:3], -1))
    assert packed.labels is None


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz(tmp_path, write):
    array, labels = np.stack([pixels(i) for i in range(4)]), np.array([1, 0, -1, 1])
    write(tmp_path / "a.npz", x=array, labels=labels, class_names=np.array(["p", "q"]))
    packed = quiet_pack(tmp_path / "a.npz", tmp_path / "out")
    np.testing.assert_array_equal(packed.images, array)
    assert packed.labels.tolist() == labels.tolist() and packed.class_names == ["p", "q"]
    write(tmp_path / "two.npz", x=array, y=array[::-1])
    with pytest.raises(ValueError, match="key: expected one array.*x uint8.*y uint8"):
        quiet_pack(tmp_path / "two.npz", tmp_path / "out2")
    packed = quiet_pack(tmp_path / "two.npz", tmp_path / "out2", key="y")
    np.testing.assert_array_equal(packed.images, array[::-1])


def write_encoded(path, n, kind="jpeg", spoil=()):
    blobs = [encoded(pixels(i), format=kind.upper(), quality=90) for i in range(n)]
    for i in spoil:
        blobs[i] = blobs[i][:-150]
    arrays = {}
    for split, chosen in (("train", blobs), ("test", blobs[:2])):
        arrays[f"{split}_{kind}"] = np.frombuffer(b"".join(chosen), np.uint8)
        arrays[f"{split}_off"] = np.cumsum([0] + [len(b) for b in chosen])
        arrays[f"{split}_label"] = (np.arange(len(chosen)) % 3).astype(np.int16)
    arrays["train_file"] = np.array([f"f{i}" for i in range(n)])
    np.savez(path, class_names=np.array(["p", "q", "r"]), **arrays)
    return blobs


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_encoded_npz(tmp_path, kind):
    blobs = write_encoded(tmp_path / "a.npz", 6, kind, spoil=[4])
    packed = quiet_pack(tmp_path / "a.npz", tmp_path / "out")
    expected = [np.asarray(Image.open(io.BytesIO(b))) for b in (*blobs[:4], blobs[5])]
    np.testing.assert_array_equal(packed.images, expected)
    assert packed.labels.tolist() == [0, 1, 2, 0, 2] and packed.labels.dtype == np.int64
    assert list(reasons(tmp_path / "out")) == ["f4"]
    assert len(quiet_pack(tmp_path / "a.npz", tmp_path / "test", split="test")) == 2
    with pytest.raises(ValueError, match="split: expected one of test, train.*'valid'"):
        quiet_pack(tmp_path / "a.npz", tmp_path / "valid", split="valid")


def test_workers_change_no_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 7)
    write_encoded(tmp_path / "a.npz", 40, spoil=[3, 30])
    outs = [tmp_path / f"out{workers}" for workers in (0, 2)]
    for workers, out in zip((0, 2), outs, strict=True):
        quiet_pack(tmp_path / "a.npz", out, workers=workers)
    for name in ("images.npy", "labels.npy", "items.jsonl", "skipped.jsonl", "manifest.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name


SCRIPT = """
import sys
from fastphi.data import pack, shards
from fastphi.support import files

shards.SHARD = 8
stop, seen = int(sys.argv[3]), 0

def audit(event, args):
    # Everything that changes the disk passes here: die just before the stop-th of them.
    global seen
    written = event == "open" and "w" in str(args[1])
    if not written and event not in ("os.rename", "os.remove", "os.rmdir"):
        return
    inside = str(args[0]).startswith(sys.argv[2])
    if inside or (not written and args[-1] >= 0):  # or named relative to an open folder
        seen += 1
        if seen == stop:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    sys.addaudithook(audit)
    pack(sys.argv[1], sys.argv[2], size=16, progress=False)
    print(seen)
"""


def run_script(tmp_path, *args):
    script = tmp_path / f"script{args[-1]}.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(Path(fastphi.__file__).parents[1])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def snapshot(out):
    names = ("images.npy", "labels.npy", "items.jsonl", "skipped.jsonl", "manifest.json")
    return {name: (out / name).read_bytes() for name in names}


def test_killed_at_any_step_and_resumed(tmp_path, monkeypatch):
    """SIGKILL before one of the steps that change the disk, in a process of its own, and resume."""
    monkeypatch.setattr(shards, "SHARD", 8)
    source = tmp_path / "a.npz"
    write_encoded(source, 30, spoil=[11])
    process = run_script(tmp_path, source, tmp_path / "whole", 0)
    steps = int(process.communicate()[0])
    assert steps > 30
    whole = snapshot(tmp_path / "whole")
    moments = [1, 3, steps // 3, steps // 2, 2 * steps // 3, steps - 3, steps]
    make, made = shards.make_shard, []
    monkeypatch.setattr(shards, "make_shard", lambda p, *a: made.append(p.name) or make(p, *a))
    killed = [run_script(tmp_path, source, tmp_path / str(m), m) for m in moments]
    for moment, process in zip(moments, killed, strict=True):
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        out = tmp_path / str(moment)
        finished = {p.name for p in (out / ".parts").glob("0*.npz")}
        made.clear()
        quiet_pack(source, out)
        assert snapshot(out) == whole
        assert not finished & set(made), "a finished shard was made again"
        assert {p.name for p in out.iterdir()} == {*whole, ".lock"}


def test_workers_die_with_their_parent(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 2)
    source = tmp_path / "in"
    for i in range(40):
        save(source / f"{i}.png", pixels(i, 400, 400), compress_level=0)
    code = SCRIPT.replace("progress=False", "progress=False, workers=2").replace(
        "SHARD = 8", "SHARD = 2"
    )
    (tmp_path / "two.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(fastphi.__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "two.py"), str(source), str(tmp_path / "out"), "0"]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    wait_for(lambda: list((tmp_path / "out").glob(".parts/0*.npz")), process)
    process.kill()
    process.wait()
    wait_for(lambda: not members(process.pid))
    other = quiet_pack(source, tmp_path / "other")
    assert quiet_pack(source, tmp_path / "out").sha256 == other.sha256


def members(session):
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(stat)
    return found


def wait_for(condition, process=None, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the process ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_ctrl_c_leaves_a_resumable_state(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 4)
    make, calls = shards.make_shard, []

    def interrupted(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return make(*args)

    monkeypatch.setattr(shards, "make_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet_pack(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="unfinished, run it again"):
        PackedImages(tmp_path / "out")
    monkeypatch.setattr(shards, "make_shard", lambda *a: calls.append(a) or make(*a))
    assert len(quiet_pack(folder, tmp_path / "out")) == 14 and len(calls) == 4


@pytest.mark.parametrize("fails", ["000000004.npz", "images.npy", "labels.npy", "manifest.json"])
def test_full_disk(folder, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(shards, "SHARD", 4)
    real = files.atomic_write

    @contextlib.contextmanager
    def full(path):
        with real(path) as temporary:
            yield temporary
            if Path(path).name == fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    monkeypatch.setattr(files, "atomic_write", full)
    with pytest.raises(OSError, match="no space left while packing.*run it again"):
        quiet_pack(folder, out)
    assert not (out / fails).exists() and not list(out.rglob("*.tmp"))
    assert not (out / "manifest.json").exists()
    monkeypatch.setattr(files, "atomic_write", real)
    assert quiet_pack(folder, out).sha256 == quiet_pack(folder, tmp_path / "other").sha256


def test_finished_pack_is_returned_at_once(folder, tmp_path, monkeypatch):
    quiet_pack(folder, tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(shards, "make_all", None)
    assert len(quiet_pack(folder, tmp_path / "out", workers=3)) == 14
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ValueError, match="finished pack that differs: size: 16 there, 8 now"):
        quiet_pack(folder, tmp_path / "out", size=8)


def test_resume_with_other_settings_or_source(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastphi.data.assembly.assemble", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quiet_pack(folder, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"unfinished.*color: True there, False now.*start over"):
        quiet_pack(folder, tmp_path / "out", color=False)
    save(folder / "a" / "z0.png", pixels(77))
    with pytest.raises(ValueError, match="source: its images' names, sizes, dates or contents"):
        quiet_pack(folder, tmp_path / "out")
    save(folder / "a" / "new.png", pixels(78))
    with pytest.raises(ValueError, match="number of source images: 14 there, 15 now"):
        quiet_pack(folder, tmp_path / "out")


def interrupt(*_):
    raise KeyboardInterrupt


def test_damaged_shard_is_named_and_made_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastphi.data.assembly.assemble", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quiet_pack(folder, tmp_path / "out")
    monkeypatch.undo()
    part = tmp_path / "out" / ".parts" / "000000000.npz"
    part.write_bytes(part.read_bytes()[:-500])
    with pytest.raises(ValueError, match="damaged.*run it again"):
        quiet_pack(folder, tmp_path / "out")
    assert len(quiet_pack(folder, tmp_path / "out")) == 14


def test_one_writer_at_a_time(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing"):
            quiet_pack(folder, tmp_path / "out")
    quiet_pack(folder, tmp_path / "out")


def test_out_with_other_files_is_left_alone(folder, tmp_path):
    (tmp_path / "out").mkdir()
    np.save(tmp_path / "out" / "images.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"not empty and holds no pack \(images.npy\)"):
        quiet_pack(folder, tmp_path / "out")
    assert np.load(tmp_path / "out" / "images.npy").shape == (3,)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, SIZE, SIZE), np.uint8), "channels first"),
        (np.zeros((2, SIZE, SIZE, 2), np.uint8), "expected .N, H, W"),
        (np.zeros((0, SIZE, SIZE, 3), np.uint8), "mmap|shape"),
        (np.zeros((SIZE, SIZE), np.uint8), "expected .N, H, W"),
        (np.zeros((2, SIZE, SIZE), np.int32), "int32; expected uint8"),
        (np.full((2, SIZE, SIZE), 255.0), "in .255, 255."),
        (np.full((2, SIZE, SIZE), np.nan), r"expected \[0, 1\]"),
        (np.array([{}, {}], object), "not a whole .npy .an array of object"),
    ],
)
def test_wrong_arrays(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        quiet_pack(tmp_path / "a.npy", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_sources_and_options(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="source: no file or folder"):
        quiet_pack(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image in"):
        quiet_pack(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "a.npz").write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match="not a whole .npz"):
        quiet_pack(tmp_path / "a.npz", tmp_path / "out")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="expected a folder, an .npy"):
        quiet_pack(tmp_path / "a.txt", tmp_path / "out")
    np.savez(tmp_path / "b.npz", x=np.zeros((2, SIZE, SIZE), np.uint8), labels=np.array([0.5, 1]))
    with pytest.raises(ValueError, match="labels is float64"):
        quiet_pack(tmp_path / "b.npz", tmp_path / "out")
    with pytest.raises(ValueError, match="key: no array 'y'"):
        quiet_pack(tmp_path / "b.npz", tmp_path / "out", key="y")
    with pytest.raises(ValueError, match="size: "):
        quiet_pack(folder, tmp_path / "out", size=0)
    with pytest.raises(ValueError, match="workers: "):
        quiet_pack(folder, tmp_path / "out", workers=-1)
    with pytest.raises(ValueError, match="out: .* is a file"):
        quiet_pack(folder, tmp_path / "a.txt")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no usable image.*too small"):
        quiet_pack(folder, tmp_path / "out", size=500)


def test_broken_packs_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        PackedImages(tmp_path / "out")
    with pytest.raises(ValueError, match="manifest.json is missing; this is not a pack"):
        PackedImages(folder)
    out = quiet_pack(folder, tmp_path / "out").path
    whole = (out / "images.npy").read_bytes()
    (out / "images.npy").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"images.npy has {len(whole) - 1} bytes"):
        PackedImages(out)
    (out / "images.npy").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="sha256"):
        PackedImages(out).verify()
    (out / "labels.npy").unlink()
    with pytest.raises(ValueError, match="labels.npy is missing"):
        PackedImages(out)
    for text, message in (("{", "not valid JSON"), ("{}", "not that of a fastphi-images")):
        (out / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            PackedImages(out)
    header = {"format": FORMAT, "version": 99}
    (out / "manifest.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="version 99"):
        PackedImages(out)
    (out / "manifest.json").write_text(json.dumps({**header, "version": VERSION}))
    with pytest.raises(ValueError, match="lacks channels, class_names"):
        PackedImages(out)


def test_batch(folder, tmp_path):
    packed = quiet_pack(folder, tmp_path / "out")
    order = [5, 0, 13, 5]
    x = packed.batch(order)
    expected = np.load(tmp_path / "out" / "images.npy")[order].astype(np.float32) / np.float32(255)
    assert x.is_contiguous() and x.dtype == torch.float32
    np.testing.assert_array_equal(x.numpy(), expected.transpose(0, 3, 1, 2))
    assert torch.equal(packed.batch(torch.tensor(order)), x)
    assert packed.batch([]).shape == (0, 3, SIZE, SIZE)
    assert torch.equal(pickle.loads(pickle.dumps(packed)).batch(order), x)
    for wrong, error in (
        ([14], ValueError),
        ([-1], ValueError),
        ([0.5], TypeError),
        (3, TypeError),
    ):
        with pytest.raises(error, match="indices: expected"):
            packed.batch(wrong)


def test_split():
    images = MemoryImages(torch.rand(50, 1, 4, 4))
    train, held_out = images.split(10, seed=3)
    assert len(held_out) == 10 and sorted([*train, *held_out]) == list(range(50))
    again = images.split(10, seed=3)
    assert (again[0] == train).all() and (again[1] == held_out).all()
    assert (images.split(10, seed=4)[1] != held_out).any()
    assert len(images.split(0, seed=3)[0]) == 50
    with pytest.raises(ValueError, match="holdout"):
        images.split(50, seed=3)


def test_open_images(folder, tmp_path):
    packed = quiet_pack(folder, tmp_path / "out")
    assert open_images(packed) is packed
    assert len(open_images(str(packed.path))) == 14
    x = packed.batch(range(14))
    for source in (x, x.numpy(), x.double()):
        memory = open_images(source)
        assert torch.equal(memory.batch([3, 1]), x[[3, 1]])
        assert memory.shape == packed.shape and memory.size == SIZE and memory.channels == 3
        assert memory.mean == pytest.approx(packed.mean, abs=1e-6)
        assert memory.sha256 == open_images(x).sha256 != open_images(x[1:]).sha256
        np.testing.assert_allclose(memory.images, packed.images / 255, atol=1e-6)
    with pytest.raises(ValueError, match="not square"):
        _ = open_images(torch.rand(1, 1, 4, 6)).size
    with pytest.raises(ValueError, match="divide 8-bit values by 255"):
        open_images(x * 255)
    with pytest.raises(TypeError, match="images: expected the path of a pack"):
        open_images(3)


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("before")
    with (
        pytest.raises(OSError, match=r"No space left.*out\.json'$"),
        files.atomic_write(path) as temporary,
    ):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
