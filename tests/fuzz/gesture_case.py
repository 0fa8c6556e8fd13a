"""What people do to a network, one gesture a function: of one of two models, with random numbers that are
the same for the other."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastphi.unet import UNet

PARTS = ("enc1.0", "enc1.1", "mid.0", "mid.1", "mid.2", "dec1.0", "dec1.2", "dec2.1", "up1", "up2")


class Side:
    """One of the two models, and the handles of its hooks."""

    def __init__(self, model: UNet) -> None:
        self.model, self.handles = model, []

    def part(self, rng: random.Random) -> nn.Module:
        return self.model.get_submodule(rng.choice(PARTS))

    def parameter(self, rng: random.Random) -> Tensor:
        return rng.choice(list(self.model.parameters()))


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


class Own(nn.Module):
    def forward(self, h: Tensor, skip: Tensor | None = None) -> Tensor:
        return h.abs() + 0.1


class Sub(UNet):
    def _blocks(self, ops: Any, x: Tensor) -> Any:
        for name, h in super()._blocks(ops, x):
            yield name, h + 1 if name == "mid" else h


def numbers(like: Tensor, rng: random.Random) -> Tensor:
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    return torch.randn(like.shape, generator=g, dtype=like.dtype)


def write_data(s: Side, rng: random.Random) -> None:
    s.parameter(rng).data.flatten()[-1:] = rng.uniform(-1, 1)


def write_numpy(s: Side, rng: random.Random) -> None:
    p = s.parameter(rng).detach().numpy()
    p.reshape(-1)[rng.randrange(p.size)] *= -2


def write_in_place(s: Side, rng: random.Random) -> None:
    with torch.no_grad():
        s.parameter(rng).mul_(rng.uniform(0.5, 1.5))


def write_swap(s: Side, rng: random.Random) -> None:
    p = s.parameter(rng)
    if len(p) > 1:
        p.data[[0, 1]] = p.data[[1, 0]]


def write_pointer(s: Side, rng: random.Random) -> None:
    p = s.parameter(rng)
    p.data = p.detach() + 0.1 * numbers(p, rng)


def write_fused(s: Side, rng: random.Random) -> None:
    p = s.parameter(rng)
    if p.requires_grad and p.is_leaf:
        p.grad = numbers(p, rng)
        torch.optim.SGD([p], lr=0.05, fused=True).step()


def new_parameter(s: Side, rng: random.Random) -> None:
    part = s.part(rng)
    if isinstance(w := getattr(part, "weight", None), nn.Parameter):
        part.weight = nn.Parameter(0.5 * numbers(w, rng))


def of_another_shape(s: Side, rng: random.Random) -> None:
    part, name = s.part(rng), rng.choice(["gamma", "bias", "weight"])
    shape = rng.choice([(1,), (3,), (8,), (8, 5, 3, 3)])
    if isinstance(getattr(part, name, None), nn.Parameter):
        dtype = next(s.model.parameters()).dtype
        setattr(part, name, nn.Parameter(torch.full(shape, 0.3, dtype=dtype)))


def without(s: Side, rng: random.Random) -> None:
    part, name = s.part(rng), rng.choice(["gamma", "bias"])
    if hasattr(part, name):
        setattr(part, name, None)


def tied(s: Side, rng: random.Random) -> None:
    s.model.mid[1].weight = s.model.mid[2].weight


def loaded(s: Side, rng: random.Random) -> None:
    state = {name: 0.9 * v for name, v in s.model.state_dict().items()}
    s.model.load_state_dict(state)


def forward_hook(s: Side, rng: random.Random) -> None:
    replace = rng.random() < 0.5

    def hook(module: Any, inputs: Any, out: Tensor) -> Tensor | None:
        assert out.dim() == 4
        return 1.5 * out + 0.1 if replace else None

    s.handles.append(s.part(rng).register_forward_hook(hook))


def pre_hook(s: Side, rng: random.Random) -> None:
    s.handles.append(
        s.part(rng).register_forward_pre_hook(lambda m, inputs: (inputs[0] + 0.5, *inputs[1:]))
    )


def backward_hook(s: Side, rng: random.Random) -> None:
    s.handles.append(
        s.part(rng).register_full_backward_hook(
            lambda m, gi, go: tuple(g and None for g in ()) or None
        )
    )


def block_hook(s: Side, rng: random.Random) -> None:
    block = s.model.get_submodule(rng.choice(["enc1", "mid", "dec1"]))
    s.handles.append(block.register_forward_hook(lambda m, i, out: 2 * out))


def global_hook(s: Side, rng: random.Random) -> None:
    inner = s.model.mid[-1]
    hook = nn.modules.module.register_module_forward_hook
    s.handles.append(hook(lambda m, i, out: out + 0.2 if m is inner else None))


def unhooked(s: Side, rng: random.Random) -> None:
    if s.handles:
        s.handles.pop(rng.randrange(len(s.handles))).remove()


def parametrized(s: Side, rng: random.Random) -> None:
    parametrize.register_parametrization(s.part(rng), "weight", Doubled())


def normed(s: Side, rng: random.Random) -> None:
    parametrizations.weight_norm(s.part(rng))


def unparametrized(s: Side, rng: random.Random) -> None:
    for part in s.model.modules():
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight")
            return


def pruned(s: Side, rng: random.Random) -> None:
    prune.l1_unstructured(s.part(rng), "weight", 0.4)


def unpruned(s: Side, rng: random.Random) -> None:
    for part in s.model.modules():
        if prune.is_pruned(part) and "weight_mask" in part._buffers:
            prune.remove(part, "weight")
            return


def relu(s: Side, rng: random.Random) -> None:
    part = s.part(rng)
    part.relu = rng.random() < 0.3


def eps(s: Side, rng: random.Random) -> None:
    s.part(rng).eps = rng.choice([0.5, 1e-5])


def replaced(s: Side, rng: random.Random) -> None:
    s.model.mid[1] = Own()


def removed(s: Side, rng: random.Random) -> None:
    if len(s.model.mid) > 2:
        del s.model.mid[-1]


def overridden(s: Side, rng: random.Random) -> None:
    s.model.mid[0].forward = Own().forward


def subclassed(s: Side, rng: random.Random) -> None:
    s.model.__class__ = Sub


def beside(s: Side, rng: random.Random) -> None:
    s.model.head = nn.Linear(2, 2)


def frozen_part(s: Side, rng: random.Random) -> None:
    s.part(rng).requires_grad_(False)


def mode(s: Side, rng: random.Random) -> None:
    s.model.train(rng.random() < 0.5)


def deepcopied(s: Side, rng: random.Random) -> None:
    if not s.handles:
        s.model = copy.deepcopy(s.model)


def pickled(s: Side, rng: random.Random) -> None:
    if not s.handles:
        s.model = pickle.loads(pickle.dumps(s.model))


def layout(s: Side, rng: random.Random) -> None:
    s.model.to(memory_format=torch.channels_last)


def double(s: Side, rng: random.Random) -> None:
    s.model.double()


def nothing(s: Side, rng: random.Random) -> None:
    """So that a question follows a question."""


GESTURES: list[Callable[[Side, random.Random], None]] = [
    *(write_data, write_numpy, write_in_place, write_swap, write_pointer, write_fused),
    *(new_parameter, of_another_shape, without, tied, loaded),
    *(forward_hook, pre_hook, backward_hook, block_hook, global_hook, unhooked, unhooked, unhooked),
    *(parametrized, normed, unparametrized, unparametrized, pruned, unpruned, unpruned),
    *(relu, relu, eps, replaced, removed, overridden, subclassed, beside),
    *(frozen_part, mode, deepcopied, pickled, layout, double, nothing, nothing),
]
