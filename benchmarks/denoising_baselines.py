"""PSNR of a trained denoiser beside non-local means, wavelet and TV denoising, at the same σ.

    python benchmarks/denoising_baselines.py MODEL PACK [--n 100] [--out results.json]

The classical methods are told σ; their strength is the best of a grid, chosen on the very images they
are scored on (in their favour). The network is told nothing. The noise is the same for all. PSNR is the
mean over images of 10 log10(1/MSE), output not clipped for anyone. Needs scikit-image, PyWavelets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, denoise_wavelet

import fastphi
from fastphi import data, noise
from fastphi.support import files

Method = Callable[[np.ndarray, float, float], np.ndarray]


def _nlm(x: np.ndarray, sigma: float, strength: float) -> np.ndarray:
    return denoise_nl_means(
        x, patch_size=5, patch_distance=6, h=strength * sigma, sigma=sigma, channel_axis=-1
    )


def _wavelet(x: np.ndarray, sigma: float, strength: float) -> np.ndarray:
    return denoise_wavelet(
        x, sigma=strength * sigma, method="BayesShrink", mode="soft", channel_axis=-1
    )


def _tv(x: np.ndarray, sigma: float, strength: float) -> np.ndarray:
    return denoise_tv_chambolle(x, weight=strength * sigma, channel_axis=-1)


METHODS: dict[str, tuple[Method, tuple[float, ...]]] = {
    "non-local means": (_nlm, (0.4, 0.6, 0.8, 1.0)),
    "wavelet": (_wavelet, (0.7, 1.0, 1.5, 2.0)),
    "TV": (_tv, (0.6, 0.9, 1.2, 1.6, 2.2, 3.0)),
}


def psnr(x: np.ndarray, clean: np.ndarray) -> float:
    mse = ((x - clean) ** 2).reshape(len(x), -1).mean(axis=1)
    return float((-10 * np.log10(mse)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--n", type=int, default=100, help="number of images")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    model, packed = fastphi.load(arguments.model), data.open_images(arguments.pack)
    index = np.linspace(0, len(packed) - 1, min(arguments.n, len(packed))).astype(int)
    clean = packed.batch(index)
    info = model.training_info
    table = {}
    header = ["sigma", "noisy", "network", *METHODS, "gain over best"]
    print("  ".join(f"{h:>15}" for h in header))
    for k, sigma in enumerate(np.geomspace(max(info.sigma_min, 0.01), info.sigma_max, 10)):
        z = noise.normal(1, index, noise.stream("evaluate", k), 0, tuple(clean.shape[1:]))
        noisy = clean + float(sigma) * z
        with torch.no_grad():
            row = {"noisy": psnr(noisy.numpy(), clean.numpy())}
            row["network"] = psnr(model(noisy).numpy(), clean.numpy())
        hwc, truth = (t.permute(0, 2, 3, 1).numpy().astype(np.float64) for t in (noisy, clean))
        for name, (method, strengths) in METHODS.items():
            row[name] = max(
                psnr(np.stack([method(x, float(sigma), s) for x in hwc]), truth) for s in strengths
            )
        row["gain over best"] = row["network"] - max(row[m] for m in METHODS)
        table[f"{sigma:.4f}"] = row
        print("  ".join(f"{v:>15}" for v in [f"{sigma:.4f}", *(f"{v:.2f}" for v in row.values())]))
    if arguments.out:
        result = {"model": str(arguments.model), "images": len(index), "psnr_db": table}
        files.write_json(arguments.out, json.loads(json.dumps(result)))


if __name__ == "__main__":
    main()
