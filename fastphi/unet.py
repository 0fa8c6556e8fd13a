"""The blind denoiser of the paper (§2.1, Appendix A): a UNet without a noise-level input."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastphi import engine, reference
from fastphi.config import TrainingInfo, UNetConfig
from fastphi.support import validate

_PLAIN = reference.ReferenceOps()


class Layer(nn.Module):
    """conv 3×3 → norm → ReLU. weight (out, in, 3, 3); bias, gamma, beta (out,) or None.

    Called, it is plain PyTorch on (N, C, H, W), what a hook sees; `by` is the same by an engine's ops,
    on its own activations, past hooks. The same holds of the other parts.
    """

    def __init__(self, cin: int, cout: int, config: UNetConfig, norm: bool, relu: bool) -> None:
        super().__init__()
        self.relu = relu
        self.weight = nn.Parameter(torch.empty(cout, cin, 3, 3))
        self.bias = nn.Parameter(torch.zeros(cout)) if config.bias else None
        self.gamma = nn.Parameter(torch.empty(cout)) if norm else None
        self.beta = nn.Parameter(torch.zeros(cout)) if norm and config.norm == "layer" else None
        self.eps = config.eps
        nn.init.kaiming_normal_(self.weight)
        if self.gamma is not None:
            nn.init.normal_(self.gamma, 0.0, 2 / 9 / 64).data.clamp_(-0.025, 0.025)

    def forward(self, h: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.by(_PLAIN, h, skip)

    def by(self, ops: engine.Ops, h: Any, skip: Any = None) -> Any:
        textbook = {} if self.beta is None else {"beta": self.beta}
        return ops.layer(
            h, self.weight, self.bias, self.gamma, self.eps, self.relu, skip=skip, **textbook
        )


class Upsample(nn.Module):
    """Transposed conv 2×2, stride 2. weight (in, out, 2, 2)."""

    def __init__(self, cin: int, cout: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cin, cout, 2, 2))
        self.bias = nn.Parameter(torch.zeros(cout)) if bias else None
        nn.init.kaiming_normal_(self.weight.data.transpose(0, 1))

    def forward(self, h: Tensor) -> Tensor:
        return self.by(_PLAIN, h)

    def by(self, ops: engine.Ops, h: Any) -> Any:
        return ops.upsample(h, self.weight, self.bias)


class Block(nn.ModuleList):
    """Layers one after the other; a decoder block's first reads the skip connection too."""

    def forward(self, h: Tensor, skip: Tensor | None = None) -> Tensor:
        for i, layer in enumerate(self):
            h = layer(h, skip) if i == 0 and skip is not None else layer(h)
        return h

    def by(self, ops: engine.Ops, h: Any, skip: Any = None) -> Any:
        for i, layer in enumerate(self):
            h = layer.by(ops, h, skip if i == 0 else None)  # type: ignore[operator]
        return h


