"""The C++ ops with arguments that no caller of ours would hand over: an error or a result, nothing read or
written that is not the call's, and nothing written at all where there is an error.

The calls are those of real work, recorded; then one to three of their arguments are changed. Under
AddressSanitizer (make sanitize, make fuzz) a byte beyond a buffer ends the process.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fuzz_case import some, tried
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastphi
from fastphi import engine, noise, ops
from fastphi.engine import contract
from fastphi.engine.cpu import pack

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))

Call = tuple[Any, list[Any]]  # an op and its arguments
REFUSED = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, OverflowError)
REFUSED += (
    AttributeError,
)  # of a rule of shapes, in Python, of which a meta tensor makes torch ask


class Recorder(TorchDispatchMode):
    """Every call of an op of ours, its arguments as they were before it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        if op.namespace == "fastphi" and arguments:
            self.calls.append((op, [copied(a) for a in arguments]))
        return op(*arguments, **(options or {}))


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [copied(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """Of every op, by networks of several widths, in both precisions, forwards and backwards."""
    with pytest.MonkeyPatch.context() as patch, Recorder() as recorder:
        # a mode is at work: the recorder
        patch.setattr(contract, "reason", lambda *arguments: None)
        patch.setattr(ops, "transform", lambda: None)
        torch.manual_seed(0)
        for dtype in (torch.float32, torch.float64):
            for channels, size in (((4, 6), 4), ((16, 32), 8), ((64, 64), 8)):
                use(fastphi.UNet(fastphi.UNetConfig(channels=channels)).to(dtype), size)
        low = fastphi.UNet(fastphi.UNetConfig(channels=(32, 64)))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            low.phi(torch.rand(2, 3, 8, 8))
            if "unet_fwd_bf16" in {op.__name__.split(".")[0] for op, _ in recorder.calls}:
                fastphi.match_phi(low, torch.rand(2, 3, 8, 8), torch.rand(2, 64), max_iter=2)
        for op, arguments in others():
            op(*arguments)
    seen = {op.name() for op, _ in recorder.calls}
    known = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastphi::")}
    elsewhere = ("gpu_", "bf16", "info", "new_stream")  # Python's, this processor's, of no tensor
    gone = {name for name in known if any(word in name for word in elsewhere)}
    assert seen >= known - gone, known - gone - seen
    return recorder.calls


def use(model: fastphi.UNet, size: int) -> None:
    x = torch.rand(2, 3, size, size, dtype=next(model.parameters()).dtype)
    (model(x).sum() + model.phi(x).sum()).backward()
    with torch.no_grad():
        assert engine.pick(model, x).name == "cpu"
        model(x)
        model.block_means(x)
        width = model.config.channels[-1]
        fastphi.match_phi(model, x, torch.rand(2, width, dtype=x.dtype), max_iter=2)
    pack.checksum(list(model.parameters()))
    noise.normal(3, [5, 9], 1, 2, (3, size, size))


def others() -> Iterator[Call]:
    """Ops that only GPU code calls, on a CPU: the same update, moments and layouts, a part at a time."""
    f, (n, c, h) = torch.ops.fastphi, (3, 5, 4)
    r = torch.rand
    whole = torch.zeros(n, dtype=torch.int64)
    flags = torch.ones(n, dtype=torch.int32)
    settings = torch.tensor([0.01, 0.0, 3.0], dtype=torch.float64)
    yield f.in_large_pages.default, [r(7, 9)]
    yield f.move_to_large_pages.default, [[r(7, 9), r(3).bfloat16()]]
    lanes = torch.zeros(2, 1024, dtype=torch.int64)
    yield f.weights_content.default, [[r(7, 9), r(3).bfloat16()], lanes]
    yield f.largest_magnitude.default, [r(2, 3, 4, 4)]
    yield f.image_to_nhwc.default, [r(n, 3, h, h), r(n, h, h, 3)]
    yield f.image_to_nchw.default, [r(n, h, h, 3), r(n, 3, h, h)]
    yield f.combine_moments.default, [r(n, 4, 3), 1e-5, r(n), r(n), r(n)]
    blocks = [[r(n, 4, c)] * 2, [r(n), r(n)], [16, 4], [r(n, c), r(n, c)]]
    yield f.combine_means.default, [*blocks, r(n, 4, 3), 1e-5, r(n), r(n)]
    numbers = [r(n), 3, whole + 1, 2, whole]  # sigma, seed, sample, stream, draw
    pixels = (255 * r(2, h, h, 3)).to(torch.uint8)
    yield f.noisy_image.default, [pixels, whole, *numbers, r(n, h, h, 3)]
    yield f.noisy_image.default, [r(n, 3, h, h), None, *numbers, r(n, h, h, 3)]
    state = [r(4, n), whole.clone(), flags.clone(), 0 * flags]  # losses, updates, active, converged
    of_phi = [r(n, c), r(n, c), r(c), r(n), 16, settings]
    yield f.match_loss.default, [*of_phi, *state, r(n, c), r(n, 1)]
    images = [r(n, 3, h, h) for _ in range(3)]
    adam = [r(n, 3, h, h), flags, whole + 1, settings, *images, r(n, h, h, 3)]
    yield f.match_adam.default, adam
    yield f.match_remaining.default, [flags, flags[:1].clone()]


TENSORS = "size dtype strides storage empty expanded offset values kind alias dimension".split()
WHOLE = [-1, 0, 1, 2, 7, -(2**31), 2**31, 2**62, 2**63 - 1, -(2**63)]
REAL = [float("nan"), float("inf"), -1.0, 0.0, 1e-300, 1e300]


def hostile_tensor(t: Tensor, rng: random.Random, others: list[Tensor]) -> Any:
    """Another tensor in its place, or the same one in another state."""
    how = rng.choice(TENSORS)
    if how == "size" and t.dim():
        shape = list(t.shape)
        at = rng.randrange(len(shape))
        shape[at] = max(0, rng.choice([shape[at] - 1, shape[at] + 1, 2 * shape[at], 0, 1]))
        return t.new_zeros(shape) if t.numel() < 1e6 else t
    if how == "dtype":
        kinds = [
            torch.float32,
            torch.float64,
            torch.bfloat16,
            torch.float16,
            torch.int64,
            torch.int32,
        ]
        return t.to(rng.choice([*kinds, torch.bool, torch.uint8, torch.complex64]))
    if how == "strides" and t.dim() > 1:
        a, b = rng.sample(range(t.dim()), 2)
        return t.transpose(a, b).contiguous().transpose(a, b)
    if how == "storage" and t.numel():
        room = t.untyped_storage().nbytes()
        t.untyped_storage().resize_(rng.choice([0, room // 2, max(0, room - 1)]))
        return t
    if how == "expanded" and t.numel():
        return t.flatten()[:1].expand(t.shape)
    if how == "offset" and t.numel():  # the end of a longer one, with nothing behind it
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    if how == "values" and t.numel():
        if t.is_floating_point() or t.is_complex():
            limits = torch.finfo(t.dtype)
            worst = [float("nan"), float("inf"), -1.0, 0.0, limits.max, limits.tiny]
        else:
            worst = [0] if t.dtype == torch.bool else [1, *whole_limits(t.dtype)]
        flat = t.flatten().clone()
        flat[rng.randrange(len(flat))] = rng.choice(worst)
        t = flat.view(t.shape)
        return t
    if how == "kind":
        return rng.choice(
            [None, t.to("meta"), t.to_sparse() if t.dim() else t, 3, [t], torch.rand(3).numpy()]
        )
    if how == "alias" and others:
        return rng.choice(others)
    if how == "dimension":
        return rng.choice([t[None], t.flatten(), t.flatten()[0] if t.numel() else t])
    return t.new_empty(0)


def whole_limits(dtype: torch.dtype) -> tuple[int, int]:
    limits = torch.iinfo(dtype)
    return limits.min, limits.max


def hostile(value: Any, rng: random.Random, others: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return hostile_tensor(value, rng, others)
    if isinstance(value, list) and value:
        value = list(value)
        at = rng.randrange(len(value))
        if rng.random() < 0.3:
            del value[at]
        elif rng.random() < 0.2:
            value.insert(at, value[at])
        else:
            value[at] = hostile(value[at], rng, others)
        return value
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(WHOLE)
    if isinstance(value, float):
        return rng.choice(REAL)
    return rng.choice([None, torch.rand(3), torch.rand(2, 3, 3, 3), [], -1])


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from tensors(item)


def state(t: Tensor) -> bytes | None:
    """What a call must leave as it was."""
    if not has(t):
        return None
    raw = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
    return raw.numpy().tobytes()


@pytest.mark.filterwarnings("ignore")
@some(400)
@given(seed=st.integers(0, 2**63))
def test_hostile_arguments_are_an_error_or_a_result(seed, calls):
    rng = random.Random(seed)
    for _ in range(10):
        # in words: a report that prints a tensor whose storage is gone reads what is not there
        problem = hostile_call(*rng.choice(calls), rng)
        assert problem is None, problem


def hostile_call(op: Any, recorded: list[Any], rng: random.Random) -> str | None:
    """What is wrong with what came of a call whose arguments were changed."""
    arguments, done = [copied(a) for a in recorded], []
    for at in rng.sample(range(len(arguments)), k=min(len(arguments), rng.choice([1, 1, 2, 3]))):
        arguments[at] = hostile(arguments[at], rng, list(tensors(arguments)))
        done.append(f"{op._schema.arguments[at].name} -> {describe(arguments[at])}")
    before = [(t, state(t)) for t in tensors(arguments)]
    writes = [
        t
        for value, spec in zip(arguments, op._schema.arguments, strict=True)
        if spec.alias_info is not None and spec.alias_info.is_write
        for t in tensors(value)
    ]
    tried["op calls"] += 1
    try:
        op(*arguments)
        written = {place(t) for t in writes}
    except REFUSED:
        written = set()
    except BaseException as error:
        return f"{op.name()}: {'; '.join(done)}: {type(error).__name__}: {error}"
    if any(state(t) != content for t, content in before if place(t) not in written):
        return f"{op.name()}: {'; '.join(done)}: wrote into what it may not"
    return None


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout == torch.strided else value.layout
        room = value.untyped_storage().nbytes() if value.layout == torch.strided else "?"
        return f"{value.dtype} {tuple(value.shape)} {strides} of {room} B on {value.device}"
    return f"[{', '.join(map(describe, value))}]" if isinstance(value, list) else repr(value)[:40]


def place(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() if has(t) else 0


def has(t: Tensor) -> bool:
    return t.layout == torch.strided and not t.is_meta and t.untyped_storage().nbytes() > 0
