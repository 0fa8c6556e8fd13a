"""What `pack` takes beside folders and numpy's files: real files, made here."""

from __future__ import annotations

import io
import json
import logging
import os
import struct
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from images_case import SIZE, encoded, lines, pixels, quiet_pack, reasons, save
from PIL import Image, features

import fastphi
from fastphi.data import shards


def png(i):
    return encoded(pixels(i), format="PNG")


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def sample(i, label=None):
    beside = [] if label is None else [(f"{i:04d}.cls", str(label).encode())]
    return [(f"{i:04d}.png", png(i)), *beside]


def names_of(out):
    return [line["name"] for line in lines(out / "items.jsonl")]


def same_pixels(packed, numbers):
    np.testing.assert_array_equal(packed.images, [pixels(i) for i in numbers])


# --- .tar ------------------------------------------------------------------------------------------


@pytest.fixture
def shard_files(tmp_path):
    (tmp_path / "in").mkdir()
    for k in range(3):
        members = [m for i in range(4 * k, 4 * k + 4) for m in sample(i, i % 3)]
        write_tar(tmp_path / "in" / f"s-{k:03d}.tar", members)
    return tmp_path / "in"


def test_shards_by_folder_list_and_pattern(shard_files, tmp_path):
    one = quiet_pack(shard_files / "s-001.tar", tmp_path / "one")
    same_pixels(one, range(4, 8))
    (shard_files / "README.md").write_text("not an image")
    (shard_files / "LICENSE").write_text("nor this")
    ways = {
        "folder": shard_files,
        "list": sorted(shard_files.glob("*.tar")),
        "range": f"{shard_files}/s-{{000..002}}.tar",
        "words": f"{shard_files}/s-00{{0,1,2}}.tar",
        "stars": f"{shard_files}/s-*.tar",
    }
    for name, source in ways.items():
        packed = quiet_pack(source, tmp_path / name)
        same_pixels(packed, range(12))
        assert packed.labels.tolist() == [i % 3 for i in range(12)]
        assert packed.class_names is None
    with pytest.raises(FileNotFoundError, match=r"source: no file or folder .*s-003.tar"):
        quiet_pack(f"{shard_files}/s-{{000..003}}.tar", tmp_path / "more")
    with pytest.raises(ValueError, match=r"expected a pattern as \{000..003\}, got \{2..1\}"):
        quiet_pack(f"{shard_files}/s-{{2..1}}.tar", tmp_path / "more")


def test_classes_of_samples(tmp_path):
    members = [
        ("a.png", png(0)),
        ("a.json", b'{"label": "cat"}'),
        ("b.json", b'{"cls": "ant"}'),
        ("b.png", png(1)),
        ("c.png", png(2)),
        ("c.json", b"{"),
    ]
    packed = quiet_pack(write_tar(tmp_path / "a.tar", members), tmp_path / "out")
    assert packed.labels.tolist() == [1, 0, -1] and packed.class_names == ["ant", "cat"]
    folders = [("./p/dog/1.png", png(0)), ("./p/cat/deep/1.png", png(1)), ("./p/._x.png", b"")]
    packed = quiet_pack(write_tar(tmp_path / "b.tar", folders), tmp_path / "b")
    assert packed.labels.tolist() == [1, 0] and packed.class_names == ["cat", "dog"]
    assert names_of(tmp_path / "b") == ["p/dog/1.png", "p/cat/deep/1.png"]


def test_samples_without_an_image_are_listed(tmp_path):
    members = [*sample(0, 1), ("lost.cls", b"2"), ("arr.npy", b"x"), *sample(1, 0)]
    members += [("cut.jpg", encoded(pixels(5, 64, 64), format="JPEG")[:500])]
    packed = quiet_pack(write_tar(tmp_path / "a.tar", members), tmp_path / "out")
    same_pixels(packed, [0, 1])
    found = reasons(tmp_path / "out")
    assert found["lost"] == "unreadable: no image among cls"
    assert found["arr"] == "unreadable: no image among npy"
    assert found["cut.jpg"].startswith("truncated")
    assert packed.manifest["skipped"]["unreadable"] == 2


