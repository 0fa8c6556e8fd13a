"""The launches of a guidance iteration on a GPU, in order (DESIGN of the backward pass in csrc/README.md):
forward with z kept, the loss, backward to the image, Adam.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastphi.engine import ops
from fastphi.engine.gpu.pack import Transposed
from fastphi.engine.gpu.plan import Plan, Scalars, merged_of, partials_of


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


class Iteration(Plan):
    """What `MatchPlan` repeats, in the memory that it makes: the state of a match, one row an image."""

    transposed: Transposed
    x: Tensor  # (N, C, H, W) float32, as m, v, gradient
    m: Tensor
    v: Tensor
    gradient: Tensor
    phi: Tensor  # (N, channels) float32, as target, d_phi
    target: Tensor
    d_phi: Tensor
    weight: Tensor  # (channels,)
    losses: Tensor  # (rows, N)
    d_s_last: Tensor  # (N, 1)
    updates: Tensor  # (N,) int64
    active: Tensor  # (N,) int32, as converged
    converged: Tensor
    settings: Tensor  # (3,) float64: lr, tolerance, max_iter

    def _iteration(self) -> list[Any]:
        kept = self._forward()  # whose scalars are merged when the loss wants them
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
        r: Any = self.image
        s: Scalars = self.ones
        names = list(self.transposed.layers)
        for name, after in zip(names, [*names[1:], ""], strict=True):
            last_of_block = name.split(".")[0] != after.split(".")[0]
            form = "full" if not last_of_block else "pooled" if after else "means"
            layer, r, s = self._layer_forward(name, r, s, form)
            kept.append(layer)
        return kept

    def _layer_forward(
        self, name: str, r: Tensor, s: Scalars, form: str
    ) -> tuple[Kept, Any, Scalars]:
        """A layer with all that its gradient needs, and the next one's input."""
        from fastphi.triton_kernels import first_layer, fused_layer
        from fastphi.triton_kernels.scalars import Parts

        weights = self.packed.layers[name]
        (n, height, width, c), c_out = r.shape, len(weights.weight)
        place = (height, width, self.packed.dtype, self.device)
        full = self._take((n, height, width, c_out))
        out = self._take((n, height // 2, width // 2, c_out)) if form == "pooled" else None
        options: dict[str, Any] = dict(pooled=out, active=self.active, precision=self.precision)
        if name == "enc1.0":
            self._add(first_layer.first_layer_fwd, r, weights.weight, weights.bias, full, **options)
            kept = Kept(name, r, self.ones, full, self.ones, self.ones, self.ones, form)
            return kept, full if out is None else out, self.ones
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
        self._give(partials_of(s))
        if form == "means":
            sums, eps = options["sums"], self.config.eps
            self._add(
                ops.combine_means, *([sums], [s_out], [height * width], [self.phi]),
                *(partials, eps, mean, std),
            )  # fmt: skip
            self._give(partials, sums)
        kept = Kept(name, r, merged_of(s), full, s_out, mean, std, form)
        return kept, out, Parts(partials, self.config.eps, s_out, mean, std)

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
