"""The commands, one after another, as a user runs them; and wrong inputs to each."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastphi

pytest.importorskip("tyro")  # the Python API does without

from fastphi.cli.main import COMMANDS, main  # noqa: E402

TRAIN = "--model.channels 4 8 --model.dec-layers 2 --batch 8".split()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a pack, a short training run and a φ store, made by the commands."""
    folder = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    np.save(folder / "images.npy", rng.integers(0, 256, (40, 16, 16, 3), np.uint8))
    main(["pack", str(folder / "images.npy"), str(folder / "pack"), "--size", "16"])
    run = ["train", "--data", str(folder / "pack"), "--out", str(folder / "run"), *TRAIN]
    main([*run, "--max-steps", "3", "--holdout", "4"])
    words = [str(folder / name) for name in ("run", "pack", "phi")]
    main(["extract", *words, "--sigmas", "0.1", "0.5", "--draws", "2"])
    return folder


def test_the_path_leaves_what_the_api_reads(work):
    packed, store = fastphi.PackedImages(work / "pack"), fastphi.PhiStore(work / "phi")
    model = fastphi.load(work / "run")
    assert len(packed) == len(store) == 40 and store.sigmas == (0.1, 0.5)
    again = fastphi.extract(model, packed, sigmas=[0.5], draws=2, indices=[7])
    assert torch.equal(again.phi(0.5), store.phi(0.5, [7]))  # one image alone: the same bits


def test_shards_make_the_same_store(work, tmp_path, capsys):
    words = [str(work / "run"), str(work / "pack"), str(tmp_path / "phi"), "--sigmas", "0.1", "0.5"]
    for shard, there in (("1/3", 26), ("0/3", 52), ("2/3", None)):
        main(["extract", *words, "--draws", "2", "--shard", shard])
        said = "phi of 40 images" if there is None else f"{there} of 80 rows are there"
        assert said in capsys.readouterr().out
    found, want = fastphi.PhiStore(tmp_path / "phi"), fastphi.PhiStore(work / "phi")
    assert found.manifest == want.manifest
    assert all(torch.equal(found.phi(s), want.phi(s)) for s in want.sigmas)


def test_neighbours(work, capsys, monkeypatch):
    asked, read = [], fastphi.PackedImages._read
    monkeypatch.setattr("fastphi.analysis.rows._VALUES", 7 * 16 * 16 * 3)
    monkeypatch.setattr(
        fastphi.PackedImages, "_read", lambda *of: asked.append(len(of[1])) or read(*of)
    )
    words = ["--images", str(work / "pack"), "--picture", str(work / "near.png"), "--k", "3"]
    main(["neighbours", str(work / "phi"), "0", "5", *words])
    found = json.loads(capsys.readouterr().out)
    phi = fastphi.PhiStore(work / "phi").phi(0.5).double()
    cosine = torch.nn.functional.cosine_similarity(phi[5], phi)
    cosine[5] = -2
    assert found["phi"][1] == cosine.argsort(descending=True)[:3].tolist()
    pixels = fastphi.PackedImages(work / "pack").batch(range(40)).flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(pixels[5], pixels)
    cosine[5] = -2
    assert found["pixels"][1] == cosine.argsort(descending=True)[:3].tolist()
    assert max(asked[:-1]) == 7  # never all at once, but for the line above
    assert (work / "near.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "target",
    [
        ["--images", "pack", "--indices", "3", "4"],
        ["--images", "pack", "--indices", "3", "4", "--combine", "mean"],
        ["--store", "phi", "--indices", "1", "--target-sigma", "0.5"],
        ["--images", "pack", "--indices", "3", "--form", "adaptive", "--first-sigma", "0.2"],
        ["--images", "pack", "--indices", "3", "--channels", "0", "2"],
    ],
)
def test_reconstruct(work, tmp_path, target):
    target = [str(work / word) if word in ("pack", "phi") else word for word in target]
    short = ["--last-sigma", "0.15", "--steps", "3", "--max-iter", "2", "--size", "16"]
    out = tmp_path / "out.npz"
    words = [str(work / "run"), str(out), *target, *short, "--copies", "2"]
    main(["reconstruct", *words, "--picture", str(tmp_path / "p.png")])
    result = fastphi.Reconstruction.load(out)
    many = target.count("4") and "--combine" not in target
    assert len(result) == (4 if many else 2) and result.finished
    assert torch.isfinite(result.images).all() and (tmp_path / "p.png").exists()


