"""The guidance loop of the GPU engine (Algorithm 2, DESIGN of the backward pass in csrc/README.md): for
each capacity the launches of an iteration, their memory, and the graph that replays some of them.

An image that has stopped is left out by every kernel, so it costs next to nothing: a batch costs
what its images need, not what the slowest needs times their number, and a capacity that is not
filled costs no more than the images in it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastphi import gpu_loop, gpu_plan, ops
from fastphi.gpu_plan import Packed, Plan, Weights

if TYPE_CHECKING:
    from fastphi.unet import UNet

STEPS = (
    4  # iterations in a graph: a look at the flag every millisecond or so, next to none for nothing
)
ROWS = 128  # the losses' rows come in multiples of this: one graph for most `max_iter`


def capacity(n: int) -> int:
    """Images that a plan for n of them is made for: few plans serve every batch."""
    return 1 << (n - 1).bit_length()


def rows_for(max_iter: int) -> int:
    """Rows of the losses of a plan for so many updates."""
    return -(-(max_iter + 1) // ROWS) * ROWS


class Transposed(Packed):
    """The weights of the encoder and the middle block as `conv_bwd` reads them."""

    def __init__(self, model: UNet, dtype: torch.dtype, stamp: tuple) -> None:
        from fastphi.triton_kernels import conv_bwd

        self.dtype, self.stamp = dtype, stamp
        self.layers = {
            name: Weights(conv_bwd.pack_transposed_weight(module.weight, dtype), None, None)
            for name, module in model.named_modules()
            if getattr(module, "weight", None) is not None and name.startswith(("enc", "mid"))
        }


class Kept(NamedTuple):
    """What a layer leaves for its gradient."""

    name: str
    source: Tensor  # (N, H, W, Cin): its input's r (or the image)
    s_in: Tensor  # (N,), the input's scalars
    z: Tensor  # (N, H, W, C); r where there is no norm
    s: Tensor  # (N,), as mean and std
    mean: Tensor
    std: Tensor
    form: str  # in which the gradient of r comes, see `norm_bwd`


class MatchPlan(Plan):
    """The launches of `STEPS` guidance iterations, in order, and the memory that they work in."""

    def __init__(
        self,
        model: UNet,
        packed: Packed,
        shape: tuple[int, ...],
        device: torch.device,
        precision: str,
        rows: int,
    ) -> None:
        """shape: (capacity, H, W); rows: of the losses, max_iter + 1 at most."""
        if device.type == "cuda":
            gpu_plan.not_captured(f"a batch of shape {shape} (N, H, W) is matched")
        self.config, self.packed, self.device, self.precision = (
            model.config,
            packed,
            device,
            precision,
        )
        self.transposed = Transposed(model, packed.dtype, packed.stamp)
        self.n = shape[0]
        self._make_state(shape, rows)
        self.launches = []
        self._free = {}
        iteration = self._iteration()
        self.launches = iteration * STEPS
        self.launches.append(functools.partial(ops.match_remaining, self.active, self.remaining))
        self.graph, self.held = None, False
        self.done = torch.cuda.Event() if device.type == "cuda" else None
        self.on_device: Any = None  # the loop, where it runs without the host
        if self.done is not None:
            self._capture()

    def _capture(self) -> None:
        make = gpu_loop.on_device(self.n, self.device)
        self.graph_options = {"keep_graph": make is not None}
        super()._capture()
        if make is not None and self.graph is not None:
            body = self.graph.raw_cuda_graph()
            self.on_device = make(body=body, remaining=self.remaining.data_ptr())

    def _make_state(self, shape: tuple[int, ...], rows: int) -> None:
        """No image is active yet: a run then does nothing but compile."""
        n, config, float32, int32 = shape[0], self.config, torch.float32, torch.int32
        planar, means = (n, config.image_channels, *shape[1:]), (n, config.channels[-1])
        self.image = self._new((*shape, config.image_channels), self.packed.dtype)
        self.x, self.m, self.v, self.gradient = (self._new(planar, float32) for _ in range(4))
        self.ones = torch.ones(n, device=self.device)
        self.target, self.phi, self.d_phi = (self._new(means, float32) for _ in range(3))
        self.weight = self._new(means[1:], float32)
        self.losses, self.d_s_last = self._new((rows, n), float32), self._new((n, 1), float32)
        self.updates = self._new((n,), torch.int64)
        self.active, self.converged = (self._new((n,), int32) for _ in range(2))
        self.settings = self._new((3,), torch.float64)
        self.remaining = self._new((1,), int32)
        self.left = torch.zeros(1, dtype=int32, pin_memory=self.device.type == "cuda")

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)  # numbers, where no image is yet

    # --- a match ---

    def start(
        self, x: Tensor, target: Tensor, weight: Tensor, lr: float, max_iter: int, tolerance: float
    ) -> None:
        """x: (n, C, H, W), n at most the capacity; the others as in `Runner.match`."""
        n = len(x)
        self.x[:n].copy_(x)
        ops.image_to_nhwc(self.x, self.image)
        self.target[:n].copy_(target)
        self.weight.copy_(weight)
        self.settings.copy_(torch.tensor([lr, tolerance, max_iter], dtype=torch.float64))
        for state in (self.m, self.v, self.updates, self.converged, self.active):
            state.zero_()
        self.active[:n] = 1
        self.losses.fill_(torch.nan)

    def loop(self, max_iter: int) -> None:
        """Run until every image has stopped. On a GPU, the next run is queued before the flag of the
        one before is looked at; a run with no image left does nothing."""
        if self.on_device is not None:
            self.on_device.launch(torch.cuda.current_stream().cuda_stream)
            return
        looked_at: torch.cuda.Event | None = None
        for _ in range(max_iter // STEPS + 2):
            self.run()
            self.left.copy_(self.remaining, non_blocking=True)
            if self.graph is None:
                if not int(self.left):
                    return
                continue
            if looked_at is not None:
                looked_at.synchronize()
                if not int(self.left):
                    return
            looked_at = torch.cuda.Event()
            looked_at.record()

    def results(self, n: int, max_iter: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x, losses, updates, converged) of the first n images."""
        return (
            self.x[:n].to(like.dtype, copy=True),
            self.losses[: max_iter + 1, :n].clone(),
            self.updates[:n].clone(),
            self.converged[:n].bool(),
        )

    def refresh(self, model: UNet) -> None:
        """Pack the transposed weights again where the others have been."""
        if self.transposed.stamp != self.packed.stamp:
            fresh = Transposed(model, self.packed.dtype, self.packed.stamp)
            self.transposed.overwrite(fresh)

    # --- the launches of an iteration ---

    def _iteration(self) -> list[Any]:
        kept = self._forward()
        pixels = kept[-1].z.shape[1] * kept[-1].z.shape[2]
        self._add(
            ops.match_loss,
            *(self.phi, self.target, self.weight, kept[-1].s, pixels, self.settings, self.losses),
            *(self.updates, self.active, self.converged, self.d_phi, self.d_s_last),
        )
        self._backward(kept)
        self._add(
            ops.match_adam,
            *(self.gradient, self.active, self.updates, self.settings),
            *(self.x, self.m, self.v, self.image),
        )
        iteration, self.launches = self.launches, []
        return iteration

    def _add(self, launch: Any, *arguments: Any, **options: Any) -> None:
        self.launches.append(functools.partial(launch, *arguments, **options))

    def _forward(self) -> list[Kept]:
        """The encoder and the middle block: their layers, the last of which leaves φ."""
        kept: list[Kept] = []
        r, s = self.image, self.ones
        names = list(self.transposed.layers)
        for name, after in zip(names, [*names[1:], ""], strict=True):
            last_of_block = name.split(".")[0] != after.split(".")[0]
            form = "full" if not last_of_block else "pooled" if after else "means"
            layer, r = self._layer_forward(name, r, s, form)
            s = layer.s
            kept.append(layer)
        return kept

    def _layer_forward(self, name: str, r: Tensor, s: Tensor, form: str) -> tuple[Kept, Any]:
        """A layer with all that its gradient needs, and the next one's input."""
        from fastphi.triton_kernels import first_layer, fused_layer

        weights = self.packed.layers[name]
        (n, height, width, c), c_out = r.shape, len(weights.weight)
        place = (height, width, self.packed.dtype, self.device)
        full = self._take((n, height, width, c_out))
        out = self._take((n, height // 2, width // 2, c_out)) if form == "pooled" else None
        options: dict[str, Any] = dict(pooled=out, active=self.active, precision=self.precision)
        if name == "enc1.0":
            self._add(first_layer.first_layer_fwd, r, weights.weight, weights.bias, full, **options)
            kept = Kept(name, r, s, full, self.ones, self.ones, self.ones, form)
            return kept, full if out is None else out
        if form == "full":
            out = options["r_out"] = self._take(tuple(full.shape))
        if form == "means":
            parts = fused_layer.sums_per_image((c,), c_out, *place)
            options["sums"] = self._take((n, parts, c_out), torch.float32)
        slots = fused_layer.partials_per_image((c,), c_out, *place)
        partials = self._take((n, slots, 3), torch.float32)
        s_out, mean, std = (self._new((n,), torch.float32) for _ in range(3))
        self._add(
            fused_layer.fused_layer_fwd,
            r,
            s,
            *weights[:3],
            z_out=full,
            partials=partials,
            **options,
        )
        self._add(ops.combine_moments, partials, self.config.eps, s_out, mean, std)
        if form == "means":
            self._add(ops.combine_means, options["sums"], s_out, height * width, self.phi)
        self._give(partials, options.get("sums"))
        return Kept(name, r, s, full, s_out, mean, std, form), out

    def _backward(self, kept: list[Kept]) -> None:
        """From the gradients of the last layer's r and s down to the image's."""
        from fastphi.triton_kernels import conv_bwd, last_layer, norm_bwd

        shared = dict(active=self.active)
        d_r, d_s = self.d_phi, self.d_s_last
        for layer, below in zip(reversed(kept), [*reversed(kept[:-1]), None], strict=True):
            # masked below: what came down already is d_z
            masked = below is None and layer.form == "full"
            d_z = d_r if masked else self._take(tuple(layer.z.shape))
            if not masked:
                gamma = self.packed.layers[layer.name].gamma
                norm = dict(s=layer.s, mean=layer.mean, std=layer.std, d_s=d_s)
                s_in = None if below is None else layer.s_in
                options = norm if gamma is not None else {}
                self._add(
                    norm_bwd.norm_bwd, *(d_r, layer.z, gamma, d_z),
                    form=layer.form, s_in=s_in, **options, **shared,
                )  # fmt: skip
                if d_r is not self.d_phi:
                    self._give(d_r, d_s)
            weight = self.transposed.layers[layer.name].weight
            if below is None:
                self._add(
                    last_layer.last_layer_fwd, *(d_z, None, weight, None, self.gradient),
                    precision=self.precision, **shared,
                )  # fmt: skip
            else:
                d_r, d_s = self._conv_backward(conv_bwd, layer, below, d_z, weight)
            self._give(d_z)

    def _conv_backward(
        self, conv_bwd: Any, layer: Kept, below: Kept, d_z: Tensor, weight: Tensor
    ) -> tuple[Tensor, Any]:
        """(d_r, d_s) of a layer's input."""
        n, height, width, c_in = layer.source.shape
        d_r, d_s = self._take(tuple(layer.source.shape)), None
        masked = below.name == "enc1.0" and below.form == "full"
        if below.name != "enc1.0":
            place = (height, width, self.packed.dtype, self.device)
            slots = conv_bwd.d_s_per_image(d_z.shape[3], c_in, *place)
            d_s = self._take((n, slots), torch.float32)
        self._add(
            conv_bwd.conv_bwd, *(d_z, weight, d_r), d_s=d_s, masked=masked,
            r=layer.source if masked or d_s is not None else None, s=layer.s_in,
            active=self.active, precision=self.precision,
        )  # fmt: skip
        return d_r, d_s
