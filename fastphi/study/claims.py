"""The paper's claims, each with the rule for its verdict, fixed before anything was measured.

"reproduced": the rule holds. "weaker": it does not, but the second, milder rule does: the effect has
the paper's direction, and a control or a threshold is missed. Otherwise "not reproduced". The file is
one table, and as long as there are claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastphi.analysis.common import exceeds
from fastphi.study.claim import Claim, beats_chance, median, shares, spearman, with_error


def judge(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row per claim whose result is there: name, claim, rule, found, verdict."""
    return [
        {
            "name": c.name,
            "claim": c.text,
            "rule": c.rule,
            "found": c.number(results[c.needs]),
            "verdict": c.verdict(results[c.needs]),
        }
        for c in CLAIMS
        if c.needs in results and c.applies(results[c.needs])
    ]


def _channel(name: str, text: str) -> Claim:
    extra = ", and the specialised channels' median excess kurtosis is above 1"
    return Claim(
        name,
        "channels",
        text,
        "rank correlation with PR over images has the paper's sign, p < 0.01"
        + (extra if name == "kurtosis" else ""),
        "the sign is the paper's",
        lambda r: r.as_expected.get(name, False),
        lambda r: r.correlations[name][0] * r.expected[name] > 0,
        lambda r: spearman(r.correlations[name]),
    )


def _stable_middle(r: Any) -> bool:
    mean = {b: float(np.nanmean(v)) for b, v in r.over_levels().items()}
    return bool(mean["mid"] > np.mean([v for b, v in mean.items() if b != "mid"]))


def _separations(r: Any) -> str:
    return (
        f"nearest pairs {median(r.nearest):.2f} (Gaussian {r.gaussian_nearest.mean():.2f} ± "
        f"{r.gaussian_nearest.std(ddof=1):.2f}), random pairs {median(r.random):.2f} "
        f"(Gaussian {r.gaussian_random.mean():.2f} ± {r.gaussian_random.std(ddof=1):.2f})"
    )


def _predicts(r: Any) -> bool:
    rho, p = r.correlations["φ"]
    return bool(rho >= 0.5 and p < 0.01 and rho > r.correlations["pixels"][0])