def test_sample(work, tmp_path):
    out = tmp_path / "s.npz"
    words = ["--n", "3", "--size", "16", "--first-sigma", "0.2", "--last-sigma", "0.15"]
    main(["sample", str(work / "run"), str(out), *words])
    assert fastphi.Reconstruction.load(out).images.shape == (3, 3, 16, 16)


def test_doctor(capsys):
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    served = {row["dtype"]: row for row in found["engines"] if row["device"] == "cpu"}
    assert served["float32"]["engine"].startswith("cpu")
    low = served["bfloat16"]
    assert low["engine"].startswith("cpu")
    if found["compiled"]["cpu"]["isa"] == "amx":
        assert low["remark"] is None and low["with gradient"].startswith("reference")
    else:
        assert "computed in float32" in low["remark"] and low["with gradient"].startswith("cpu")
    main(["doctor"])
    assert "Engines" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["pack", "nowhere", "out"], "nowhere"),
        (["pack", "{work}/images.npy", "{tmp}/p", "--size", "0"], "size"),
        (["pack", "{work}/s-{{0..1}}.tar", "{tmp}/p"], "source: .*s-0.tar"),
        (["pack", "{work}/images.npy", "{tmp}/p", "--bits", "99"], "bits: "),
        (["train", "--data", "nowhere", "--out", "{tmp}/r"], "nowhere"),
        (["train", "--data", "{work}/pack", "--out", "{tmp}/r", "--lr", "nan"], "lr"),
        (["train", "--data", "{work}/pack", "--out", "{tmp}/r", "--batch", "4096"], "batch"),
        (["extract", "nowhere", "{work}/pack", "{tmp}/f"], "nowhere"),
        (["extract", "{work}/run", "{work}/pack", "{tmp}/f", "--sigmas", "-1"], "sigma"),
        (["neighbours", "{work}/phi", "99"], "queries"),
        (["neighbours", "{work}/phi", "1", "--picture", "{tmp}/x.png"], "picture"),
        (["reconstruct", "{work}/run", "{tmp}/o.npz"], "target"),
        (["reconstruct", "{work}/run", "{tmp}/o.npz", "--images", "{work}/pack"], "indices"),
        (["sample", "{work}/run", "{tmp}/o.npz", "--size", "15"], "size"),
        (["sample", "{work}/run", "{tmp}/o.npz", "--seed", "-1"], "seed"),
        (["sample", "{work}/run", "{tmp}/o.npz", "--n", "x"], "n"),
        (["sample", "{work}/run", "{tmp}/o.npz", "--n", "99999999999"], "n: "),
        (["sample", "{work}/run", "{tmp}/o.npz", "--n", "4000000000"], "n: .*GiB"),
        (["sample", "{work}/run", "{tmp}/o.npz", "--picture", "{tmp}/x.doc"], "picture: .*x.doc"),
        (["extract", "{work}/run", "{work}/pack", "{work}/images.npy"], "out: .* is a file"),
        (
            ["extract", "{work}/run", "{work}/pack", "{tmp}/f", "--shard", "1"],
            "shard: expected i/n",
        ),
        (["extract", "{work}/run", "{work}/pack", "{tmp}/f", "--shard", "2/2"], "0 <= i < n"),
        (["extract", "{work}/run", "{work}/pack", "{work}/pack"], "not that of a φ store"),
        (["train", "--data", "{work}/pack", "--out", "{work}/pack", *TRAIN], "out: .*is a pack"),
        (["train", "--data", "{work}/pack", "--out", "/dev/null", *TRAIN], "out: .*is a file"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(work, tmp_path, capsys, words, named):
    words = [word.format(work=work, tmp=tmp_path) for word in words]
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(named, said) and "Traceback" not in said
    assert not any(path.suffix in (".npz", ".png") for path in tmp_path.iterdir())


HEADER = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (%s)%s"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        (HEADER % (b"96,", b", }")).ljust(127) + b"\n",  # a header and no array
        (HEADER % (b"96,", b"")).ljust(127) + b"\n",  # without its }
        (HEADER % (b"10" * 15 + b",", b", }")).ljust(127) + b"\n",  # more than there is memory
        b"PK\x03\x04",
    ],
)
def test_phi_of_any_bytes(work, tmp_path, capsys, content):
    (tmp_path / "phi.npy").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["reconstruct", f"{work}/run", f"{tmp_path}/o.npz", "--phi", f"{tmp_path}/phi.npy"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert re.search(r"error: phi: .*phi\.npy is not a whole \.npy \(", said)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("blocks", 5, "blocks: expected an object"),
        ("blocks", {"../x": 8}, "unknown name"),
        ("rows", "40", "rows: expected an integer"),
        ("sigmas", [0.1, float("nan")], "NaN is no JSON number"),
        ("seed", -1, "seed"),
        ("surprise", 1, "unknown surprise"),
    ],
)
def test_store_manifests_of_any_kind(work, tmp_path, capsys, field, value, named):
    shutil.copytree(work / "phi", tmp_path / "phi")
    manifest = tmp_path / "phi" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {field: value}))
    with pytest.raises(SystemExit) as stop:
        main(["neighbours", str(tmp_path / "phi"), "0"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"store: {manifest}" in said and named in said


@pytest.mark.parametrize("mean", ["abc", [0.5, 0.5], [0.5, 0.5, float("nan")], [0.5, 0.5, 2], None])
def test_a_pack_whose_mean_is_none_trains_nothing(work, tmp_path, capsys, mean):
    shutil.copytree(work / "pack", tmp_path / "pack")
    manifest = tmp_path / "pack" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"mean": mean}))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--data", str(tmp_path / "pack"), "--out", str(tmp_path / "run"), *TRAIN])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"pack: {manifest}" in said
    assert not (tmp_path / "run").exists()


