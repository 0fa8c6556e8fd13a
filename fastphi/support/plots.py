"""Pictures of the report: axes-level functions, each returns the axes it drew on. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def training_curve(ax: Axes, steps: ArrayLike, loss: ArrayLike, smooth: int = 25) -> Axes:
    """Loss per pixel against step: every value faint, the running mean of `smooth` of them on top."""
    steps, loss = np.asarray(steps), np.asarray(loss, np.float64)
    ax.plot(steps, loss, color="C0", alpha=0.25, lw=0.8)
    n = min(smooth, len(loss))
    if n:
        mean = np.convolve(loss, np.ones(n) / n, mode="valid")
        ax.plot(steps[n - 1 :], mean, color="C0", lw=1.8, label=f"mean of {n} steps")
        ax.legend(frameon=False)
    ax.set(xlabel="step", ylabel="squared error per pixel", yscale="log")
    return ax


def psnr_against_sigma(ax: Axes, psnr: Mapping[float, float]) -> Axes:
    """PSNR of the denoised image (dB) against σ, beside that of the noisy image itself."""
    sigma = np.array(sorted(psnr))
    ax.plot(sigma, [psnr[s] for s in sigma], "o-", color="C0", label="denoised")
    ax.plot(sigma, -20 * np.log10(sigma), "--", color="0.5", label="noisy input")
    ax.set(xscale="log", xlabel="σ (images in [0, 1])", ylabel="PSNR (dB)")
    ax.legend(frameon=False)
    return ax


def participation(ax: Axes, ratios: Mapping[str, ArrayLike]) -> Axes:
    """Participation ratio of each block's ā over images (Fig. 1): median, quartiles, 5-95 %."""
    values = [np.asarray(v, np.float64) for v in ratios.values()]
    values = [v[np.isfinite(v)] for v in values]
    ax.boxplot(values, whis=(5, 95), showfliers=False, medianprops={"color": "C0", "lw": 2})
    ax.set_xticks(range(1, len(ratios) + 1), list(ratios))
    ax.set(ylabel="participation ratio", ylim=(0, 1))
    return ax


def images(ax: Axes, rows: Sequence[ArrayLike], labels: Sequence[str] = (), gap: int = 2) -> Axes:
    """A grid of images, one row per entry: each (N, C, H, W) in [0, 1], clipped for display."""
    ax.imshow(tile(rows, gap), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    height = np.asarray(rows[0]).shape[-2] + gap
    ax.set_yticks([height * i + height / 2 for i in range(len(labels))], list(labels))
    ax.set_xticks([])
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    return ax


def tile(rows: Sequence[ArrayLike], gap: int = 2) -> np.ndarray:
    """One picture (H, W, 3) in [0, 1] of rows of images (N, C, H, W), white between them."""
    arrays = [np.clip(np.asarray(r, np.float32), 0, 1) for r in rows]
    if any(a.ndim != 4 for a in arrays):
        raise ValueError(f"rows: expected images (N, C, H, W), got {[a.shape for a in arrays]}")
    columns = max(len(a) for a in arrays)
    _, _, h, w = arrays[0].shape
    out = np.ones((len(arrays) * (h + gap) - gap, columns * (w + gap) - gap, 3), np.float32)
    for i, row in enumerate(arrays):
        for j, image in enumerate(row):
            y, x = i * (h + gap), j * (w + gap)
            out[y : y + h, x : x + w] = image.transpose(1, 2, 0)
    return out


def reconstruction_panel(ax: Axes, target: ArrayLike, samples: ArrayLike) -> Axes:
    """Eight samples round their target (Fig. 7). target: (C, H, W); samples: (8, C, H, W)."""
    s = np.asarray(samples, np.float32)
    t = np.asarray(target, np.float32)[None]
    if len(s) != 8:
        raise ValueError(f"samples: a panel takes 8, got {len(s)}")
    images(ax, [s[:3], np.concatenate([s[3:4], t, s[4:5]]), s[5:]])
    h, w = t.shape[-2:]
    from matplotlib.patches import Rectangle

    frame = Rectangle((w + 0.5, h + 0.5), w + 2, h + 2, fill=False, ec="crimson", lw=2.5)
    ax.add_patch(frame)
    ax.set_yticks([])
    return ax