CLAIMS = (
    Claim(
        "sparsity",
        "sparsity",
        "PR of ā rises from input to output in encoder blocks, falls in middle and decoder (Fig. 1)",
        "in every block, by more than 3 standard errors over images",
        "in more than half of the blocks",
        lambda r: r.shown,
        lambda r: 2 * sum(r.steps.values()) > len(r.steps),
        lambda r: ", ".join(
            f"{b} {median(r.inputs[b]):.2f} → {median(r.outputs[b]):.2f}"
            for b in r.outputs
            if b in r.inputs
        ),
    ),
    Claim(
        "stability",
        "stability",
        "The middle block's ā is the most stable across σ (Fig. 2)",
        "its cosine with ā(0.5), mean over σ in [0.1, 1], exceeds every block's by 3 standard errors",
        "it exceeds the mean of the other blocks'",
        lambda r: r.shown,
        _stable_middle,
        lambda r: ", ".join(f"{b} {with_error(v)}" for b, v in r.over_levels().items()),
    ),
    Claim(
        "collapse",
        "stability",
        "φ collapses as σ → 0 (Fig. 2, 11)",
        "mean ‖φ‖ at σ = 0 is below 0.2 of that at 0.5",
        "below 0.5 of it",
        lambda r: r.collapse["mid"] < 0.2,
        lambda r: r.collapse["mid"] < 0.5,
        lambda r: f"{r.collapse['mid']:.2f} of ‖φ(0.5)‖",
    ),
    Claim(
        "selectivity",
        "selectivity",
        "Selectivity of channels is bimodal (Fig. 3)",
        "dip test p < 0.01, lowest quartile's median PR < 0.5, and no control has both",
        "dip test p < 0.05",
        lambda r: r.shown,
        lambda r: r.p < 0.05,
        lambda r: (
            f"dip {r.dip:.3f}, p = {r.p:.2g}; median PR {median(r.ratios):.2f}; "
            f"{r.faint} of {len(r.ratios)} channels nearly dead"
        ),
    ),
    _channel("kurtosis", "Specialised channels have heavy-tailed marginals (Fig. 13)"),
    _channel("spatial", "Specialised channels are spatially sparse (Fig. 13)"),
    _channel("dimension", "Specialised channels' maps are low-dimensional (Fig. 13)"),
    _channel(
        "frequency", "Specialised channels respond to a narrow range of frequencies (Fig. 13)"
    ),
    _channel("orientation", "Specialised channels respond to few orientations (Fig. 13)"),
    Claim(
        "dimension_local",
        "subspaces",
        "Local dimension of φ is 0.2-0.3 d (Fig. 5)",
        "the median over neighbourhoods lies in [0.15, 0.35]",
        "it lies below 0.5",
        lambda r: 0.15 <= median(r.dimension) <= 0.35,
        lambda r: median(r.dimension) < 0.5,
        lambda r: f"median {median(r.dimension):.2f} (Gaussian {median(r.gaussian_dimension):.2f})",
    ),
    Claim(
        "subspaces",
        "subspaces",
        "φ lies in a union of subspaces: neighbours share channels that other images do not (Fig. 5)",
        "neighbours' gain in overlap exceeds the Gaussian's by 3 standard errors",
        "neighbours overlap more than random images do, by 3 standard errors",
        lambda r: exceeds(r.shared - r.shared_random, r.gaussian_shared - r.gaussian_shared_random),
        lambda r: exceeds(r.shared, r.shared_random),
        lambda r: (
            f"gain {with_error(r.shared - r.shared_random)}, Gaussian "
            f"{with_error(r.gaussian_shared - r.gaussian_shared_random)}"
        ),
    ),
    Claim(
        "neighbours",
        "neighbours",
        "Neighbours in φ share labels more than neighbours in pixels do (Fig. 14)",
        "more than in pixels, their PCA and an untrained network's φ, by 3 standard errors",
        "more than chance, by 3 standard errors",
        lambda r: r.shown,
        lambda r: beats_chance(r.shares, r.chance),
        lambda r: shares(r.shares, r.chance),
    ),
    Claim(
        "clusters",
        "clusters",
        "K-means clusters of φ are better separated than a Gaussian's (Fig. 6)",
        "medians over random and over nearest pairs exceed five Gaussians' by 3 of their standard "
        "deviations and by 5 %",
        "one of the two medians exceeds all five Gaussians'",
        lambda r: r.shown,
        lambda r: (
            median(r.random) > r.gaussian_random.max()
            or median(r.nearest) > r.gaussian_nearest.max()
        ),
        _separations,
    ),
    Claim(
        "classes",
        "clusters",
        "Clusters of φ are better separated than labelled classes (Fig. 6)",
        "both medians exceed the classes' (random pairs and nearest pairs)",
        "one of them does",
        lambda r: r.better_than_classes,
        lambda r: (
            median(r.random) > median(r.class_random) or median(r.nearest) > median(r.class_nearest)
        ),
        lambda r: (
            f"classes: nearest pairs {median(r.class_nearest):.2f}, random "
            f"{median(r.class_random):.2f}; purity {r.purity:.3f}, shuffled {r.purity_chance:.3f}"
        ),
        lambda r: len(r.class_random) > 0,
    ),
    Claim(
        "agreement",
        "agreement",
        "Clusters are found again from other seeds, at other σ, from class centroids (Fig. 15, 16)",
        "adjusted Rand index of each kind exceeds the Gaussian's between seeds by 3 of its standard "
        "deviations and by 0.05",
        "every kind's index is above 0.1",
        lambda r: r.shown,
        lambda r: all(v.mean() > 0.1 for v in r.found.values()),
        lambda r: (
            ", ".join(f"{n} {v.mean():.2f}" for n, v in r.found.items())
            + f"; Gaussian {r.gaussian.mean():.2f} ± {r.gaussian.std():.2f}"
        ),
    ),
    Claim(
        "samples_phi",
        "likeness",
        "Samples made to match φ of a target have it (Fig. 7)",
        "the own target is the nearest in φ of all targets more often than chance, by 3 standard errors",
        "cosine of φ with the own target exceeds that with the others by 3 standard errors",
        lambda r: r.keeps_phi,
        lambda r: exceeds(r.cosine, r.cosine_other),
        lambda r: (
            f"own nearest in {r.nearest.mean():.2f} (chance {1 / len(r.between):.2f}); cosine "
            f"{with_error(r.cosine)}, with others {with_error(r.cosine_other)}"
        ),
    ),
    Claim(
        "samples_layout",
        "likeness",
        "Samples keep the layout of their target (Fig. 7)",
        "8 × 8 correlation with the own target exceeds that with the others by 3 standard errors, and "
        "is at least 0.3",
        "it exceeds it by 3 standard errors",
        lambda r: r.keeps_layout and float(np.nanmean(r.layout)) >= 0.3,
        lambda r: r.keeps_layout,
        lambda r: f"{with_error(r.layout)}, with others {with_error(r.layout_other)}",
    ),
    Claim(
        "samples_vary",
        "likeness",
        "Samples of one target are not identical (Fig. 7)",
        "they differ (rms) by at least a fifth of what targets differ by",
        "by a tenth",
        lambda r: r.varied,
        lambda r: r.between.mean() >= 0.1 * r.targets.mean(),
        lambda r: (
            f"rms {r.between.mean():.3f} between samples, {r.targets.mean():.3f} between targets"
        ),
    ),
    Claim(
        "copies",
        "memorisation",
        "Samples are not copies of training images (Fig. 17-19)",
        "at most 5 % are nearer to a training image than the nearest 1 % of held-out images are",
        "at most 20 %",
        lambda r: r.shown,
        lambda r: r.copies <= 0.2,
        lambda r: (
            f"{100 * r.copies:.0f} % of {len(r.samples)}; nearest {r.samples.min():.3f}, held-out "
            f"1 % {np.percentile(r.heldout, 1) if len(r.heldout) else float('nan'):.3f} (rms)"
        ),
    ),
    Claim(
        "noise_level",
        "noise_level",
        "Matching leaves the noise level unchanged (Fig. 20)",
        "median |σ̂ after/before − 1| <= 5 % at every level, where the loss fell to half or less",
        "<= 15 % at every level",
        lambda r: r.shown,
        lambda r: bool((np.median(r.change, axis=1) <= 0.15).all()),
        lambda r: (
            "median change "
            + ", ".join(
                f"{100 * c:.1f} % at {s:g}"
                for s, c in zip(r.sigmas, np.median(r.change, axis=1), strict=True)
            )
            + f"; loss ratio {median(r.loss_ratio):.2g}"
        ),
    ),
    Claim(
        "divergence",
        "divergence",
        "Distance in φ predicts the divergence of the conditional densities (Fig. 8)",
        "Spearman's ρ >= 0.5 with p < 0.01, and above that of pixel distance",
        "ρ > 0 with p < 0.05",
        _predicts,
        lambda r: r.correlations["φ"][0] > 0 and r.correlations["φ"][1] < 0.05,
        lambda r: (
            ", ".join(f"{n}: {spearman(v)}" for n, v in r.correlations.items())
            + f"; {len(r.squared)} pairs"
        ),
    ),
    Claim(
        "bounds",
        "divergence",
        "The ratio d²/‖Δφ‖² varies little: B/A = 2.9 (Fig. 8)",
        "B/A is at most 5.8, twice the paper's",
        "the 95th over the 5th percentile is",
        lambda r: r.bounds["B/A"] <= 5.8,
        lambda r: r.bounds["q95/q5"] <= 5.8,
        lambda r: (
            f"B/A {r.bounds['B/A']:.1f}, 95 %/5 % {r.bounds['q95/q5']:.1f}; Monte-Carlo error "
            f"{100 * median(r.error / r.squared):.0f} % of d² (median; nan where there is one path)"
        ),
    ),
    Claim(
        "probe",
        "probe",
        "A linear probe reads labels off φ (the authors' programs)",
        "better than off pixels' PCA and an untrained network's φ, by 3 standard errors",
        "better than chance, by 3 standard errors",
        lambda r: r.shown,
        lambda r: beats_chance(r.correct, r.chance),
        lambda r: shares(r.correct, r.chance),
    ),
    Claim(
        "location",
        "decoding",
        "Position can be decoded from ā (§2.1, Fig. 18)",
        "R² from the middle block above 0.5, and above every control's by 0.1",
        "above 0.2",
        lambda r: r.shown,
        lambda r: r.r2["mid"] > 0.2,
        lambda r: (
            ", ".join(f"{b} {v:.2f}" for b, v in r.r2.items())
            + "; "
            + ", ".join(f"{n} {max(v.values()):.2f} at best" for n, v in r.controls.items())
        ),
    ),
    Claim(
        "generation",
        "generation",
        "Samples from φ of several images together, a cluster's, a class's, a pair's, have it (Fig. 17-19)",
        "of every kind the cosine with the target's φ exceeds that of images from noise alone, and that "
        "with the other targets of the kind, by 3 standard errors",
        "that of images from noise alone",
        lambda r: r.shown,
        lambda r: all(exceeds(own, r.cosine_prior[kind]) for kind, own in r.cosine.items()),
        lambda r: "; ".join(
            f"{kind} {with_error(own)} (others {with_error(r.cosine_other[kind])}, noise alone "
            f"{with_error(r.cosine_prior[kind])})"
            for kind, own in r.cosine.items()
        ),
    ),
)
