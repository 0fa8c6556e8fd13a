"""The known answers of tests/golden: models with their weights, and the arrays (see its README)."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import torch

from fastphi.checkpoint import authors
from fastphi.config import UNetConfig
from fastphi.unet import UNet

NAMES = ("public_small", "public_upbias")
_FOLDER = Path(__file__).parent / "golden"


@functools.cache
def _arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(_FOLDER / f"{name}.npz") as f:
        return {key: f[key] for key in f.files}


def authors_arguments(name: str) -> dict:
    """The sizes of the network, as in the authors' exp_arguments.pkl."""
    return json.loads(str(_arrays(name)["config"]))


def authors_state(name: str) -> dict[str, torch.Tensor]:
    """The state dict under the authors' names."""
    arrays = _arrays(name)
    return {
        key.removeprefix("weights/"): torch.from_numpy(value.copy())
        for key, value in arrays.items()
        if key.startswith("weights/")
    }


def load_golden(name: str, backend: str = "auto") -> tuple[UNet, dict[str, torch.Tensor]]:
    """(float32 model, arrays as float32 tensors) of one file."""
    a = authors_arguments(name)
    config = UNetConfig(
        channels=tuple(a["num_kernels"]),
        image_channels=a["num_channels"],
        enc_layers=tuple(a["num_enc_conv"]),
        mid_layers=a["num_mid_conv"],
        dec_layers=tuple(a["num_dec_conv"]),
        bias=a["bias"],
        upsample_bias=a["upsample_with_bias"],
        eps=a["eps"],
    )
    model = UNet(config, backend=backend)
    model.load_state_dict(authors.rename(authors_state(name), model, _FOLDER))
    skipped = ("config", "weights/")
    arrays = {
        key: torch.from_numpy(value.copy())
        for key, value in _arrays(name).items()
        if not key.startswith(skipped)
    }
    return model.eval(), arrays
