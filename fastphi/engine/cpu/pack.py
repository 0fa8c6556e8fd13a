"""A model's weights as the CPU engine's kernels read them, and whether they are still the model's."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastphi.engine.cpu import bf16

Place: TypeAlias = tuple[str, int]  # of a layer: its block, and which of the block's it is


class Packed(NamedTuple):
    """Parameters in the kernels' order; the checksum of those of the model, and, where they are vouched
    for, who vouched, their addresses and versions."""

    tensors: list[Tensor]
    checksum: int
    names: list[str]
    seen: Any = None
    moved: bool = False  # the model's own into large pages: done at the second look

    def with_weights(self, own: dict[Place, Tensor]) -> list[Tensor]:
        """The tensors, with weights that are not packed, in torch's layout, in their places."""
        if not own:
            return self.tensors
        tensors = [*self.tensors]
        weights = [name for name in self.names if name.endswith(".weight")]
        at = {name: 3 * i for i, name in enumerate(weights)}
        for (block, i), weight in own.items():
            tensors[at[f"{block}.{i}.weight"]] = weight.detach().reshape(-1)
        return tensors


def pack(parameters: dict[str, Tensor], transposed: bool) -> list[Tensor]:
    """{"enc1.0.weight": ...}, in network order -> three tensors per convolution: weights, bias, gamma;
    empty for none. transposed: the weights for the gradient to the input."""
    packed = []
    for name, weight in parameters.items():
        layer, _, kind = name.rpartition(".")
        if kind != "weight":
            continue
        none = weight.new_empty(0)
        weight = weight.contiguous()
        if not weight.numel():  # of a layer that has it in place
            first = none
        elif layer.startswith("up"):
            first = torch.ops.fastphi.pack_upsample_weights(weight)
        else:
            first = torch.ops.fastphi.pack_conv_weights(weight, _own(layer, weight), transposed)
        rest = [parameters.get(f"{layer}.{kind}", none) for kind in ("bias", "gamma")]
        packed += [first, *(p.contiguous() for p in rest)]
    return packed


def pack_low(parameters: dict[str, Tensor], transposed: bool) -> list[Tensor]:
    """The same for AMX, weights in bfloat16; transposed: one tensor per convolution."""
    layers = [n.removesuffix(".weight") for n in parameters if n.endswith(".weight")]
    weights = {layer: parameters[f"{layer}.weight"] for layer in layers}
    if transposed:
        return bf16.together(
            [bf16.transposed(w, first=layer == "enc1.0") for layer, w in weights.items()]
        )
    kernels, rest = [], []
    image = layers[-1] if layers[-1].startswith("dec1.") else None  # to it, with no panels of 32
    for layer, weight in weights.items():
        up = layer.startswith("up")
        if up:
            first = bf16.upsample(weight)
        elif layer == "enc1.0":
            first = bf16.first(weight)
        elif layer == image:
            first = bf16.last(weight)
        else:
            first = bf16.conv(weight, _own(layer, weight))
        none = torch.empty(0)
        zeros = none if up else weight.new_zeros(weight.shape[0])
        both = parameters.get(f"{layer}.bias", zeros), parameters.get(f"{layer}.gamma", none)
        kernels.append(first)
        rest.append([bf16.padded(p) for p in both])
    joined = zip(bf16.together(kernels), rest, strict=True)
    return [part for kernel, both in joined for part in (kernel, *both)]


def tensors_of(block: torch.nn.Module) -> list[Tensor]:
    """A block's parameters, as its `parameters` (which take as long as a layer)."""
    parts = (block, *block._modules.values())
    found = [p for part in parts if part is not None for p in part._parameters.values()]
    return [p for p in found if p is not None]


def version(p: Tensor) -> int:
    return 0 if p.is_inference() else p._version


def checksum(tensors: list[Tensor]) -> int:
    """Of every bit of them. What it costs: docs/contract.md."""
    return torch.ops.fastphi.weights_checksum([*map(Tensor.contiguous, tensors)])


def _own(layer: str, weight: Tensor) -> int:
    """Input channels of the first source: a decoder block's first layer reads the up-sampled channels,
    then as many of the skip's."""
    cin = weight.shape[1]
    return cin // 2 if layer.startswith("dec") and layer.endswith(".0") else cin
