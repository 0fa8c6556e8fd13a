"""Denoisers that come with fastphi: weights trained with it, each with its card.

model = fastphi.load_pretrained("natural64-small")
print(fastphi.pretrained.card("natural64-small"))
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastphi.checkpoint import native
from fastphi.support import validate

if TYPE_CHECKING:
    import torch

    from fastphi.unet import UNet


def names() -> tuple[str, ...]:
    """The models that came with this installation."""
    return tuple(sorted(path.stem for path in _folder().glob("*.safetensors")))


def load_pretrained(
    name: str = "natural64-small",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> UNet:
    """A trained denoiser that comes with fastphi; no network is needed.

    name: one of `fastphi.pretrained.names()`; `card(name)` tells what it was trained on and the terms
    of those images, which apply to the weights apart from the licence of the code. device, dtype,
    backend: as in `fastphi.load`. Raises ValueError for an unknown name.
    """
    return native.load(path(name), device=device, dtype=dtype, backend=backend)


def path(name: str) -> Path:
    """The file of a pretrained model."""
    validate.choice(name, "name", names())
    return _folder() / f"{name}.safetensors"


def card(name: str = "natural64-small") -> str:
    """What a pretrained model is: data and their terms, recipe, measurements; Markdown."""
    return path(name).with_suffix(".md").read_text(encoding="utf-8")


def resolve(model: Any) -> Any:
    """A path as it is, or the file of a pretrained model where a name of one was given instead."""
    text = str(model)
    return path(text) if text in names() and not Path(text).exists() else model


def _folder() -> Path:
    return Path(str(resources.files("fastphi.checkpoint")))
