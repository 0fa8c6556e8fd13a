"""The record of a run: what each step did, the state on disk, going on from it to the same bits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastphi import engine
from fastphi.engine import ops
from fastphi.sampling.guidance import MatchResult
from fastphi.sampling.plan import Plan
from fastphi.sampling.result import (
    TABLES,
    Reconstruction,
    frames,
    frames_file,
    read,
    to_numpy,
)
from fastphi.support import files, validate
from fastphi.support.transfer import to_device, to_host
from fastphi.targets.kinds import Targets

if TYPE_CHECKING:
    from fastphi.unet import UNet


@dataclass(frozen=True)
class State:
    """The loop between two steps. x: (N, C, H, W); sigma: (N,) float64, noise level of each."""

    step: int
    x: Tensor
    sigma: np.ndarray


@dataclass(frozen=True)
class StepInfo:
    """One step of the loop, of the n images that took part; for looking at, not for writing to.

    step: counted from 1. rows: (n,) their rows in the result. samples: (n,) their ids.
    sigma: (n,) the noise level of the step. noisy, matched, x: (n, C, H, W), the images before and
    after matching and after the step. match: losses, updates, converged (see `MatchResult`).
    sigma_hat: (n,) ‖x − denoised(x)‖/√(CHW) of `matched` (adaptive), or σ (schedule).
    """

    step: int
    rows: np.ndarray
    samples: np.ndarray
    sigma: np.ndarray
    noisy: Tensor
    match: MatchResult
    x: Tensor
    sigma_hat: np.ndarray

    @property
    def matched(self) -> Tensor:
        return self.match.x


class Record:
    """Rows of the tables, one per step, and every k-th x; may be a row ahead of the state."""

    def __init__(
        self,
        samples: np.ndarray,
        every: int,
        device: torch.device,
        settings: dict[str, Any],
        path: Path | None,
    ) -> None:
        """samples: (N,) ids. every: so many steps the images are kept, 0: never."""
        self.path, self.device, self.settings = path, device, settings
        self.samples, self.every = torch.from_numpy(samples), every
        self.rows: dict[str, list[Tensor]] = {name: [] for name in TABLES}
        self.kept: list[Tensor] = []  # where no file takes them
        self._stored_step = -1
        stored = path is not None and not files.is_stream(path)
        self._frames = frames_file(path) if stored and self.every and path is not None else None

    def add(self, info: StepInfo, after: State) -> None:
        """The rows stay where the images are: what is on a GPU comes to the host when it is stored."""
        match, n = info.match, len(self.samples)
        rows = to_device(info.rows, match.updates.device)
        values = (
            to_device(info.sigma, rows.device),
            match.first,
            match.last,
            match.updates,
            match.converged,
        )
        for name, value in zip(TABLES, values, strict=True):
            value = value.double() if value.is_floating_point() else value
            row = value.new_full((n,), torch.nan if value.is_floating_point() else 0)
            row[rows] = value
            self.rows[name].append(row)
        if self.every and after.step % self.every == 0:
            self._keep(after.x)

    def _keep(self, x: Tensor) -> None:
        """On the disk, behind those before: a state that is stored every few steps does not hold them."""
        if self._frames is None:
            self.kept.append(x.detach().cpu())
            return
        with open(self._frames, "ab") as f:
            f.write(to_numpy(x).data)

    def result(self, state: State, finished: bool) -> Reconstruction:
        """The run up to `state`."""
        for name in TABLES:
            rows = self.rows[name]
            away = [row for row in rows if row.is_cuda]  # the last ones
            if away:
                self.rows[name] = rows[: -len(away)] + list(to_host(torch.stack(away)).unbind())
        count = state.step // self.every if self.every else 0
        kept = None
        if count and self._frames is None:
            kept = torch.stack(self.kept[:count])
        elif count and self._frames is not None and finished:
            kept = frames(self._frames, count, to_numpy(state.x)).to(state.x.dtype)
        return Reconstruction(
            images=state.x,
            samples=self.samples,
            sigma_hat=torch.from_numpy(state.sigma),
            settings=self.settings,
            finished=finished,
            progress=kept,
            **{name: _stack(self.rows[name][: state.step], name, self.samples) for name in TABLES},
        )

    def store(self, state: State) -> None:
        if self.path is None or files.is_stream(self.path):  # which takes the end result alone
            return
        if state.step != self._stored_step:
            if self._frames is not None:
                self._frames.touch()
                with open(self._frames, "rb") as f:  # before the state that counts them
                    os.fsync(f.fileno())
            self.result(state, finished=False).save(self.path)
            self._stored_step = state.step

    def rescue(self, state: State) -> None:
        """Store on the way out of an error, whose message matters more than one of the disk."""
        with contextlib.suppress(OSError):
            self.store(state)

    def finish(self, state: State) -> Reconstruction:
        result = self.result(state, finished=True)
        if self.path is not None:
            result.save(self.path)
        if self._frames is not None:
            self._frames.unlink()
        return result

    def restore(self, earlier: Reconstruction) -> State:
        for name in TABLES:
            self.rows[name] = list(getattr(earlier, name))
        kept = [] if earlier.progress is None else list(earlier.progress)
        if self._frames is None or earlier.finished:
            self.kept, self._frames = kept, None
        else:  # without those of steps that the state had not come to
            with files.atomic_write(self._frames) as temporary, open(temporary, "wb") as f:
                f.writelines(to_numpy(x).data for x in kept)
        self._stored_step = len(earlier.sigma)
        return State(len(earlier.sigma), earlier.images.to(self.device), earlier.sigma_hat.numpy())


def run_settings(model: UNet, targets: Targets | None, plan: Plan) -> dict[str, Any]:
    """All that decides the bits of a result."""
    from fastphi.checkpoint import fingerprint  # needs safetensors, which `import fastphi` does not

    parameter = next(model.parameters())
    like = parameter.new_zeros(1, *plan.shape)
    return {
        "model": fingerprint(model),
        "engine": engine.pick(model, like).name,
        "device": parameter.device.type,
        "dtype": str(ops.compute_dtype(like)).removeprefix("torch."),
        "targets": None if targets is None else targets.state(),
        **plan.settings(matching=targets is not None),
    }


def finished_run(path: Path | None, settings: dict[str, Any]) -> Reconstruction | None:
    """The run stored at `path`, if it is finished: nothing is to be written."""
    earlier = earlier_run(path, settings)
    return earlier if earlier is not None and earlier.finished else None


def earlier_run(path: Path | None, settings: dict[str, Any]) -> Reconstruction | None:
    """The run stored at `path`, None where there is none; ValueError where it is another run."""
    if path is None or files.is_stream(path) or not path.exists():
        return None
    earlier = read(path, "save")
    differing = list(_differences(earlier.settings, settings))
    if differing:
        raise ValueError(
            f"save: {os.fspath(path)} holds a run with other settings: {'; '.join(differing)}. "
            "Give another path, or resume=False to overwrite it"
        )
    return earlier


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """What differs, named, with values where they are short."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            inner = f"{name}.{key}" if name else key
            yield from _differences(there.get(key), here.get(key), inner)
    elif there != here:
        texts = [repr(value) for value in (there, here)]
        short = all(len(text) <= 40 for text in texts)
        yield f"{name} ({texts[0]} there, {texts[1]} here)" if short else name


