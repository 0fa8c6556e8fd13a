"""Sparsity of channel averages, block by block (Fig. 1, 10)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastphi.analysis.common import Result, blocks_of, exceeds, new_axes
from fastphi.analysis.rows import Rows, chunks, parts
from fastphi.support import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastphi.unet import UNet


def participation_ratio(means: Any) -> np.ndarray:
    """PR(ā) = ‖ā‖₁² / (d ‖ā‖₂²) of each row: the fraction of channels that take part, in (0, 1].

    means: (N, d), finite. Returns (N,) float64; rows of zeros give NaN.
    """
    return np.concatenate([_ratios(np.abs(x)) for _, x in chunks(means, "means")])


def _ratios(a: np.ndarray) -> np.ndarray:
    scale = a.max(axis=1, keepdims=True)  # so that squares neither overflow nor vanish
    with np.errstate(invalid="ignore"):
        a = a / scale
    return a.sum(axis=1) ** 2 / (a.shape[1] * (a**2).sum(axis=1))


@dataclass(frozen=True)
class Sparsity(Result):
    """PR of ā at the input and the output of each block, per image: {block: (N,)}, in (0, 1].

    outputs, inputs: of the trained network; inputs lack the first encoder's (an image) and are empty
    where no model was given. controls: {name: {block: (N,)}}, outputs of other networks.
    shown (Fig. 1): PR rises from input to output in every encoder block and falls in the middle and
    every decoder block, each by more than three standard errors over images.
    """

    outputs: Mapping[str, np.ndarray]
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    controls: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)

    @property
    def steps(self) -> dict[str, bool]:
        """Of each block with both ends: whether PR goes the way the paper says."""
        found = {}
        for block in self.inputs.keys() & self.outputs.keys():
            ends = (self.outputs[block], self.inputs[block])
            found[block] = exceeds(*(ends if block.startswith("enc") else ends[::-1]))
        return found

    @property
    def shown(self) -> bool:
        return bool(self.steps) and all(self.steps.values())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Boxes of the outputs, medians of the inputs and of the controls' outputs."""
        ax = plots.participation(new_axes(ax), self.outputs)
        names = list(self.outputs)
        inputs = [
            (i + 1, np.nanmedian(self.inputs[b])) for i, b in enumerate(names) if b in self.inputs
        ]
        if inputs:
            ax.plot(*zip(*inputs, strict=True), "k_", ms=14, label="input (median)")
        for k, (name, blocks) in enumerate(self.controls.items()):
            medians = [np.nanmedian(blocks[b]) if b in blocks else np.nan for b in names]
            ax.plot(range(1, len(names) + 1), medians, "x", color=f"C{k + 1}", label=name)
        if inputs or self.controls:
            ax.legend(frameon=False)
        return ax


def sparsity(
    means: Any,
    model: UNet | None = None,
    *,
    sigma: float | None = None,
    controls: Mapping[str, Any] | None = None,
) -> Sparsity:
    """PR of every block's ā, and with the model of every block's input (Fig. 1).

    means: {block: (N, C)}, or a φ store with `sigma`. model: the network the means are of.
    controls: name → means of other networks on the same images, e.g. an untrained one.
    """
    blocks = blocks_of(means, sigma)
    return Sparsity(
        {b: participation_ratio(a) for b, a in blocks.items()},
        {} if model is None else _input_ratios(model, blocks),
        {
            name: {b: participation_ratio(a) for b, a in blocks_of(other, sigma).items()}
            for name, other in (controls or {}).items()
        },
    )


def _input_ratios(model: UNet, blocks: Mapping[str, Rows]) -> dict[str, np.ndarray]:
    """{block: (N,)}: PR of each block's input."""
    n = len(next(iter(blocks.values())))
    found: dict[str, list[np.ndarray]] = {}
    for part in parts(n, sum(a.shape[1] for a in blocks.values())):
        for block, a in block_inputs(model, {b: a[part] for b, a in blocks.items()}).items():
            found.setdefault(block, []).append(participation_ratio(a))
    return {block: np.concatenate(ratios) for block, ratios in found.items()}


def block_inputs(model: UNet, means: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """ā of each block's input, exactly, from the outputs: {block: (N, C)}, may be negative.

    Average pooling keeps means; the mean of an up-sampled map is the kernel's mean times ā (plus the
    bias); a decoder block's input is the up-sampled channels, then the skip's.
    """
    config = model.config
    order = [*config.block_names, "dec1"]
    found = {}
    for before, block in zip(order, order[1:], strict=False):
        if before not in means:
            continue
        a = np.asarray(means[before], np.float64)
        if block.startswith("dec"):
            level = block.removeprefix("dec")
            if f"enc{level}" not in means:
                continue
            up: Any = model.get_submodule(f"up{level}")
            a = a @ up.weight.detach().double().mean((2, 3)).cpu().numpy()
            if up.bias is not None:
                a = a + up.bias.detach().double().cpu().numpy()
            a = np.hstack([a, np.asarray(means[f"enc{level}"], np.float64)])
        found[block] = a
    return found
