"""What a training run needs of its processes: interruptions, several of them, the same bits."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Interrupts:
    """Ctrl-C and SIGTERM while training: at once, but within `hold()` they wait for its end.

    SIGINT raises KeyboardInterrupt, SIGTERM SystemExit(143). Outside the main thread, where Python
    delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._held = False
        self._pending: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self._held:
            self._pending = number
        elif number == signal.SIGTERM:
            raise SystemExit(128 + number)
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False
            number, self._pending = self._pending, None
        if number is not None:
            self._handle(number, None)


@dataclass(frozen=True)
class World:
    """The processes of a run: one, or those that torchrun started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> World:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), local)
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local)
        return cls()

    def join(self, device: torch.device) -> None:
        """Make the process group, unless there is one."""
        if self.size > 1 and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            # not at the end of the run: a second group would find the first one's addresses
            atexit.register(dist.destroy_process_group)

    def sum(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value: T) -> list[T]:
        """Everyone's value, in order of rank, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """The first process's make(), on every process; its exception, too."""
        if self.size == 1:
            return make()
        result: list[Any] = [None, None]
        if self.rank == 0:
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
