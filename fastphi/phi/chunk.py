"""φ of some images at one noise level: E_z[ā(x + σz)], by the engine that serves the model (§2.2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastphi import engine, noise
from fastphi.unet import UNet

if TYPE_CHECKING:
    from fastphi.data import Images

_ROWS = 4096  # noisy images that the GPU engine is given at a time
MAX_DRAWS = (1 << 25) - 1  # see counters

Means = dict[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """All that a chunk of rows needs, in this process or another."""

    model: UNet
    images: Images
    indices: np.ndarray | None  # (N,) the image of each row; None: row i is image i
    blocks: tuple[str, ...]
    draws: int
    seed: int
    dtype: torch.dtype  # computed in
    on_device: bool  # whether images are decoded and noise is made by the GPU engine

    def __len__(self) -> int:
        return len(self.images) if self.indices is None else len(self.indices)

    def images_of(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.indices is None else self.indices[rows]


def means_of(job: Job, sigma: float, rows: np.ndarray) -> Means:
    """E_z[ā] of some rows: {block: (n, C) float32}; draws are summed in order, in float64."""
    return checked(average(job, sigma, *read(job, rows)), job.images_of(rows), sigma)


def read(job: Job, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """The rows' images, as the engine takes them (a GPU decodes them itself), and their numbers.

    For a GPU in pinned memory: a copy from other memory waits for all that the GPU has to do.
    """
    numbers = job.images_of(rows)
    x = job.images.stored(numbers) if job.on_device else job.images.batch(numbers)
    ids = torch.from_numpy(np.ascontiguousarray(numbers))
    if next(job.model.parameters()).is_cuda:
        return x.pin_memory(), ids.pin_memory()
    return x, ids


def average(job: Job, sigma: float, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
    parameter = next(job.model.parameters())
    draws = job.draws if sigma > 0 else 1
    drawn = _drawn_on_device if job.on_device else _drawn
    total: dict[str, Any] = dict.fromkeys(job.blocks, 0)
    with plain(parameter.device, job.dtype):
        x = x.to(parameter.device, non_blocking=True)
        for means in drawn(job, sigma, ids, x, draws):
            for block in job.blocks:
                total[block] = total[block] + means[block].double()
        return {block: (t / draws).float() for block, t in total.items()}


def _drawn(
    job: Job, sigma: float, ids: Tensor, x: Tensor, draws: int
) -> Iterator[dict[str, Tensor]]:
    """ā of every image, by draw."""
    x = x.to(next(job.model.parameters()).dtype)
    for d in range(draws):
        noisy = x
        if sigma > 0:
            stream, draw = counters(sigma, d)
            z = noise.normal(
                job.seed, ids, stream, draw, job.images.shape, device=x.device, dtype=x.dtype
            )
            noisy = x + sigma * z
        yield job.model.block_means(noisy, until=job.blocks[-1])


def _drawn_on_device(
    job: Job, sigma: float, ids: Tensor, x: Tensor, draws: int
) -> Iterator[dict[str, Tensor]]:
    """The same with images decoded and noise made on the device, many draws in a batch."""
    runner: Any = engine.runner(job.model, next(job.model.parameters()))
    n, device = len(ids), x.device
    together = min(draws, max(1, _ROWS // n))
    rows = torch.arange(n, device=device).repeat(together)
    sample = ids.to(device, non_blocking=True).repeat(together)
    for first in range(0, draws, together):
        count = min(together, draws - first)
        stream, start = counters(sigma, first)
        draw = start + torch.arange(count, device=device).repeat_interleave(n)
        part = slice(0, count * n)
        means = runner.noisy_block_means(
            x, rows[part], sigma, job.seed, sample[part], stream, draw, until=job.blocks[-1]
        )
        yield from (
            {block: means[block][d * n : d * n + n] for block in job.blocks} for d in range(count)
        )


def checked(average: dict[str, Tensor], ids: np.ndarray, sigma: float) -> Means:
    found = {block: values.cpu().numpy() for block, values in average.items()}
    for block, values in found.items():
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            raise FloatingPointError(
                f"NaN or Inf in the means of block {block}: image {ids[row]}, sigma {sigma:g}"
            )
    return found


@contextlib.contextmanager
def plain(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """No gradients, and computing in `dtype`, whatever autocast the caller is in."""
    low = dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=low):
        yield


def counters(sigma: float, draw: int) -> tuple[int, int]:
    """Noise stream and draw of draw d at σ: distinct for distinct σ, whichever others there are.

    The 31 bits of a float32 σ >= 0 are spread over two counters: the low 24 are the index of the
    stream, the other 7 the top of the 32-bit draw, of which 25 are left for d.
    """
    bits = int(np.float32(sigma).view(np.uint32))
    return noise.stream("extract", bits & 0xFFFFFF), (bits >> 24) << 25 | draw
