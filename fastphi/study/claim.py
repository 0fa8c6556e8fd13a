"""A claim of the paper: what it is judged by, and its verdict; and words for what was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastphi.analysis.common import exceeds

Number = Callable[[Any], str]
Rule = Callable[[Any], bool]


@dataclass(frozen=True)
class Claim:
    """name: its key. needs: the result it is judged by. text: the claim, with the figure of the paper.
    rule, weaker: in words and as functions of that result. number: what was found, in words.
    applies: whether there is anything to judge, labels for instance."""

    name: str
    needs: str
    text: str
    rule: str
    weaker: str
    full: Rule
    partial: Rule
    number: Number
    applies: Rule = lambda result: True  # noqa: E731

    def verdict(self, result: Any) -> str:
        if self.full(result):
            return "reproduced"
        return "weaker" if self.partial(result) else "not reproduced"


def median(values: Any) -> float:
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def with_error(values: Any) -> str:
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return "none"
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{values.mean():.3f} ± {error:.3f}"


def shares(shares: Mapping[str, Any], chance: float) -> str:
    listed = ", ".join(f"{name} {with_error(v)}" for name, v in shares.items())
    return f"{listed}, chance {chance:.3f}"


def beats_chance(shares: Mapping[str, Any], chance: float) -> bool:
    phi = next(iter(shares.values()))
    return exceeds(phi, np.full(len(phi), chance))


def spearman(values: tuple[float, float]) -> str:
    return f"ρ = {values[0]:.2f} (p = {values[1]:.1g})"
