"""The seam: what an engine supplies, which engines there are, and which one serves a call.

A new engine supplies two things and a reason to refuse:
  ops      per layer, differentiable: for training and for users' own code;
  runner   a prepared model: a whole encoder, network or match in one call, no autograd;
  refuses  why it cannot serve a configuration, device or dtype (None where it can); where its ops
           cannot serve all that its runner can, ops_refuse; where it serves a dtype by another, remark.
Everything above this file is the same for all engines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastphi import reference
from fastphi.engine import contract, cpu, gpu, ops
from fastphi.engine.network import Network

if TYPE_CHECKING:
    from fastphi.config import UNetConfig

log = logging.getLogger("fastphi")


class Ops(Protocol):
    """Differentiable ops on the engine's own activations `h` (a tensor, or a deferred (r, s) pair)."""

    def from_image(self, x: Tensor) -> Any: ...
    def to_image(self, h: Any) -> Tensor: ...
    def layer(
        self,
        h: Any,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        eps: float,
        relu: bool = True,
        skip: Any = None,
    ) -> Any: ...
    def upsample(self, h: Any, weight: Tensor, bias: Tensor | None) -> Any: ...
    def pool(self, h: Any) -> Any: ...
    def mean(self, h: Any) -> Tensor: ...
    def network(self, model: Network, x: Tensor) -> Tensor | None:
        """The output of the whole network, (N, C, H, W); None where it is only served layer by layer."""
        ...


class Runner(Protocol):
    """A prepared model. Results never depend on who shares the batch. Images are NCHW.

    Computes in x's dtype, or autocast's where that is on; in bfloat16, means are float32 all the same.
    vouched: an object while somebody vouches that the weights do not change (`frozen`), else None.
    seen: the model's parameters as they were looked at for the call that comes, or None.
    """

    vouched: object | None
    seen: list[Tensor] | None

    def denoise(self, x: Tensor) -> Tensor: ...
    def block_means(self, x: Tensor, until: str | None = None) -> dict[str, Tensor]: ...
    def match(
        self, x: Tensor, target: Tensor, weight: Tensor, lr: float, max_iter: int, tolerance: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Algorithm 2 with L_i = Σ_c weight_c (φ_c(x_i) − target_ic)².

        Returns x, losses (max_iter + 1, N) (NaN after an image stopped), updates (N,), converged (N,).
        """
        ...


@dataclass(frozen=True)
class Engine:
    name: str
    what: str
    device: str | None  # the type of device it is made for; None: any
    ops: Ops
    runner: Callable[[Network], Runner]
    refuses: Callable[[UNetConfig, torch.device, torch.dtype], str | None]
    ops_refuse: Callable[[torch.dtype], str | None] = lambda dtype: None
    remark: Callable[[UNetConfig, torch.dtype], str | None] = lambda config, dtype: None

    def reason(
        self, config: UNetConfig, device: torch.device, dtype: torch.dtype, gradient: bool = False
    ) -> str | None:
        """Why it cannot serve, by its ops where a gradient is needed, else by its runner; or None."""
        refused = self.refuses(config, device, dtype)
        return self.ops_refuse(dtype) if refused is None and gradient else refused

    def made_for(self, device: torch.device) -> bool:
        return self.device in (None, device.type)


# In order of preference: the first that does not refuse serves.
ENGINES = (
    Engine(
        "cuda",
        "Triton and CUDA kernels (triton_kernels, csrc/cuda)",
        "cuda",
        gpu.GPUOps(),
        gpu.GPURunner,
        gpu.refuses,
    ),
    Engine(
        "cpu",
        "compiled C++ (csrc/cpu)",
        "cpu",
        cpu.CPUOps(),
        cpu.CPURunner,
        cpu.refuses,
        cpu.ops_refuse,
        cpu.remark,
    ),
    Engine(
        "reference",
        "plain PyTorch",
        None,
        reference.ReferenceOps(),
        reference.ReferenceRunner,
        lambda config, device, dtype: None,
    ),
)
BACKENDS = ("auto", *(engine.name for engine in ENGINES))

_runners: weakref.WeakKeyDictionary[Network, dict[str, Runner]] = weakref.WeakKeyDictionary()
_vouched: weakref.WeakKeyDictionary[Network, object] = weakref.WeakKeyDictionary()
_told: set[str] = set()


def serving(model: Network, x: Tensor, gradient: bool) -> tuple[Runner | None, Ops | None]:
    """What serves a call of the model: its runner; or ops, where a gradient is needed; or neither, and
    the modules are to be called."""
    seen: list[Tensor] = []
    engine = pick(model, x, gradient, seen)
    if engine.device is None and (gradient or contract.watched(model)):
        return None, None
    return (None, engine.ops) if gradient else (_prepared(model, engine, seen), None)


def runner(model: Network, x: Tensor) -> Runner:
    """The prepared model that serves x: made once per model and engine."""
    seen: list[Tensor] = []
    return _prepared(model, pick(model, x, seen=seen), seen)


def _prepared(model: Network, engine: Engine, seen: list[Tensor]) -> Runner:
    prepared = _runners.setdefault(model, {})
    if engine.name not in prepared:
        proxy: Any = weakref.proxy(model)  # the runner must not keep its model alive
        prepared[engine.name] = engine.runner(proxy)
    found = prepared[engine.name]
    found.vouched, found.seen = _vouched.get(model), seen or None
    return found


@contextlib.contextmanager
def frozen(model: Network) -> Iterator[None]:
    """Vouches that the model's weights do not change inside, so that they are looked at once.

    Outside, each call of an engine sums them all up, to see what torch does not tell: a write through
    `.data`, numpy or dlpack, or by a fused optimiser. Jobs (extract, match_phi, reconstruct, sample,
    targets) vouch by themselves. What it saves: docs/contract.md. An assignment or an in-place
    operation that torch sees is found inside, too.

    >>> with fastphi.frozen(model):
    ...     phis = [model.phi(image) for image in images]
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a fastphi.UNet, got {type(model).__name__}")
    if model in _vouched:  # within another
        yield
        return
    _vouched[model] = object()
    try:
        yield
    finally:
        del _vouched[model]
        for prepared in _runners.get(model, {}).values():
            prepared.vouched = None


@contextlib.contextmanager
def plain_mode(model: Network, device: torch.device, low: bool = False) -> Iterator[None]:
    """A job on a model: weights that are looked at once (`frozen`), and numbers that do not depend on the
    caller's context: no autograd beyond what a match asks for (in a caller's inference mode it could not
    be had), and the model's own dtype, no autocast, unless `low` asks for bfloat16. But for a GPU, where
    autocast is how a float32 model is asked for the tensor cores: images stay float32."""
    kind = torch.bfloat16 if low else None
    low = low or (device.type == "cuda" and torch.is_autocast_enabled("cuda"))
    with (
        frozen(model),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, kind, enabled=low),
    ):
        yield


