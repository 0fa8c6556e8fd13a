"""Settings of a training run: one field, one line of `fastphi train --help`."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastphi import engine
from fastphi.config import UNetConfig
from fastphi.engine import cpu
from fastphi.support import validate

# A resumed run may change these: they say where things are and how long and how often, and none of
# them changes the parameters after a given step. The images are compared by content, not by path.
FREE = (
    "out",
    "data",
    "heldout",
    "epochs",
    "max_steps",
    "keep",
    "evaluate_every",
    "checkpoint_every",
    "log_every",
    "tensorboard",
    "device",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run (Appendix A); the defaults are the paper's.

    Raises ValueError or TypeError, naming the field, for a value that cannot be.
    """

    out: Path
    """Folder of the run: checkpoints, model.safetensors, log.jsonl, config.json. The same settings
    with the same folder resume."""
    data: Path | None = None
    """Pack of training images, made by `fastphi pack`."""
    heldout: Path | None = None
    """Pack of other images for PSNR, instead of holding some of `data` out."""
    holdout: int | None = None
    """Images of `data` held out for PSNR (default: a 20th of them, at most 1000; 0: none)."""
    model: UNetConfig = UNetConfig()
    """Sizes of the network."""
    epochs: int = 1000
    """Passes over the training images."""
    max_steps: int | None = None
    """Optimiser steps after which to stop, where that is before the last epoch."""
    batch: int = 1024
    """Images per optimiser step, over all processes."""
    micro_batch: int | None = None
    """Images at a time within a process, where its share of the batch does not fit in memory."""
    lr: float = 1e-3
    """Learning rate of Adam at the start."""
    lr_halve_every: int = 100
    """Epochs after which the learning rate is halved, again and again."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly to what it would be (a run may end before)."""
    clip: float | None = None
    """Highest norm of the gradient, all parameters together: a longer one is scaled down to it."""
    ema: Literal["none", "exponential", "power"] = "none"
    """Average the weights over the steps: by a half-life, or by a power of the step (Karras et al. 2024).
    The average is then what is evaluated, saved as model.safetensors and returned."""
    ema_halflife: int | None = None
    """Half-life of the exponential average in images; at most a 20th of those seen so far."""
    ema_sigma_rel: float | None = None
    """Width of the power average: its standard deviation over the run's length (0.05 to 0.15, say)."""
    sigma_min: float | None = None
    """Lowest noise level, in units of images in [0, 1] (default 0; for log-uniform 1/255)."""
    sigma_max: float = 1.0
    """Highest noise level, in units of images in [0, 1]."""
    sigma_density: Literal["sqrt", "uniform", "log-uniform"] = "sqrt"
    """Density of noise levels: proportional to 1/√σ (sqrt), to 1, or to 1/σ (log-uniform)."""
    loss_weight: Literal["none", "inverse-variance"] = "none"
    """Weight of an image's squared error: 1, or 1/σ² (needs sigma_min > 0)."""
    seed: int = 0
    """Of the initial parameters, the order of the images, the noise levels and the noise."""
    evaluate_every: int = 1000
    """Steps between two evaluations (PSNR of held-out images at ten noise levels)."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    log_every: int = 1
    """Steps between two lines of log.jsonl."""
    keep: int = 3
    """How many checkpoints to keep."""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """Mixed precision: bf16 autocast, none, or whichever is faster. On a CPU that is float32 in the
    compiled engine, except with `compile` where there is AMX."""
    device: str = "auto"
    """auto (a CUDA device if there is one), cpu, cuda or cuda:N."""
    backend: Literal["auto", "cuda", "cpu", "reference"] = "auto"
    """The engine; auto takes the fastest that can serve."""
    compile: bool = False
    """Run the network through torch.compile: the fastest way on a CPU with AMX."""
    tensorboard: bool = False
    """Write TensorBoard files, too, into out/tensorboard."""

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("out", "data", "heldout"):
            if (value := getattr(self, name)) is not None:
                put(name, Path(value))
        if not isinstance(self.model, UNetConfig):
            raise TypeError(f"model: expected a UNetConfig, got {type(self.model).__name__}")
        for name in ("epochs", "batch", "lr_halve_every", "evaluate_every", "checkpoint_every"):
            put(name, validate.integer(getattr(self, name), name, low=1))
        for name in ("log_every", "keep"):
            put(name, validate.integer(getattr(self, name), name, low=1))
        for name, low in (("holdout", 0), ("max_steps", 1), ("micro_batch", 1)):
            if getattr(self, name) is not None:
                put(name, validate.integer(getattr(self, name), name, low=low))
        if self.heldout is not None and self.holdout:
            raise ValueError(f"holdout: give heldout or holdout, not both; got {self.holdout}")
        validate.seed(self.seed)
        put("lr", validate.number(self.lr, "lr", low=0, open_low=True))
        put("warmup", validate.integer(self.warmup, "warmup", low=0))
        if self.clip is not None:
            put("clip", validate.number(self.clip, "clip", low=0, open_low=True))
        for name, allowed in _CHOICES.items():
            validate.choice(getattr(self, name), name, allowed)
        for name in ("compile", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        self._check_ema(put)
        self._check_sigmas(put)
        if not isinstance(self.device, str) or not _DEVICES.fullmatch(self.device):
            raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {self.device!r}")

    def _check_ema(self, put: Any) -> None:
        for kind, name, example in (
            ("exponential", "ema_halflife", "500000 images"),
            ("power", "ema_sigma_rel", "0.1"),
        ):
            value = getattr(self, name)
            if (value is None) == (self.ema == kind):
                wanted = f"a number ({example}, say)" if value is None else f"none, it is {kind}'s"
                raise ValueError(f"{name}: with ema {self.ema} expected {wanted}; got {value}")
        if self.ema_halflife is not None:
            put("ema_halflife", validate.integer(self.ema_halflife, "ema_halflife", low=1))
        if self.ema_sigma_rel is not None:  # that of the plain mean of all steps is the highest
            high, name = 12**-0.5, "ema_sigma_rel"
            put(name, validate.number(self.ema_sigma_rel, name, low=1e-4, high=high))

    def _check_sigmas(self, put: Any) -> None:
        log_uniform = self.sigma_density == "log-uniform"
        if self.sigma_min is None:
            put("sigma_min", 1 / 255 if log_uniform else 0.0)
        put("sigma_min", validate.sigma(self.sigma_min, "sigma_min"))
        put("sigma_max", validate.sigma(self.sigma_max, "sigma_max", allow_zero=False))
        assert self.sigma_min is not None
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min: expected < sigma_max = {self.sigma_max:g}, got {self.sigma_min:g}"
            )
        for name, needs in (
            ("sigma_density: log-uniform", log_uniform),
            ("loss_weight: inverse-variance", self.loss_weight == "inverse-variance"),
        ):
            if needs and self.sigma_min == 0:
                raise ValueError(f"{name} needs sigma_min > 0 (1/255, say), got 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them (tuples become lists)."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, (tuple, list)):
                return [plain(v) for v in value]
            return str(value) if isinstance(value, Path) else value

        return plain(dataclasses.asdict(self))

    def sigmas(self, u: np.ndarray) -> np.ndarray:
        """Noise levels from uniform numbers: the inverse of the density's distribution function."""
        low, high = float(self.sigma_min or 0), self.sigma_max
        if self.sigma_density == "sqrt":
            return (math.sqrt(low) + u * (math.sqrt(high) - math.sqrt(low))) ** 2
        if self.sigma_density == "log-uniform":
            return low * (high / low) ** u
        return low + u * (high - low)

    def evaluation_sigmas(self) -> list[float]:
        """Ten log-spaced noise levels in [max(sigma_min, 0.01), sigma_max], to four digits."""
        low = min(max(self.sigma_min or 0.0, 0.01), self.sigma_max)
        return list(dict.fromkeys(float(f"{s:.4g}") for s in np.geomspace(low, self.sigma_max, 10)))

    def mixed_precision(self, device: torch.device) -> bool:
        """Whether to run in bf16 autocast on `device`."""
        if self.amp != "auto":
            return self.amp == "bf16"
        if device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        # Measured with AMX: torch.compile in bf16 > the engine in float32 > plain PyTorch in bf16; with
        # AVX512_BF16 alone the engine in float32 takes 0.97 of torch.compile's time in bf16.
        if self.backend == "cpu":
            return False
        if self.backend == "auto" and not cpu.refuses(self.model, device, torch.float32):
            return self.compile and cpu.remark(self.model, torch.bfloat16) is None
        return _fast_bf16()


_CHOICES = {
    "sigma_density": ("sqrt", "uniform", "log-uniform"),
    "loss_weight": ("none", "inverse-variance"),
    "ema": ("none", "exponential", "power"),
    "amp": ("auto", "off", "bf16"),
    "backend": engine.BACKENDS,
}


_DEVICES = re.compile(r"auto|cpu|cuda(:\d+)?")


def _fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (elsewhere it is emulated, slowly)."""
    return any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
