"""One model and one data set, measured in the paper's order: what `fastphi analyze` computes.

Every stage's result is stored when it is done, so that an interrupted study goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import fastphi
from fastphi import checkpoint, data, files, validate
from fastphi.analysis import record
from fastphi.analysis.channels import Channels, channels
from fastphi.analysis.clusters import Agreement, Clusters, KMeans, agreement, clusters, kmeans
from fastphi.analysis.common import Result, principal, untrained
from fastphi.analysis.divergence import Divergence, conditional_divergence
from fastphi.analysis.embedding import Embedding, embedding
from fastphi.analysis.likeness import Likeness, likeness
from fastphi.analysis.location import Decoding, Shifts, decode_objects, shifts
from fastphi.analysis.memorisation import Memorisation, memorisation
from fastphi.analysis.neighbours import LabelAgreement, distinct, label_agreement
from fastphi.analysis.noise_level import NoiseLevel, noise_level
from fastphi.analysis.probe import Probe, probe
from fastphi.analysis.selectivity import Selectivity, selectivity
from fastphi.analysis.sparsity import Sparsity, sparsity
from fastphi.analysis.stability import Stability, stability
from fastphi.analysis.subspaces import Subspaces, subspaces
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
KINDS: dict[str, type[Result]] = {
    kind.__name__: kind
    for kind in (
        Agreement, Channels, Clusters, Decoding, Divergence, Embedding, KMeans, LabelAgreement, Likeness,
        Memorisation, NoiseLevel, Probe, Selectivity, Shifts, Sparsity, Stability, Subspaces,
    )
}  # fmt: skip


class Study:
    """The stages, and what they share: φ stores in `out`, an untrained network's, pixels, samples.

    model: a denoiser; images: a pack or images; training: the pack it was trained on, for nearest
    training images; out: the folder of everything. Raises ValueError where `out` is of another study.
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
    ) -> None:
        self.model, self.images, self.out = model, data.open_images(images), Path(out)
        self.settings, self.progress = settings or Settings(), progress
        self.training = None if training is None else data.open_images(training)
        n = min(self.settings.images, len(self.images))
        if n < 40:
            raise ValueError(f"images: {n} images, an analysis needs at least 40")
        chosen = np.random.default_rng(self.settings.seed).permutation(len(self.images))[:n]
        self.rows = np.sort(chosen)
        self.few = self.rows[np.linspace(0, n - 1, min(self.settings.few, n)).astype(int)]
        self._claim_folder()

    def _claim_folder(self) -> None:
        """ValueError where the folder holds another study; else its description is there."""
        described = {
            "fastphi": fastphi.__version__,
            "model": checkpoint.fingerprint(self.model),
            "data": self.images.sha256,
            "training": None if self.training is None else self.training.sha256,
            "settings": asdict(self.settings) | {"levels": list(self.settings.levels)},
        }
        path = self.out / "study.json"
        if path.exists():
            known = files.read_json(path, "study")
            if differ := [name for name in described if known.get(name) != described[name]]:
                raise ValueError(f"out: {self.out} holds a study of another {', '.join(differ)}")
        else:
            files.write_json(path, described)

    # --- what stages share ------------------------------------------------------------------------

    def _extract(
        self, name: str, model: UNet, rows: np.ndarray, **options: Any
    ) -> fastphi.PhiStore:
        options |= {"indices": rows, "seed": self.settings.seed, "progress": self.progress}
        return fastphi.extract(model, self.images, self.out / "phi" / name, **options)

    @cached_property
    def levels(self) -> tuple[float, ...]:
        top = self.model.training_info.sigma_max
        wanted = {*self.settings.levels, self.settings.sigma, self.settings.other}
        return tuple(sorted(s for s in wanted if s <= top))

    @cached_property
    def store(self) -> fastphi.PhiStore:
        s = self.settings
        levels = [s.sigma, s.other]
        return self._extract("images", self.model, self.rows, sigmas=levels, draws=s.draws)

    @cached_property
    def phi(self) -> np.ndarray:
        """(N, C) at `sigma`."""
        return self.store.array(self.settings.sigma)

    @cached_property
    def blocks(self) -> fastphi.PhiStore:
        return self._every_block("levels", self.model)

    @cached_property
    def fresh(self) -> UNet:
        return untrained(self.model, self.settings.seed)

    @cached_property
    def fresh_blocks(self) -> fastphi.PhiStore:
        return self._every_block("untrained-levels", self.fresh)

    @cached_property
    def fresh_phi(self) -> np.ndarray:
        s = self.settings
        options: dict[str, Any] = {"sigmas": [s.sigma], "draws": s.draws}
        return self._extract("untrained", self.fresh, self.rows, **options).array(s.sigma)

    def _every_block(self, name: str, model: UNet) -> fastphi.PhiStore:
        options: dict[str, Any] = {"draws": LEVEL_DRAWS, "blocks": "all", "sigmas": self.levels}
        return self._extract(name, model, self.few, **options)

    @cached_property
    def pixels(self) -> np.ndarray:
        return self.images.batch(self.rows).flatten(1).numpy()

    @cached_property
    def controls(self) -> dict[str, np.ndarray]:
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

    @cached_property
    def reconstruction(self) -> fastphi.Reconstruction:
        s = self.settings
        return fastphi.reconstruct(
            self.model,
            fastphi.targets.from_images(self.model, self.targets, draws=10, copies=s.copies),
            sigmas=(min(1.0, self.model.training_info.sigma_max), 0.03, s.steps),
            seed=s.seed,
            save=self.out / "reconstruction.npz",
            progress=self.progress,
        )

    @cached_property
    def samples(self) -> Tensor:
        """(targets, copies, C, H, W)."""
        images = self.reconstruction.images.float().cpu()
        return images.reshape(len(self.targets), self.settings.copies, *images.shape[1:])

    @cached_property
    def results(self) -> dict[str, Result]:
        """Of the stages that are done, in order."""
        return {name: self._load(name) for name in STAGES if self._file(name).exists()}

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


