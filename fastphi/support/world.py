"""The ranks of a job: the processes that torchrun or srun started, and what they do together."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from fastphi import __version__
from fastphi.support.link import Gone, Link, initialised, told

__all__ = ["Gone", "World", "first_host", "told"]

T = TypeVar("T")
_link: Link | None = None


@dataclass(frozen=True)
class World:
    """The ranks of a job: this one's number, how many there are, the same of this machine's."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def here(cls) -> World:
        """From torch.distributed, where it is initialised, from the variables of torchrun, or of srun."""
        e = os.environ
        if (dist := initialised()) is not None or {"RANK", "WORLD_SIZE"} <= e.keys():
            at = (_number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1))
            if dist is not None:
                return cls(dist.get_rank(), dist.get_world_size(), *at)
            if {"MASTER_ADDR", "MASTER_PORT"} <= e.keys():
                return cls._checked(_number("RANK"), _number("WORLD_SIZE"), *at)
        if _of_srun():
            tasks = _tasks_per_node(e["SLURM_STEP_TASKS_PER_NODE"])
            at = (_number("SLURM_LOCALID"), tasks[_number("SLURM_NODEID", 0)])
            return cls._checked(_number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS"), *at)
        return cls()

    @classmethod
    def _checked(cls, rank: int, size: int, *at: int) -> World:
        if not 0 <= rank < size:
            raise ValueError(f"RANK, WORLD_SIZE: expected 0 <= rank < size, got {rank} of {size}")
        return cls(rank, size, *at)

    @property
    def address(self) -> tuple[str, int]:
        """Where the ranks meet: MASTER_ADDR and MASTER_PORT, else the step's first node, and a port that
        follows from the job's number."""
        e = os.environ
        port = 20000 + (_number("SLURM_JOB_ID", 0) * 64 + _number("SLURM_STEP_ID", 0)) % 20000
        host = first_host(e.get("SLURM_STEP_NODELIST", "localhost"))
        return e.get("MASTER_ADDR", host), _number("MASTER_PORT", port)

    def link(self, patience: float = 600) -> Link:
        """To the other ranks, made at the first call; it stays for as long as the process. Gone where the
        first rank has not come in so many seconds."""
        global _link
        if _link is None:
            _link = Link(self.rank, self.size, self.address, patience)
        return _link

    @contextlib.contextmanager
    def job(self, patience: float = 600) -> Iterator[World]:
        """Work that all ranks do together; ends when all of them have done theirs. Jobs may nest.

        patience: seconds in which every rank must have come. Gone where another rank has not, is gone
        or has failed. A rank that fails tells the others.
        """
        if self.size == 1:
            yield self
            return
        with self.link(patience).job(patience):
            yield self

    def check(self) -> None:
        """Gone where another rank is: to be called between pieces of work."""
        if self.size > 1:
            self.link().check()

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Calls to the other ranks: where one fails because a rank is gone, Gone says which."""
        if self.size == 1:
            yield
            return
        with self.link().connected():
            yield

    def heed(self) -> None:
        """This rank is on its way out, and takes the time to leave what it has whole."""
        if self.size > 1 and (watch := self.link().watch) is not None:
            watch.heeded.set()

    def gather(self, value: T) -> list[T]:
        """Everyone's value, in order of rank, on every rank."""
        return [value] if self.size == 1 else self.link().gather(value)

    def first(self, make: Callable[[], T]) -> T:
        """The first rank's make(), on every rank; its exception, too."""
        return make() if self.size == 1 else self.link().first(make)

    def cut(self, n: int) -> slice:
        """This rank's of `size` equal runs of n things."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def deal(self, n: int) -> Iterator[int]:
        """The numbers 0 ... n − 1, each to the rank that asks for it next."""
        if self.size == 1:
            yield from range(n)
            return
        take = self.link().dealer()
        while (i := take()) < n:
            yield i

    def agree(self, facts: dict[str, Any], name: str) -> None:
        """ValueError on every rank where one has other facts than the first, or another version."""
        facts = {"version of fastphi": __version__} | facts
        everyone = self.gather(facts)
        for rank, theirs in enumerate(everyone):
            if differ := [key for key in facts if theirs.get(key) != everyone[0].get(key)]:
                there, here = ([f"{v.get(k)}"[:40] for k in differ] for v in (theirs, everyone[0]))
                raise ValueError(
                    f"{name}: rank {rank} has another {', '.join(differ)} than rank 0 "
                    f"({', '.join(there)}; {', '.join(here)})"
                )


def _number(name: str, default: int | None = None) -> int:
    """What a launcher says. ValueError where it is no number."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name}: expected a whole number from the launcher, got {text!r}")
    return int(text)


def _of_srun() -> bool:
    """Whether srun started several of us (a batch script itself has a SLURM_PROCID, too, and one task)."""
    needed = {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID"}
    return needed <= os.environ.keys() and _number("SLURM_STEP_NUM_TASKS") > 1


def _tasks_per_node(text: str) -> list[int]:
    """ "2(x3),1" -> [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def first_host(nodes: str) -> str:
    """Of SLURM's list: "gpu[003-007,9],other" -> "gpu003"."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST: expected names of nodes, got {nodes!r}")
    return "".join(part or "" for part in found.groups())
