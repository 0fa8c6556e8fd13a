"""The compiled CPU engine: differentiable ops for training, a prepared runner for the rest."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastphi.engine import ops
from fastphi.engine.cpu import bf16, pack, training
from fastphi.engine.network import Network

if TYPE_CHECKING:
    from fastphi.config import UNetConfig


# Of a layer whose weights are not packed: here they are packed once, so fewer tiles than where each step
# packs anew (winograd_fresh in csrc/cpu/winograd/conv.cpp).
FEW_TILES, MANY_WEIGHTS = 16, 1 << 14


def refuses(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled engine cannot serve, or None."""
    if (reason := ops.missing()) is not None:
        return reason
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"it computes in float32, float64 and bfloat16, not in {_name(dtype)}"
    if config.norm != "std":
        return f"norm {config.norm!r} subtracts a mean inside the ReLU, which cannot be deferred"
    return None


def ops_refuse(dtype: torch.dtype) -> str | None:
    """Why the differentiable ops cannot serve what the engine does not refuse, or None."""
    if dtype == torch.bfloat16 and _isa() == "amx":
        return "where a gradient is needed PyTorch's own bfloat16 serves, on this processor's AMX"
    return None


def remark(config: UNetConfig, dtype: torch.dtype) -> str | None:
    """What is to be said of how the engine serves a dtype, or None."""
    if dtype != torch.bfloat16 or (reason := _no_tiles(config)) is None:
        return None
    return (
        f"bfloat16 is computed in float32, which is faster here and more exact, and the result rounded "
        f"({reason})"
    )


def _no_tiles(config: UNetConfig) -> str | None:
    """Why AMX, the only unit that is faster in bfloat16 than the others in float32, cannot be used."""
    if (isa := _isa()) != "amx":
        return f"instruction set {isa} has no AMX"
    most, channels = bf16.IMAGE_CHANNELS, config.image_channels
    if channels > most:
        return f"AMX takes images of at most {most} channels, not {channels}"
    return None


@torch.compiler.assume_constant_result  # torch.compile cannot trace what returns text
def _isa() -> str:
    return _build_info()["isa"]


@cache
def _build_info() -> dict[str, Any]:
    return json.loads(torch.ops.fastphi.build_info())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Deferred(NamedTuple):
    """An activation s·r whose norm is not yet divided out. r: (N, H, W, C); s: (N,)."""

    r: Tensor
    s: Tensor


class CPUOps:
    """The ops of the seam (`fastphi.engine.Ops`) on deferred activations.

    What comes in bfloat16 is widened to float32, and stays so.
    """

    def network(self, model: Network, x: Tensor) -> Tensor | None:
        return training.denoised(model, x)

    def from_image(self, x: Tensor) -> Deferred:
        x = _wide(x)
        return Deferred(x.permute(0, 2, 3, 1).contiguous(), x.new_ones(len(x)))

    def to_image(self, h: Deferred) -> Tensor:
        return (h.s[:, None, None, None] * h.r).permute(0, 3, 1, 2).contiguous()

    def layer(
        self,
        h: Deferred,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        eps: float,
        relu: bool = True,
        skip: Deferred | None = None,
    ) -> Deferred:
        r2, s2 = (None, None) if skip is None else skip
        weight, bias, gamma = _wide(weight), _wide(bias), _wide(gamma)
        return Deferred(
            *ops.fused_layer(h.r, h.s, weight, bias, gamma, eps, relu=relu, r2=r2, s2=s2)
        )

    def upsample(self, h: Deferred, weight: Tensor, bias: Tensor | None) -> Deferred:
        r, bias = ops.upsample(h.r, _wide(weight)), _wide(bias)
        if bias is None:
            return Deferred(r, h.s)
        # A bias does not commute with the scalar: the deferral ends here.
        return Deferred(h.s[:, None, None, None] * r + bias, torch.ones_like(h.s))

    def pool(self, h: Deferred) -> Deferred:
        return Deferred(ops.avg_pool(h.r), h.s)

    def mean(self, h: Deferred) -> Tensor:
        return h.s[:, None] * ops.spatial_mean(h.r)


