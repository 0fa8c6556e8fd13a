"""What the analyses share: their input, their controls, and what every result can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastphi.analysis.rows import Rows, finite, gathered, matrix, moments, parts, some
from fastphi.phi import PhiStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastphi.unet import UNet


class Result:
    """Base of the frozen dataclasses that analyses return.

    `numbers()` gives every number as plain JSON values; `shown`, where a class has it, tells whether
    the paper's claim came out beyond its controls, by the rule in the class's own docstring.
    """

    def numbers(self) -> dict[str, Any]:
        found = {f.name: plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        if hasattr(self, "shown"):
            found["shown"] = bool(self.shown)
        return found


def plain(value: Any) -> Any:
    """JSON values: an array becomes its median, quartiles, mean, its standard error, and counts."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Result):
        return value.numbers()
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray) and value.ndim:
        return summary(value)
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def summary(values: np.ndarray) -> dict[str, Any]:
    """Median, quartiles, mean and its standard error of the finite values; n, and how many are NaN."""
    flat = np.asarray(values, np.float64).ravel()
    kept = flat[np.isfinite(flat)]
    found: dict[str, Any] = {"n": len(kept), "nan": len(flat) - len(kept)}
    if len(kept):
        low, middle, high = np.percentile(kept, [25, 50, 75])
        found |= {"median": float(middle), "q25": float(low), "q75": float(high)}
        found |= {"mean": float(kept.mean()), "se": standard_error(kept)}
    return found


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values; NaN for fewer than two becomes 0."""
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def exceeds(a: np.ndarray, b: np.ndarray, errors: float = 3.0) -> bool:
    """Whether the mean of paired differences a − b lies above 0 by more than `errors` standard errors."""
    difference = (np.asarray(a, np.float64) - np.asarray(b, np.float64)).ravel()
    difference = difference[np.isfinite(difference)]
    if len(difference) < 2:
        return False
    return bool(difference.mean() > errors * standard_error(difference) and difference.mean() > 0)


def blocks_of(source: Any, sigma: float | None = None) -> dict[str, Rows]:
    """{block: (N, C)} of what an analysis is given: such a mapping, one array, or a φ store at σ."""
    if isinstance(source, PhiStore):
        if sigma is None:
            raise ValueError("sigma: a φ store has several noise levels, name one")
        return {block: source.array(sigma, block) for block in source.blocks}
    if not isinstance(source, Mapping):
        source = {"mid": source}
    arrays = {str(name): matrix(value, str(name)) for name, value in source.items()}
    if not arrays or len({len(a) for a in arrays.values()}) != 1:
        sizes = {name: len(a) for name, a in arrays.items()}
        raise ValueError(f"blocks: expected arrays (N, C) of the same N, got {sizes}")
    return arrays


def labels_of(labels: Any, n: int) -> np.ndarray:
    """(N,) whole numbers, one per row."""
    array = np.asarray(labels)
    if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"labels: expected {n} whole numbers, one per row, got {array.dtype} {array.shape}"
        )
    return array


# --- controls -------------------------------------------------------------------------------------


def gaussian_like(rows: Any, seed: int = 0) -> np.ndarray:
    """As many draws (N, C) from the Gaussian with the rows' mean and covariance: geometry without
    structure. Whatever comes out the same on it, clusters for instance, says nothing of the rows.

    More than 10⁸ values are a memory map of a temporary file (`gathered`), in float32: 6e-8 off. The sign
    of a principal component hangs on the covariance's last bit: other chunks may give the draws mirrored.
    """
    rows, rng = matrix(rows), np.random.default_rng(seed)
    n, d = rows.shape
    if n <= d:  # mixing the centred rows spares a factorisation of (C, C)
        x = finite(rows)
        mean = x.mean(axis=0)
        return mean + rng.standard_normal((n, n)) @ (x - mean) / n**0.5
    of, first = moments(rows, products=True), finite(rows[:1])[0]
    values, vectors = np.linalg.eigh(of.scatter * (1 / n))  # / n would round otherwise than np.cov
    mixing = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
    drawn = (
        # rounding would bring a dead channel to life
        np.where(of.constant, first, of.mean + rng.standard_normal((p.stop - p.start, d)) @ mixing)
        for p in parts(n, d)
    )
    return gathered((n, d), drawn)


def principal(rows: Any, k: int, sample: int = 10_000) -> np.ndarray:
    """Scores (N, k) on the first k principal components: pixels reduced to as many numbers as φ has.

    sample: of more rows than this, as many at random say what the components are. Scores are float32;
    more than 10⁸ values are a memory map of a temporary file (`gathered`).
    """
    from sklearn.decomposition import PCA

    rows = matrix(rows)
    at = some(len(rows), sample)
    x = np.asarray(rows[at], np.float32)
    k = min(k, *x.shape)
    fitted: Any = PCA(k, svd_solver="randomized", random_state=0)
    if len(at) == len(rows):
        return fitted.fit_transform(x)
    fitted.fit(x)
    scores = (
        fitted.transform(np.asarray(rows[part], np.float32))
        for part in parts(len(rows), rows.shape[1])
    )
    return gathered((len(rows), k), scores, np.float32)


def untrained(model: UNet, seed: int = 0) -> UNet:
    """A network of the same shape with random weights: what the architecture does on its own."""
    from fastphi.unet import UNet

    parameter = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = UNet(model.config, backend=model.backend)
    fresh.training_info = model.training_info
    return fresh.to(parameter.device, parameter.dtype).eval()


def new_axes(ax: Axes | None) -> Axes:
    """`ax`, or axes of a new figure."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(5, 3.6), layout="constrained").subplots()
