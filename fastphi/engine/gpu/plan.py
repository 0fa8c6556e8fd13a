"""What the GPU engine prepares (runner.py) for each batch size: the launches of the network, their
memory and the graph that replays them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fastphi.engine import ops
from fastphi.engine.gpu import library
from fastphi.engine.gpu.capture import captured
from fastphi.engine.gpu.pack import Packed

if TYPE_CHECKING:
    from fastphi.config import UNetConfig

Scalars: TypeAlias = Any  # (N,) float32; or Parts, which the first kernel that reads them merges


def not_captured(what: str) -> None:
    """RuntimeError where the caller captures a graph: what they captured now would never be there."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"fastphi: {what} for the first time while the current stream is captured in a CUDA graph;"
            " call the model once with such a batch first"
        )


def widths(config: UNetConfig) -> dict[str, int]:
    return dict(zip(config.block_names, (*config.channels, *config.channels[-2:0:-1]), strict=True))


def capacity(n: int) -> int:
    """Images that a plan for n of them is made for: up to a quarter more, so that a batch that shrinks one
    by one is captured a few times, not every time. Up to 8 images exactly n, and 16, 32, 64, ... too."""
    step = 1 << max(0, (n - 1).bit_length() - 3)
    return -(-n // step) * step


class Plan:
    """The launches of one batch size, in network order, and the memory that they work in.

    image (N, H, W, C) is what they read; denoised (N, C, H, W) float32, or means {block: (N, C)
    float32} up to block `until`, what they leave. In a graph that the caller captures they are made one
    by one, in memory of that graph's own, and nothing is kept.
    """

    def __init__(
        self,
        config: UNetConfig,
        packed: Packed,
        shape: tuple[int, ...],
        device: torch.device,
        until: str | None,
        precision: str,
    ) -> None:
        self.config, self.packed, self.device, self.precision = config, packed, device, precision
        self.n, height, width = shape
        self.image = self._new((*shape, config.image_channels), packed.dtype)
        self.ones = torch.ones(self.n, device=device)
        self.means: dict[str, Tensor] = {}
        if until is None:
            self.denoised = self._new((self.n, config.image_channels, height, width), torch.float32)
        else:
            names = config.block_names
            for name in names[: names.index(until) + 1]:
                self.means[name] = self._new((self.n, widths(config)[name]), torch.float32)
        # what they hold is tensors, not this plan: it must go, with its memory, as soon as it is let go
        self.launches: list[Callable[[], None]] = []
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._summed: list[tuple[Tensor, Any, int, Tensor]] = []  # sums, scalars, pixels, means
        self._network(until)
        self._finish()

    graph: torch.cuda.CUDAGraph | None = None
    tries = 3  # a capture may break because another thread waited for the device meanwhile
    graph_options: dict[str, bool] = {}  # of torch.cuda.CUDAGraph
    done: torch.cuda.Event | None = None  # the last use

    def _finish(self) -> None:
        on_gpu = self.device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return
        self.image.zero_()  # numbers, in rows that a smaller batch leaves as they are
        if on_gpu:
            self.done = torch.cuda.Event()
            self._launch()  # compiles and loads, which a capture must not
            self._capture()

    # Before and after a use: the memory is one user's at a time, on whichever streams they are.

    def wait(self, stream: torch.cuda.Stream | None) -> None:
        if self.done is not None and stream is not None:
            stream.wait_event(self.done)

    def used(self, stream: torch.cuda.Stream | None) -> None:
        if self.done is not None:
            self.done.record(stream)

    def run(self) -> None:
        if self.graph is None and self.done is not None and self.tries:
            self._capture()
        if self.graph is None:
            self._launch()
        else:
            self.graph.replay()

    def _launch(self) -> None:
        for launch in self.launches:
            launch()

    def _capture(self) -> None:
        self.tries -= 1
        self.graph = captured(self._launch, self.device, **self.graph_options)

    def __del__(self) -> None:
        if self.done is not None:
            self.done.synchronize()  # a stream may still work in the memory

    # The network, once.

    def _network(self, until: str | None) -> None:
        r: Any = self.image
        s: Scalars = self.ones
        skips = []
        for b in range(1, self.config.blocks + 1):
            r, pooled, s = self._block(f"enc{b}", r, s, pool=until != f"enc{b}", keep=self._decodes)
            if until == f"enc{b}":
                return self._combine()
            skips.append((r, s))
            r = pooled
        r, _, s = self._block("mid", r, s, keep=self._decodes)
        for b in range(self.config.blocks, 0, -1):
            if until == "mid" or until == f"dec{b + 1}":
                return self._combine()
            r, s = self._upsample(f"up{b}", r, s)
            r, _, s = self._block(f"dec{b}", r, s, skip=skips.pop())
        if self.means:
            return self._combine()
        self._image(r, s)

    @property
    def _decodes(self) -> bool:
        return not self.means or any(name.startswith("dec") for name in self.means)

    def _block(
        self,
        name: str,
        r: Any,
        s: Scalars,
        *,
        skip: Any = None,
        pool: bool = False,
        keep: bool = True,
    ) -> tuple[Any, Any, Scalars]:
        """A block's (output, its 2×2 means, scalars); an output that nobody reads is not written."""
        names = [key for key in self.packed.layers if key.startswith(f"{name}.")]
        if name == "dec1":
            names = names[:-1]  # the last one makes the image
        pooled = None
        for i, layer in enumerate(names):
            end = i == len(names) - 1
            r, pooled, s = self._layer(
                layer,
                r,
                s,
                skip if i == 0 else None,
                keep=keep or not end,
                pool=pool and end,
                mean=self.means.get(name) if end else None,
            )
        return r, pooled, s

    def _layer(
        self, name: str, r: Tensor, s: Scalars, skip: Any, *, keep: bool, pool: bool, mean: Any
    ) -> tuple[Any, Any, Scalars]:
        layer = self.packed.layers[name]
        (n, height, width, _), c_out = r.shape, len(layer.weight)
        r_out = self._take((n, height, width, c_out)) if keep else None
        pooled = self._take((n, height // 2, width // 2, c_out)) if pool else None
        options: dict[str, Any] = dict(r_out=r_out, pooled=pooled)
        s_out: Scalars = self.ones
        launch, inputs, partials, sums = self._kernel(name, r, s, skip, options)
        if layer.gamma is not None:
            s_out = self._parts(n, partials())
            options["partials"] = s_out.partials
        if mean is not None:
            options["sums"] = self._new((n, sums(), c_out), torch.float32)
            self._summed.append((options["sums"], s_out, height * width, mean))
        self.launches.append(lambda: launch(*inputs, **options))
        self._give(partials_of(s), options.get("r2"), None if r is self.image else r)
        return r_out, pooled, s_out

    def _parts(self, n: int, count: int) -> Any:
        """Room for a layer's statistics, and for what the first who reads them makes of them."""
        from fastphi.triton_kernels.scalars import Parts

        partials = self._take((n, count, 3), torch.float32)
        return Parts(partials, self.config.eps, self._new((n,), torch.float32))

    def _combine(self) -> None:
        """The means of all blocks in one launch; the last one's scalars are nobody else's to merge."""
        sums, scalars, pixels, means = ([*column] for column in zip(*self._summed, strict=True))
        partials, eps = partials_of(scalars[-1]), self.config.eps
        merged = [merged_of(s) for s in scalars]
        self.launches.append(lambda: ops.combine_means(sums, merged, pixels, means, partials, eps))

    def _kernel(
        self, name: str, r: Tensor, s: Scalars, skip: Any, options: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], Callable[[], int], Callable[[], int]]:
        """Launcher and arguments of a layer, and how many partial statistics and sums an image has."""
        from fastphi.triton_kernels import epilogue, first_layer, fused_layer

        layer = self.packed.layers[name]
        (n, height, width, c), c_out = r.shape, len(layer.weight)
        place = (height, width, self.packed.dtype, self.device)
        if name == "enc1.0":
            options["precision"] = self.precision
            inputs: tuple[Any, ...] = (r, layer.weight, layer.bias)
            sums = partial(first_layer.sums_per_image, c_out, *place)
            return first_layer.first_layer_fwd, inputs, sums, sums
        r2, s2 = skip or (None, None)
        options |= dict(r2=r2, s2=None if s2 is None else merged_of(s2))  # by the next block
        c_in = (c,) if r2 is None else (c, r2.shape[3])
        if layer.library and library.takes(c_in, c_out, height, width, n, self.device):
            return (
                library.layer_fwd,
                (r, s, layer.library, layer.bias, layer.gamma),
                partial(epilogue.partials_per_image, c_out, *place),
                partial(epilogue.sums_per_image, c_out, *place),
            )
        options["precision"] = self.precision
        return (
            fused_layer.fused_layer_fwd,
            (r, s, layer.weight, layer.bias, layer.gamma),
            partial(fused_layer.partials_per_image, c_in, c_out, *place),
            partial(fused_layer.sums_per_image, c_in, c_out, *place),
        )

    def _upsample(self, name: str, r: Tensor, s: Scalars) -> tuple[Tensor, Scalars]:
        from fastphi.triton_kernels import upsample

        layer, precision = self.packed.layers[name], self.precision
        n, height, width, _ = r.shape
        out = self._take((n, 2 * height, 2 * width, len(layer.weight) // 4))
        self.launches.append(
            lambda: upsample.upsample_fwd(r, s, layer.weight, layer.bias, out, precision=precision)
        )
        self._give(r)
        if layer.bias is None:
            return out, s
        self._give(partials_of(s))
        return out, self.ones  # a bias ends the deferral

    def _image(self, r: Tensor, s: Scalars) -> None:
        from fastphi.triton_kernels import last_layer

        layer, precision = list(self.packed.layers.values())[-1], self.precision
        out = self.denoised
        self.launches.append(
            lambda: last_layer.last_layer_fwd(
                r, s, layer.weight, layer.bias, out, precision=precision
            )
        )

    # Memory: what no later launch reads is given back, and taken by the next that needs as much.

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.packed.dtype
        free = self._free.get((torch.Size(shape).numel(), dtype))
        return free.pop().view(shape) if free else self._new(shape, dtype)

    def _give(self, *tensors: Tensor | None) -> None:
        for t in tensors:
            if t is not None:
                self._free.setdefault((t.numel(), t.dtype), []).append(t)


def merged_of(s: Scalars) -> Tensor:
    """(N,), as it is once the first kernel has read them."""
    return s if isinstance(s, Tensor) else s.s


def partials_of(s: Scalars) -> Tensor | None:
    """Where they are still in parts."""
    return None if isinstance(s, Tensor) else s.partials