def _wide(t: Any) -> Any:
    return t.float() if t is not None and t.dtype == torch.bfloat16 else t


class CPURunner:
    """The runner of the seam (`fastphi.engine.Runner`): a whole network, or match, per call.

    Weights are packed when first needed and again when they have changed, which a checksum of them all
    tells at each call; or, within `frozen`, at the first. bfloat16 is computed by AMX (`low`), or else in
    float32; images, means and losses are float32 in both.
    """

    vouched: object | None = None
    seen: list[Tensor] | None = None  # it looks block by block

    def __init__(self, model: Network) -> None:
        self.model = model
        self._packed: dict[tuple[str, frozenset[pack.Place]], pack.Packed] = {}
        self._fews: dict[tuple[int, ...], frozenset[pack.Place]] = {}  # by images, height, width

    @torch.no_grad()
    def denoise(self, x: Tensor) -> Tensor:
        image, out, _ = self._forward(x, 0, decoder=True)
        return (image - out if self.model.config.residual else out).to(x.dtype)

    @torch.no_grad()
    def block_means(self, x: Tensor, until: str | None = None) -> dict[str, Tensor]:
        names = self.model.config.block_names
        names = names[: names.index(until or names[-1]) + 1]
        _, _, means = self._forward(x, len(names), decoder=names[-1].startswith("dec"))
        widths = [self.model.config.channels[_depth(self.model.config, name)] for name in names]
        return {
            name: part.contiguous()
            for name, part in zip(names, means.split(widths, dim=1), strict=True)
        }

    @torch.no_grad()
    def match(
        self, x: Tensor, target: Tensor, weight: Tensor, lr: float, max_iter: int, tolerance: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, kind, dtype = self._low(x), self._kind(x), x.dtype
        # images and losses stay in `kind` till the end
        x, target, weight = x.detach().to(kind, copy=True), target.to(kind), weight.to(kind)
        x = x.contiguous()
        run = torch.ops.fastphi.match_steps_bf16 if low else torch.ops.fastphi.match_steps
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        losses = x.new_full((max_iter + 1, len(x)), torch.nan)
        updates = torch.zeros(len(x), dtype=torch.int64)
        active = torch.ones(len(x), dtype=torch.bool)
        channels, enc_layers, mid_layers, _, eps, packed = self._network(False, kind, low)
        transposed = self._parameters("transposed", kind, low)
        start = 0
        while start <= max_iter:  # once; again where Ctrl-C came and Python's handler let it go on
            start = run(
                x,
                m,
                v,
                losses,
                updates,
                active,
                target.contiguous(),
                weight.contiguous(),
                channels,
                enc_layers,
                mid_layers,
                eps,
                packed,
                transposed,
                lr,
                tolerance,
                start,
                max_iter + 1 - start,
            )
        last = losses.gather(0, updates[None])[0]
        # in double, as the C++ compares
        reached = last.double() <= tolerance * losses[0].double()
        converged = reached if tolerance > 0 else torch.zeros_like(reached)
        return x.to(dtype), losses, updates, converged

    def _forward(self, x: Tensor, blocks: int, decoder: bool) -> tuple[Tensor, Tensor, Tensor]:
        """unet_fwd's input, image and means, of dtype `_kind`."""
        low, kind = self._low(x), self._kind(x)
        run = torch.ops.fastphi.unet_fwd_bf16 if low else torch.ops.fastphi.unet_fwd
        x = x.detach().to(kind).contiguous()
        few = frozenset() if low else self._few(x)
        return x, *run(x, *self._network(decoder, kind, low, few), blocks)

    def _low(self, x: Tensor) -> bool:
        """Whether AMX computes."""
        return ops.compute_dtype(x) == torch.bfloat16 and _no_tiles(self.model.config) is None

    def _kind(self, x: Tensor) -> torch.dtype:
        """Of images and means: float32 for bfloat16, whoever computes."""
        dtype = ops.compute_dtype(x)
        return torch.float32 if dtype == torch.bfloat16 else dtype

    def _few(self, x: Tensor) -> frozenset[pack.Place]:
        """The layers whose weights so few tiles of 4×4 pixels share that they are transformed where they
        are used: packed they take four times the memory, from where they come anew for each call."""
        config, (n, _, height, width) = self.model.config, x.shape
        if x.dtype != torch.float32 or next(self.model.parameters()).dtype != torch.float32:
            return frozenset()
        if (n, height, width) not in self._fews:
            found = set()
            for name in (*config.block_names, "dec1"):
                b = _depth(config, name)
                tiles = n * -(-(height >> b) // 4) * -(-(width >> b) // 4)
                for i, layer in enumerate(self.model._modules[name]):
                    cout, cin = layer.weight.shape[:2]
                    if tiles <= FEW_TILES and cin >= 16 and cin * cout >= MANY_WEIGHTS:
                        found.add((name, i))
            self._fews[n, height, width] = frozenset(found)
        return self._fews[n, height, width]

    def _network(
        self,
        decoder: bool,
        kind: torch.dtype,
        low: bool = False,
        few: frozenset[pack.Place] = frozenset(),
    ) -> tuple[Any, ...]:
        """What unet_fwd wants to know of the model: sizes, and parameters in network order."""
        config = self.model.config
        parts = ("encoder", "decoder") if decoder else ("encoder",)
        packed = [tensor for part in parts for tensor in self._parameters(part, kind, low, few)]
        dec_layers = config.dec_layers if decoder else ()
        sizes = (config.channels, config.enc_layers, config.mid_layers, dec_layers)
        return (*sizes, config.eps, packed)

    def _parameters(
        self,
        part: str,
        kind: torch.dtype,
        low: bool = False,
        few: frozenset[pack.Place] = frozenset(),
    ) -> list[Tensor]:
        """Packed parameters of "encoder" (with the middle block), "decoder", or "transposed", in `kind`.

        Three tensors per convolution: weights, bias, gamma; empty for none. low: the weights for AMX.
        The weights of the layers `few` are the model's own, which nobody need look at.
        """
        blocks = range(1, self.model.config.blocks + 1)
        if part == "decoder":
            names = [name for b in reversed(blocks) for name in (f"up{b}", f"dec{b}")]
        else:
            names = [*(f"enc{b}" for b in blocks), "mid"]
        modules = self.model._modules
        own = {place: modules[place[0]][place[1]].weight for place in few if place[0] in names}
        skipped = set(map(id, own.values()))
        found = [p for name in names for p in pack.tensors_of(modules[name])]
        tensors = [p for p in found if id(p) not in skipped]
        name = (f"{part} AMX" if low else f"{part} {_name(kind)}", few)
        have = self._packed.get(name)
        seen = self.vouched and (
            self.vouched,
            *map(Tensor.data_ptr, tensors),
            *map(pack.version, tensors),
        )
        if have is not None and seen and have.seen == seen:
            return have.with_weights(own)
        checksum = pack.checksum(tensors)
        if have is None or have.checksum != checksum:
            made_of = pack.pack_low if low else pack.pack
            mine = {
                n: p.detach() if low else p.detach().to(kind)
                for block in names
                for n, p in modules[block].named_parameters(block, remove_duplicate=False)
            }
            for block, i in own:
                mine[f"{block}.{i}.weight"] = torch.empty(0)  # its place
            have = pack.Packed(made_of(mine, transposed=part == "transposed"), checksum, [*mine])
        elif not have.moved:
            ops.move_to_large_pages(tensors)
            have = have._replace(moved=True)
        self._packed[name] = have._replace(seen=seen)
        return have.with_weights(own)


def _depth(config: UNetConfig, block: str) -> int:
    """Resolution of a block: 0 is full, `config.blocks` that of the middle block."""
    return config.blocks if block == "mid" else int(block[3:]) - 1
