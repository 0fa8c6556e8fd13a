"""The GPU engine: Triton and CUDA kernels (triton_kernels/, csrc/cuda/), one CUDA graph per batch size.

Computes in bfloat16 (tensor cores, sums and statistics in float32), or in float32 with products as
torch's convolutions make them (`torch.backends.cudnn.conv.fp32_precision`). Where a gradient is needed,
the ops of ops.py beside it serve.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastphi.engine import ops
from fastphi.engine.gpu.layer import products
from fastphi.engine.gpu.match import MatchPlan, filled, rows_for
from fastphi.engine.gpu.pack import Packed, Watch
from fastphi.engine.gpu.plan import Plan, capacity, not_captured, widths
from fastphi.engine.network import Network, parameters_of

if TYPE_CHECKING:
    from fastphi.config import UNetConfig

log = logging.getLogger("fastphi")

DTYPES = (torch.bfloat16, torch.float32)
CHUNK = 256 * 64 * 64  # pixels in one launch: two waves of the smallest level's programs on 132 SMs
KEPT = 8  # graphs, each with its own memory; the one unused for longest goes first


def refuses(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the GPU engine cannot serve, or None."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    return _refuses_device(device) or refuses_network(config, dtype)


@torch.compiler.assume_constant_result  # torch.compile need not follow it into the driver
def _refuses_device(device: torch.device) -> str | None:
    if (reason := missing()) is not None:
        return reason
    return _too_old(device)


@functools.cache
def _too_old(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    return None


def refuses_network(config: UNetConfig, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"it computes in bfloat16 and float32, not in {str(dtype).removeprefix('torch.')}"
    if config.norm != "std":
        return f"norm {config.norm!r} subtracts a mean inside the ReLU, which cannot be deferred"
    if config.image_channels > 4:
        return (
            f"its first and last layers take at most 4 image channels, not {config.image_channels}"
        )
    return None


def missing() -> str | None:
    """What of the engine is not installed, or None."""
    try:
        from fastphi import triton_kernels
    except ImportError:
        return "fastphi.triton_kernels is not installed: pip install --no-build-isolation -e ."
    return ops.missing("cuda") or triton_kernels.missing()


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    """Tensors made in here can be written to later, whether the caller is in inference mode or not."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _put(x: Tensor, image: Tensor) -> None:
    """x (N, C, H, W), of any floating dtype, into a plan's image (N, H, W, C)."""
    dtype = x.dtype if x.dtype in DTYPES else torch.float32  # a model of another, under autocast
    ops.image_to_nhwc(x.detach().to(dtype).contiguous(), image)


