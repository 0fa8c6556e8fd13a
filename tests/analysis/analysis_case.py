"""What is planted for the analyses to find, or left out."""

from __future__ import annotations

import json

import numpy as np
import torch

import fastphi


def structureless(n=400, d=24, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * 0.2 + 1.0


def drawable_and_plain(result):
    """Every result draws on its own axes and is JSON without NaN."""
    assert result.plot().figure is not None
    json.dumps(result.numbers(), allow_nan=False)
    return result


class Planted:
    """Stands for a network whose middle block's maps and means are given."""

    def __init__(self, maps=None, means=None):
        self.maps, self.means = maps, means
        self.config = fastphi.UNetConfig(channels=(2, 2))

    def parameters(self):
        yield torch.zeros(1, dtype=torch.float64)

    def block_maps(self, x, block):
        return self.maps(x)

    def block_means(self, x, until):
        return {until: self.means(x)}