def test_several_images_of_a_sample(tmp_path):
    members = [("a.seg.png", png(1)), ("a.jpg", png(0)), ("b.jpg", png(2)), ("b.seg.png", png(3))]
    path = write_tar(tmp_path / "a.tar", members)
    same_pixels(quiet_pack(path, tmp_path / "out"), [0, 2])
    same_pixels(quiet_pack(path, tmp_path / "seg", key="seg.png"), [1, 3])
    write_tar(path, [("a.png", png(1)), ("a.jpg", png(0))])
    with pytest.raises(ValueError, match=r"key: sample a of .* name one of png, jpg"):
        quiet_pack(path, tmp_path / "two")
    with pytest.raises(ValueError, match=r"no image in .*got 1 without .*no webp among jpg, png"):
        quiet_pack(path, tmp_path / "two", key="webp")


@pytest.mark.parametrize("keep", [-1, 2700, 1024 * 2, 700, 0])
def test_cut_tars(tmp_path, keep):
    """In the end mark, in an image, between two members, in the first of them, before it."""
    path = write_tar(tmp_path / "a.tar", [m for i in range(3) for m in sample(i, i)])
    whole = path.read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512 + 511)  # of the end mark all but a byte
    path.write_bytes(whole[:keep] if keep >= 0 else whole)
    with pytest.raises(ValueError, match=r"source: .*a\.tar is not a whole \.tar, uncompressed"):
        quiet_pack(path, tmp_path / "out")


def test_damaged_and_compressed_tars(tmp_path):
    path = write_tar(tmp_path / "a.tar", [m for i in range(3) for m in sample(i, i)])
    content = bytearray(path.read_bytes())
    second = content.index(b"0001.png")
    content[second : second + 300] = bytes(range(50)) * 6
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"damaged at byte {second}"):
        quiet_pack(path, tmp_path / "out")
    write_tar(tmp_path / "b.tar", sample(0), "w:gz")
    with pytest.raises(ValueError, match="it is compressed.*decompress it first"):
        quiet_pack(tmp_path / "b.tar", tmp_path / "out")
    write_tar(tmp_path / "b.tar.gz", sample(0), "w:gz")
    with pytest.raises(ValueError, match="compressed .tar does not allow; decompress it"):
        quiet_pack(tmp_path / "b.tar.gz", tmp_path / "out")
    with pytest.raises(ValueError, match="no image in .*got 0 without"):
        quiet_pack(write_tar(tmp_path / "c.tar", []), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tar_resumes_and_is_told_from_another(shard_files, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 3)
    whole = quiet_pack(shard_files, tmp_path / "whole", workers=2)
    real, made = shards.make_shard, []

    def interrupted(*args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args)
        return real(*args)

    monkeypatch.setattr(shards, "make_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet_pack(shard_files, tmp_path / "out")
    monkeypatch.setattr(shards, "make_shard", lambda *a: made.append(a) or real(*a))
    assert quiet_pack(shard_files, tmp_path / "out").sha256 == whole.sha256 and len(made) == 4
    write_tar(shard_files / "s-002.tar", sample(40))
    with pytest.raises(ValueError, match="a finished pack that differs"):
        quiet_pack(shard_files, tmp_path / "out")


# --- .zip ------------------------------------------------------------------------------------------


def write_zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_with_its_table_of_classes(tmp_path, method):
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(5)]
    labels = [[name, i % 3] for i, name in enumerate(names[:4])]
    members = [(name, png(i)) for i, name in enumerate(names)]
    table = ("dataset.json", json.dumps({"labels": labels}))
    packed = quiet_pack(write_zip(tmp_path / "a.zip", [*members, table], method), tmp_path / "out")
    same_pixels(packed, range(5))
    assert packed.labels.tolist() == [0, 1, 2, 0, -1] and names_of(tmp_path / "out") == names
    write_zip(tmp_path / "b.zip", [*members, ("dataset.json", '{"labels": null}')])
    assert (
        quiet_pack(tmp_path / "b.zip", tmp_path / "b").labels is None
    )  # its folders are no classes
    write_zip(tmp_path / "c.zip", [*members, ("dataset.json", '{"labels": [3]}')])
    with pytest.raises(ValueError, match=r"dataset.json needs .labels.: null, or a list of"):
        quiet_pack(tmp_path / "c.zip", tmp_path / "c")


def test_zip_of_folders(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shards, "SHARD", 2)
    members = [("top/b/1.png", png(0)), ("top/a/2.png", png(1)), ("top/a/1.png", png(2))]
    members += [("top/note.txt", b"no"), ("__MACOSX/top/._1.png", b"no"), ("top/a/3.heic", b"?")]
    path = write_zip(tmp_path / "a.zip", members)
    with caplog.at_level(logging.INFO):
        packed = quiet_pack(path, tmp_path / "out", workers=2)
    same_pixels(packed, [2, 1, 0])
    assert packed.labels.tolist() == [0, 0, 1] and packed.class_names == ["a", "b"]
    assert reasons(tmp_path / "out") == {"top/a/3.heic": "unreadable: not an image"}
    assert "passed over as no images: 1 .txt, 1 hidden" in caplog.text


def test_bad_zips(tmp_path):
    with pytest.raises(ValueError, match="source: no image in .*a.zip"):
        quiet_pack(write_zip(tmp_path / "a.zip", [("a.txt", b"x")]), tmp_path / "out")
    path = write_zip(tmp_path / "b.zip", [("a.png", png(0)), ("b.png", png(1))])
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"b\.zip is not a whole \.zip \(File is not a zip"):
        quiet_pack(path, tmp_path / "out")
    flipped = bytearray(whole)
    flipped[whole.index(b"IDAT") + 20] ^= 1
    path.write_bytes(flipped)
    same_pixels(quiet_pack(path, tmp_path / "out"), [1])
    assert reasons(tmp_path / "out")["a.png"].startswith("unreadable: not the bytes of the .zip's")
    with pytest.raises(ValueError, match="key: 'x' names .* is a .zip"):
        quiet_pack(path, tmp_path / "other", key="x")


