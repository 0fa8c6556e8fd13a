"""What the stages of a study share: a model, images, φ of them, controls; made when first asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastphi import __version__, checkpoint, data, targets
from fastphi.analysis.common import Result, principal, untrained
from fastphi.analysis.neighbours import distinct
from fastphi.analysis.rows import Pixels, Rows
from fastphi.phi import PhiStore, extract
from fastphi.sampling import Reconstruction, reconstruct
from fastphi.support import files, reading
from fastphi.support.world import World
from fastphi.unet import UNet


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    images: at most, at `sigma` and `other` with `draws` draws; few: of these, for what needs every
    block at every level, with 20 draws; levels: for stability; clusters: at most; targets, copies,
    steps: of reconstructions; pairs_of, paths, pair_steps: images, paths and levels of divergence.
    """

    images: int = 2000
    few: int = 200
    draws: int = 8
    sigma: float = 0.2
    other: float = 0.5
    levels: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
    clusters: int = 50
    targets: int = 4
    copies: int = 8
    steps: int = 40
    pairs_of: int = 6
    paths: int = 2
    pair_steps: int = 12
    seed: int = 0


QUICK = Settings(
    images=500,
    few=64,
    draws=4,
    levels=(0.0, 0.1, 0.2, 0.5, 1.0),
    clusters=20,
    targets=3,
    steps=25,
    pairs_of=5,
    paths=1,
    pair_steps=6,
)
LEVEL_DRAWS = 20


class Material:
    """A model and images, and what follows from them: φ stores in `out`, an untrained network's, pixels,
    samples. results: of the stages that are done.

    model: a denoiser; images: a pack or images; training: the pack it was trained on, for nearest
    training images; out: the folder of everything; ranks: whether the processes that torchrun or srun
    started share the work. Raises ValueError where `out` is of another study.
    """

    def __init__(
        self,
        model: UNet,
        images: Any,
        out: Path,
        settings: Settings | None = None,
        *,
        training: Any = None,
        progress: bool = False,
        ranks: bool = False,
    ) -> None:
        self.model, self.images, self.out = model, data.open_images(images), Path(out).absolute()
        self.world = World.here() if ranks else World()
        self.ranks, self.progress = ranks, progress and self.world.rank == 0
        self.settings = settings or Settings()
        self.training = None if training is None else data.open_images(training)
        n = min(self.settings.images, len(self.images))
        if n < 40:
            raise ValueError(f"images: {n} images, an analysis needs at least 40")
        chosen = np.random.default_rng(self.settings.seed).permutation(len(self.images))[:n]
        self.rows = np.sort(chosen)
        self.few = self.rows[np.linspace(0, n - 1, min(self.settings.few, n)).astype(int)]
        with self.world.job():
            self.world.first(self._claim_folder)
        self.results: dict[str, Result] = {}

    def _claim_folder(self) -> None:
        """ValueError where the folder holds another study; else its description is there."""
        described = {
            "fastphi": __version__,
            "model": checkpoint.fingerprint(self.model),
            "data": self.images.sha256,
            "training": None if self.training is None else self.training.sha256,
            "settings": asdict(self.settings) | {"levels": list(self.settings.levels)},
        }
        path = self.out / "study.json"
        if path.exists():
            known = reading.json(path, "out")
            if differ := [name for name in described if known.get(name) != described[name]]:
                raise ValueError(f"out: {self.out} holds a study of another {', '.join(differ)}")
        else:
            files.refuse_foreign(self.out, "out", "study.json")
            files.write_json(path, described)

    def _extract(self, name: str, model: UNet, rows: np.ndarray, **options: Any) -> PhiStore:
        options |= {"indices": rows, "seed": self.settings.seed, "progress": self.progress}
        options["ranks"] = self.ranks
        return extract(model, self.images, self.out / "phi" / name, **options)

    @cached_property
    def levels(self) -> tuple[float, ...]:
        top = self.model.training_info.sigma_max
        wanted = {*self.settings.levels, self.settings.sigma, self.settings.other}
        return tuple(sorted(s for s in wanted if s <= top))

    @cached_property
    def store(self) -> PhiStore:
        s = self.settings
        levels = [s.sigma, s.other]
        return self._extract("images", self.model, self.rows, sigmas=levels, draws=s.draws)

    @cached_property
    def phi(self) -> np.ndarray:
        """(N, C) at `sigma`."""
        return self.store.array(self.settings.sigma)

    @cached_property
    def blocks(self) -> PhiStore:
        return self._every_block("levels", self.model)

    @cached_property
    def fresh(self) -> UNet:
        return untrained(self.model, self.settings.seed)

    @cached_property
    def fresh_blocks(self) -> PhiStore:
        return self._every_block("untrained-levels", self.fresh)

    @cached_property
    def fresh_phi(self) -> np.ndarray:
        s = self.settings
        options: dict[str, Any] = {"sigmas": [s.sigma], "draws": s.draws}
        return self._extract("untrained", self.fresh, self.rows, **options).array(s.sigma)

    def _every_block(self, name: str, model: UNet) -> PhiStore:
        options: dict[str, Any] = {"draws": LEVEL_DRAWS, "blocks": "all", "sigmas": self.levels}
        return self._extract(name, model, self.few, **options)

    @cached_property
    def pixels(self) -> Pixels:
        return Pixels(self.images, self.rows)

    @cached_property
    def controls(self) -> dict[str, Rows]:
        return {
            "pixels": self.pixels,
            "pixels' PCA": principal(self.pixels, self.phi.shape[1]),
            "untrained": self.fresh_phi,
        }

    @cached_property
    def labels(self) -> np.ndarray | None:
        """(N,) where every image has a label and there are at least two."""
        if self.images.labels is None:
            return None
        labels = np.asarray(self.images.labels)[self.rows]
        return labels if labels.min() >= 0 and len(np.unique(labels)) > 1 else None

    @cached_property
    def target_rows(self) -> np.ndarray:
        """Rows of φ of the targets: far apart in φ."""
        return distinct(self.phi, self.settings.targets, self.settings.seed)

    @cached_property
    def targets(self) -> Tensor:
        return self.images.batch(self.rows[self.target_rows])

    @property
    def path(self) -> tuple[float, float, int]:
        """Noise levels of sampling: first, last, how many."""
        return min(1.0, self.model.training_info.sigma_max), 0.03, self.settings.steps

    @cached_property
    def reconstruction(self) -> Reconstruction:
        s = self.settings
        return reconstruct(
            self.model,
            targets.from_images(self.model, self.targets, draws=10, copies=s.copies),
            sigmas=self.path,
            seed=s.seed,
            save=self.out / "reconstruction.npz",
            progress=self.progress,
            ranks=self.ranks,
        )

    @cached_property
    def samples(self) -> Tensor:
        """(targets, copies, C, H, W)."""
        images = self.reconstruction.images.float().cpu()
        return images.reshape(len(self.targets), self.settings.copies, *images.shape[1:])
