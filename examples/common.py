"""What the four examples share: the shipped model, patches of scikit-learn's photographs, saving."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images

import fastphi

SIZE = 64


def arguments(what: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--out", type=Path, default=Path("out/examples"), help="folder of pictures")
    parser.add_argument("--reduced", action="store_true", help="the least that runs: for tests")
    return parser.parse_args()


def patches(n: int) -> torch.Tensor:
    """n patches (n, 3, 64, 64) in [0, 1] of two photographs, at full and at half resolution."""
    found = []
    for photograph in load_sample_images().images:
        for scale in (1, 2):
            image = photograph[::scale, ::scale] if scale == 1 else half(photograph)
            for y in range(0, image.shape[0] - SIZE + 1, SIZE // 2):
                for x in range(0, image.shape[1] - SIZE + 1, SIZE // 2):
                    found.append(image[y : y + SIZE, x : x + SIZE])
    order = np.random.default_rng(0).permutation(len(found))[:n]
    stack = np.stack([found[i] for i in order])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float().contiguous() / 255


def half(photograph: np.ndarray) -> np.ndarray:
    h, w = (s // 2 * 2 for s in photograph.shape[:2])
    return photograph[:h, :w].reshape(h // 2, 2, w // 2, 2, 3).mean(axis=(1, 3))


def model() -> fastphi.UNet:
    return fastphi.load_pretrained("natural64-small")


def save(figure: Figure, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name, dpi=130)
    print(folder / name)
