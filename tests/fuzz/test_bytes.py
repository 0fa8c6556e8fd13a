"""Files of any bytes: each format as fastphi writes it, then mutated, cut, spliced; what is read of it is
read in one piece or refused in one sentence that names the file."""

from __future__ import annotations

import io
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage_case import damaged
from fuzz_case import some, tried
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fastphi
from fastphi import checkpoint, data
from fastphi.analysis.common import Result
from fastphi.checkpoint import authors
from fastphi.config import UNetConfig
from fastphi.data import pixels as decoding
from fastphi.data import shards
from fastphi.study import record
from fastphi.support import reading
from fastphi.train import TrainConfig, Trainer, folder
from fastphi.train.log import Log

CONFIG = UNetConfig(channels=(2, 3), enc_layers=1, mid_layers=1, dec_layers=2)


@dataclass
class Format:
    """file: which is damaged; read: what is done with it; members: it is a zip whose members are
    damaged too, with the archive's checksums set right again."""

    file: Path
    read: Callable[[Path], Any]
    members: bool = False


@pytest.fixture(scope="module")
def formats(tmp_path_factory) -> dict[str, Format]:
    here = tmp_path_factory.mktemp("bytes")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
    labels = rng.integers(0, 3, 40)
    np.save(here / "x.npy", pixels)
    np.savez(here / "x.npz", images=pixels, labels=labels, class_names=np.array(["a", "b", "c"]))
    jpeg = [encoded(p, "jpeg") for p in pixels[:6]]
    np.savez(
        here / "encoded.npz",
        train_jpeg=np.frombuffer(b"".join(jpeg), np.uint8),
        train_off=np.cumsum([0, *map(len, jpeg)]),
        train_label=labels[:6],
    )
    packed = data.pack(here / "x.npz", here / "pack", size=8, progress=False)
    torch.manual_seed(0)
    archives(here, jpeg)
    model = fastphi.UNet(CONFIG)
    fastphi.save(model, here / "model.safetensors")
    store = fastphi.extract(model, packed, here / "store", sigmas=[0.1], draws=1, indices=[3, 1])
    result = fastphi.sample(
        model, 2, size=4, form="schedule", sigmas=(0.5, 0.1, 2), save=here / "r.npz"
    )
    assert store.complete and result.finished
    config = TrainConfig(out=here / "run", model=CONFIG, batch=8, max_steps=2, holdout=4)
    Trainer(config, packed).run(progress=False)
    parts = here / "parts"
    options = decoding.Options(8, True, False)
    shards.make_shard(parts / "000000000.npz", list(pixels[:9]), options)
    inner = Numbers(np.arange(3), {}, (float("nan"), "x"), None)
    record.save(Numbers(np.eye(2), {"a": np.ones(2)}, (1.5, "b"), inner), here / "result.npz")
    authors_folder(here / "authors", model)
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff"):
        (here / f"x.{kind}").write_bytes(encoded(pixels[0], kind))
    run = here / "run"
    newest = sorted((run / "checkpoints").iterdir())[-1]

    def pack_of(file: Path) -> Any:
        found = fastphi.PackedImages(file.parent)
        return found.batch([0, len(found) - 1]), found.labels

    def store_of(file: Path) -> Any:
        found = fastphi.PhiStore(file.parent)
        return found.phi(0.1), found.indices

    return {
        "pack manifest": Format(here / "pack/manifest.json", pack_of),
        "pack pixels": Format(here / "pack/images.npy", pack_of),
        "pack labels": Format(here / "pack/labels.npy", pack_of),
        "store manifest": Format(here / "store/manifest.json", store_of),
        "store φ": Format(here / "store/phi_mid_sigma0.1.npy", store_of),
        "store done": Format(here / "store/done_sigma0.1.npy", store_of),
        "store indices": Format(here / "store/indices.npy", store_of),
        "source npy": Format(here / "x.npy", source_of),
        "source npz": Format(here / "x.npz", source_of, members=True),
        "encoded npz": Format(here / "encoded.npz", source_of, members=True),
        "source tar": Format(here / "x.tar", decoded_source),
        "source zip": Format(here / "x.zip", decoded_source),
        "shard": Format(parts / "000000000.npz", shard_of, members=True),
        "samples": Format(here / "r.npz", fastphi.Reconstruction.load, members=True),
        "analysis": Format(
            here / "result.npz", lambda f: record.load(f, {"Numbers": Numbers}), members=True
        ),
        "model": Format(here / "model.safetensors", fastphi.load),
        "authors' weights": Format(here / "authors/model.pt", model_of, members=True),
        "authors' arguments": Format(here / "authors/exp_arguments.pkl", model_of),
        "checkpoint": Format(newest, lambda f: folder._read(f), members=True),
        "log": Format(run / "log.jsonl", log_of),
        "φ of one's own": Format(
            here / "store/phi_mid_sigma0.1.npy", lambda f: reading.array(f, "phi", mode="read")
        ),
        **{
            f"picture {kind}": Format(here / f"x.{kind}", picture_of)
            for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff")
        },
    }


