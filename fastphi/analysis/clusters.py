"""Clusters of φ (Fig. 6, 15, 16): how well they separate, and how well they are found again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastphi.analysis.common import Result, gaussian_like, labels_of, new_axes
from fastphi.analysis.kmeans import KMeans, kmeans
from fastphi.analysis.rows import add_to_groups, centroids, chunks, matrix
from fastphi.support import validate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def separations(phi: Any, labels: ArrayLike) -> np.ndarray:
    """(k, k): distance of two groups' centroids, in standard deviations along the line joining them.

    ‖c_a − c_b‖ / √((v_a + v_b)/2) with v the variance of a group's members along that line. NaN on
    the diagonal and for groups of fewer than two.
    """
    return _separations(phi, labels)[0]


def _separations(phi: Any, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """And the distances between centroids (k, k)."""
    phi = matrix(phi)
    _, own = np.unique(labels_of(labels, len(phi)), return_inverse=True)
    k = int(own.max()) + 1
    centre = centroids(phi, own, k)
    distance = np.array([np.linalg.norm(centre - c, axis=1) for c in centre])
    variance = _along_lines(phi, own, centre, distance)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = distance / np.sqrt((variance + variance.T) / 2)
    np.fill_diagonal(found, np.nan)
    return np.where(np.isfinite(found), found, np.nan), distance


def _along_lines(phi: Any, own: np.ndarray, centre: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """(k, k): variance of the members of the row's group along the line to the column's centroid; NaN for
    a group of one. own: (N,) groups; centre: (k, d); distance: (k, k) of the centroids."""
    k = len(centre)
    ends = centre - centre.mean(axis=0)  # what all share only rounds
    first, second = np.zeros((k, k)), np.zeros((k, k))
    for part, x in chunks(phi, beside=3 * k):
        group = own[part]
        places = (x - centre[group]) @ ends.T
        places -= places[np.arange(len(group)), group][:, None]  # along c_column − c_row
        length = distance[group]
        np.divide(places, length, out=places, where=length > 0)
        add_to_groups(first, places, group)
        add_to_groups(second, places**2, group)
    n = np.bincount(own, minlength=k)[:, None]
    return np.where(n > 1, second / n - (first / n) ** 2, np.nan)


@dataclass(frozen=True)
class Clusters(Result):
    """Separation of K-means' clusters, beside labelled classes and Gaussians.

    random: (pairs,) all pairs' separations, in standard deviations; nearest: (k,) each cluster's with
    the one whose centroid is nearest. gaussian_random, gaussian_nearest: (draws,) medians of the same
    for K-means on Gaussians of φ's mean and covariance. class_random, class_nearest: of the labelled
    classes; purity: share of images that have their cluster's commonest label, purity_chance the same
    after shuffling labels; NaN and empty where there are none.
    shown (Fig. 6): the median over nearest pairs exceeds the Gaussians' mean by more than three of
    their standard deviations (and by 5 %), and so does the median over random pairs.
    """

    clusters: KMeans
    random: np.ndarray
    nearest: np.ndarray
    gaussian_random: np.ndarray
    gaussian_nearest: np.ndarray
    class_random: np.ndarray
    class_nearest: np.ndarray
    purity: float
    purity_chance: float

    @property
    def shown(self) -> bool:
        def beyond(found: np.ndarray, control: np.ndarray) -> bool:
            limit = max(control.mean() + 3 * control.std(ddof=1), 1.05 * control.mean())
            return bool(np.nanmedian(found) > limit)

        return beyond(self.nearest, self.gaussian_nearest) and beyond(
            self.random, self.gaussian_random
        )

    @property
    def better_than_classes(self) -> bool:
        """Whether the medians exceed the labelled classes', random and nearest pairs both."""
        if not len(self.class_random):
            return False
        return bool(
            np.nanmedian(self.random) > np.nanmedian(self.class_random)
            and np.nanmedian(self.nearest) > np.nanmedian(self.class_nearest)
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        pairs = {"random": self.random, "nearest": self.nearest}
        top = np.nanpercentile(np.concatenate(list(pairs.values())), 99)
        bins = np.linspace(0, top, 40).tolist()
        for k, (name, values) in enumerate(pairs.items()):
            kept = values[np.isfinite(values)]
            ax.hist(kept, bins, density=True, alpha=0.5, color=f"C{k}", label=f"{name} clusters")
            ax.axvline(float(getattr(self, f"gaussian_{name}").mean()), color=f"C{k}", ls="--")
            if len(values := getattr(self, f"class_{name}")):
                ax.axvline(float(np.nanmedian(values)), color=f"C{k}", ls=":")
        ax.set(xlabel="separation (standard deviations)", ylabel="density")
        ax.set_title("dashed: Gaussian control; dotted: labelled classes", fontsize="small")
        ax.legend(frameon=False)
        return ax


def clusters(
    phi: Any,
    k: int,
    *,
    labels: ArrayLike | None = None,
    draws: int = 5,
    starts: int = 10,
    seed: int = 0,
) -> Clusters:
    """K-means on φ (N, d), and how well its clusters are separated (Fig. 6).

    labels: (N,) of classes, for comparison. draws: Gaussians of the same mean and covariance that
    go through the same K-means; at least two.
    """
    phi = matrix(phi)
    validate.integer(draws, "draws", low=2)
    found = kmeans(phi, k, starts=starts, seed=seed)
    random, nearest = _pairs(phi, found.labels)
    controls = []
    for draw in range(draws):
        gaussian = gaussian_like(phi, seed + 1 + draw)
        own = kmeans(gaussian, k, starts=starts, seed=seed).labels
        controls.append([np.nanmedian(v) for v in _pairs(gaussian, own)])
    classes, pure = (np.empty(0), np.empty(0)), (float("nan"), float("nan"))
    if labels is not None:
        labels = labels_of(labels, len(phi))
        shuffled = np.random.default_rng(seed).permutation(labels)
        classes = _pairs(phi, labels)
        pure = (purity(found.labels, labels), purity(found.labels, shuffled))
    control = np.array(controls)
    return Clusters(found, random, nearest, control[:, 0], control[:, 1], *classes, *pure)


def purity(clusters: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows that have the commonest label of their cluster."""
    clusters = np.asarray(clusters)
    labels = labels_of(labels, len(clusters))
    _, own = np.unique(clusters, return_inverse=True)
    _, named = np.unique(labels, return_inverse=True)
    table = np.zeros((own.max() + 1, named.max() + 1), np.int64)
    np.add.at(table, (own, named), 1)
    return float(table.max(axis=1).sum() / len(labels))


def _pairs(phi: Any, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Separations of all pairs, and of each group with the one of the nearest centroid."""
    table, distance = _separations(phi, labels)
    np.fill_diagonal(distance, np.inf)
    k = len(table)
    return table[np.triu_indices(k, 1)], table[np.arange(k), distance.argmin(axis=1)]


@dataclass(frozen=True)
class Agreement(Result):
    """Adjusted Rand index of clusterings of the same images: 1 the same, 0 chance.

    found: {what differs: (comparisons,)}; gaussian: the same for Gaussians of φ's mean and covariance,
    where seeds differ. shown (Fig. 15, 16): the mean over every kind of comparison exceeds the
    Gaussian's mean by three of its standard deviations and by 0.05.
    """

    found: Mapping[str, np.ndarray]
    gaussian: np.ndarray

    @property
    def shown(self) -> bool:
        limit = self.gaussian.mean() + max(3 * self.gaussian.std(), 0.05)
        return all(bool(values.mean() > limit) for values in self.found.values())

    def plot(self, ax: Axes | None = None) -> Axes:
        ax = new_axes(ax)
        for i, values in enumerate([*self.found.values(), self.gaussian]):
            ax.plot(np.full(len(values), i), values, "o", alpha=0.6)
        ax.set_xticks(range(len(self.found) + 1), [*self.found, "Gaussian, seeds"])
        ax.set(ylabel="adjusted Rand index", ylim=(-0.05, 1.05))
        return ax


def agreement(
    phi: Any,
    k: int,
    *,
    others: Mapping[str, Any] | None = None,
    labels: ArrayLike | None = None,
    seeds: int = 4,
    starts: int = 10,
) -> Agreement:
    """Are the clusters found again (Fig. 15, 16)? From other seeds, in φ at other σ, from other starts.

    others: name → (N, d') of the same images, e.g. φ at another σ. labels: (N,); K-means then also
    starts from the class centroids, whose number is then k.
    """
    from sklearn.metrics import adjusted_rand_score as rand

    phi = matrix(phi)
    validate.integer(seeds, "seeds", low=2)

    def across(rows: Any) -> list[np.ndarray]:
        return [kmeans(rows, k, starts=starts, seed=s).labels for s in range(seeds)]

    def pairs(runs: list[np.ndarray]) -> np.ndarray:
        return np.array([rand(a, b) for i, a in enumerate(runs) for b in runs[:i]])

    own = across(phi)
    found = {"seeds": pairs(own)}
    for name, rows in (others or {}).items():
        other = kmeans(rows, k, starts=starts).labels
        found[name] = np.array([rand(own[0], other)])
    if labels is not None:
        labels = labels_of(labels, len(phi))
        names, own_class = np.unique(labels, return_inverse=True)
        init = centroids(phi, own_class, len(names))
        from_classes = kmeans(phi, len(names), init=init).labels
        plus = kmeans(phi, len(names), starts=starts).labels
        found["class starts"] = np.array([rand(plus, from_classes)])
    return Agreement(found, pairs(across(gaussian_like(phi))))
