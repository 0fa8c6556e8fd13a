"""Values for the pretended GPU: each operator on CUDA tensors is its CPU kernel on the same memory, which
is the host's; Triton's kernels are what tests/engine/gpu/emulated.py states of them, or run in its
interpreter. At once, or as nodes of the graph that a stream captures.

Import it before anything else of torch's. `complaints()`: races, wrong devices, what breaks captures.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

DRIVER = ctypes.CDLL("libcuda.so.1")
RUNTIME = ctypes.CDLL("libcudart.so.13")
Call = ctypes.CFUNCTYPE(None, ctypes.c_long, ctypes.c_void_p)
P, SIZE = ctypes.c_void_p, ctypes.c_size_t
DRIVER.pretend_emulate.argtypes = [P, ctypes.c_long, ctypes.c_char_p]
DRIVER.pretend_captures.argtypes = [P]
DRIVER.pretend_access.argtypes = [P, P, SIZE, ctypes.c_int, ctypes.c_char_p]
DRIVER.pretend_complaints.restype = DRIVER.pretend_counts.restype = ctypes.c_char_p
RUNTIME.cudaMemcpyAsync.argtypes = [P, P, SIZE, ctypes.c_int, P]
RUNTIME.cudaStreamSynchronize.argtypes = [P]

# What torch does to the description of a tensor alone: its own code does that.
OF_DESCRIPTIONS = frozenset(
    """empty.memory_format empty_strided as_strided view view.dtype _reshape_alias unfold set_
    set_.source_Storage set_.source_Storage_storage_offset set_.source_Tensor resize_ record_stream
    is_pinned _pin_memory is_set_to view_as_real view_as_complex _efficientzerotensor alias""".split()
)
_failed: list[BaseException] = []


def complaints() -> list[str]:
    """What a real device would not have done, or have done wrong, since the last call."""
    found = DRIVER.pretend_complaints().decode().splitlines()
    found += [f"within a kernel: {type(e).__name__}: {e}" for e in _failed]
    _failed.clear()
    return found


# --- work in a stream ---------------------------------------------------------------------------------


class Work:
    """A kernel's stand-in: what it runs, and the tensors that it reads and writes."""

    def __init__(
        self, name: str, run: Callable[[], Any], reads: list[Tensor], writes: list[Tensor]
    ) -> None:
        self.name, self.run = name.encode(), run
        self.reads, self.writes = map_places(reads), map_places(writes)


_work: dict[int, Work] = {}
_numbers = itertools.count(1)


@Call
def _called(number: int, stream: int) -> None:
    work = _work[number]
    try:
        for places, write in ((work.reads, 0), (work.writes, 1)):
            for at, size in places:
                DRIVER.pretend_access(stream, at, size, write, work.name)
        with torch.no_grad():
            work.run()
    except BaseException as error:  # nothing may pass through C++
        traceback.print_exc()
        _failed.append(error)


DRIVER.pretend_python(_called)


def submit(work: Work) -> None:
    """At once; or, where the current stream captures, at each replay."""
    number = next(_numbers)
    _work[number] = work
    stream = torch.cuda.current_stream().cuda_stream
    captures = DRIVER.pretend_captures(stream)
    error = DRIVER.pretend_emulate(stream, number, work.name)
    if not captures:
        del _work[number]
    if error:
        raise RuntimeError(f"CUDA error {error} of {work.name.decode()}")


def span(t: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if not t.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (1 + last) * t.element_size()


def map_places(tensors: list[Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), span(t)) for t in tensors if t.is_cuda and t.numel()]


def on_host(t: Tensor) -> Tensor:
    """The CPU tensor on a CUDA tensor's memory, strides and all."""
    if not t.numel():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    memory = (ctypes.c_char * span(t)).from_address(t.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8).view(t.dtype).as_strided(t.shape, t.stride())