def test_help_on_a_terminal_without_greek():
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    for words in (["--help"], ["extract", "--help"], ["doctor"]):
        command = [sys.executable, "-m", "fastphi", *words]
        done = subprocess.run(command, capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert b"phi" in done.stdout and done.stdout.isascii()
    command = [sys.executable, "-m", "fastphi", "extract", "naïve-σ", "b", "c"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 2 and b"Traceback" not in done.stderr


def test_pipes_among_the_images_are_passed_over(work, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.load(work / "images.npy")[0]).save(tmp_path / "photos" / "a.png")
    os.mkfifo(tmp_path / "photos" / "b.png")
    main(["pack", str(tmp_path / "photos"), str(tmp_path / "out"), "--size", "16"])
    assert len(fastphi.PackedImages(tmp_path / "out")) == 1


def test_every_command_has_help(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command.__name__, "--help"])
        assert stop.value.code == 0 and len(capsys.readouterr().out) > 200


def test_runs_as_a_module():
    command = [sys.executable, "-m", "fastphi", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fastphi.__version__


def test_doctor_names_the_assembler(monkeypatch, tmp_path):
    """And says of one with which others had wrong numbers that it is one."""
    from fastphi.cli import doctor

    triton_kernels = pytest.importorskip("fastphi.triton_kernels")
    if triton_kernels.missing() is not None:
        pytest.skip(str(triton_kernels.missing()))
    for version, words in (("12.8.93", "TRITON_PTXAS_PATH"), ("13.1.80", "by ptxas 13.1.80")):
        fake = tmp_path / f"ptxas-{version}"
        fake.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V{version}'\n")
        fake.chmod(0o755)
        monkeypatch.setenv("TRITON_PTXAS_PATH", str(fake))
        said = doctor._triton_kernels()
        assert str(fake) in said and words in said
        assert ("wrong numbers" in said) == version.startswith("12")
