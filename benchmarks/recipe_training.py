"""Training by a recipe, for a fixed amount of one thread's CPU time: what recipe_study.py compares.

The network, its engine, the order of the images, their noise levels and their noise are the Trainer's;
what differs from the paper is a field of `Recipe`. Compute is CPU time (a stopped or crowded process
loses nothing), of steps alone: measuring and saving do not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastphi import noise
from fastphi.config import TrainingInfo, UNetConfig
from fastphi.data import Images
from fastphi.support import files
from fastphi.unet import Layer, UNet, Upsample

SMALL = 32  # height and width of the first images, where they are smaller ones


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; the defaults are `base`, of which every other recipe changes one thing."""

    channels: tuple[int, ...] = (16, 32, 64, 128)
    dec_layers: int | tuple[int, ...] = 6
    gain: float | None = 1.0
    """Initial value of every gain of the norms; None: the paper's, within ±0.025."""
    optimizer: Literal["adam", "muon"] = "adam"
    """muon: orthogonalised updates for convolutions between channels, Adam for the rest."""
    lr: float = 1e-3
    """Of Adam, at its height."""
    muon_lr: float = 0.02
    batch: int = 16
    warmup: int = 200
    """Steps over which both rates rise; then they fall by a half cosine over the compute."""
    ema: float = 0.999
    """Decay per step of the averaged weights, which are what is measured."""
    density: Literal["sqrt", "uniform", "log-uniform"] = "sqrt"
    """Of σ on [sigma_min, 1], as in TrainConfig."""
    sigma_min: float = 0.0
    weighted: bool = False
    """Squared errors times 1/σ²."""
    first: Literal["whole", "crops", "means"] = "whole"
    """Images of the first half: whole, random 32×32 crops, or means of 2×2 pixels."""
    seed: int = 0

    def config(self) -> UNetConfig:
        return UNetConfig(channels=self.channels, dec_layers=self.dec_layers)

    def sigmas(self, u: np.ndarray) -> np.ndarray:
        """Noise levels from uniform numbers: the inverse of the density's distribution function."""
        low = self.sigma_min
        if self.density == "sqrt":
            return (math.sqrt(low) + u * (1 - math.sqrt(low))) ** 2
        return low ** (1 - u) if self.density == "log-uniform" else low + u * (1 - low)

    def network(self) -> UNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = UNet(self.config())
        for layer in model.modules():
            if isinstance(layer, Layer) and layer.gamma is not None and self.gain is not None:
                nn.init.constant_(layer.gamma, self.gain)
        return model


