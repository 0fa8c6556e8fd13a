"""The commands, one after another, as a user runs them; and wrong inputs to each."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

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


def test_neighbours(work, capsys):
    words = ["--images", str(work / "pack"), "--picture", str(work / "near.png"), "--k", "3"]
    main(["neighbours", str(work / "phi"), "0", "5", *words])
    found = json.loads(capsys.readouterr().out)
    phi = fastphi.PhiStore(work / "phi").phi(0.5).double()
    cosine = torch.nn.functional.cosine_similarity(phi[5], phi)
    cosine[5] = -2
    assert found["phi"][1] == cosine.argsort(descending=True)[:3].tolist()
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
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(work, tmp_path, capsys, words, named):
    words = [word.format(work=work, tmp=tmp_path) for word in words]
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and named in said and "Traceback" not in said
    assert not any(path.suffix in (".npz", ".png") for path in tmp_path.iterdir())


def test_every_command_has_help(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command.__name__, "--help"])
        assert stop.value.code == 0 and len(capsys.readouterr().out) > 200


def test_runs_as_a_module():
    command = [sys.executable, "-m", "fastphi", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fastphi.__version__
