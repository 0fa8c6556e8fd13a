"""CUDA graphs of the engine's launches. A capture that fails costs the graph, not the process: the launches
are made one by one instead, and the log says so once.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Iterator

import torch

from fastphi.engine import ops

log = logging.getLogger("fastphi")

_capturing = threading.Lock()  # torch captures with state of the whole process: one at a time
_streams: dict[torch.device, torch.cuda.Stream] = {}
_told: list[str] = []


def captured(
    run: Callable[[], object], device: torch.device, **options: bool
) -> torch.cuda.CUDAGraph | None:
    """A graph of what `run` launches, on memory that was there before, or None where that fails.

    options: of torch.cuda.CUDAGraph.
    """
    with _capturing, _nothing_collected(), torch.cuda.stream(_stream(device)):
        try:
            # for what was loaded, and for what torch keeps of its generators, which every capture writes;
            # an error where another thread captures
            torch.cuda.synchronize(device)
            return _graph(run, **options)
        except Exception as error:
            _restore(device)
            _tell_once(error)
            return None


def _graph(run: Callable[[], object], **options: bool) -> torch.cuda.CUDAGraph:
    graph, pool = torch.cuda.CUDAGraph(**options), torch.cuda.graph_pool_handle()
    # other threads may allocate and wait meanwhile
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        run()
    finally:
        try:
            graph.capture_end()
        except Exception:  # torch then leaves the allocator's door to the graph's pool open
            with contextlib.suppress(Exception):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
    return graph


def _restore(device: torch.device) -> None:
    """A capture that failed leaves torch's generators in theirs, until the next one has ended."""
    one = torch.zeros(1, device=device)
    with contextlib.suppress(Exception):
        _graph(one.zero_)


def _tell_once(error: BaseException) -> None:
    while error.__context__ is not None:  # what broke it, not that it is broken
        error = error.__context__
    if not _told:
        _told.append(str(error))
        log.warning(
            "a CUDA graph could not be captured (%s: %s): the GPU engine makes its launches one by one, "
            "which small batches wait for",
            *(
                type(error).__name__,
                str(error).splitlines()[0] if str(error) else "no reason given",
            ),
        )


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """What is collected may wait for the device, which breaks a capture."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _stream(device: torch.device) -> torch.cuda.Stream:
    """One of our own for each device: torch's 32 may be anybody's, and what others ask of them meanwhile
    would become part of the graph."""
    if device not in _streams:
        with torch.cuda.device(device):
            place = ops.new_stream(torch.cuda.current_device())
        _streams[device] = torch.cuda.ExternalStream(place, device)
    return _streams[device]
