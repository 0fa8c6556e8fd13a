"""The commands that make images: their options, as `fastphi.cli` offers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

Backend = Literal["auto", "cuda", "cpu", "reference"]


def reconstruct(
    model: Positional[Path],
    out: Positional[Path],
    images: Path | None = None,
    indices: tuple[int, ...] = (),
    phi: Path | None = None,
    store: Path | None = None,
    combine: Literal["none", "mean", "max"] = "none",
    copies: int = 1,
    target_sigma: float | None = None,
    channels: tuple[int, ...] | None = None,
    zero_elsewhere: bool = False,
    form: Literal["schedule", "adaptive"] = "schedule",
    first_sigma: float | None = None,
    last_sigma: float | None = None,
    steps: int = 100,
    h0: float = 0.01,
    beta: float = 0.01,
    fixed_h: bool = False,
    lr: float = 0.01,
    max_iter: int = 100,
    tolerance: float = 0.01,
    size: int | None = None,
    seed: int = 0,
    picture: Path | None = None,
    device: str = "auto",
    backend: Backend = "auto",
) -> None:
    """Sample images whose φ matches a target (Algorithm 1, with Algorithm 2 inside).

    Give one kind of target: --images with --indices, --store with --indices, or --phi.

    Args:
        model: a checkpoint: .safetensors, a training folder, the authors' folder, or natural64-small.
        out: the result, .npz; interrupted work goes on from it.
        images: a pack; the targets are φ of the images at --indices.
        indices: which images of the pack, or rows of the store.
        phi: an .npy of φ, (C,) or (N, C), used at every noise level.
        store: a φ store; φ*(σ) is interpolated between its levels.
        combine: one target from all of them: their mean or maximum.
        copies: samples per target.
        target_sigma: take φ* at this one noise level instead of the current one.
        channels: match these channels only.
        zero_elsewhere: with --channels: all channels in the loss, target zero elsewhere.
        form: the noise schedule, or the step size adapted to each image's own noise level.
        first_sigma: the noise level to start from (default: 1, at most the top of training).
        last_sigma: the noise level to end at (default: 0.03; adaptive: 0.01).
        steps: schedule: number of noise levels.
        h0: adaptive: step size.
        beta: adaptive: share of noise put back.
        fixed_h: adaptive: the step size stays h0 (thousands of steps).
        lr: Adam's, in units of images in [0, 1].
        max_iter: updates per noise level at most.
        tolerance: stop an image at this share of its first loss; 0 never stops.
        size: side in pixels (default: that of the targets).
        seed: of the noise.
        picture: a PNG to write: targets and their samples.
        device: cpu, cuda, cuda:N, or auto, a GPU where there is one.
        backend: the engine; auto takes the fastest that can serve.
    """
    options = locals()
    from fastphi.cli.commands import reconstruct_command

    reconstruct_command(**options)


def sample(
    model: Positional[Path],
    out: Positional[Path],
    n: Annotated[int, arg(aliases=("--count",))] = 16,
    size: int = 64,
    form: Literal["schedule", "adaptive"] = "adaptive",
    h0: float = 0.01,
    beta: float = 0.01,
    fixed_h: bool = False,
    first_sigma: float | None = None,
    last_sigma: float | None = None,
    steps: int = 100,
    seed: int = 0,
    picture: Path | None = None,
    device: str = "auto",
    backend: Backend = "auto",
) -> None:
    """Sample images from the denoiser alone (Kadkhodaie & Simoncelli 2021).

    Args:
        model: a checkpoint: .safetensors, a training folder, the authors' folder, or natural64-small.
        out: the result, .npz; interrupted work goes on from it.
        n: number of images (--count under torchrun, which takes --n for an option of its own).
        size: side in pixels.
        form: step size adapted to each image's own noise level, or a noise schedule.
        h0: step size.
        beta: share of noise put back.
        fixed_h: the step size stays h0 (thousands of steps).
        first_sigma: the noise level to start from (default: 1, at most the top of training).
        last_sigma: the noise level to end at (default: 0.01; schedule: 0.03).
        steps: schedule: number of noise levels.
        seed: of the noise.
        picture: a PNG to write.
        device: cpu, cuda, cuda:N, or auto, a GPU where there is one.
        backend: the engine; auto takes the fastest that can serve.
    """
    options = locals()
    from fastphi.cli.commands import sample_command

    sample_command(**options)
