"""A φ store that does not fit in memory: analyses in a process that may not hold it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastphi
from fastphi.analysis.kmeans import mini_batch_kmeans
from fastphi.phi.store import FORMAT, VERSION, Writer

N, WIDTH, GROUPS = 300_000, 64, 6  # 77 MB of float32
_LIMITED = """
import resource, sys
import numpy as np
import scipy.sparse, scipy.stats, sklearn.cluster, sklearn.decomposition, sklearn.metrics
from fastphi import PhiStore
from fastphi.analysis import rows as gone_over
from fastphi.analysis.channels import channels
from fastphi.analysis.clusters import kmeans, purity, separations
from fastphi.analysis.common import gaussian_like, principal
from fastphi.analysis.neighbours import distinct, label_agreement, nearest
from fastphi.analysis.probe import probe
from fastphi.analysis.selectivity import exciting, pictured, selectivity
from fastphi.analysis.sparsity import sparsity
from fastphi.analysis.stability import stability
from fastphi.analysis.subspaces import subspaces

rows, labels = PhiStore(sys.argv[1]).array(0.5), np.arange(300_000) % 6
kmeans(np.random.default_rng(0).random((50, 4)), 2, starts=1)  # loads what K-means loads
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 55_000_000,) * 2)
try:
    np.array(rows)
    sys.exit("the store fits: the limit proves nothing")
except MemoryError:
    pass
"""
_NEIGHBOURS = """
queries = np.array([5, 150_000, 299_999])
index, cosine = nearest(rows[queries], rows, k=10, chunk=8192, exclude=queries)
assert (index % 6 == queries[:, None] % 6).all() and (cosine > 0.9).all()
found = kmeans(rows, 6, starts=2)
assert purity(found.labels, np.arange(len(rows)) % 6) > 0.999, found.inertia
assert len(set(distinct(rows, 6) % 6)) == 6
print("done")
"""
_OTHERS = """
gone_over._HELD = 10**6  # a Gaussian of more values goes to a file
assert np.isfinite(sparsity(rows).outputs["mid"]).all()
assert (stability({s: {"mid": rows} for s in (0.1, 0.5)}).same["mid"] > 0.999).all()
assert isinstance(gaussian_like(rows), np.memmap)
found = selectivity(rows, draws=20)
assert len(found.ratios) == 64 and len(pictured(rows)) == 16 and len(exciting(rows, 3)) == 8
assert np.allclose(channels(rows, others={0.1: rows}).noise, 1)
assert (subspaces(rows, 20, queries=50).shared > 0).all()
assert probe(rows, labels).accuracy["φ"] > 0.999
assert label_agreement(rows, labels, queries=100).shares["φ"].mean() > 0.999
assert np.nanmin(separations(rows, labels)) > 20
assert principal(rows, 4).shape == (300_000, 4)
print("done")
"""


@pytest.fixture
def store(tmp_path) -> Path:
    """Row i belongs to group i mod 6."""
    fields = {"rows": N, "indices": None, "sigmas": [0.5], "draws": 1, "blocks": {"mid": WIDTH}}
    known = {"format": FORMAT, "version": VERSION, "seed": 0, "model": "m", "data": "d"}
    rng = np.random.default_rng(0)
    centre = rng.random((GROUPS, WIDTH))
    with Writer(tmp_path, fields | known, None, range(N)) as writer:
        for start in range(0, N, 50_000):
            at = np.arange(start, start + 50_000)
            values = centre[at % GROUPS] + 0.02 * rng.random((len(at), WIDTH), np.float32)
            writer.write(0.5, at, {"mid": values.astype(np.float32)})
    return tmp_path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory limits")
@pytest.mark.parametrize("script", [_NEIGHBOURS, _OTHERS], ids=["neighbours, clusters", "others"])
def test_a_store_larger_than_memory(store, script):
    source = str(Path(fastphi.__file__).parents[1])
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    run = subprocess.run(
        [sys.executable, "-c", _LIMITED + script, str(store)],
        env=os.environ | threads | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.stdout == "done\n", run.stderr


def test_mini_batches_find_planted_clusters_and_go_from_given_centroids():
    rng = np.random.default_rng(1)
    centre, labels = rng.normal(size=(5, 8)), rng.integers(0, 5, 20_000)
    rows = centre[labels] + 0.05 * rng.normal(size=(20_000, 8))
    given = mini_batch_kmeans(rows, 5, init=centre)
    np.testing.assert_array_equal(given.labels, labels)  # and so numbered
    free = mini_batch_kmeans(rows, 5, starts=10)
    assert free.inertia == pytest.approx(8 * 0.05**2, rel=0.05)
    rows[7, 3] = np.nan
    with pytest.raises(ValueError, match="phi: expected finite values"):
        mini_batch_kmeans(rows, 5, init=centre)
