"""The stages of a study, in the paper's order: each is one analysis of what the study holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastphi.analysis.channels import Channels, channels
from fastphi.analysis.clusters import Agreement, Clusters, agreement, clusters
from fastphi.analysis.common import Result
from fastphi.analysis.divergence import Divergence, conditional_divergence
from fastphi.analysis.embedding import Embedding, embedding
from fastphi.analysis.generation import Generation, generation
from fastphi.analysis.kmeans import KMeans, kmeans
from fastphi.analysis.likeness import Likeness, likeness
from fastphi.analysis.location import Decoding, Shifts, decode_objects, shifts
from fastphi.analysis.memorisation import Memorisation, memorisation
from fastphi.analysis.neighbours import LabelAgreement, distinct, label_agreement
from fastphi.analysis.noise_level import NoiseLevel, noise_level
from fastphi.analysis.probe import Probe, probe
from fastphi.analysis.rows import Rows
from fastphi.analysis.selectivity import Selectivity, selectivity
from fastphi.analysis.sparsity import Sparsity, sparsity
from fastphi.analysis.stability import Stability, stability
from fastphi.analysis.subspaces import Subspaces, subspaces
from fastphi.study.material import Material

KINDS: dict[str, type[Result]] = {
    kind.__name__: kind
    for kind in (
        Agreement, Channels, Clusters, Decoding, Divergence, Embedding, Generation, KMeans, LabelAgreement,
        Likeness, Memorisation, NoiseLevel, Probe, Selectivity, Shifts, Sparsity, Stability, Subspaces,
    )
}  # fmt: skip


# A stage returns None where it does not apply.


def _sparsity(s: Material) -> Result:
    return sparsity(
        s.blocks, s.model, sigma=s.settings.sigma, controls={"untrained": s.fresh_blocks}
    )


def _stability(s: Material) -> Result:
    return stability(s.blocks, s.settings.other, controls={"untrained": s.fresh_blocks})


def _selectivity(s: Material) -> Result:
    others = {"untrained": s.fresh_phi, "pixels' PCA": s.controls["pixels' PCA"]}
    return selectivity(s.phi, controls=others, seed=s.settings.seed)


def _channels(s: Material) -> Result:
    sigma, few = s.settings.sigma, s.images.batch(s.few)
    others = {s.settings.other: s.store.array(s.settings.other)}
    return channels(
        s.phi,
        model=s.model,
        images=few,
        others=others,
        sigma=sigma,
        untrained=(s.fresh_phi, s.fresh),
        seed=s.settings.seed,
    )


def _subspaces(s: Material) -> Result:
    return subspaces(s.phi, min(50, len(s.phi) // 4), seed=s.settings.seed)


def _neighbours(s: Material) -> Result | None:
    return None if s.labels is None else label_agreement(s.phi, s.labels, controls=s.controls)


def _count(s: Material) -> int:
    """Of clusters: so many that each can have twenty members."""
    return max(min(s.settings.clusters, len(s.phi) // 20), 2)


def _clusters(s: Material) -> Result:
    return clusters(s.phi, _count(s), labels=s.labels, seed=s.settings.seed)


def _agreement(s: Material) -> Result:
    others = {f"σ = {s.settings.other:g}": s.store.array(s.settings.other)}
    return agreement(s.phi, _count(s), others=others, labels=s.labels, starts=5)


def _map(s: Material) -> Result:
    return embedding(s.phi, labels=clusters_of(s), seed=s.settings.seed)


def clusters_of(s: Material) -> np.ndarray:
    """(N,): each row's cluster."""
    found: Any = s.results.get("clusters")
    return (kmeans(s.phi, _count(s)) if found is None else found.clusters).labels


def _likeness(s: Material) -> Result:
    return likeness(s.model, s.targets, s.samples, sigma=s.settings.sigma)


GROUPS, MEMBERS = 2, 16  # targets of a kind, and images that one is made of


def groups_of(s: Material) -> dict[str, list[np.ndarray]]:
    """{kind: rows of φ of the images behind each target}: of the largest clusters, of the commonest
    classes, and pairs of the images that were reconstructed."""
    pairs = s.target_rows[: len(s.target_rows) // 2 * 2].reshape(-1, 2)[:GROUPS]
    found = {"clusters": _members(clusters_of(s), s.settings.seed)}
    if s.labels is not None:
        found["classes"] = _members(s.labels, s.settings.seed)
    return found | {"pairs": list(pairs)}


def _members(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Rows of random members of each of the largest groups."""
    names, count = np.unique(labels, return_counts=True)
    largest = names[np.argsort(-count, kind="stable")[:GROUPS]]
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(labels == c))[:MEMBERS] for c in largest]


def _generation(s: Material) -> Result:
    groups = {
        kind: [s.images.batch(s.rows[rows]) for rows in of] for kind, of in groups_of(s).items()
    }
    return generation(
        s.model,
        groups,
        how={"pairs": "max"},
        sigma=s.settings.sigma,
        sigmas=s.path,
        seed=s.settings.seed,
        progress=s.progress,
    )


def _memorisation(s: Material) -> Result | None:
    if s.training is None:
        return None
    made = s.samples.flatten(0, 1).clamp(0, 1)
    return memorisation(made, s.training, s.images.batch(s.rows[:500]))


def _divergence(s: Material) -> Result:
    rows = distinct(s.phi, s.settings.pairs_of, s.settings.seed)
    return conditional_divergence(
        s.model,
        s.images.batch(s.rows[rows]),
        paths=s.settings.paths,
        steps=s.settings.pair_steps,
        phi_sigma=s.settings.other,
        seed=s.settings.seed,
        progress=s.progress,
        controls={"untrained": s.fresh},
    )


def _noise_level(s: Material) -> Result:
    images = s.images.batch(s.few[:16])
    return noise_level(s.model, images, seed=s.settings.seed, controls={"untrained": s.fresh})


def _probe(s: Material) -> Result | None:
    return None if s.labels is None else probe(s.phi, s.labels, controls=_small(s))


def _small(s: Material) -> dict[str, Rows]:
    """Controls of as many numbers per image as φ has."""
    return {name: rows for name, rows in s.controls.items() if name != "pixels"}


def _shifts(s: Material) -> Result:
    return shifts(s.model, s.images.batch(s.few[:64]), controls={"untrained": s.fresh})


def _decoding(s: Material) -> Result:
    height = s.images.shape[1]
    return decode_objects(s.model, height, 400, control=s.fresh)


# What each stage needs that ranks make together, before the stages are dealt to them.
_PHI = ("store",)
_BOTH = ("store", "fresh_phi")
_BLOCKS = ("blocks", "fresh_blocks")
MATERIAL: dict[str, tuple[str, ...]] = {
    "sparsity": _BLOCKS,
    "stability": _BLOCKS,
    "selectivity": _BOTH,
    "channels": _BOTH,
    "subspaces": _PHI,
    "neighbours": _BOTH,
    "clusters": _PHI,
    "agreement": _PHI,
    "map": _PHI,
    "likeness": ("store", "reconstruction"),
    "generation": _PHI,
    "memorisation": ("store", "reconstruction"),
    "divergence": _PHI,
    "noise_level": (),
    "probe": _BOTH,
    "shifts": (),
    "decoding": (),
}

STAGES: dict[str, Callable[[Material], Result | None]] = {
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
    "generation": _generation,
    "memorisation": _memorisation,
    "divergence": _divergence,
    "noise_level": _noise_level,
    "probe": _probe,
    "shifts": _shifts,
    "decoding": _decoding,
}