# --- .parquet --------------------------------------------------------------------------------------


def write_parquet(path, numbers, plain=False, names=None, rows=2, **columns):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    cells = [png(i) for i in numbers]
    if not plain:
        cells = [{"bytes": c, "path": f"{i}.png"} for i, c in zip(numbers, cells, strict=True)]
    table = pa.table({"image": cells, **columns})
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        said = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        table = table.replace_schema_metadata(said)
    pq.write_table(table, path, row_group_size=rows)
    return path


@pytest.mark.parametrize("plain", [False, True])
def test_parquet(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 3)
    (tmp_path / "in").mkdir()
    for k in range(2):
        numbers = range(5 * k, 5 * k + 5)
        file = tmp_path / "in" / f"train-0000{k}-of-00002.parquet"
        write_parquet(file, numbers, plain, ["p", "q"], label=[i % 2 for i in numbers])
    write_parquet(tmp_path / "in" / "test-00000-of-00001.parquet", [90], plain, label=[1])
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        packed = quiet_pack(tmp_path / "in", out, workers=workers)
        same_pixels(packed, range(10))
        assert packed.labels.tolist() == [i % 2 for i in range(10)]
        assert packed.class_names == ["p", "q"]
        assert names_of(out)[7] == ("train-00001-of-00002/2" if plain else "7.png")
    same_pixels(quiet_pack(tmp_path / "in", tmp_path / "test", split="test"), [90])
    with pytest.raises(ValueError, match="split: expected one of test, train for .*'valid'"):
        quiet_pack(tmp_path / "in", tmp_path / "valid", split="valid")


