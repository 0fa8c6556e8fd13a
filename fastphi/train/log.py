"""What the first process of a training run does after a step: log, evaluate, save."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fastphi.support import files, reading
from fastphi.train import folder
from fastphi.train.record import RunState

log = logging.getLogger("fastphi")
Callback = Callable[[dict[str, Any]], Any]
Evaluate = Callable[[], dict[float, float]]


class Log:
    """log.jsonl: one JSON object per line, in order of step."""

    def __init__(self, path: Path, step: int) -> None:
        """Open to append, without lines after `step` and a line that a kill left half-written."""
        self.last: dict[str, Any] = {}
        if path.exists():
            lines = reading.lines(path)
            kept = [line for line in lines if _up_to(line, step)]
            if len(kept) < len(lines):
                with files.atomic_write(path) as temporary:
                    temporary.write_bytes(b"".join(kept))
            self.last = reading.json_value(kept[-1], nan=True) if kept else {}
        self._file = open(path, "a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """On disk before a checkpoint is: so that a resumed run misses no line."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _up_to(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and reading.json_value(line, nan=True)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


class Writer:
    """What the first process does after a step: log, evaluate, save."""

    def __init__(
        self, run: RunState, evaluate: Evaluate, callback: Callback | None, progress: bool
    ) -> None:
        """evaluate: PSNR of the held-out images per noise level, {σ: dB}."""
        self.run, self.evaluate, self.callback = run, evaluate, callback
        self.log = Log(run.config.out / "log.jsonl", run.step)
        self.bar = tqdm(
            total=run.steps,
            initial=run.step,
            disable=None if progress else True,  # None: no bar where stderr is not a terminal
            unit="step",
        )
        self.board = None
        if run.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            where = str(run.config.out / "tensorboard")
            self.board = SummaryWriter(where, purge_step=run.step + 1)
        self.seen = (run.step, run.seconds)
        self.fresh: dict[str, Any] | None = None

    def begin(self) -> None:
        """The evaluation that an interruption prevented."""
        if self._evaluation_due() and "psnr" not in self.log.last:
            self._evaluate()

    def trained(self, loss: float) -> None:
        t, c = self.run, self.run.config
        self.bar.update()
        self.fresh = None
        if t.step % c.log_every and t.step != t.steps:
            return
        steps, seconds = t.step - self.seen[0], t.seconds - self.seen[1]
        self.seen = (t.step, t.seconds)
        self.fresh = {
            "step": t.step,
            "epoch": (t.step - 1) // t.steps_per_epoch,
            "loss": loss,
            "lr": t.optimizer.param_groups[0]["lr"],
            "seconds": round(t.seconds, 3),
            "images_per_second": round(steps * c.batch / max(seconds, 1e-9), 2),
        }
        self.log.write(self.fresh)

    def after_step(self) -> None:
        t, c = self.run, self.run.config
        if self.fresh:
            self._tell(self.fresh)
        if self._evaluation_due():
            self._evaluate()
        if t.step % c.checkpoint_every == 0 or t.step == t.steps:
            self.checkpoint()

    def _evaluation_due(self) -> bool:
        t = self.run
        due = t.step % t.config.evaluate_every == 0 or t.step == t.steps
        return due and t.step > 0 and len(t.split.held) > 0

    def _evaluate(self) -> None:
        t, found = self.run, self.evaluate()
        record = {"step": t.step, "psnr": {str(s): round(v, 4) for s, v in found.items()}}
        self.log.write(record)
        levels = ", ".join(f"{v:.2f} at {s:.3g}" for s, v in found.items())
        log.info("step %d: PSNR %s", t.step, levels)
        self._tell(record)

    def _tell(self, record: dict[str, Any]) -> None:
        if self.board:
            for name, value in record.items():
                many = value if isinstance(value, dict) else {"": value}
                for key, scalar in many.items():
                    self.board.add_scalar(f"{name}/{key}".rstrip("/"), scalar, record["step"])
        if self.callback:
            self.callback(record)

    def checkpoint(self) -> None:
        self.log.sync()
        folder.save(self.run)

    def close(self) -> None:
        self.bar.close()
        self.log.close()
        if self.board:
            self.board.close()
