"""What a training run needs of its ranks: a group that adds gradients up, and the same bits."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastphi.support.world import World

T = TypeVar("T")


def join(world: World, device: torch.device) -> None:
    """Make the process group, unless there is one."""
    if world.size > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = dist.PrefixStore("group", world.link().group_store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
        # not at the end of the run: a second group would find the first one's addresses
        atexit.register(dist.destroy_process_group)


def total(world: World, x: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(x)
    return x


def from_first(world: World, make: Callable[[], T]) -> T:
    """`world.first` of values as large as a checkpoint: by the group, not by its store."""
    if world.size == 1:
        return make()
    result: list[Any] = [None, None]
    if world.rank == 0:
        try:
            result[0] = make()
        except Exception as error:
            result[1] = error
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Convolutions by algorithms that give the same bits every time: what an exact resume needs."""
    old = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = old