def test_columns_of_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [0, 1], other=[png(2), png(3)], label=["b", "a"])
    packed = quiet_pack(path, tmp_path / "out")
    assert packed.labels.tolist() == [1, 0] and packed.class_names == ["a", "b"]
    same_pixels(quiet_pack(path, tmp_path / "other", key="other"), [2, 3])
    with pytest.raises(ValueError, match="key: expected a column of encoded images.*got 'x'"):
        quiet_pack(path, tmp_path / "x", key="x")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(path)
    pq.write_table(table.rename_columns(["u", "v", "label"]), path)
    with pytest.raises(ValueError, match="key: expected .* got 2 of them; its columns: u struct"):
        quiet_pack(path, tmp_path / "x")
    pq.write_table(table.select(["label"]), path)
    with pytest.raises(ValueError, match="source: expected a column .* its columns: label string"):
        quiet_pack(path, tmp_path / "x")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole \.parquet"):
        quiet_pack(path, tmp_path / "x")


def test_parquet_files_that_do_not_belong_together(tmp_path):
    write_parquet(tmp_path / "a.parquet", [0], label=[1])
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pq.read_table(tmp_path / "a.parquet").select(["label"]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet is not a \.parquet with image\.bytes, as a"):
        quiet_pack(tmp_path, tmp_path / "out")


def test_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"source: .*a\.parquet needs pyarrow, which is not inst"):
        quiet_pack(tmp_path / "a.parquet", tmp_path / "out")


def test_several_files_of_one_kind(tmp_path):
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, np.zeros((1, SIZE, SIZE), np.uint8))
    with pytest.raises(ValueError, match="of several files expected all .tar or all .parquet"):
        quiet_pack([tmp_path / "a.npy", tmp_path / "b.npy"], tmp_path / "out")
    assert len(quiet_pack([tmp_path / "a.npy"], tmp_path / "out")) == 1


# --- every type of file ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["avif", "jp2", "tga", "qoi", "pcx", "dds", "ico", "sgi"])
def test_types_that_pillow_opens(tmp_path, suffix):
    wanted = {"avif": "avif", "jp2": "jpg_2000"}.get(suffix)
    if wanted and not features.check(wanted):
        pytest.skip(f"this Pillow has no {wanted}")
    if f".{suffix}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no .{suffix}")
    smooth = np.asarray(Image.fromarray(pixels(1, 4, 4)).resize((SIZE, SIZE)))
    options = {"sizes": [(SIZE, SIZE)]} if suffix == "ico" else {}
    if suffix == "avif":
        options |= {"quality": 95, "subsampling": "4:4:4"}
    save(tmp_path / "in" / f"a.{suffix}", smooth, **options)
    packed = quiet_pack(tmp_path / "in", tmp_path / "out")
    assert np.abs(packed.images[0].astype(int) - smooth).mean() < 4  # AVIF's own loss


def test_every_file_is_packed_listed_or_counted(tmp_path, caplog):
    source = tmp_path / "in"
    save(source / "a.png", pixels(0))
    (source / "without_suffix").write_bytes(png(1))
    (source / "raw.cr2").write_bytes(b"II*\0 of a camera")
    (source / "film.mp4").write_bytes(b"\0\0\0 ftypisom")
    for name in ("caption.txt", "more.txt", "data.JSON", ".DS_Store"):
        (source / name).write_text("{}")
    os.mkfifo(source / "pipe.png")
    (source / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.INFO):
        same_pixels(quiet_pack(source, tmp_path / "out"), [0, 1])
    found = reasons(tmp_path / "out")
    assert set(found) == {"raw.cr2", "film.mp4", "pipe.png", "dangling.jpg"}
    assert found["pipe.png"] == "unreadable: not a regular file"
    assert "passed over as no images: 1 .json, 2 .txt, 1 hidden" in caplog.text


# --- 12 and 14 bits in 16 --------------------------------------------------------------------------


def deep_png(values, sbit=None, channels=1):
    """A PNG of 16 bits by hand, as Pillow writes no sBIT."""
    height, width = values.shape[:2]

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    colour = {1: 0, 3: 2}[channels]
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    if sbit is not None:
        parts.append(chunk(b"sBIT", bytes([sbit] * channels)))
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def ramp(bits):
    return np.linspace(0, 2**bits - 1, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint16)


def packed_one(tmp_path, name, content, **options):
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / name).write_bytes(content)
    found = quiet_pack(tmp_path / "in", tmp_path / "out", color=False, **options)
    return np.array(found.images[0, ..., 0])