def lowered(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_cuda:
        return on_host(value.detach())
    return value


# --- torch's operators and ours -----------------------------------------------------------------------


def as_cpu(op: Any) -> Callable[..., Any]:
    """The operator for CUDA tensors: its CPU kernel."""
    schema, name = op._schema, op.name()
    takes_device = any(a.name == "device" for a in schema.arguments)
    mutable = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    foreach = name.startswith("aten::_foreach") and name.split("::")[1].split(".")[0].endswith("_")

    def call(*args: Any, **kwargs: Any) -> Any:
        pairs: list[tuple[Tensor, Tensor]] = []

        def lower(a: Any) -> Any:
            if isinstance(a, Tensor) and a.is_cuda:
                pairs.append((a, on_host(a.detach())))
                return pairs[-1][1]
            if isinstance(a, torch.device) and a.type == "cuda":
                return torch.device("cpu")
            return None if isinstance(a, torch.Generator) else a

        device = next(
            (a.device for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor) and a.is_cuda),
            None,
        )
        device = device or kwargs.get("device") or torch.device("cuda", torch.cuda.current_device())
        cpu_args, cpu_kwargs = tree_map(lower, args), tree_map(lower, kwargs)
        if takes_device:
            cpu_kwargs["device"] = torch.device("cpu")
        out = op(*cpu_args, **cpu_kwargs)
        written = [t for a, w in zip(args, mutable, strict=False) if w for t in tree_leaves(a)]
        written += [
            t for a in schema.arguments if a.is_out for t in tree_leaves(kwargs.get(a.name))
        ]
        if foreach:  # which raise versions; the fused optimisers do not
            for t in tree_leaves(args[0]):
                torch.autograd.graph.increment_version(t)
        resized: list[tuple[Tensor, Tensor]] = []
        for t, c in pairs:
            if c.shape != t.shape:  # an out= that was of another size: written beside its memory
                t.resize_(c.shape)
                resized.append((on_host(t), c))
                resized[-1][0].copy_(c)
        made: list[Tensor] = []

        def lift(o: Any) -> Any:
            if not isinstance(o, Tensor):
                return o
            for t, c in pairs:
                if o is c:
                    return t
            fresh = torch.ops.aten.empty_strided.default(
                list(o.shape), list(o.stride()), dtype=o.dtype, device=device
            )
            if o.numel():
                on_host(fresh).copy_(o)
            made.append(fresh)
            return fresh

        result = tree_map(lift, out)
        # of CUDA tensors a replay holds the memory alone: who asks whether others hold them, as the
        # accumulation of gradients does, is answered as it would be
        targets, ours = [on_host(t) for t in made], [c for _, c in pairs]

        def again() -> None:
            found = op(*cpu_args, **cpu_kwargs)
            new = [
                x
                for x in tree_leaves(found)
                if isinstance(x, Tensor) and all(x is not c for c in ours)
            ]
            for target, x in (*zip(targets, new, strict=True), *resized):
                target.copy_(x)

        reads = [t for t, _ in pairs]
        writes = [t for t in written if isinstance(t, Tensor)] + made
        with torch.cuda.device(device):  # torch's own operators have such a guard
            captures = DRIVER.pretend_captures(torch.cuda.current_stream().cuda_stream)
            submit(Work(name, again if captures else lambda: None, reads, writes))
            if isinstance(out, (bool, int, float)):  # torch waits for what it tells the host
                RUNTIME.cudaStreamSynchronize(torch.cuda.current_stream().cuda_stream)
        return result

    return call


def copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """copy_: within the device a kernel; else by cudaMemcpyAsync, waited for unless `non_blocking`."""
    if to.is_cuda and source.is_cuda:
        return as_cpu(torch.ops.aten.copy_.default)(to, source, non_blocking)
    with torch.cuda.device(to.device if to.is_cuda else source.device):
        return _between(to, source, non_blocking)


