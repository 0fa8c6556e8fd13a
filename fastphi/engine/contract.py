"""What an engine may stand in for: a call whose answer is the module's own (docs/contract.md).

A UNet is an nn.Module, and people hook, prune, replace and differentiate such. An engine knows its
weights and its configuration, no more; so before each call this module looks whether there is more.
"""

from __future__ import annotations

import ctypes
import functools
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastphi.engine import ops
from fastphi.engine.network import Network

# Beyond, sums of squares leave the range of the engines' numbers, or nearly: of a million values, times
# a thousand for gains.
LARGEST = {torch.float32: 1e12, torch.bfloat16: 1e12, torch.float64: 1e140}

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_METHODS = ("forward", "by")  # of a part; an instance may have its own
_PARAMETERS = frozenset((nn.Parameter, Tensor))
_facts = attrgetter("shape", "dtype", "device", "layout")
_Outline = tuple[tuple[type, Any, Any, Any], ...]


def reason(model: Network, x: Tensor, parameters: list[Tensor] | None = None) -> str | None:
    """Why this call is for the modules themselves, or None: an engine may serve it.

    parameters: a list that the model's are put into, in network order, where they were looked at.
    What it costs: docs/contract.md.
    """
    if torch.compiler.is_compiling():
        return _reason_in_graph(id(model))
    if (found := ops.transform()) is not None:
        return found
    if not _as_configured(model, x, [] if parameters is None else parameters):
        found = hooked(model) or difference(model, x)
    return found or out_of_range(x)


@torch.compiler.assume_constant_result  # whose arguments must be constants: a module is none in torch 2.11
def _reason_in_graph(place: int) -> str | None:
    """The same for a graph that is being made: of its image nothing but the shape is known.

    place: the model's id, whom the caller holds.
    """
    model: Network = ctypes.cast(place, ctypes.py_object).value
    return hooked(model) or difference(model, next(model.parameters()))


def watched(model: Network) -> bool:
    """Whether somebody sees how the modules are called, not only what comes out."""
    return (ops.transform() or hooked(model)) is not None


def hooked(model: Network) -> str | None:
    """A hook on a part of the model, or on all modules."""
    if _hook_for_all():
        return "a hook is registered for all modules"
    for name, part in model.named_modules():
        if part is not model and any(getattr(part, kind) for kind in _HOOKS):
            return f"{name} has a hook"
    return None


def _hook_for_all() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def difference(model: Network, x: Tensor) -> str | None:
    """Where the model is not what its configuration says, its parameters' values apart."""
    twin = model.twin()
    for name in twin.WALK:
        if name in model.__dict__ or getattr(type(model), name) is not getattr(type(twin), name):
            return f"the model has a {name} of its own"
    for name, fresh in twin._modules.items():
        part = model._modules.get(name)
        if (found := _difference(name, part, fresh, x)) is not None:
            return found
        mine, theirs = part._modules, fresh._modules  # type: ignore[union-attr]
        if mine.keys() != theirs.keys():
            return f"{name} has layers {', '.join(mine)}; its configuration has {', '.join(theirs)}"
        for child, new in theirs.items():
            if (found := _difference(f"{name}.{child}", mine[child], new, x)) is not None:
                return found
    return None


def _difference(name: str, part: Any, fresh: Any, x: Tensor) -> str | None:
    if type(part) is not type(fresh):
        return f"{name} is a {type(part).__name__}, not a {type(fresh).__name__}"
    for method in _METHODS:
        if method in part.__dict__:
            return f"{name} has a {method} of its own"
    for setting in ("relu", "eps"):
        have, want = getattr(part, setting, None), getattr(fresh, setting, None)
        if have is not want and have != want:
            return f"{name}.{setting} is {have}, its configuration has {want}"
    for key, new in fresh._parameters.items():
        p = part._parameters.get(key)
        if new is None and p is not None:
            return f"{name}.{key} is there, and its configuration has none"
        if new is not None and (
            (type(p) not in _PARAMETERS and not torch.compiler.is_compiling())
            or p.shape != new.shape
            or p.dtype != x.dtype
            or p.device != x.device
            or p.layout != torch.strided
        ):
            have = "no parameter" if p is None else f"{type(p).__name__} {tuple(p.shape)}"
            kind = "" if p is None else f", {p.dtype} on {p.device}, {p.layout}"
            return (
                f"{name}.{key} is {have}{kind}; expected a parameter {tuple(new.shape)}, {x.dtype} "
                f"on {x.device}"
            )
    return None


def _as_configured(model: Network, x: Tensor, parameters: list[Tensor]) -> bool:
    """Whether it has no hook and no difference, in a tenth of their time (they say which). The parameters
    are put into a list that was empty."""
    del parameters[:]
    twin: nn.Module = model.twin()
    if (
        _hook_for_all()
        or type(model) is not type(twin)
        or not model.__dict__.keys().isdisjoint(model.WALK)
    ):
        return False
    if not _parts_are(model.__dict__["_modules"], _outline(twin), parameters):
        return False
    wanted = _facts_of(twin, x.dtype, x.device)
    return [*map(_facts, parameters)] == wanted and _PARAMETERS.issuperset(map(type, parameters))


def _parts_are(modules: Any, outline: _Outline, parameters: list[Tensor]) -> bool:
    """Whether each part has the outline's class and settings, no hook and no method of its own; collects
    the parameters on the way."""
    if len(modules) != len(outline):
        return False
    for module, (kind, relu, eps, parts) in zip(modules.values(), outline, strict=True):
        d = module.__dict__
        if (
            module.__class__ is not kind
            or d["_forward_pre_hooks"]
            or d["_forward_hooks"]
            or d["_backward_pre_hooks"]
            or d["_backward_hooks"]
            or "forward" in d
            or "by" in d
            or d.get("relu") is not relu
            or d.get("eps") != eps
        ):
            return False
        parameters += [p for p in d["_parameters"].values() if p is not None]
        if parts and not _parts_are(d["_modules"], parts, parameters):
            return False
    return True


@functools.lru_cache(maxsize=64)
def _outline(twin: nn.Module) -> _Outline:
    """Of each part: class, relu, eps, parts."""
    return tuple(
        (type(part), getattr(part, "relu", None), getattr(part, "eps", None), _outline(part))
        for part in twin._modules.values()
        if part is not None
    )


@functools.lru_cache(maxsize=64)
def _facts_of(twin: nn.Module, dtype: torch.dtype, device: torch.device) -> list[tuple[Any, ...]]:
    return [(p.shape, dtype, device, torch.strided) for p in twin.parameters()]


def out_of_range(x: Tensor) -> str | None:
    """Why an image's values are beyond the engines' range, or None. A GPU's are not looked at: that
    would wait for it."""
    if x.device.type != "cpu" or x.dtype not in LARGEST or ops.missing() is not None:
        return None
    found = torch.ops.fastphi.largest_magnitude(x.detach())
    largest = LARGEST[x.dtype]
    return f"x has values of {found:.3g}, beyond {largest:g}" if found > largest else None
