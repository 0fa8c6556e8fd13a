"""One rank's end of the store of torch.distributed, torchrun's own or one that the first rank keeps, in
which the ranks of a job meet.

While a job is under way each rank lets its heart beat there: one that is killed is missed by the others,
who say so and end, instead of waiting for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from fastphi.support.interrupts import RESUMABLE, Stopped

log = logging.getLogger("fastphi")

_BEAT = 0.5  # seconds from one beat to the next
_MISSED = 20  # looks without a beat after which a rank is gone
_GRACE = 5.0  # seconds in which a rank that computes may end by itself
_PIECE = 4 << 20  # bytes of a value that the store takes at a time


class Gone(RuntimeError):
    """Another rank is gone, or has ended with an error: this one cannot go on.

    mine: whether this rank is the one to say so.
    """

    def __init__(self, text: str, mine: bool) -> None:
        super().__init__(text)
        self.mine = mine

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.mine)


def told(error: BaseException) -> bool:
    """Whether it is for this rank to say why a job has ended."""
    return error.mine if isinstance(error, Gone) else getattr(error, "told", True)


def initialised() -> Any:
    """torch.distributed, where somebody has made a group."""
    if "torch" not in sys.modules:  # which a command that only prints does not load
        return None
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() else None


def _torchruns() -> bool:
    """Whether torchrun keeps the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class Link:
    """rank, size: which of how many; address: host and port where the first keeps the store; patience:
    seconds in which it must have come."""

    def __init__(self, rank: int, size: int, address: tuple[str, int], patience: float) -> None:
        from torch import distributed as dist

        self.rank, self.size, self.address = rank, size, address
        self.depth = self.jobs = self.calls = 0
        self.watch: _Watch | None = None
        self.keeps = False  # the store, which goes with this process
        if (group := initialised()) is not None:
            store = group.distributed_c10d._get_default_store()
        elif _torchruns():
            store, _, _ = next(dist.rendezvous("env://"))
        else:
            self.keeps = rank == 0
            store = self._open(*address, patience)
        self.group_store, self.store = store, dist.PrefixStore("fastphi", store)

    def _open(self, host: str, port: int, patience: float) -> Any:
        from torch import distributed as dist

        try:
            return dist.TCPStore(
                host,
                port,
                self.size,
                self.keeps,
                timeout=timedelta(seconds=patience),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            if not self.keeps:
                late = f"rank 0 has not come to {host}, port {port}, in {patience:g} seconds"
                raise Gone(late, True) from error
            reason = str(error).split("\n", 1)[0]
            raise ValueError(f"MASTER_PORT: {port} cannot be opened ({reason})") from None

    @contextlib.contextmanager
    def job(self, patience: float) -> Iterator[None]:
        if self.depth == 0:
            self.jobs += 1
            self.watch = _Watch(self, patience)
            self.watch.start()
        self.depth += 1
        try:
            yield
            self.gather(None)  # until all are done
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self.depth -= 1
            if self.depth == 0 and self.watch is not None:
                self.watch.leave()
                self.watch = None

    def _fail(self, error: BaseException) -> None:
        """Tell the others, unless one of them has told before. error.told: whether it is this rank that
        says why the job has ended."""
        watch = self.watch
        if watch is None or isinstance(error, Gone) or hasattr(error, "told"):
            return
        if isinstance(error, SystemExit) and not isinstance(error, Stopped):
            return  # every rank's alike: a help text, say
        watch.heeded.set()
        kind = "" if isinstance(error, Stopped) else f"{type(error).__name__}: "
        watch.tell(f"rank {self.rank}: {kind}{error}")
        error.told = watch.mine  # type: ignore[attr-defined]

    def check(self) -> None:
        if self.watch is not None and self.watch.failed.is_set():
            self.watch.heeded.set()
            raise Gone(self.watch.text, self.watch.mine)

    def gather(self, value: Any) -> list[Any]:
        name = self._call()
        with self.connected():
            self._put(f"{name}/{self.rank}", value)
            return [self._get(f"{name}/{rank}") for rank in range(self.size)]

    def first(self, make: Callable[[], Any]) -> Any:
        name, value, error = self._call(), None, None
        if self.rank == 0:
            try:
                value = make()
            except Exception as raised:
                error = raised
        with self.connected():
            if self.rank == 0:
                self._put(name, (value, error))
            else:
                value, error = self._get(name)
        if error is not None:
            raise error
        return value

    def dealer(self) -> Callable[[], int]:
        """What gives 0, 1, 2, ..., each number to one rank."""
        name = self._call()

        def take() -> int:
            self.check()
            with self.connected():
                return self.store.add(name, 1) - 1

        return take

    def _call(self) -> str:
        """A name for what is exchanged: the ranks make the same calls in the same order."""
        self.calls += 1
        return f"{self.jobs}/{self.calls}"

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # who is gone is known soon
            watch = self.watch
            if watch is None or isinstance(error, Gone):
                raise
            watch.heeded.set()
            if not watch.failed.wait(2 * _BEAT * _MISSED):
                raise
            raise Gone(watch.text, watch.mine) from error

    def _put(self, name: str, value: Any) -> None:
        """In pieces, of which the store takes each at once; the last names how many there are."""
        content = pickle.dumps(value)
        pieces = range(0, len(content), _PIECE)
        for i in pieces:
            self.store.set(f"{name}:{i}", content[i : i + _PIECE])  # type: ignore[arg-type]
        self.store.set(name, str(len(content)))

    def _get(self, name: str) -> Any:
        """Waits as long as all are there: a rank may have hours of work left when this one is done."""
        pause = 0.001
        while not self.store.check([name]):
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        pieces = range(0, int(self.store.get(name)), _PIECE)
        return pickle.loads(b"".join(self.store.get(f"{name}:{i}") for i in pieces))


class _Watch(threading.Thread):
    """Beats for this rank, and listens: the first rank to all, all to the first.

    A rank is gone that has not beaten for so many of this rank's own looks: clocks do not matter, nor a
    stop of the whole job. One that computes, and does not end in time, is ended here: what it has written
    is kept.
    """

    def __init__(self, link: Link, patience: float) -> None:
        super().__init__(name="fastphi-watches-ranks", daemon=True)
        from torch import distributed as dist

        self.rank, self.size, self.host = link.rank, link.size, link.address[0]
        self.keeps, self.patience = link.keeps, patience
        # of its own: another thread's wait would hold the connection
        self.store = dist.PrefixStore(f"fastphi/{link.jobs}", link.group_store.clone())
        self.failed, self.heeded, self.left = (threading.Event() for _ in range(3))
        self.text, self.mine = "", False
        self.seen: dict[int, tuple[bytes, int]] = {}  # the last beat, and looks since
        self.store.set(f"host/{self.rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self.store.set(f"beat/{self.rank}", "0")

    def leave(self) -> None:
        """The job has ended, whichever way. Who keeps the store stays until the others have read it."""
        self.left.set()
        self.join(_GRACE)
        with contextlib.suppress(RuntimeError):
            self.store.set(f"beat/{self.rank}", "left")
            until = time.monotonic() + _GRACE
            others = [f"beat/{rank}" for rank in range(1, self.size)]
            while self.keeps and others and time.monotonic() < until:
                others = [b for b in others if not (self.store.check([b]) and self._left(b))]
                time.sleep(0.02)

    def tell(self, text: str) -> None:
        """Unless another rank has told something before: everyone ends for the same reason."""
        told = f"{self.rank} {text}"
        with contextlib.suppress(RuntimeError):  # the store is gone with who kept it
            told = self.store.compare_set("failed", "", told).decode()
        teller, self.text = told.split(" ", 1)
        self.mine = int(teller) == self.rank
        self.failed.set()

    def lost(self) -> None:
        """The store is, in which all would be told."""
        if not self.failed.is_set():
            keeper = "torchrun" if _torchruns() else f"rank 0 (on {self.host})"
            self.text, self.mine = f"{keeper}, which kept the store, is gone", True
            self.failed.set()

    def run(self) -> None:
        beats = 0
        while not self.left.wait(_BEAT):
            beats += 1
            try:
                self.store.set(f"beat/{self.rank}", str(beats))
                if self.store.check(["failed"]):
                    self.tell("")
                self._listen()
            except RuntimeError:
                self.lost()
            if self.failed.is_set():
                return self._end()

    def _left(self, beat: str) -> bool:
        return self.store.get(beat) == b"left"

    def _listen(self) -> None:
        others = range(1, self.size) if self.rank == 0 else (0,)
        for rank in others:
            name = f"beat/{rank}"
            beat = self.store.get(name) if self.store.check([name]) else b""
            last, looks = self.seen.get(rank, (b"", 0))
            looks = 0 if beat == b"left" or beat != last else looks + 1
            self.seen[rank] = (beat, looks)
            if beat and looks > _MISSED:
                where = self.store.get(f"host/{rank}").decode()
                self.tell(f"rank {rank} ({where}) is gone")
            elif looks * _BEAT > self.patience:
                self.tell(f"rank {rank} has not come in {self.patience:g} seconds")

    def _end(self) -> None:
        self.heeded.wait(_GRACE)
        if not self.heeded.is_set() and not self.left.is_set():
            if self.mine:
                log.error("%s; what is written is kept: the same command goes on", self.text)
            logging.shutdown()
            os._exit(RESUMABLE)
