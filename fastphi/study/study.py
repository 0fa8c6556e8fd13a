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
from fastphi.study.stages import KINDS, MATERIAL, STAGES
from fastphi.support import validate

__all__ = ["QUICK", "Settings", "Study"]


class Study(Material):
    """The material, and its stages run in order, or dealt to the ranks. Arguments and errors are those
    of `Material`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._read()

    def run(self, stages: Sequence[str] | None = None) -> Mapping[str, Result]:
        """Every stage that applies, or those of `stages`; what is done already is read."""
        from tqdm.auto import tqdm

        for name in stages or ():
            validate.choice(name, "stages", STAGES)
        named = [name for name in STAGES if stages is None or name in stages]
        with self.world.job(), tqdm(desc="analyze", unit="stage", disable=not self.progress) as bar:
            wanted = self.world.first(lambda: [name for name in named if name not in self.results])
            bar.reset(len(wanted))
            if self.world.size > 1:
                self._share({name for stage in wanted for name in MATERIAL[stage]})
            for i in self.world.deal(len(wanted)):
                bar.update(i - bar.n)
                bar.set_postfix_str(wanted[i])
                if (result := STAGES[wanted[i]](self)) is not None:
                    record.save(result, self._file(wanted[i]))
                    self.results[wanted[i]] = result
            self.world.gather(None)
            bar.update(len(wanted) - bar.n)
            self._read()
        return {name: self.results[name] for name in STAGES if name in self.results}

    def _share(self, needed: set[str]) -> None:
        """What the stages need, made by all ranks; each stage is then one rank's own."""
        for name in sorted(needed):
            getattr(self, name)
        self.ranks = False

    def _read(self) -> None:
        self.results = {name: self._load(name) for name in STAGES if self._file(name).exists()}

    def _file(self, name: str) -> Path:
        return self.out / "results" / f"{name}.npz"

    def _load(self, name: str) -> Result:
        return record.load(self._file(name), KINDS)
