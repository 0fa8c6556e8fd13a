"""The folder of a training run: what is saved, and how a run goes on from it.

A run that is killed at any moment leaves a folder from which the same settings go on, to the same
bits: checkpoints appear whole or not at all, and so does the model.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from fastphi import checkpoint
from fastphi.support import files, reading, validate
from fastphi.support.world import World
from fastphi.train.config import FREE, TrainConfig
from fastphi.train.process import from_first
from fastphi.train.record import RunState

log = logging.getLogger("fastphi")
FORMAT = 1


def finished_elsewhere(run: RunState, world: World) -> bool:
    """Whether the folder, which cannot be written to, holds this run at its end: every process to there."""

    def find() -> dict[str, Any] | None:
        out = run.config.out
        if not out.is_dir() or os.access(out, os.W_OK):
            return None
        state = Checkpoints(out, run.config.keep).newest()
        if state is not None and state["step"] >= run.steps:
            _check_identity(run, state["identity"])
            return state
        return None

    if (state := from_first(world, find)) is None:
        return False
    _restore(run, state)
    return True


def resume(run: RunState, world: World) -> None:
    """Every process to the newest checkpoint; the first starts the run where there is none."""
    state = from_first(world, lambda: _find(run))
    if state is not None:
        _restore(run, state)
    if world.rank == 0 and run.step >= run.steps and not _model(run).exists():
        checkpoint.save(run.product, _model(run))


def _restore(run: RunState, state: dict[str, Any]) -> None:
    run.model.load_state_dict(state["model"])
    if run.average is not None:
        run.average.load_state_dict(state["average"])
    # the optimiser's settings stay this run's: the other's were of its device (one kernel, say)
    settings = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict(state["optimizer"] | {"param_groups": settings})
    run.step, run.seconds = state["step"], state["seconds"]
    _put_steps(run)


def save(run: RunState) -> None:
    """Model, then checkpoint: where the last step's checkpoint is, the finished model is, too."""
    _put_steps(run)
    checkpoint.save(run.product, _model(run))
    _save_checkpoint(run)


def _find(run: RunState) -> dict[str, Any] | None:
    """The state to go on from; a new run's folder is made this run's."""
    out = run.config.out
    checkpoints = Checkpoints(out, run.config.keep)
    leftovers = [*out.glob(".*.tmp"), *checkpoints.folder.glob(".*.tmp")]
    for path in leftovers:  # by a run that was killed while it wrote; we hold the lock
        path.unlink(missing_ok=True)
    state = checkpoints.newest()
    if state is None:
        if _model(run).exists():
            raise ValueError(
                f"out: {_model(run)} is there, but no checkpoint to go on from; choose "
                "another folder, or move it away"
            )
        _write_config(run)
        _save_checkpoint(run)
        return None
    _check_identity(run, state["identity"])
    _write_config(run)
    here, there = run.environment, state["environment"]
    if other := [f"{k} {there.get(k)} -> {here[k]}" for k in here if here[k] != there.get(k)]:
        log.warning("resuming elsewhere, not to the same bits: %s", ", ".join(other))
    if state["step"] < run.steps:
        log.info("%s: going on from step %d of %d", out, state["step"], run.steps)
    else:
        log.info("%s: finished, %d steps", out, state["step"])
    return state


def _check_identity(run: RunState, theirs: dict[str, Any]) -> None:
    mine = identity(run)
    # an earlier fastphi had only what is now the default
    theirs = {f.name: f.default for f in dataclasses.fields(TrainConfig)} | theirs
    differ = [k for k in mine if mine[k] != theirs.get(k)]
    if differ:
        raise ValueError(
            f"out: {run.config.out} holds a run of other settings: "
            + "; ".join(f"{k} was {theirs.get(k)}, is {mine[k]}" for k in differ)
            + "; choose another folder, or the same settings"
        )


def identity(run: RunState) -> dict[str, Any]:
    """What a run must share with a checkpoint to go on from it."""
    settings = {k: v for k, v in run.config.to_dict().items() if k not in FREE}
    settings["holdout"] = len(run.split.held)
    held = run.split.heldout.sha256 if run.config.heldout else None
    return settings | {"data": run.split.images.sha256, "heldout": held}


def _write_config(run: RunState) -> None:
    facts = {
        "config": run.config.to_dict(),
        "images": len(run.split.images),
        "training_images": len(run.split.training),
        "steps": run.steps,
        "environment": run.environment,
    }
    files.write_json(run.config.out / "config.json", facts)


def _save_checkpoint(run: RunState) -> None:
    state = {
        "step": run.step,
        "seconds": run.seconds,
        "identity": json.dumps(identity(run)),
        "environment": json.dumps(run.environment),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    if run.average is not None:
        state["average"] = run.average.state_dict()
    Checkpoints(run.config.out, run.config.keep).save(state)


def _put_steps(run: RunState) -> None:
    for model in {run.model, run.product}:
        model.training_info = dataclasses.replace(model.training_info, steps=run.step)


def _model(run: RunState) -> Path:
    return run.config.out / "model.safetensors"


class Checkpoints:
    """out/checkpoints/step-0000123.pt: tensors and plain values, the last `keep` of them."""

    def __init__(self, out: Path, keep: int) -> None:
        self.folder, self.keep = out / "checkpoints", keep

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, state: dict[str, Any]) -> None:
        """Write one, then remove the oldest. OSError where there is no room: the others stay."""
        path = self.folder / f"step-{state['step']:07d}.pt"
        content = io.BytesIO()  # torch.save to a path reports a full disk as a bare RuntimeError
        torch.save({"format": FORMAT, **state}, content)
        try:
            with files.atomic_write(path) as temporary:
                temporary.write_bytes(content.getbuffer())
        except OSError as error:
            raise OSError(
                error.errno,
                f"the checkpoint could not be written ({error.strerror}); earlier ones are intact",
                str(path),
            ) from error
        older = [p for p in self.paths() if p.name <= path.name]
        for old in older[: -self.keep]:
            old.unlink(missing_ok=True)

    def newest(self) -> dict[str, Any] | None:
        """The newest whole checkpoint, on the CPU; None where there is none at all.

        Each that cannot be read is passed over with a warning; ValueError where all are.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                state = _read(path)
            except ValueError as error:
                log.warning("%s: going back to the checkpoint before", error)
                continue
            if (version := state["format"]) != FORMAT:
                raise ValueError(f"out: {path} has format {version!r}, this fastphi reads {FORMAT}")
            return state
        if paths:
            raise ValueError(
                f"out: no checkpoint in {self.folder} can be read; delete it, or choose another out"
            )
        return None


_WHAT = "a whole checkpoint"
_FIELDS: dict[str, validate.Check] = {
    "format": validate.count,
    "step": validate.unsigned,
    "seconds": validate.number,
    "identity": validate.text,
    "environment": validate.text,
    "model": validate.mapping,
    "optimizer": validate.mapping,
    "average": validate.mapping,
}


def _read(path: Path) -> dict[str, Any]:
    """What `_save_checkpoint` wrote, or what another version of it did."""
    state = reading.torch_file(path, _WHAT, "out")
    with reading.whole(path, _WHAT, "out"):
        if state["format"] == FORMAT:
            validate.record(state, "it", _FIELDS, lacking=("average",))
            for name in ("identity", "environment"):
                state[name] = reading.json_object(state[name])
            if state["identity"].get("ema", "none") != "none" and "average" not in state:
                raise ValueError("it: lacks average")
        return state
