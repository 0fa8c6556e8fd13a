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
        self.fresh: dict[str, Any] | None = None  # the line that the callback has not been told

    def begin(self) -> None:
        """The evaluation that an interruption prevented."""
        if self._evaluation_due() and "psnr" not in self.log.last:
            self._evaluate()

    def waits(self) -> bool:
        """Whether the next step may begin only when this one's loss is known and `after_step` is done."""
        told = self.callback is not None and self._line_due(
            self.run.step
        )  # it may look at the model
        return told or self._evaluation_due() or self._checkpoint_due()

    def trained(self, step: int, loss: float) -> None:
        """Of each step in order, `run.seconds` after it; where nothing `waits`, the next may have begun."""
        t, c = self.run, self.run.config
        self.bar.update()
        if not self._line_due(step):
            return
        steps, seconds = step - self.seen[0], t.seconds - self.seen[1]
        self.seen = (step, t.seconds)
        self.fresh = {
            "step": step,
            "epoch": (step - 1) // t.steps_per_epoch,
            "loss": loss,
            "lr": t.lr(step),
            "seconds": round(t.seconds, 3),
            "images_per_second": round(steps * c.batch / max(seconds, 1e-9), 2),
        }
        self._write(self.fresh)

    def after_step(self) -> None:
        fresh, self.fresh = self.fresh, None
        if fresh:
            self._tell(fresh)
        if self._evaluation_due():
            self._evaluate()
        if self._checkpoint_due():
            self.checkpoint()

    def _line_due(self, step: int) -> bool:
        return step % self.run.config.log_every == 0 or step == self.run.steps

    def _evaluation_due(self) -> bool:
        t = self.run
        due = t.step % t.config.evaluate_every == 0 or t.step == t.steps
        return due and t.step > 0 and len(t.split.held) > 0

    def _checkpoint_due(self) -> bool:
        t = self.run
        return t.step % t.config.checkpoint_every == 0 or t.step == t.steps

    def _evaluate(self) -> None:
        t, found = self.run, self.evaluate()
        record = {"step": t.step, "psnr": {str(s): round(v, 4) for s, v in found.items()}}
        self._write(record)
        levels = ", ".join(f"{v:.2f} at {s:.3g}" for s, v in found.items())
        log.info("step %d: PSNR %s", t.step, levels)
        self._tell(record)

    def _write(self, record: dict[str, Any]) -> None:
        self.log.write(record)
        if self.board:
            for name, value in record.items():
                many = value if isinstance(value, dict) else {"": value}
                for key, scalar in many.items():
                    self.board.add_scalar(f"{name}/{key}".rstrip("/"), scalar, record["step"])

    def _tell(self, record: dict[str, Any]) -> None:
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
