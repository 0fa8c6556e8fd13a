"""A training run between two steps: all that its folder and its log know of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastphi.data import Images
from fastphi.train.config import TrainConfig
from fastphi.unet import UNet


@dataclass(frozen=True)
class Split:
    """Which images train, and which are held out for PSNR: their numbers in `images`, in `heldout`."""

    images: Images
    training: np.ndarray
    heldout: Images
    held: np.ndarray


@dataclass
class RunState:
    """config, and what training changes. average: the network of the averaged weights, where the run has
    one; steps: after which the run ends; step: completed so far; seconds: spent on them; environment: what
    the bits depend on beside the settings."""

    config: TrainConfig
    split: Split
    model: UNet
    optimizer: torch.optim.Optimizer
    steps_per_epoch: int
    steps: int
    step: int = 0
    seconds: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)
    average: UNet | None = None

    @property
    def product(self) -> UNet:
        """What the run is for: evaluated, saved as its model, returned."""
        return self.model if self.average is None else self.average

    def lr(self, step: int) -> float:
        """Learning rate of the optimiser's step number `step`, from 1."""
        c, epoch = self.config, (step - 1) // self.steps_per_epoch
        risen = min(1.0, step / c.warmup) if c.warmup else 1.0
        return c.lr * 0.5 ** (epoch // c.lr_halve_every) * risen
