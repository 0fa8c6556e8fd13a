"""Images of the denoiser's prior, from noise and no target (Kadkhodaie & Simoncelli 2021)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastphi.sampling.plan import make_plan
from fastphi.sampling.record import StepInfo
from fastphi.sampling.result import Reconstruction
from fastphi.sampling.run import run
from fastphi.sampling.sampler import Sampler

if TYPE_CHECKING:
    from fastphi.unet import UNet


def sample(
    model: UNet,
    n: int,
    *,
    size: int | tuple[int, int],
    form: str = "adaptive",
    seed: int = 0,
    samples: Sequence[int] | None = None,
    sigmas: tuple[float, float, int] | None = None,
    h0: float = 0.01,
    beta: float = 0.01,
    sigma_0: float | None = None,
    sigma_last: float | None = None,
    fixed_h: bool = False,
    max_steps: int = 10_000,
    batch: int | None = None,
    callback: Callable[[StepInfo], object] | None = None,
    store_progress: bool | int = False,
    progress: bool = False,
    save: str | os.PathLike[str] | None = None,
    save_every: int = 10,
    resume: bool = True,
    ranks: bool = False,
) -> Reconstruction:
    """n images of the denoiser's prior: the loop of `reconstruct` without matching.

    size: height and width in pixels, one number or two. All other arguments, what is returned and
    what is raised are as in `reconstruct`.
    """
    plan = make_plan(
        model,
        n,
        form=form,
        seed=seed,
        samples=samples,
        size=size,
        sigmas=sigmas,
        h0=h0,
        beta=beta,
        sigma_0=sigma_0,
        sigma_last=sigma_last,
        fixed_h=fixed_h,
        max_steps=max_steps,
        store_progress=store_progress,
    )
    return run(
        Sampler(model, None, plan, batch),
        callback=callback,
        progress=progress,
        save=save,
        save_every=save_every,
        resume=resume,
        ranks=ranks,
    )