def pick(
    model: Network, x: Tensor, gradient: bool = False, seen: list[Tensor] | None = None
) -> Engine:
    """The engine that serves x: `model.backend`, or FASTPHI_BACKEND, or the first that can.

    gradient: it is the engine's ops that are wanted, not its runner. seen: as of `contract.reason`.

    An engine asked for by name that cannot serve raises RuntimeError; under "auto" one log line says
    which path runs and why.
    """
    dtype = ops.compute_dtype(x)
    wanted = model.backend if model.backend != "auto" else _environment()
    reasons: list[str] = []
    for engine in ENGINES:
        if wanted != engine.name and not (wanted == "auto" and engine.made_for(x.device)):
            continue
        reason = engine.reason(model.config, x.device, dtype, gradient)
        if reason is None and engine.device is not None:
            reason = contract.reason(model, x, seen)
        if reason is None:
            if (remark := engine.remark(model.config, dtype)) is not None:
                reasons.append(remark)
            if reasons and not torch.compiler.is_compiling():
                _tell_once(f"the {engine.name} engine runs: {'; '.join(reasons)}")
            return engine
        reasons.append(f"engine {engine.name}: {reason}")
    raise RuntimeError(f"backend: {wanted!r} was asked for but cannot serve ({'; '.join(reasons)})")


@torch.compiler.assume_constant_result
def _environment() -> str:
    wanted = os.environ.get("FASTPHI_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise ValueError(f"FASTPHI_BACKEND: expected one of {', '.join(BACKENDS)}; got {wanted!r}")
    return wanted


def _tell_once(line: str) -> None:
    if line not in _told:
        _told.add(line)
        log.warning(line)
