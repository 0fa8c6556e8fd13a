"""Random sequences of what people do to a network (docs/contract.md), each on a model with its engine and
on its copy by plain PyTorch; after each gesture both are asked the same, and must answer the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz_case import some, tried
from gesture_case import GESTURES, Side
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastphi
from fastphi import ops
from fastphi.unet import UNet

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))
F = torch.func


# --- questions -----------------------------------------------------------------------------------------


def picture(rng: random.Random, dtype: torch.dtype) -> Tensor:
    n, (h, w) = rng.choice([1, 2, 3]), rng.choice([(4, 4), (8, 8), (12, 8)])
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    x = torch.rand(n, 3, h, w, generator=g, dtype=dtype)
    how = rng.randrange(10)
    if how == 0:
        return x.contiguous(memory_format=torch.channels_last)
    if how == 1:
        return x.transpose(2, 3)
    if how == 2:
        return x[:1].expand(n, -1, -1, -1)
    if how == 3:
        return torch.cat([x, x])[::2]
    if how == 4:
        return x * 10.0 ** rng.randrange(-12, 19)
    return x


def denoised(model: UNet, x: Tensor, rng: random.Random) -> list[Tensor]:
    with rng.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])():
        return [model(x)]


def means(model: UNet, x: Tensor, rng: random.Random) -> list[Tensor]:
    until = rng.choice([None, "mid", "enc2", "dec2"])
    with torch.no_grad():
        return list(model.block_means(x, until).values())


def gradients(model: UNet, x: Tensor, rng: random.Random) -> list[Tensor]:
    x = x.detach().clone().requires_grad_(rng.random() < 0.7)
    wanted = [p for p in (x, *model.parameters()) if p.requires_grad]
    loss = model(x).square().mean() if rng.random() < 0.5 else model.phi(x).square().mean()
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [g if g is not None else torch.zeros(1) for g in found]


def pushed(model: UNet, x: Tensor, rng: random.Random) -> list[Tensor]:
    return list(F.jvp(rng.choice([model, model.phi]), (x,), (torch.ones_like(x),)))


def pulled(model: UNet, x: Tensor, rng: random.Random) -> list[Tensor]:
    return [F.grad(lambda y: model.phi(y).square().sum())(x)]


def mapped(model: UNet, x: Tensor, rng: random.Random) -> list[Tensor]:
    return [F.vmap(model.phi)(torch.stack([x, 0.5 * x]))]


def matched(model: UNet, x: Tensor, rng: random.Random) -> list[Tensor]:
    width = model.config.channels[-1]
    found = fastphi.match_phi(model, x, torch.full((width,), 0.2, dtype=x.dtype), max_iter=2)
    return [found.losses]  # Adam's first steps are signs: of a rounding error, either one


def vouched(model: UNet, x: Tensor, rng: random.Random) -> list[Tensor]:
    with fastphi.frozen(model), torch.no_grad():
        return [model(x), model.phi(x)]


QUESTIONS = [
    denoised,
    denoised,
    means,
    means,
    gradients,
    gradients,
    pushed,
    pulled,
    mapped,
    vouched,
]
QUESTIONS.append(matched)


def answer(f: Callable[[], list[Tensor]]) -> list[Tensor] | Exception:
    try:
        return [t.detach().clone() for t in f()]
    except Exception as error:
        return error


def difference(a: Any, b: Any, tolerance: float) -> str | None:
    if isinstance(a, Exception) or isinstance(b, Exception):
        if isinstance(a, Exception) and isinstance(b, Exception):
            return None
        return f"engine {str(a)[:300]!r}, plain {str(b)[:300]!r}"
    if [t.shape for t in a] != [t.shape for t in b]:
        return f"shapes {[t.shape for t in a]}, {[t.shape for t in b]}"
    for found, expected in zip(a, b, strict=True):
        found, expected = found.double(), expected.double()
        finite = expected.isfinite()
        if not torch.equal(finite, found.isfinite()):
            return "another place of NaN or Inf"
        if finite.any():
            scale = float(expected[finite].abs().max())
            error = float((found - expected)[finite].abs().max())
            if error > tolerance * scale + 1e-30:
                return f"off by {error:.3g} of {scale:.3g}"
    return None


@pytest.mark.filterwarnings("ignore")
@some(60)
@given(seed=st.integers(0, 2**63))
def test_any_sequence_of_gestures_is_what_the_modules_do(seed):
    rng = random.Random(seed)
    dtype, tolerance = rng.choice([(torch.float64, 1e-8), (torch.float32, 2e-3)])
    torch.manual_seed(seed % 2**31)
    config = fastphi.UNetConfig(
        channels=(4, 6, 8),
        dec_layers=3,
        upsample_bias=rng.random() < 0.3,
        residual=rng.random() < 0.2,
    )
    model = UNet(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)
    plain = copy.deepcopy(model)
    plain.backend = "reference"
    sides, done = (Side(model), Side(plain)), []
    try:
        for _ in range(rng.choice([3, 6, 12])):
            gesture, question = rng.choice(GESTURES), rng.choice(QUESTIONS)
            done += [gesture.__name__, f"{question.__name__}?"]
            state = rng.getstate()
            raised = []
            for side in sides:
                rng.setstate(state)
                raised.append(answer(lambda s=side, g=gesture: g(s, rng) or []))
            assert type(raised[0]) is type(raised[1]), (done, raised)
            tried["gestures"] += 1
            state = rng.getstate()
            answers = []
            for side in sides:
                rng.setstate(state)
                x = picture(rng, next(side.model.parameters()).dtype)
                answers.append(answer(lambda s=side, x=x, q=question: q(s.model, x, rng)))
            problem = difference(*answers, tolerance)
            assert problem is None, (seed, done, problem)
    finally:
        for side in sides:
            for handle in side.handles:
                handle.remove()
