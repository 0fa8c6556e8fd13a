"""Checks before any work: each names the argument, what came, and what was expected."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


def images(x: Any, config: Any = None, name: str = "x") -> Tensor:
    """A float tensor (N, C, H, W); with a UNetConfig, of its channels and of a size it can halve."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor (N, C, H, W), got {type(x).__name__}")
    shape = tuple(x.shape)
    if x.dim() != 4 or 0 in shape:
        raise ValueError(f"{name}: expected a non-empty tensor (N, C, H, W), got shape {shape}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected floating point images in [0, 1], got {x.dtype}")
    if config is not None:
        if shape[1] != config.image_channels:
            raise ValueError(
                f"{name}: the model takes {config.image_channels} channel(s), got {shape[1]} "
                f"(shape {shape}, expected (N, C, H, W))"
            )
        size(shape[2:], config, name)
    return x


def size(hw: Sequence[int], config: Any, name: str = "size") -> None:
    """H and W must be multiples of 2^(number of encoder blocks)."""
    multiple = 2 ** (len(config.channels) - 1)
    if any(n % multiple or n < multiple for n in hw):
        raise ValueError(
            f"{name}: height and width must be multiples of {multiple} (the model halves them "
            f"{len(config.channels) - 1} times), got {hw[0]}x{hw[1]}"
            + ("; fastphi.pack crops and resizes" if name == "images" else "")
        )


def clean_images(x: Any, config: Any = None, name: str = "x") -> Tensor:
    """As `images`, and finite and within [0, 1] (noisy inputs are never range-checked)."""
    images(x, config, name)
    finite(x, name)
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        raise ValueError(
            f"{name}: clean images must lie in [0, 1], got [{low:g}, {high:g}]"
            + ("; divide 8-bit values by 255" if high > 1.5 else "")
        )
    return x


def finite(x: Tensor, name: str) -> Tensor:
    """No NaN and no Inf."""
    bad = ~torch.isfinite(x)
    if bad.any():
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name}: {int(bad.sum())} values are NaN or Inf, the first at index {where}"
        )
    return x


def like_model(x: Tensor, parameter: Tensor, name: str = "x") -> None:
    """The model's device and dtype are followed, never guessed."""
    if x.device != parameter.device or x.dtype != parameter.dtype:
        raise ValueError(
            f"{name}: {x.dtype} on {x.device}, but the model is {parameter.dtype} on "
            f"{parameter.device}; convert one with .to(...)"
        )


def number(
    value: Any, name: str, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> float:
    """A finite real number in [low, high], or (low, high] with `open_low`."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    value = float(value)
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise ValueError(f"{name}: expected a number in {bracket}{low:g}, {high:g}], got {value:g}")
    return value


def integer(value: Any, name: str, *, low: int | None = None, high: int | None = None) -> int:
    """A whole number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {value!r}")
    value = int(value)
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}: expected an integer {bounds}, got {value}")
    return value


def seed(value: Any, name: str = "seed") -> int:
    """An integer in [0, 2^63)."""
    return integer(value, name, low=0, high=2**63 - 1)


def sigma(value: Any, name: str = "sigma", *, allow_zero: bool = True) -> float:
    """A noise level, in the units of the images: finite, >= 0 (> 0 where a score is asked)."""
    return number(value, name, low=0.0, open_low=not allow_zero)


def sigmas(values: Any, name: str = "sigmas") -> tuple[float, ...]:
    """A non-empty list of distinct noise levels >= 0."""
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name}: expected a list of noise levels, got {type(values).__name__}")
    out = tuple(sigma(v, f"{name}[{i}]") for i, v in enumerate(values))
    if not out:
        raise ValueError(f"{name}: expected at least one noise level, got none")
    if len(set(out)) != len(out):
        raise ValueError(f"{name}: noise levels must be distinct, got {out}")
    return out


def batch_sigma(value: Any, n: int, x: Tensor, name: str = "sigma") -> Tensor:
    """One σ or N of them, whose squares are normal numbers, as an (N, 1, 1, 1) tensor like x."""
    values = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    if values.numel() not in (1, n):
        raise ValueError(
            f"{name}: expected one noise level or one per image ({n}), got {values.numel()}"
        )
    low = math.sqrt(torch.finfo(x.dtype).smallest_normal)  # σ² below it is lost, (x̂ − x)/σ² is Inf
    if not bool((torch.isfinite(values) & (values >= low)).all()):
        raise ValueError(
            f"{name}: the score in {x.dtype} needs finite noise levels of at least {low:.2g}, got {value}"
        )
    return values.reshape(-1, 1, 1, 1)


def choice(value: Any, name: str, allowed: Collection[str]) -> str:
    """One of a few words."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(sorted(allowed))}; got {value!r}")
    return str(value)


def channel_subset(channels: Any, count: int, name: str = "channels") -> tuple[int, ...] | None:
    """Distinct channel numbers in [0, count); None means all."""
    if channels is None:
        return None
    if hasattr(channels, "tolist"):  # a tensor's or an array's own numbers
        channels = channels.tolist()
    if isinstance(channels, (str, bytes)) or not hasattr(channels, "__iter__"):
        raise TypeError(f"{name}: expected a list of channel numbers, got {channels!r}")
    out = tuple(integer(c, f"{name}[{i}]", low=0, high=count - 1) for i, c in enumerate(channels))
    if not out or len(set(out)) != len(out):
        raise ValueError(f"{name}: expected distinct channel numbers, at least one; got {out}")
    return out


# --- what a file says of itself --------------------------------------------------------------------

Check = Callable[[Any, str], Any]  # of a value and its name: TypeError or ValueError

count: Check = partial(integer, low=1)
unsigned: Check = partial(integer, low=0)
share: Check = partial(number, low=0.0, high=1.0)


def text(value: Any, name: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {value!r:.80}")
    return value


def flag(value: Any, name: str) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r:.80}")
    return value


def sha256(value: Any, name: str) -> str:
    """64 hexadecimal digits."""
    if len(text(value, name)) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{name}: expected 64 hexadecimal digits, got {value!r:.80}")
    return value


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """An object of a JSON file."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected an object, got {value!r:.80}")
    return value


def optional(check: Check) -> Check:
    """Or None."""
    return lambda value, name: None if value is None else check(value, name)


def each(check: Check) -> Check:
    """A list of such values."""

    def checked(value: Any, name: str) -> None:
        if not isinstance(value, list):
            raise TypeError(f"{name}: expected a list, got {value!r:.80}")
        for i, item in enumerate(value):
            check(item, f"{name}[{i}]")

    return checked


def table(check: Check, keys: Callable[[str], Any]) -> Check:
    """An object of such values, under names for which `keys` holds."""

    def checked(value: Any, name: str) -> None:
        for key, item in mapping(value, name).items():
            if not keys(key):
                raise ValueError(f"{name}: unknown name {key!r:.80}")
            check(item, f"{name}.{key}")

    return checked


def record(
    value: Any, name: str, fields: Mapping[str, Check], lacking: Collection[str] = ()
) -> None:
    """An object with these fields, each as its check wants it; those of `lacking` may be absent."""
    found = mapping(value, name)
    if missing := sorted(fields.keys() - found.keys() - set(lacking)):
        raise ValueError(f"{name}: lacks {', '.join(missing)}")
    if unknown := sorted(found.keys() - fields.keys()):
        raise ValueError(
            f"{name}: unknown {', '.join(unknown)[:200]}; is the file from a newer fastphi?"
        )
    for key, check in fields.items():
        if key in found:
            check(found[key], key)
