"""What every command begins with, the model and where it runs; of several ranks the first one speaks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fastphi.support.world import World

if TYPE_CHECKING:
    import torch

    from fastphi.unet import UNet

log = logging.getLogger("fastphi")


def load(model: Path, device: str, backend: str) -> UNet:
    """The model where it is to run."""
    from fastphi import checkpoint
    from fastphi.checkpoint.pretrained import resolve

    place = find(device)
    return checkpoint.load(resolve(model), device=place, backend=backend)


def find(name: str) -> torch.device:
    """The device, which the log's first line tells."""
    from fastphi.support import device

    found, world = device.find(name), World.here()
    if found.type == "cpu":
        device.share_threads(world)
    log.info("%s", device.described(found, world))
    return found


def say(text: str) -> None:
    """A command's result."""
    if World.here().rank == 0:
        print(text)