# --- stages, in the paper's order; None where one does not apply ----------------------------------


def _sparsity(s: Study) -> Result:
    return sparsity(
        s.blocks, s.model, sigma=s.settings.sigma, controls={"untrained": s.fresh_blocks}
    )


def _stability(s: Study) -> Result:
    return stability(s.blocks, s.settings.other, controls={"untrained": s.fresh_blocks})


def _selectivity(s: Study) -> Result:
    others = {"untrained": s.fresh_phi, "pixels' PCA": s.controls["pixels' PCA"]}
    return selectivity(s.phi, controls=others, seed=s.settings.seed)


def _channels(s: Study) -> Result:
    sigma, few = s.settings.sigma, s.images.batch(s.few)
    others = {s.settings.other: s.store.array(s.settings.other)}
    return channels(s.phi, model=s.model, images=few, others=others, sigma=sigma)


def _subspaces(s: Study) -> Result:
    return subspaces(s.phi, min(50, len(s.phi) // 4), seed=s.settings.seed)


def _neighbours(s: Study) -> Result | None:
    return None if s.labels is None else label_agreement(s.phi, s.labels, controls=s.controls)


def _count(s: Study) -> int:
    """Of clusters: so many that each can have twenty members."""
    return max(min(s.settings.clusters, len(s.phi) // 20), 2)


def _clusters(s: Study) -> Result:
    return clusters(s.phi, _count(s), labels=s.labels, seed=s.settings.seed)


def _agreement(s: Study) -> Result:
    others = {f"σ = {s.settings.other:g}": s.store.array(s.settings.other)}
    return agreement(s.phi, _count(s), others=others, labels=s.labels, starts=5)


def _map(s: Study) -> Result:
    return embedding(s.phi, labels=clusters_of(s), seed=s.settings.seed)


def clusters_of(s: Study) -> np.ndarray:
    """(N,): each row's cluster."""
    found: Any = s.results.get("clusters")
    return (kmeans(s.phi, _count(s)) if found is None else found.clusters).labels


def _likeness(s: Study) -> Result:
    return likeness(s.model, s.targets, s.samples, sigma=s.settings.sigma)


def _memorisation(s: Study) -> Result | None:
    if s.training is None:
        return None
    made = s.samples.flatten(0, 1).clamp(0, 1)
    return memorisation(made, s.training, s.images.batch(s.rows[:500]))


def _divergence(s: Study) -> Result:
    rows = distinct(s.phi, s.settings.pairs_of, s.settings.seed)
    return conditional_divergence(
        s.model,
        s.images.batch(s.rows[rows]),
        paths=s.settings.paths,
        steps=s.settings.pair_steps,
        phi_sigma=s.settings.other,
        seed=s.settings.seed,
        progress=s.progress,
    )


def _noise_level(s: Study) -> Result:
    return noise_level(s.model, s.images.batch(s.few[:16]), seed=s.settings.seed)


def _probe(s: Study) -> Result | None:
    return None if s.labels is None else probe(s.phi, s.labels, controls=_small(s))


def _small(s: Study) -> dict[str, np.ndarray]:
    """Controls of as many numbers per image as φ has."""
    return {name: rows for name, rows in s.controls.items() if name != "pixels"}


def _shifts(s: Study) -> Result:
    return shifts(s.model, s.images.batch(s.few[:64]))


def _decoding(s: Study) -> Result:
    height = s.images.shape[1]
    return decode_objects(s.model, height, 400, control=s.fresh)


STAGES: dict[str, Callable[[Study], Result | None]] = {
    "sparsity": _sparsity,
    "stability": _stability,
    "selectivity": _selectivity,
    "channels": _channels,
    "subspaces": _subspaces,
    "neighbours": _neighbours,
    "clusters": _clusters,
    "agreement": _agreement,
    "map": _map,
    "likeness": _likeness,
    "memorisation": _memorisation,
    "divergence": _divergence,
    "noise_level": _noise_level,
    "probe": _probe,
    "shifts": _shifts,
    "decoding": _decoding,
}