@dataclass(frozen=True)
class Numbers(Result):
    """A result with a field of each kind."""

    values: np.ndarray
    table: dict[str, np.ndarray]
    pair: tuple[float, str]
    inner: Result | None


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def authors_folder(path: Path, model: fastphi.UNet) -> None:
    import pickle

    path.mkdir()
    state = model.state_dict()
    theirs = {}
    for name, ours in authors.names(model):
        value = state[ours]
        theirs[name] = value.reshape(1, -1, 1, 1) if name.endswith("gammas") else value
    torch.save(theirs, path / "model.pt")
    arguments = {
        "num_kernels": list(CONFIG.channels),
        "num_channels": 3,
        "num_enc_conv": 1,
        "num_mid_conv": 1,
        "num_dec_conv": 2,
        "bias": True,
        "upsample_with_bias": False,
        "NormType": "LayerNorm",
        "noise_level_range": [0, 255],
    }
    (path / "exp_arguments.pkl").write_bytes(pickle.dumps(arguments))


def source_of(file: Path) -> Any:
    source = data.sources.open_source(file, "train", None)
    return source.payloads(0, 2)


def archives(here: Path, jpeg: list[bytes]) -> None:
    with tarfile.open(here / "x.tar", "w") as tar, zipfile.ZipFile(here / "x.zip", "w") as zipped:
        for i, content in enumerate(jpeg):
            members = {f"a/{i}.jpg": content, f"a/{i}.json": b'{"label": 1}'}
            for name, its in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(its)
                tar.addfile(info, io.BytesIO(its))
            zipped.writestr(f"a/{i}.jpg", content)
        zipped.writestr("dataset.json", '{"labels": [["a/1.jpg", 2]]}')


def decoded_source(file: Path) -> Any:
    source = data.sources.open_source(file, "train", None)
    for payload in source.payloads(0, len(source)):
        try:
            decoding.convert(payload, 4, True, True)
        except decoding.Skipped as reason:
            assert "\n" not in str(reason)


def shard_of(file: Path) -> Any:
    names = ("pixels", "kept", "digests", "skipped", "reasons")
    return shards.read(file.parent, 0, *names)


def model_of(file: Path) -> Any:
    return checkpoint.load_authors_checkpoint(file.parent)


def log_of(file: Path) -> Any:
    Log(file, 1).close()


def picture_of(file: Path) -> Any:
    try:
        with decoding.strict_decoding():
            return decoding.convert(str(file), 4, True, True)
    except decoding.Skipped as reason:
        assert "\n" not in str(reason)


NAMES = [
    *("pack manifest", "pack pixels", "pack labels", "store manifest", "store φ", "store done"),
    *("store indices", "source npy", "source npz", "encoded npz", "source tar", "source zip"),
    *("shard", "samples", "analysis"),
    *("model", "authors' weights", "authors' arguments", "checkpoint", "log", "φ of one's own"),
    *(f"picture {kind}" for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff")),
]


@pytest.fixture(scope="module")
def work(formats, tmp_path_factory) -> dict[str, Path]:
    """A copy of each format's folder, whose one file is damaged again and again."""
    copies = {}
    for number, (name, form) in enumerate(formats.items()):
        folder = tmp_path_factory.mktemp(f"work{number}")
        for path in form.file.parent.iterdir():
            if path.is_file():
                shutil.copy(path, folder / path.name)
        copies[name] = folder / form.file.name
    return copies


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_file_is_read(name, formats, work):
    """So that what the damaged one is refused for is its damage."""
    assert formats.keys() == set(NAMES)
    formats[name].read(work[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
@some(60)
@given(seed=st.integers(0, 2**63))
def test_a_damaged_file_is_read_or_refused(seed, name, formats, work):
    form, path, rng = formats[name], work[name], random.Random(seed)
    content = form.file.read_bytes()
    bad = damaged(content, form.members, rng)
    path.write_bytes(bad)
    tried["files"] += 1
    try:
        form.read(path)
    except ValueError as error:
        said = str(error)
        assert str(path.parent) in said or "key: " in said or "source: " in said, said
        assert "\n" not in said and len(said) < 2000, said
