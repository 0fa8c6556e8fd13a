"""fastphi: what a diffusion denoiser knows about images, fast (arXiv 2506.01912).

model = fastphi.load_pretrained()                # or fastphi.load("model.safetensors")
store = fastphi.extract(model, "pack", "phi", sigmas=[0.5])
result = fastphi.reconstruct(model, targets=fastphi.targets.from_images(model, images))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Every public name and where it lives. Loaded when first used: `import fastphi` needs torch and numpy.
_PUBLIC = {
    "UNet": "unet",
    "UNetConfig": "config",
    "TrainingInfo": "config",
    "save": "checkpoint",
    "load": "checkpoint",
    "load_authors_checkpoint": "checkpoint",
    "load_pretrained": "checkpoint.pretrained",
    "pack": "data",
    "PackedImages": "data",
    "frozen": "engine",
    "extract": "phi",
    "PhiStore": "phi",
    "match_phi": "sampling",
    "MatchResult": "sampling",
    "reconstruct": "sampling",
    "Reconstruction": "sampling",
    "sample": "sampling",
}
_MODULES = {
    "data": "data",
    "engine": "engine",
    "noise": "noise",
    "ops": "engine.ops",
    "pretrained": "checkpoint.pretrained",
    "reference": "reference",
    "targets": "targets",
    "train": "train",
    "validate": "support.validate",
}

__all__ = sorted([*_PUBLIC, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"fastphi.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"fastphi.{_MODULES[name]}")
    raise AttributeError(f"module 'fastphi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from fastphi import data, engine, noise, reference, targets, train
    from fastphi.checkpoint import load, load_authors_checkpoint, pretrained, save
    from fastphi.checkpoint.pretrained import load_pretrained
    from fastphi.config import TrainingInfo, UNetConfig
    from fastphi.data import PackedImages, pack
    from fastphi.engine import frozen, ops
    from fastphi.phi import PhiStore, extract
    from fastphi.sampling import MatchResult, Reconstruction, match_phi, reconstruct, sample
    from fastphi.support import validate
    from fastphi.unet import UNet