class Muon(torch.optim.Optimizer):
    """Momentum whose step is the nearest orthogonal matrix (Jordan 2024), for kernels as matrices.

    A kernel is one row per output channel; the step has singular values of about 1, times
    √(rows/columns) where there are more rows.
    """

    def __init__(self, parameters: list[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "transposed": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("closure: expected none, Muon takes the gradients that are there")
        for group in self.param_groups:
            for p in group["params"]:
                state, momentum = self.state[p], group["momentum"]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                mean = state["momentum"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(mean, momentum)  # Nesterov's
                update = update.transpose(0, 1) if group["transposed"] else update
                rows = orthogonal(update.flatten(1)).reshape(update.shape)
                scale = max(1.0, len(rows) / rows[0].numel()) ** 0.5
                rows = rows.transpose(0, 1) if group["transposed"] else rows
                p.add_(rows, alpha=-group["lr"] * scale)


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """g (m, n) with its singular values brought near 1 by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[0] > g.shape[1]
    x = g.T if tall else g
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


def optimizers(model: UNet, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Adam of all parameters, or Muon of what mixes channels (first and last layer apart) beside it."""
    if recipe.optimizer == "adam":
        return [torch.optim.Adam(model.parameters(), recipe.lr)]
    convolutions, ups = [], []
    for module in model.modules():
        if isinstance(module, Upsample):
            ups.append(module.weight)
        elif isinstance(module, Layer) and module.gamma is not None:
            convolutions.append(module.weight)
    taken = {id(p) for p in [*convolutions, *ups]}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups: list[dict[str, Any]] = [{"params": convolutions}, {"params": ups, "transposed": True}]
    return [torch.optim.Adam(rest, recipe.lr), Muon(groups, recipe.muon_lr)]


class Training:
    """A run in `folder`, which a new object of the same recipe continues from its last checkpoint.

    seconds: CPU time of the steps so far, of `budget`; images, steps: seen, made; at: place in the
    epochs' order; losses: mean per pixel of σ-averaged squared error, one per 100 steps.
    """

    def __init__(self, recipe: Recipe, images: Images, folder: Path, budget: float) -> None:
        self.recipe, self.images, self.folder, self.budget = recipe, images, folder, budget
        self.model = recipe.network()
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.optimizers = optimizers(self.model, recipe)
        self.rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.seconds, self.steps, self.seen, self.saved = 0.0, 0, 0, 0.0
        self.losses: list[float] = []
        if self._checkpoint.exists():
            self._load()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def run(self, share: float, every: float = 120.0) -> None:
        """Steps until `share` of the budget is used; a checkpoint every so many seconds of CPU time."""
        began, recent = time.process_time() - self.seconds, []
        batches = self._batches()
        while self.seconds < share * self.budget:
            recent.append(self._step(*next(batches)))
            self.seconds = time.process_time() - began
            if self.steps % 100 == 0:
                self.losses.append(float(np.mean(recent)))
                recent = []
            if self.seconds - self.saved > every:
                self.save()
                began = time.process_time() - self.seconds
        self.save()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """clean, σ (n, 1, 1, 1) and noise, from where the run is."""
        recipe, n = self.recipe, self.recipe.batch
        each = len(self.images) // n  # the rest of an epoch is left out
        epoch = -1
        while True:
            if self.steps // each != epoch:
                epoch = self.steps // each
                stream = noise.stream("order")
                order = noise.permutation(recipe.seed, len(self.images), stream, epoch)
            at = self.steps % each * n
            indices = order[at : at + n]
            clean = self._smaller(self.images.batch(indices), indices, epoch)
            u = noise.uniform(recipe.seed, indices, noise.stream("sigma"), epoch)
            sigma = torch.from_numpy(recipe.sigmas(u)).float().reshape(-1, 1, 1, 1)
            shape = (clean.shape[1], clean.shape[2], clean.shape[3])
            yield (
                clean,
                sigma,
                noise.normal(recipe.seed, indices, noise.stream("train"), epoch, shape),
            )

    def _smaller(self, clean: Tensor, indices: np.ndarray, epoch: int) -> Tensor:
        """The images as the recipe's first half sees them; whole in the second."""
        if self.recipe.first == "whole" or self.seconds >= self.budget / 2:
            return clean
        if self.recipe.first == "means":
            return F.avg_pool2d(clean, clean.shape[-1] // SMALL)
        room = clean.shape[-1] - SMALL + 1
        y, x = (
            (noise.uniform(self.recipe.seed, indices, noise.stream("subset", k), epoch) * room)
            for k in (1, 2)
        )
        places = zip(clean, y.astype(int), x.astype(int), strict=True)
        return torch.stack([c[:, i : i + SMALL, j : j + SMALL] for c, i, j in places])

    def _step(self, clean: Tensor, sigma: Tensor, z: Tensor) -> float:
        """One update; the squared error per pixel and channel before it."""
        x = (clean + sigma * z).contiguous(memory_format=torch.channels_last)
        error = (self.model(x) - clean).square().sum(dim=(1, 2, 3))
        loss = error / sigma.flatten() ** 2 if self.recipe.weighted else error
        self.model.zero_grad()
        loss.mean().backward()
        found = float(error.detach().mean()) / clean[0].numel()
        if not math.isfinite(found):
            raise FloatingPointError(f"step {self.steps + 1}: the loss is {found}")
        height = self._height()
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * height
            optimizer.step()
        self.steps += 1
        self.seen += len(clean)
        decay = min(self.recipe.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            new = list(self.model.state_dict().values())
            torch._foreach_lerp_(list(self.average.values()), new, 1 - decay)
        return found

    def _height(self) -> float:
        """Of the learning rates: up in `warmup` steps, then down by a half cosine over the budget."""
        up = min(1.0, (self.steps + 1) / self.recipe.warmup)
        return up * 0.5 * (1 + math.cos(math.pi * min(1.0, self.seconds / self.budget)))

    def averaged(self) -> UNet:
        """The network of the averaged weights, to be measured."""
        model = self.recipe.network()
        model.load_state_dict(self.average)
        model.training_info = TrainingInfo(
            self.recipe.sigma_min, 1.0, self.images.mean, "natural64", self.steps
        )
        return model.eval().requires_grad_(False)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            **{k: getattr(self, k) for k in ("seconds", "steps", "seen", "losses")},
        }
        with files.atomic_write(self._checkpoint) as temporary:
            torch.save(state, temporary)
        self.saved = self.seconds

    def _load(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.seconds, self.steps, self.seen = state["seconds"], state["steps"], state["seen"]
        self.losses, self.saved = state["losses"], state["seconds"]
