"""What a training run needs of its ranks: a group that adds gradients up, and the same bits."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.futures import Future

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
    """The sum over all ranks, in their order: the same bits on all of them, however they are connected."""
    if world.size == 1:
        return x
    everyone = [torch.empty_like(x) for _ in range(world.size)]
    dist.all_gather(everyone, x)
    return _in_order(everyone)


def mean_gradient(world: World, bucket: dist.GradBucket) -> Future[Tensor]:
    """What DistributedDataParallel is to do with the ranks' gradients: their mean, summed in order of rank.

    Its own sum has an order that depends on how the ranks are connected, and on each gradient's place among
    the others, which changes after a run's first step: other bits on other machines and after a resume.
    As much is sent: each rank sums up one piece, and sends that to all.
    """
    gradient = bucket.buffer()
    each = -(-len(gradient) // world.size)
    whole = F.pad(gradient, (0, each * world.size - len(gradient)))
    pieces = torch.empty_like(whole)
    dist.all_to_all_single(pieces, whole)
    mine = _in_order(list(pieces.split(each))).div_(world.size)
    dist.all_gather(list(whole.split(each)), mine)
    done: Future[Tensor] = Future(devices=[whole.device] if whole.is_cuda else None)
    done.set_result(whole[: len(gradient)])
    return done


def _in_order(parts: list[Tensor]) -> Tensor:
    """Their sum, into the first."""
    for part in parts[1:]:
        parts[0] += part
    return parts[0]


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