class GPURunner:
    """The runner of the seam (`fastphi.engine.Runner`).

    The first call with a batch size (`capacity`) compiles and captures; later ones replay. Batches beyond
    `CHUNK` pixels run in parts. Safe in threads and on any stream. A call that the caller captures in a
    graph of their own is launch by launch part of it, in that graph's memory. Under autocast it computes
    in autocast's dtype. Means are float32, images of x's dtype.
    """

    vouched: object | None = None
    seen: list[Tensor] | None = None

    def __init__(self, model: Network) -> None:
        self.model = model
        self._packed: dict[torch.dtype, Packed] = {}
        self._plans: OrderedDict[tuple, Plan] = OrderedDict()
        self._compiled: set[tuple] = set()  # what a caller's graph may hold
        self._in_graphs: list[Packed] = []  # weights that callers' graphs read
        self._lock = threading.Lock()
        self._watch: Watch | None = None

    @torch.no_grad()
    def denoise(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        with self._lock:
            for rows, n, plan, stream in self._parts(x, until=None):
                _put(x[rows], plan.image[:n])
                plan.run()
                if self.model.config.residual:
                    torch.sub(x[rows], plan.denoised[:n], out=out[rows])
                else:
                    out[rows].copy_(plan.denoised[:n])
                plan.used(stream)
        return out

    @torch.no_grad()
    def block_means(self, x: Tensor, until: str | None = None) -> dict[str, Tensor]:
        return self._means(x, until, lambda rows, image: _put(x[rows], image))

    @torch.no_grad()
    def noisy_block_means(
        self,
        images: Tensor,
        rows: Tensor,
        sigma: float,
        seed: int,
        sample: Tensor,
        stream: int,
        draw: Tensor,
        *,
        until: str | None = None,
    ) -> dict[str, Tensor]:
        """ā of images[rows] + σz, the images decoded and the noise made on the device.

        images: (M, H, W, C) uint8 or (M, C, H, W) float32; rows, sample, draw: (N,) int64 (see
        `fastphi.ops.noisy_image`).
        """
        _, height, width, c = images.shape
        if images.dtype != torch.uint8:
            c, height, width = images.shape[1:]
        # never read: says shape, device and dtype
        dtype = parameters_of(self.model)[0].dtype
        x = torch.empty((), dtype=dtype, device=images.device).expand(len(rows), c, height, width)
        sigmas = torch.full((len(rows),), sigma, dtype=torch.float32, device=images.device)

        def fill(part: slice, image: Tensor) -> None:
            ops.noisy_image(
                images, rows[part], sigmas[part], seed, sample[part], stream, draw[part], image
            )

        return self._means(x, until, fill)

    @torch.no_grad()
    def match(
        self, x: Tensor, target: Tensor, weight: Tensor, lr: float, max_iter: int, tolerance: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "match: it waits for the GPU to see who has stopped, so it cannot be captured in a graph"
            )
        parts = []
        with self._lock:
            for rows, n, plan, stream in self._parts(x, "match", max_iter):
                try:
                    plan.start(x[rows], target[rows], weight, lr, max_iter, tolerance)
                    plan.loop(max_iter)
                    parts.append(plan.results(n, max_iter, x))
                finally:  # an interrupt, too: what is queued may still work in the memory
                    plan.used(stream)
        images, losses, updates, converged = zip(*parts, strict=True)
        return (
            torch.cat(images),
            torch.cat(losses, dim=1),
            torch.cat(updates),
            torch.cat(converged),
        )

    def _means(
        self, x: Tensor, until: str | None, fill: Callable[[slice, Tensor], None]
    ) -> dict[str, Tensor]:
        names, width = self.model.config.block_names, widths(self.model.config)
        names = names[: names.index(until or names[-1]) + 1]
        out = {
            b: torch.empty(len(x), width[b], dtype=torch.float32, device=x.device) for b in names
        }
        with self._lock:
            for rows, n, plan, stream in self._parts(x, until=names[-1]):
                fill(rows, plan.image[:n])
                plan.run()
                torch._foreach_copy_(
                    [mean[rows] for mean in out.values()], [plan.means[name][:n] for name in out]
                )  # one launch
                plan.used(stream)
        return out

    def _parts(self, x: Tensor, until: str | None, max_iter: int = 0) -> Any:
        """(rows, how many, the plan that serves them, the stream) of each part of a batch, the device made
        current.

        until: what the plan is for: the block to stop after, None for the image, or "match".
        """
        dtype = ops.compute_dtype(x)
        most = max(1, CHUNK // (x.shape[2] * x.shape[3]))
        with torch.cuda.device(x.device if x.is_cuda else -1):
            stream = torch.cuda.current_stream() if x.is_cuda else None
            packed = self._pack(dtype, stream)
            for start in range(0, len(x), most):
                rows = slice(start, min(start + most, len(x)))
                n = rows.stop - start
                if until == "match":
                    plan: Plan = self._match_plan(n, x, packed, max_iter, stream)
                else:
                    plan = self._plan(n, min(most, capacity(n)), x, packed, until)
                plan.wait(stream)
                yield rows, n, plan, stream

    def _pack(self, dtype: torch.dtype, stream: torch.cuda.Stream | None) -> Packed:
        """The packed weights: made when first needed, made anew in place when a parameter changed, as
        torch's version counter tells at every call, and their content at the first of a job (`frozen`), at
        other calls without a wait: at the one after (`Watch`)."""
        packed, parameters = self._packed.get(dtype), self.seen or parameters_of(self.model)
        self.seen = None  # of one call
        key = Packed.key(parameters)
        told = self.vouched is None or (packed is not None and packed.vouched is self.vouched)
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if packed is not None and told and packed.stamp[0] == key:
            if (
                self.vouched is not None
                or capturing
                or not self._changed(packed, parameters, stream)
            ):
                return packed
        key = (key, [] if capturing else Packed.content(parameters))
        if packed is not None and (
            packed.stamp == key or (capturing and packed.stamp[0] == key[0])
        ):
            packed.vouched = None if capturing else self.vouched
            return packed
        self._watch = None  # what is on its way is of the ones before
        if torch.cuda.is_available():
            not_captured("weights are packed")
        with _lasting():
            fresh = Packed(self.model, dtype, key)
        if packed is not None and packed.fits(fresh):
            for plan in self._plans.values():
                plan.wait(stream)
            with _lasting():
                packed.overwrite(fresh)  # the graphs hold its addresses
        else:
            self._plans.clear()
            self._packed = {dtype: fresh} if packed is not None else self._packed | {dtype: fresh}
            packed = fresh
        packed.vouched = self.vouched
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # plans on other streams read them next
        return packed

    def _changed(
        self, packed: Packed, parameters: list[Tensor], stream: torch.cuda.Stream | None
    ) -> bool:
        """Whether the weights' content at an earlier call was another than these'; asks for it anew."""
        if self._watch is None:
            with _lasting():
                self._watch = Watch(parameters)
        found = self._watch.told()
        self._watch.ask(stream)
        if found in (None, packed.stamp[1]):
            return False
        log.warning(
            "the model's weights have changed where torch does not count it (.data, numpy, a fused "
            "optimiser): the call before, and those since the change, were answered with the old ones; "
            "fastphi.frozen(model) around a job looks at its start"
        )
        return True

    def _plan(self, n: int, room: int, x: Tensor, packed: Packed, until: str | None) -> Plan:
        """Of `room` images; in a caller's graph of n, for this call alone."""
        precision = products(packed.dtype)
        kind = (*x.shape[2:], packed.dtype, x.device, until, precision)

        def make(count: int) -> Plan:
            shape = (count, *x.shape[2:])
            return Plan(self.model.config, packed, shape, x.device, until, precision)

        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            if kind not in self._compiled:
                not_captured(f"a batch of shape {(n, *x.shape[2:])} (N, H, W) runs")
            if packed not in self._in_graphs:
                self._in_graphs.append(packed)
            with _lasting():
                return make(n)
        plan = self._kept((room, *kind), lambda: make(room))
        self._compiled.add(kind)
        return plan

    def _match_plan(
        self, n: int, x: Tensor, packed: Packed, max_iter: int, stream: torch.cuda.Stream | None
    ) -> MatchPlan:
        precision = products(packed.dtype)
        shape, rows = (filled(n), *x.shape[2:]), rows_for(max_iter)
        plan = self._kept(
            (shape, packed.dtype, x.device, "match", rows, precision),
            lambda: MatchPlan(self.model, packed, shape, x.device, precision, rows),
        )
        if plan.transposed.stamp != packed.stamp:
            plan.wait(stream)
            with _lasting():
                plan.refresh(self.model)
        return plan

    def _kept(self, key: tuple, make: Callable[[], Any]) -> Any:
        """The plan of this key, made when first asked for."""
        if key not in self._plans:
            while len(self._plans) >= KEPT:
                self._plans.popitem(last=False)
            with _lasting():
                self._plans[key] = make()
        self._plans.move_to_end(key)
        return self._plans[key]