@pytest.mark.parametrize("bits", [12, 14])
@pytest.mark.parametrize("how", ["low bits", "scaled", "shifted"])
def test_png_says_how_many_bits(tmp_path, bits, how):
    """In the low bits, as programs write it; scaled by the PNG specification's ways."""
    values = ramp(bits)
    stored = {
        "low bits": values,
        "scaled": values << (16 - bits) | values >> (2 * bits - 16),
        "shifted": values << (16 - bits),
    }[how]
    found = packed_one(tmp_path, "a.png", deep_png(stored, bits))
    # rounded to 8 bits; what is shifted, not scaled, is a little darker: 4080/4095
    assert np.abs(found - values / (2**bits - 1) * 255).max() <= 0.5 + (how == "shifted")


def test_png_without_sbit_is_of_16_bits_unless_told(tmp_path):
    content = deep_png(ramp(12))
    assert packed_one(tmp_path, "a.png", content).max() == 16  # 4095/65535
    (tmp_path / "out").rename(tmp_path / "before")
    found = packed_one(tmp_path, "a.png", content, bits=12)
    assert np.abs(found - ramp(12) / 4095 * 255).max() <= 0.5
    with pytest.raises(ValueError, match=r"bits: a value of 4095, where bits=11 .*a\.png"):
        quiet_pack(tmp_path / "in", tmp_path / "eleven", bits=11)
    for wrong in (8, 17):
        with pytest.raises(ValueError, match="bits: "):
            quiet_pack(tmp_path / "in", tmp_path / "wrong", bits=wrong)


def test_tiff_says_how_many_bits(tmp_path):
    for bits in (12, 14):
        values = ramp(bits)
        save(tmp_path / "in" / f"{bits}.tif", values, tiffinfo={281: 2**bits - 1})
    save(tmp_path / "in" / "c_brightest.tif", ramp(15), tiffinfo={281: 30000})
    save(tmp_path / "in" / "d_beyond.tif", ramp(13), tiffinfo={281: 4095})
    images = quiet_pack(tmp_path / "in", tmp_path / "out", color=False).images[..., 0]
    assert len(images) == 2  # the second of the same shades is the first's duplicate
    assert np.abs(images[0] - ramp(12) / 4095 * 255).max() <= 0.5
    assert np.abs(images[1] - ramp(15) / 65535 * 255).max() <= 0.5
    found = reasons(tmp_path / "out")
    assert found["14.tif"] == "duplicate of 12.tif"
    assert found["d_beyond.tif"] == "unreadable: a value of 8191, where MaxSampleValue allows 4095"


def test_tiff_of_12_packed_bits(tmp_path):
    values = ramp(12).reshape(-1, 2).astype(np.uint32)
    pair = values[:, 0] << 12 | values[:, 1]
    strip = np.stack([pair >> 16, pair >> 8 & 255, pair & 255], 1).astype(np.uint8).tobytes()
    tags = [(256, SIZE), (257, SIZE), (258, 12), (259, 1), (262, 1)]
    tags += [(273, 8), (277, 1), (278, SIZE), (279, len(strip))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    table = struct.pack("<H", len(tags)) + entries + bytes(4)
    content = b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + table
    found = packed_one(tmp_path, "a.tif", content)
    assert np.abs(found - ramp(12) / 4095 * 255).max() <= 0.5


def test_deep_colour_that_pillow_cuts_is_listed(tmp_path):
    colour = np.repeat(ramp(12)[..., None], 3, 2)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "dark.png").write_bytes(deep_png(colour, 12, 3))
    (tmp_path / "in" / "scaled.png").write_bytes(deep_png(colour << 4, 12, 3))
    (tmp_path / "in" / "sixteen.png").write_bytes(deep_png(colour << 3, None, 3))
    assert len(quiet_pack(tmp_path / "in", tmp_path / "out")) == 2
    found = reasons(tmp_path / "out")
    assert found["dark.png"].startswith("unreadable: 12 bits in 16-bit colour")


# --- data sets -------------------------------------------------------------------------------------