def _between(to: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
    stream = torch.cuda.current_stream().cuda_stream
    there = source.expand_as(to)
    if there.is_cuda:
        there = there.to(to.dtype).contiguous()  # a kernel's work
    elif there.dtype != to.dtype or not there.is_contiguous():
        there = there.to(to.dtype).contiguous()
    plain = to.is_contiguous()
    into = to if plain else torch.empty(to.shape, dtype=to.dtype, device=to.device)
    size = to.numel() * to.element_size()
    if size:
        error = RUNTIME.cudaMemcpyAsync(into.data_ptr(), there.data_ptr(), size, 4, stream)
        if error:
            raise RuntimeError(f"CUDA error {error} of a copy")
    if not non_blocking:
        RUNTIME.cudaStreamSynchronize(stream)
    if not plain:
        to.copy_(into)
    return to


def cudnn_convolution(  # type: ignore[no-untyped-def]
    x: Tensor, weight: Tensor, padding, stride, dilation, groups, *_settings
) -> Tensor:
    """Which no CPU has: the one of all devices."""
    rest = (stride, padding, dilation, False, [0] * len(stride), groups)
    return torch.ops.aten.convolution.default(x, weight, None, *rest)


def item(t: Tensor) -> Any:
    with torch.cuda.device(t.device):
        RUNTIME.cudaStreamSynchronize(torch.cuda.current_stream().cuda_stream)
    return on_host(t.detach()).item()


def install() -> list[torch.library.Library]:
    libraries = {n: torch.library.Library(n, "IMPL") for n in ("aten", "fastphi")}
    for full in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        namespace, name = full.split("::")
        base, _, overload = name.partition(".")
        if namespace not in libraries or name in OF_DESCRIPTIONS or base in OF_DESCRIPTIONS:
            continue
        op = getattr(
            getattr(getattr(torch.ops, namespace), base, None), overload or "default", None
        )
        ours = namespace == "fastphi"
        if op is None or (ours and not torch._C._dispatch_has_kernel_for_dispatch_key(full, "CPU")):
            continue
        libraries[namespace].impl(name, as_cpu(op), "CUDA", allow_override=True)
    aten = libraries["aten"]
    for name in ("convolution_backward", "_convolution", "convolution", "_foreach_mul_.Scalar"):
        base, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, base), overload or "default")
        aten.impl(name, as_cpu(op), "CUDA", allow_override=True)
    aten.impl("cudnn_convolution", cudnn_convolution, "CUDA", allow_override=True)
    aten.impl("copy_", copy, "CUDA", allow_override=True)
    aten.impl("_local_scalar_dense", item, "CUDA", allow_override=True)
    return list(libraries.values())


# --- Triton's kernels ---------------------------------------------------------------------------------


def kernel(run: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher on CPU tensors, as work in a stream. It may write whatever it is given."""

    def launch(*args: Any, **kwargs: Any) -> None:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_cuda]
        devices = {t.device.index for t in given}
        if devices and devices != {torch.cuda.current_device()}:
            raise RuntimeError(
                f"{run.__name__}: tensors of device {sorted(devices)}, and device "
                f"{torch.cuda.current_device()} is current"
            )
        low = tree_map(lowered, (args, kwargs))
        submit(Work(run.__name__, lambda: run(*low[0], **low[1]), given, []))

    launch.__name__ = run.__name__
    return launch


@contextlib.contextmanager
def stated_kernels() -> Iterator[None]:
    """Each launcher as tests/engine/gpu/emulated.py states its contract."""
    import emulated
    from fastphi.triton_kernels import fused_layer, pack_taps

    pack = fused_layer.pack_weight

    def packed(
        weight: Tensor, into: Tensor, *, split: int | None = None, transposed: bool = False
    ) -> None:
        w = weight.flip(2, 3).transpose(0, 1) if transposed else weight
        into.copy_(pack(w.contiguous(), split, into.dtype))

    names = [n for n in vars(emulated) if n[0] == "_" and n.endswith(("_fwd", "_bwd"))]
    with contextlib.ExitStack() as stack:
        for name in names:
            made = kernel(getattr(emulated, name))
            stack.enter_context(mock.patch.object(emulated, name, made))
        stack.enter_context(mock.patch.object(pack_taps, "pack_taps", kernel(packed)))
        stack.enter_context(emulated.kernels())
        yield


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of operators that are registered twice, which is meant
    from fastphi import ops  # noqa: E402, F401  # its operators must be there first

    _kept = install()
