"""Reconstruction from φ (§2.3): samples of the denoiser's prior whose φ matches a target's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastphi.sampling.plan import make_plan
from fastphi.sampling.record import StepInfo
from fastphi.sampling.result import Reconstruction
from fastphi.sampling.run import run
from fastphi.sampling.sampler import Sampler
from fastphi.targets import Targets

if TYPE_CHECKING:
    from fastphi.unet import UNet

__all__ = ["Reconstruction", "StepInfo", "reconstruct"]


def reconstruct(
    model: UNet,
    targets: Targets,
    *,
    form: str = "schedule",
    samples: Sequence[int] | None = None,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    sigmas: tuple[float, float, int] | None = None,
    lr: float = 0.01,
    max_iter: int = 100,
    tolerance: float = 0.01,
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
    """Algorithm 1: sample images, matching φ to the target's (Algorithm 2) at every noise level.

    form: "schedule": x ← the data set's mean colour (0.5 where the model does not know it); for σ
        in linspace(*sigmas): x_σ = x + σz, match φ(x_σ) to φ*(σ), x ← denoised(x_σ).
        "adaptive" (Kadkhodaie & Simoncelli 2021): x ~ N(mean, sigma_0²), and until an image's own
        σ̂ < sigma_last: match to φ*(σ̂), f = x − denoised(x), σ̂ = ‖f‖/√n,
        x ← x − h f + γz with γ² = ((1−βh)² − (1−h)²) σ̂²; its result is denoised(x).
    targets: what yields φ*(σ), one per image to make (`fastphi.targets`).
    seed, samples: an image is a function of (seed, its id in `samples`), of its target and of the
        settings below, and of nothing else; ids default to 0 ... N − 1.
    size: height and width in pixels (default: that of the images behind the targets).
    sigmas: (first, last, steps) of the schedule; default (1, 0.03, 100), clipped to the training
        range.
    lr, max_iter, tolerance: of Algorithm 2, see `match_phi`.
    h0, beta: adaptive: h = h0 t/(1 + h0 (t−1)) in step t, or h0 with `fixed_h`; beta = 1 puts no
        noise back, 0 as much as was removed.
    sigma_0, sigma_last: adaptive: σ_0 and σ_L; default the top of the training range, and 0.01.
    max_steps: adaptive: after these the images still running are returned denoised, with a warning.
    batch: images through the network at once (default 64): memory, not the result.
    callback: called with a StepInfo after each step, gradients off. progress: show a bar.
    store_progress: keep the images after each step (True) or after every k-th (k) in `.progress`.
    save: an .npz with the state, rewritten every `save_every` steps and when interrupted, and with
        the result in the end; images of `store_progress` are appended to a file beside it meanwhile.
        The same call goes on from it, to the same bits, unless `resume` is False.
    ranks: whether the processes that torchrun or srun started, each with the model on a device of its
        own, make some of the images each, to the same bits, and bring them together in `save`; all
        return when they are there. As many as there are go on from what any number have left.

    Targets with a range of noise levels must cover the form's; where the adaptive form's σ̂ strays
    beyond their ends, the end is taken. Raises ValueError or TypeError before any work for
    arguments that do not fit or a `save` that holds another run, FloatingPointError where NaN or
    Inf arises, support.world.Gone where another rank is gone.
    """
    if not isinstance(targets, Targets):
        raise TypeError(
            f"targets: expected an object of fastphi.targets, got {type(targets).__name__}; a φ of "
            "your own goes through targets.fixed(phi)"
        )
    plan = make_plan(
        model,
        len(targets),
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
        lr=lr,
        max_iter=max_iter,
        tolerance=tolerance,
        targets=targets,
    )
    return run(
        Sampler(model, targets, plan, batch),
        callback=callback,
        progress=progress,
        save=save,
        save_every=save_every,
        resume=resume,
        ranks=ranks,
    )