class Photographs(torch.utils.data.Dataset):
    """As torchvision's folders: (PIL image, class), with the classes' names."""

    classes = ("ant", "bee", "cat")

    def __init__(self, n=7):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i == 5:
            raise OSError("image file is truncated")
        return Image.fromarray(pixels(i, SIZE, 2 * SIZE)), i % 3


def test_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 3)
    packs = [quiet_pack(Photographs(), tmp_path / f"{w}", workers=w) for w in (0, 2)]
    for packed in packs:
        np.testing.assert_array_equal(packed.images[1], pixels(1, SIZE, 2 * SIZE)[:, 8:24])
        assert packed.labels.tolist() == [0, 1, 2, 0, 1, 0]
        assert packed.class_names == ["ant", "bee", "cat"]
    assert packs[0].sha256 == packs[1].sha256
    assert reasons(tmp_path / "0") == {"5": "truncated: image file is truncated"}
    with pytest.raises(ValueError, match="number of source images: 7 there, 8 now"):
        quiet_pack(Photographs(8), tmp_path / "0")
    loader = torch.utils.data.DataLoader(Photographs(), batch_size=2)
    assert quiet_pack(loader, tmp_path / "0").sha256 == packs[0].sha256


def test_data_sets_of_many_forms(tmp_path):
    arrays = [pixels(i) for i in range(3)]
    chw = [torch.from_numpy(a).permute(2, 0, 1) for a in arrays]
    forms = {
        "PIL": [Image.fromarray(a) for a in arrays],
        "arrays": arrays,
        "tensors": chw,
        "floats": [x / 255 for x in chw],
        "one tensor": torch.stack(chw),
        "dicts": [{"img": Image.fromarray(a), "label": 4} for a in arrays],
        "bytes": [{"image": {"bytes": png(i), "path": None}} for i in range(3)],
        "pairs": torch.utils.data.TensorDataset(torch.stack(chw), torch.tensor([4, 4, 4])),
    }
    for name, source in forms.items():
        packed = quiet_pack(source, tmp_path / name)
        same_pixels(packed, range(3))
        labels = [4, 4, 4] if name in ("dicts", "pairs") else None
        assert (None if packed.labels is None else packed.labels.tolist()) == labels, name
    named = [{"photo": Image.fromarray(a)} for a in arrays]
    same_pixels(quiet_pack(named, tmp_path / "named", key="photo"), range(3))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "source: the list has no items"),
        (7, TypeError, "source: expected images, or a data set with __len__ and __getitem__"),
        ({"train": [1]}, TypeError, "source: expected a data set, got a dict; choose .*'train'"),
        ([{"x": 1}], ValueError, "source: list: no image or img in an item, which has x"),
        ([1, 2], ValueError, "no usable image in list; the first: unreadable: expected a PIL"),
    ],
)
def test_data_sets_that_are_none(tmp_path, source, error, message):
    with pytest.raises(error, match=message):
        quiet_pack(source, tmp_path / "out")


def test_a_data_set_that_cannot_be_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 2)
    unsendable = Photographs()
    unsendable.transform = lambda x: x
    with pytest.raises(ValueError, match="workers: .* cannot be sent to other processes"):
        quiet_pack(unsendable, tmp_path / "out", workers=2)


def test_pack_is_the_same_from_every_source(tmp_path):
    members = [(f"{i}.png", png(i)) for i in range(6)]
    for name, content in members:
        save(tmp_path / "folder" / name, np.asarray(Image.open(io.BytesIO(content))))
    sources = [
        tmp_path / "folder",
        write_tar(tmp_path / "a.tar", members),
        write_zip(tmp_path / "a.zip", members),
        [Image.open(io.BytesIO(content)) for _, content in members],
    ]
    found = {quiet_pack(s, tmp_path / f"out{k}").sha256 for k, s in enumerate(sources)}
    assert len(found) == 1 and fastphi.PackedImages(tmp_path / "out0").labels is None


def test_a_folder_of_pipes_has_no_image(tmp_path):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "a.png")
    with pytest.raises(ValueError, match="source: no image in"):
        quiet_pack(tmp_path / "in", tmp_path / "out")