class UNet(nn.Module):
    """A blind denoiser. Images are float (N, C, H, W) in [0, 1] plus noise; σ is in the same units.

    backend: "auto" (the fastest engine that can serve), or an engine's name, which then raises
    RuntimeError where it cannot. A gradient is needed → the engine's ops; otherwise → its runner.
    Where neither would give what the modules give (hooks, transforms, replaced parts: docs/contract.md)
    the modules are called.
    """

    # what an engine stands in for
    WALK: ClassVar[tuple[str, ...]] = ("walk", "walk_means", "_blocks")

    def __init__(self, config: UNetConfig | None = None, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config = config or UNetConfig()
        self.backend = validate.choice(backend, "backend", engine.BACKENDS)
        self.training_info = TrainingInfo()
        for name, widths, relus in self._plan():
            block = Block()
            for i, (cin, cout) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
                first = name == "enc1" and i == 0  # the very first layer has no norm
                block.append(Layer(cin, cout, config, norm=relus[i] and not first, relu=relus[i]))
            if name.startswith("dec"):
                b = int(name[3:])
                bias = config.upsample_bias and b > 1
                self.add_module(
                    f"up{b}", Upsample(config.channels[b], config.channels[b - 1], bias)
                )
            self.add_module(name, block)

    def _plan(self) -> Iterator[tuple[str, list[int], list[bool]]]:
        """Each block's name, channel counts from its input on, and whether each layer has a ReLU."""
        c, config = self.config.channels, self.config
        enc, dec = config.enc_layers, config.dec_layers
        assert isinstance(enc, tuple) and isinstance(dec, tuple)
        for b in range(1, config.blocks + 1):
            cin = c[b - 2] if b > 1 else config.image_channels
            yield f"enc{b}", [cin] + [c[b - 1]] * enc[b - 1], [True] * enc[b - 1]
        yield "mid", [c[-2]] + [c[-1]] * config.mid_layers, [True] * config.mid_layers
        for b in range(config.blocks, 0, -1):
            widths, relus = [2 * c[b - 1]] + [c[b - 1]] * dec[b - 1], [True] * dec[b - 1]
            if b == 1:
                widths[-1], relus[-1] = config.image_channels, False
            yield f"dec{b}", widths, relus

    # --- the network, once -------------------------------------------------------------------------

    def _blocks(self, ops: engine.Ops | None, x: Tensor) -> Iterator[tuple[str, Any]]:
        """(name, output) of each block in network order; whoever stops asking stops the network."""

        def part(name: str, *h: Any) -> Any:
            module: Any = self.get_submodule(name)
            return module(*h) if ops is None else module.by(ops, *h)

        of = _PLAIN if ops is None else ops
        h = of.from_image(x)
        skips = []
        for b in range(1, self.config.blocks + 1):
            h = part(f"enc{b}", h)
            yield f"enc{b}", h
            skips.append(h)
            h = of.pool(h)
        h = part("mid", h)
        yield "mid", h
        for b in range(self.config.blocks, 0, -1):
            h = part(f"dec{b}", part(f"up{b}", h), skips.pop())
            yield f"dec{b}", h

    def walk(self, ops: engine.Ops | None, x: Tensor) -> Tensor:
        """The denoised image of x (N, C, H, W): by an engine's ops, or (None) by calling the modules,
        with their hooks."""
        out = None if ops is None else ops.network(self, x)
        if out is None:
            for _, h in self._blocks(ops, x):  # noqa: B007 (the last one is the image)
                pass
            out = h if ops is None else ops.to_image(h)
        out = x - out if self.config.residual else out
        wide = ops is not None and x.dtype == torch.bfloat16  # computed in float32 by some
        return out.to(x.dtype) if wide else out

    def walk_means(self, ops: engine.Ops | None, x: Tensor, until: str | None) -> dict[str, Tensor]:
        """ā of each block up to and including `until`: {name: (N, C)}."""
        until = until or self.config.block_names[-1]
        mean = (ops or _PLAIN).mean
        means = {}
        for name, h in self._blocks(ops, x):
            means[name] = mean(h)
            if name == until:
                break
        return means

    # --- what users call ---------------------------------------------------------------------------

    def forward(self, x: Tensor, sigma: Any = None) -> Tensor:
        """Denoised image x̂ (N, C, H, W). sigma is accepted for other libraries' conventions and not
        used: the denoiser is blind."""
        runner, ops = self._serving(x)
        return runner.denoise(x) if runner is not None else self.walk(ops, x)

    def score(self, x: Tensor, sigma: Any) -> Tensor:
        """∇ log p_σ(x) = (x̂ − x)/σ² (eq. 2). sigma > 0: one number, or N of them."""
        validate.images(x, self.config)
        variance = validate.batch_sigma(sigma, len(x), x) ** 2
        return (self(x) - x) / variance

    def block_means(self, x: Tensor, until: str | None = None) -> dict[str, Tensor]:
        """ā_j: spatial mean of each block's output, before pooling, in network order.

        Returns {"enc1": (N, C1), ..., "mid": (N, C), ..., "dec2": (N, C2)}; the network stops after
        block `until` (default: the last that has a mean; the full-resolution decoder never runs).
        """
        if until is not None:
            validate.choice(until, "until", self.config.block_names)
        runner, ops = self._serving(x)
        if runner is not None:
            return runner.block_means(x, until)
        return self.walk_means(ops, x, until)

    def block_maps(self, x: Tensor, block: str = "mid") -> Tensor:
        """A block's output itself, whose spatial mean is ā: (N, C, h, w). Plain PyTorch, no gradient."""
        validate.images(x, self.config)
        validate.choice(block, "block", self.config.block_names)
        with torch.no_grad():
            blocks = self._blocks(None, x)
            return next(h for name, h in blocks if name == block)

    def phi(self, x: Tensor) -> Tensor:
        """ā of the middle block, of x itself: (N, channels[-1]). Only encoder and middle block run."""
        return self.block_means(x, until="mid")["mid"]

    def representation(self) -> Representation:
        """A parameter-free module image → φ, e.g. for plenoptic's Metamer."""
        return Representation(self)

    def twin(self) -> UNet:
        """A network of this configuration without values, to compare this one with."""
        return _twin(self.config)

    def _serving(self, x: Tensor) -> tuple[engine.Runner | None, engine.Ops | None]:
        """What serves x: a runner; or ops, where a gradient is needed (or a graph is traced); or neither,
        but the modules themselves."""
        if isinstance(x, torch.fx.Proxy):
            return None, None
        validate.images(x, self.config)
        validate.like_model(x, next(self.parameters(), x))
        needed = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        return engine.serving(self, x, gradient=needed or torch.compiler.is_compiling())


@functools.lru_cache(maxsize=64)
def _twin(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


class Representation(nn.Module):
    """image (N, C, H, W) → φ (N, channels[-1]); has no parameters of its own."""

    def __init__(self, model: UNet) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that nn.Module does not register its parameters

    def forward(self, x: Tensor) -> Tensor:
        return self._model[0].phi(x)
