"""Which device: the one that was named, or the best there is; of a machine's ranks each has its own."""

from __future__ import annotations

import os

import torch

from fastphi.support.world import World


def find(name: torch.device | str) -> torch.device:
    """ "auto" is a GPU where there is one; a "cuda" without a number is this rank's share of the GPUs.

    ValueError where the device cannot be used.
    """
    if isinstance(name, str) and name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            # srun may show each rank one GPU alone
            device = torch.device("cuda", World.here().local_rank % torch.cuda.device_count())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(
            f"device: {str(name)!r} cannot be used ({reason}); expected auto, cpu, cuda or cuda:N"
        ) from None
    return device


def share_threads(world: World) -> None:
    """A rank on a CPU takes its share of the machine's cores, unless OMP_NUM_THREADS says how many."""
    if world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        mine = torch.get_num_threads()
        bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else mine
        # cores that srun has bound to this rank are its own already
        if bound >= (os.cpu_count() or 1):
            torch.set_num_threads(max(1, mine // world.local_size))


def described(device: torch.device, world: World) -> str:
    """In words."""
    name = f"{device}"
    if device.type == "cuda":
        name += f" ({torch.cuda.get_device_name(device)})"
    elif device.type == "cpu":
        count = torch.get_num_threads()
        name += f", {count} thread{'s' * (count > 1)}"
    return f"device {name}" if world.size == 1 else f"{world.size} ranks; the first on {name}"
