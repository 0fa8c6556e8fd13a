"""The guidance loop of the GPU engine (Algorithm 2, DESIGN of the backward pass in csrc/README.md): for
each capacity the launches of an iteration, their memory, and the graph that replays some of them.

An image that has stopped is left out by every kernel, so it costs next to nothing: a batch costs
what its images need, not what the slowest needs times their number, and a capacity that is not
filled costs no more than the images in it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastphi.engine import ops
from fastphi.engine.gpu import loop
from fastphi.engine.gpu.iteration import Iteration
from fastphi.engine.gpu.pack import Packed, Transposed
from fastphi.engine.network import Network
from fastphi.support.transfer import to_device

STEPS = (
    4  # iterations in a graph: a look at the flag every millisecond or so, next to none for nothing
)
ROWS = 128  # the losses' rows come in multiples of this: one graph for most `max_iter`


def filled(n: int) -> int:
    """Images that a plan for n of them is made for: those that are not there cost next to nothing."""
    return 1 << (n - 1).bit_length()


def rows_for(max_iter: int) -> int:
    """Rows of the losses of a plan for so many updates."""
    return -(-(max_iter + 1) // ROWS) * ROWS


class MatchPlan(Iteration):
    """The launches of `STEPS` guidance iterations, in order, and the memory that they work in."""

    def __init__(
        self,
        model: Network,
        packed: Packed,
        shape: tuple[int, ...],
        device: torch.device,
        precision: str,
        rows: int,
    ) -> None:
        """shape: (capacity, H, W); rows: of the losses, max_iter + 1 at most."""
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
        self.on_device: Any = None  # the loop, where it runs without the host
        self._finish()

    def _capture(self) -> None:
        make = loop.on_device(self.n, self.device)
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
        settings = torch.tensor([lr, tolerance, max_iter], dtype=torch.float64)
        self.settings.copy_(to_device(settings, self.device))
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

    def refresh(self, model: Network) -> None:
        """Pack the transposed weights again, as the others have been."""
        self.transposed.overwrite(Transposed(model, self.packed.dtype, self.packed.stamp))
