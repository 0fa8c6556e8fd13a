"""A small training run, shared by the tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastphi.config import UNetConfig
from fastphi.train import TrainConfig, Trainer
from fastphi.unet import UNet

NETWORK = UNetConfig(channels=(4, 6), dec_layers=2, mid_layers=2)
ROOT = Path(__file__).parents[2]


def images(n: int = 40) -> torch.Tensor:
    """Blocks of uniform colour: easy to denoise."""
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 2, 2, generator=g).repeat_interleave(4, 2).repeat_interleave(4, 3)


def config(out: Path, **changes) -> TrainConfig:
    settings = {"batch": 8, "epochs": 4, "holdout": 4, "checkpoint_every": 3, "evaluate_every": 5}
    settings |= {"model": NETWORK, "amp": "off", "lr": 3e-3, "device": "cpu"}
    return TrainConfig(out=out, **(settings | changes))


def train(out: Path, x: torch.Tensor | None = None, callback=None, **changes) -> UNet:
    x = images() if x is None else x
    return Trainer(config(out, **changes), x).run(callback, progress=False)


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def bits(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def at_scale(ema: str = "power") -> dict:
    """Every option for training at scale. The gradients of this case are 400 to 6000 long."""
    width = {"power": {"ema_sigma_rel": 0.15}, "exponential": {"ema_halflife": 40}}[ema]
    return {"ema": ema, "clip": 1000.0, "warmup": 5, **width}