def _stack(rows: list[Tensor], name: str, samples: Tensor) -> Tensor:
    if rows:
        return torch.stack(rows)
    kinds = {"updates": torch.int64, "converged": torch.bool}
    return torch.empty(0, len(samples), dtype=kinds.get(name, torch.float64))


@contextlib.contextmanager
def progress_bar(plan: Plan, done: int, shown: bool) -> Iterator[Callable[[StepInfo], None]]:
    """A bar of steps (schedule), or a count of them (adaptive, which ends when the images do)."""
    if not shown:
        yield lambda info: None
        return
    from tqdm.auto import tqdm

    total = plan.steps if plan.form == "schedule" else None
    with tqdm(total=total, initial=done, unit="step") as bar:

        def show(info: StepInfo) -> None:
            bar.set_postfix_str(
                f"{len(info.rows)} images, σ {np.median(info.sigma_hat):.3f}", False
            )
            bar.update()

        yield show


def check_run_options(callback: Any, save: Any, save_every: Any) -> None:
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: expected a function of one argument, got {callback!r}")
    if save is not None and not isinstance(save, (str, os.PathLike)):
        raise TypeError(f"save: expected a path, got {type(save).__name__}")
    if save is not None and os.path.isdir(save):
        raise ValueError(f"save: {os.fspath(save)} is a folder, expected the path of a file")
    validate.integer(save_every, "save_every", low=1)
