"""A linear probe on φ: how well a linear classifier reads the label off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastphi.analysis.common import Result, exceeds, labels_of, new_axes
from fastphi.analysis.common import standard_error as se
from fastphi.analysis.ridge import ridge
from fastphi.analysis.rows import chunks, matrix, one_hot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Probe(Result):
    """Whether each test image is classified right: {space: (tests,)} of 0 and 1; chance: the commonest
    label's share. The first space is φ. shown: φ exceeds every control, image by image, and chance, by
    more than three standard errors."""

    correct: Mapping[str, np.ndarray]
    chance: float

    @property
    def accuracy(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.correct.items()}

    @property
    def shown(self) -> bool:
        phi, *others = self.correct.values()
        return all(exceeds(phi, other) for other in [*others, np.full(len(phi), self.chance)])

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        means = list(self.accuracy.values())
        errors = [se(v) for v in self.correct.values()]
        ax.bar(range(len(means)), means, yerr=errors, color=["C0"] + ["0.7"] * (len(means) - 1))
        ax.axhline(self.chance, color="k", ls=":", label="commonest label")
        ax.set_xticks(range(len(means)), list(self.correct))
        ax.set(ylabel="accuracy of a linear probe")
        ax.legend(frameon=False)
        return ax


def probe(
    phi: Any,
    labels: ArrayLike,
    *,
    controls: Mapping[str, Any] | None = None,
    test: float = 0.3,
    strength: float = 1e-2,
    seed: int = 0,
) -> Probe:
    """Ridge classification of standardised φ (N, C), trained on a random share, tested on the rest.

    controls: name → (N, d) of the same images. test: share of test images. strength: of the ridge,
    relative to the number of training images.
    """
    spaces = {"φ": matrix(phi), **{n: matrix(v, n) for n, v in (controls or {}).items()}}
    n = len(spaces["φ"])
    _, named = np.unique(labels_of(labels, n), return_inverse=True)
    order = np.random.default_rng(seed).permutation(n)
    cut = round(n * test)
    if not 0 < cut < n:
        raise ValueError(f"test: expected a share that leaves images on both sides, got {test}")
    held, kept = order[:cut], np.ones(n, bool)
    kept[held] = False
    hot, k = one_hot(named, named.max() + 1), int(named.max()) + 1
    correct = {}
    for name, rows in spaces.items():
        argument = "phi" if name == "φ" else name
        guesses = ridge(rows, hot, kept, strength, argument)
        parts = [guesses(x).argmax(axis=1) for _, x in chunks(rows, argument, beside=k)]
        correct[name] = (np.concatenate(parts)[held] == named[held]).astype(np.float64)
    chance = float(np.bincount(named[held]).max() / len(held))
    return Probe(correct, chance)
