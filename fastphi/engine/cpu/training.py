"""A whole network with gradients in two calls, forward and back (csrc/cpu/unet_train.cpp)."""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastphi.engine import ops
from fastphi.engine.network import Network

if TYPE_CHECKING:
    from fastphi.config import UNetConfig

FEWEST = 16  # channels that Winograd's convolutions sum over


def serves(config: UNetConfig, x: Tensor, parameters: list[Tensor]) -> bool:
    """Whether the whole network can be served at once; where not, layer by layer."""
    return (
        all(t.dtype == torch.float32 for t in (x, *parameters))
        and ops.compute_dtype(x) == torch.float32
        and min(config.channels) >= FEWEST
        and not config.upsample_bias
    )


def denoised(model: Network, x: Tensor) -> Tensor | None:
    """The network's output (N, C, H, W), differentiable; None where it is not served at once."""
    if torch.compiler.is_compiling():  # it sees layers, and fuses what is between them
        return None
    twin = model.twin()
    named = dict(model.named_parameters(remove_duplicate=False))
    parameters = [named.get(name) for name in _names(twin)]  # other parts beside do not count
    if not serves(model.config, x, [p for p in parameters if p is not None]):
        return None
    memory = _memories.setdefault(model, Memory())
    memory.steps += 1
    if memory.steps == 2:  # there will be more
        ops.move_to_large_pages([p for p in parameters if p is not None])
    return _Whole.apply(twin, memory, x, *parameters)


@functools.lru_cache(maxsize=64)
def _names(twin: torch.nn.Module) -> list[str]:
    """Of weight, bias and gamma of each convolution, in network order, whether it has them or not."""
    weights = [name for name, _ in twin.named_parameters() if name.endswith(".weight")]
    layers = [name.removesuffix(".weight") for name in weights]
    return [f"{at}.{kind}" for at in layers for kind in ("weight", "bias", "gamma")]


class Memory:
    """What a step needs of it comes back when the last tensor in it is gone, and serves the next step:
    the system clears fresh pages, which took a fifteenth of a step."""

    def __init__(self) -> None:
        self._free: dict[str, np.ndarray] = {}
        self.steps = 0

    def take(self, kind: str, size: int) -> Tensor:
        """(size,) float32, its values undefined."""
        base = self._free.pop(kind, None)
        if base is None or not size <= len(base) - _LINE <= 2 * size:
            base = np.empty(size + _LINE, np.float32)
        first = -base.ctypes.data // base.itemsize % _LINE
        part = base[first : first + size]
        weakref.finalize(part, self._free.__setitem__, kind, base).atexit = False
        return torch.from_numpy(part)  # which holds `part`


_LINE = 16  # numbers of a line of the cache
_memories: weakref.WeakKeyDictionary[Network, Memory] = weakref.WeakKeyDictionary()


class _Whole(torch.autograd.Function):
    """(twin, memory, x, parameters in network order: weight, bias, gamma of each convolution, or None)."""

    @staticmethod
    def forward(
        ctx: Any, twin: Any, memory: Memory, x: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        x, sizes, dense = x.contiguous(), _sizes(twin.config), _dense(x, parameters)
        kept = memory.take("kept", torch.ops.fastphi.unet_train_size(x, *sizes, dense))
        image = torch.ops.fastphi.unet_train_fwd(x, *sizes, twin.config.eps, dense, kept)
        ctx.twin, ctx.memory = twin, memory
        ctx.save_for_backward(x, kept, *parameters)
        return image

    @staticmethod
    def backward(ctx: Any, d_image: Tensor) -> Any:
        x, kept, *parameters = ctx.saved_tensors
        need = ctx.needs_input_grad[2:]
        again = torch.is_grad_enabled()  # create_graph: the gradient is to be differentiated itself
        if again or torch._C._functorch.is_legacy_batchedtensor(d_image):  # is_grads_batched
            inputs = (x, *parameters)
            return None, None, *_plain_gradients(ctx.twin, inputs, need, d_image, again)
        dense, d_image = _dense(x, parameters), d_image.contiguous()
        size = sum(map(Tensor.numel, dense)) if any(need[1:]) else 0
        flat = ctx.memory.take("gradients", size)
        d_x = torch.ops.fastphi.unet_train_bwd(
            d_image, kept, *_sizes(ctx.twin.config), dense, need[0], flat
        )
        found: list[Tensor | None] = [d_x if need[0] else None]
        at = 0
        for p, needed in zip(parameters, need[1:], strict=True):
            size = 0 if p is None else p.numel()
            part = flat[at : at + size].view(p.shape) if p is not None and needed else None
            found.append(part)
            at += size
        return None, None, *found


def _sizes(config: UNetConfig) -> tuple[Any, ...]:
    return config.channels, config.enc_layers, config.mid_layers, config.dec_layers


def _dense(x: Tensor, parameters: Any) -> list[Tensor]:
    none = x.new_empty(0)
    return [none if p is None else p.detach().contiguous() for p in parameters]


@torch.enable_grad()
def _plain_gradients(
    twin: Any,
    inputs: tuple[Tensor | None, ...],
    need: tuple[bool, ...],
    d_image: Tensor,
    again: bool,
) -> list[Tensor | None]:
    """Of the network in plain PyTorch; again: with a graph of their own."""
    plain = copy.deepcopy(twin)
    plain.backend, plain.config = "reference", dataclasses.replace(twin.config, residual=False)
    # As views: one input may have been made of another, and that way is not this function's.
    x, *parameters = (t if t is None else t.view_as(t) for t in inputs)
    named = {n: p for n, p in zip(_names(twin), parameters, strict=True) if p is not None}
    out = torch.func.functional_call(plain, named, (x,))
    wanted: Any = [t for t, needed in zip((x, *parameters), need, strict=True) if needed]
    found = iter(torch.autograd.grad(out, wanted, d_image, create_graph=again, allow_unused=True))
    return [next(found) if needed else None for needed in need]
