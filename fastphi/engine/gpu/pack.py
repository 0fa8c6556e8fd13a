"""A model's weights as the GPU engine's kernels read them, for its runner (runner.py)."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastphi.engine import ops
from fastphi.engine.gpu import library
from fastphi.engine.gpu.capture import captured
from fastphi.engine.network import Network
from fastphi.support.transfer import to_host

_version = attrgetter("_version")


class Weights(NamedTuple):
    """Of one layer: packed weight, in the engine's dtype; bias and gamma (C,) float32, or None; and
    cuDNN's form of the weight, where it may be asked (library.py)."""

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    library: tuple[Tensor, ...] = ()


class Packed:
    """A model's weights as the kernels read them: {"enc1.0": ..., "up3": ..., "dec3.0": ...}."""

    vouched: object | None = None  # who vouches for the weights since they were last summed up

    def __init__(self, model: Network, dtype: torch.dtype, stamp: tuple) -> None:
        self.dtype, self.stamp = dtype, stamp
        self.layers = {
            name: Weights(
                _pack(name, module.weight, dtype),
                *_vectors(module),
                _for_library(name, module, dtype),
            )
            for name, module in model.named_modules()
            if getattr(module, "weight", None) is not None
        }

    @staticmethod
    def key(parameters: list[Tensor]) -> tuple:
        first = parameters[0]
        try:
            versions = [*map(_version, parameters)]
        except RuntimeError:  # inference tensors have none
            versions = [0 if p.is_inference() else p._version for p in parameters]
        return first.device, first.dtype, [*map(Tensor.data_ptr, parameters)], versions

    @staticmethod
    def content(parameters: list[Tensor]) -> list[int]:
        """A sum of every parameter's bits: waits for the GPU."""
        return to_host(Content(parameters).sums()).tolist()

    def fits(self, other: Packed) -> bool:
        """Whether the other's values can be written over these."""
        return [(t.shape, t.device) for t in self._tensors()] == [
            (t.shape, t.device) for t in other._tensors()
        ]

    def overwrite(self, other: Packed) -> None:
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs)
        self.stamp = other.stamp

    def _tensors(self) -> list[Tensor]:
        found = (t for w in self.layers.values() for t in (*w[:3], *w.library))
        return [t for t in found if t is not None]


class Content:
    """The sums of some parameters' bits, in memory of their own."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = [p.detach() for p in parameters]
        device = parameters[0].device
        self.lanes = torch.empty(len(parameters), 1024, dtype=torch.int64, device=device)
        self._sums = torch.empty(len(parameters), dtype=torch.int64, device=device)

    def sums(self) -> Tensor:
        dense = [p if p.is_contiguous() else p.contiguous() for p in self.parameters]
        ops.weights_content(dense, self.lanes)
        return torch.sum(self.lanes, dim=1, out=self._sums)


class Watch:
    """What torch's version counter does not see of a model's weights, without a wait: their content is
    asked of the device at one call, and told at a later one. Of parameters that stay where they are."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._calls, self._asked = 0, False
        self._content = Content(parameters)
        self._cuda = parameters[0].is_cuda
        self._host = torch.empty(len(parameters), dtype=torch.int64, pin_memory=self._cuda)
        self._there: torch.cuda.Event | None = torch.cuda.Event() if self._cuda else None
        self._graph: torch.cuda.CUDAGraph | None = None

    def told(self) -> list[int] | None:
        """The content at an earlier call, if that has come; else None."""
        if not self._asked or (self._there is not None and not self._there.query()):
            return None
        self._asked = False
        return self._host.tolist()

    def ask(self, stream: torch.cuda.Stream | None) -> None:
        """In the current stream, which that is. At most one is on its way."""
        if self._asked:
            return
        self._calls, self._asked = self._calls + 1, True
        if self._calls == 2 and self._cuda:  # a model that is called again and again
            self._graph = captured(self._launch, self._content.lanes.device)
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()
        if self._there is not None:
            self._there.record(stream)

    def __del__(self) -> None:
        if self._asked and self._there is not None:
            self._there.synchronize()  # a replay works in memory that torch thinks is free now

    def _launch(self) -> None:
        self._host.copy_(self._content.sums(), non_blocking=True)


def _pack(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    from fastphi.triton_kernels import first_layer, fused_layer, upsample

    if name == "enc1.0":
        return first_layer.pack_first_weight(weight, dtype)
    if name.startswith("up"):
        return upsample.pack_upsample_weight(weight, dtype)
    split = weight.shape[1] // 2 if _sources(name) == 2 else None
    return fused_layer.pack_weight(weight, split, dtype)


def _sources(name: str) -> int:
    """2 for a decoder block's first layer, which reads the up-sampled channels, then the skip's."""
    return 2 if name.startswith("dec") and name.endswith(".0") else 1


def _for_library(name: str, module: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    wanted = dtype == torch.bfloat16 and getattr(module, "gamma", None) is not None
    if not wanted or not library.table()["rows"]:
        return ()
    return library.split(module.weight, _sources(name), dtype)


def _vectors(module: Any) -> tuple[Tensor | None, Tensor | None]:
    found = (module.bias, getattr(module, "gamma", None))
    bias, gamma = (v if v is None else v.detach().to(torch.float32, copy=True) for v in found)
    return bias, gamma


class Transposed(Packed):
    """The weights of the encoder and the middle block as `conv_bwd` reads them."""

    def __init__(self, model: Network, dtype: torch.dtype, stamp: tuple) -> None:
        from fastphi.triton_kernels import conv_bwd

        self.dtype, self.stamp = dtype, stamp
        self.layers = {
            name: Weights(conv_bwd.pack_transposed_weight(module.weight, dtype), None, None)
            for name, module in model.named_modules()
            if getattr(module, "weight", None) is not None and name.startswith(("enc", "mid"))
        }
