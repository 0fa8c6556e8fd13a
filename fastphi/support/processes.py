"""Work spread over spawned processes: one state for all, many items, results as they are done. And
reading ahead, by a thread."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from fastphi.support.interrupts import SIGNALS

T = TypeVar("T")


def prefetched(
    make: Callable[[Any], T], items: Iterable[Any], depth: int = 2
) -> Generator[T, None, None]:
    """make(item) of each item in order, by a thread that is up to `depth` items ahead."""
    ready: deque[futures.Future[T]] = deque()
    with futures.ThreadPoolExecutor(1, "fastphi-reads-ahead") as thread:
        try:
            for item in items:
                ready.append(thread.submit(make, item))
                if len(ready) > depth:
                    yield ready.popleft().result()
            while ready:
                yield ready.popleft().result()
        finally:
            for future in ready:
                future.cancel()


def spread(
    work: Callable[..., Any], state: Any, items: Iterable[tuple[Any, ...]], workers: int
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(item, work(state, *item)) of every item, in the order in which they are done.

    The state is sent once to each process; this one's threads are divided among them; two items per
    process are under way at any time. RuntimeError where a process dies.
    """
    items = iter(items)
    first = [*itertools.islice(items, workers)]  # with fewer items fewer processes
    if not first:
        return
    threads = max(1, torch.get_num_threads() // workers)
    setup = (work, pickled(state), threads)
    with futures.ProcessPoolExecutor(
        len(first), multiprocessing.get_context("spawn"), _start, setup
    ) as pool:
        under_way: dict[futures.Future[Any], tuple[Any, ...]] = {}
        waiting = itertools.chain(first, items)
        try:
            while True:
                while len(under_way) < 2 * workers and (item := next(waiting, None)) is not None:
                    under_way[pool.submit(_work, item)] = item
                if not under_way:
                    return
                done, _ = futures.wait(under_way, return_when=futures.FIRST_COMPLETED)
                for future in done:
                    yield under_way.pop(future), future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                'a worker process died (does the script lack `if __name__ == "__main__":`? was the '
                "process killed for memory?); what is written is kept: run it again, with that line, "
                "or with fewer workers or a smaller batch"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def pickled(state: Any) -> bytes:
    """In bytes: multiprocessing's own pickle would move a model's parameters to shared memory."""
    try:
        return pickle.dumps(state)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"workers: what they work on cannot be sent to other processes ({error}); is a function in "
            "it a lambda or defined inside another? Move it to a module, or use no workers"
        ) from None


_job: tuple[Callable[..., Any], Any]


def _start(work: Callable[..., Any], pickled: bytes, threads: int) -> None:
    global _job
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in SIGNALS:  # the parent's, which ends the workers: SLURM tells every process
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _job = work, pickle.loads(pickled)


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its workers: they watch it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(item: tuple[Any, ...]) -> Any:
    work, state = _job
    return work(state, *item)
