"""One model and one data set, measured in the paper's order: what `fastphi analyze` computes.

Every stage's result is stored when it is done, so that an interrupted study goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastphi.analysis.common import Result
from fastphi.study import record
from fastphi.study.material import QUICK, Material, Settings
from fastphi.study.stages import KINDS, STAGES
from fastphi.support import validate

__all__ = ["QUICK", "Settings", "Study"]


class Study(Material):
    """The material, and its stages run in order. Arguments and errors are those of `Material`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.results = {name: self._load(name) for name in STAGES if self._file(name).exists()}

    def run(self, stages: Sequence[str] | None = None) -> Mapping[str, Result]:
        """Every stage that applies, or those of `stages`; what is done already is read."""
        from tqdm.auto import tqdm

        for name in stages or ():
            validate.choice(name, "stages", STAGES)
        wanted = [name for name in STAGES if stages is None or name in stages]
        with tqdm(wanted, desc="analyze", unit="stage", disable=not self.progress) as bar:
            for name in bar:
                bar.set_postfix_str(name)
                if name not in self.results and (result := STAGES[name](self)) is not None:
                    record.save(result, self._file(name))
                    self.results[name] = result
        return {name: self.results[name] for name in STAGES if name in self.results}

    def _file(self, name: str) -> Path:
        return self.out / "results" / f"{name}.npz"

    def _load(self, name: str) -> Result:
        return record.load(self._file(name), KINDS)
