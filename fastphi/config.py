"""Sizes of the network, and what it was trained on: plain data that every room may import."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastphi.support import validate


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the network. Index 0 of every tuple is full resolution.

    Raises ValueError or TypeError, naming the field, for a value that cannot be.
    """

    channels: tuple[int, ...] = (64, 128, 256, 512)
    """Of each encoder block, full resolution first, then of the middle block (at least two)."""
    image_channels: int = 3
    """Colours of an image: 3, or 1 for grey."""
    enc_layers: int | tuple[int, ...] = 2
    """Convolutions per encoder block: one number, or one per resolution."""
    mid_layers: int = 3
    """Convolutions of the middle block."""
    dec_layers: int | tuple[int, ...] = 6
    """Convolutions per decoder block: one number, or one per resolution. The last one of block 1 is
    the plain one to the image, so that block has at least 2."""
    bias: bool = True
    """Whether the 3×3 convolutions have a bias."""
    norm: str = "std"
    """std, the authors' form (y = γ z / (std(z) + ε)), or layer, the textbook form."""
    upsample_bias: bool = False
    """Whether the transposed convolutions have a bias (the full-resolution one never has)."""
    residual: bool = False
    """Whether the network's output is the residual x − x̂ (eq. 1), not the denoised image x̂."""
    eps: float = 1e-5
    """ε of the norm, beside the standard deviation."""

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("channels", _counts(self.channels, "channels", None))
        if len(self.channels) < 2:
            raise ValueError(f"channels: expected at least two entries, got {self.channels}")
        blocks = len(self.channels) - 1
        put("enc_layers", _counts(self.enc_layers, "enc_layers", blocks))
        put("dec_layers", _counts(self.dec_layers, "dec_layers", blocks))
        validate.integer(self.mid_layers, "mid_layers", low=1)
        validate.integer(self.image_channels, "image_channels", low=1)
        validate.choice(self.norm, "norm", ("std", "layer"))
        put("eps", validate.number(self.eps, "eps", low=0, open_low=True))
        for name in ("bias", "upsample_bias", "residual"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.dec_layers[0] < 2:  # type: ignore[index]
            raise ValueError(f"dec_layers: decoder block 1 needs at least 2, got {self.dec_layers}")

    @property
    def blocks(self) -> int:
        """Number of resolutions below which the image is halved."""
        return len(self.channels) - 1

    @property
    def block_names(self) -> tuple[str, ...]:
        """Blocks that have a mean, in network order: enc1 ... mid ... dec2."""
        down = tuple(f"enc{b}" for b in range(1, self.blocks + 1))
        return (*down, "mid", *(f"dec{b}" for b in range(self.blocks, 1, -1)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _counts(value: Any, name: str, length: int | None) -> tuple[int, ...]:
    if length is not None and not isinstance(value, (tuple, list)):
        value = (value,) * length
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected a tuple of integers, got {value!r}")
    if length is not None and len(value) != length:
        raise ValueError(
            f"{name}: expected one count or one per resolution ({length}), got {value}"
        )
    return tuple(validate.integer(v, f"{name}[{i}]", low=1) for i, v in enumerate(value))


@dataclass(frozen=True)
class TrainingInfo:
    """What a model was trained on: travels with its checkpoint.

    sigma_min, sigma_max: range of training noise levels; mean: the data set's mean colour, per channel,
    in [0, 1]; data: a name for the data; steps: optimiser steps.
    """

    sigma_min: float = 0.0
    sigma_max: float = 1.0
    mean: tuple[float, ...] | None = None
    data: str = ""
    steps: int = 0
