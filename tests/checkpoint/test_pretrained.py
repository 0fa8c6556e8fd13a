"""The denoiser that ships: it loads by name, denoises, and its card says what it is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastphi
from fastphi import checkpoint, noise
from fastphi.checkpoint import pretrained
from fastphi.train import TrainConfig, Trainer

ROOT = Path(__file__).parents[2]
NAME = "natural64-small"


def test_loads_by_name_and_denoises():
    """Of a photograph, whose pixels it has never seen."""
    from sklearn.datasets import load_sample_images

    model = fastphi.load_pretrained()
    assert not model.training and model.training_info.steps > 0
    photograph = torch.from_numpy(load_sample_images().images[0][100:164, 200:264].copy())
    x = (photograph.permute(2, 0, 1) / 255)[None]
    for sigma in (0.1, 0.3):
        z = noise.normal(0, [0], noise.stream("evaluate"), 0, (3, 64, 64))
        error = (model(x + sigma * z) - x).square().mean().sqrt()
        assert error < 0.6 * sigma


def test_is_small_and_is_packaged(tmp_path):
    """The step of the build that copies files, by the project's own settings."""
    assert NAME in pretrained.names()
    assert pretrained.path(NAME).stat().st_size <= 15_000_000
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    for name in (f"checkpoint/{NAME}.safetensors", f"checkpoint/{NAME}.md", "study/explorer.html"):
        built = (tmp_path / "fastphi" / name).read_bytes()
        assert built == (ROOT / "fastphi" / name).read_bytes()


def test_the_card_is_of_these_weights():
    card = pretrained.card(NAME)
    assert checkpoint.fingerprint(fastphi.load_pretrained(NAME)) in card
    for words in ("Trained on", "Terms.", "fastphi train", "Seed", "commit", "PSNR", "K-means"):
        assert words in card, words


def test_unknown_names_are_refused_and_paths_left_alone(tmp_path):
    with pytest.raises(
        ValueError, match="name: expected one of .*natural64-small.*; got 'nothing'"
    ):
        fastphi.load_pretrained("nothing")
    assert pretrained.resolve(tmp_path / "model") == tmp_path / "model"
    assert pretrained.resolve(NAME) == pretrained.path(NAME)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_run_ships_in_one_command(tmp_path, monkeypatch):
    """tools/ship_model.py makes weights and card of any training folder."""
    images = torch.rand(60, 3, 16, 16)
    labels = torch.arange(60) % 3
    np.savez(
        tmp_path / "images.npz", images=(images * 255).byte().permute(0, 2, 3, 1), labels=labels
    )
    fastphi.pack(tmp_path / "images.npz", tmp_path / "pack", size=16, key="images")
    config = TrainConfig(
        data=tmp_path / "pack",
        out=tmp_path / "run",
        model=fastphi.UNetConfig(channels=(4, 6, 8), dec_layers=(3, 3)),
        batch=8,
        max_steps=4,
        evaluate_every=2,
        amp="off",
    )
    Trainer(config).run(progress=False)
    (tmp_path / "terms.md").write_text("**Trained on** noise.\n\n**Terms.** None.\n")
    spec = importlib.util.spec_from_file_location("ship_model", ROOT / "tools/ship_model.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    line = f"x {tmp_path}/run tiny --heldout {tmp_path}/pack --terms {tmp_path}/terms.md"
    monkeypatch.setattr("sys.argv", f"{line} --commit abc --out {tmp_path}/out".split())
    tool.main()
    card = (tmp_path / "out/tiny.md").read_text()
    for words in ("--batch 8", "--max-steps 4", "--model.channels 4 6 8", "--model.dec-layers 3"):
        assert words in card
    assert str(tmp_path) not in card
    assert fastphi.load(tmp_path / "out/tiny.safetensors").training_info.steps == 4
