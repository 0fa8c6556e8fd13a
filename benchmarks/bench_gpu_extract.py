"""φ of a data set on a GPU, from a uint8 memory map to a store on disk: 20 draws at one σ, wall time.

The set is random; what an ImageNet-size one would take is calculated from the throughput.
"""

from __future__ import annotations

import shutil
import time

import gpu_case
import gpu_sizes
import numpy as np
import pytest
import support
import torch

import fastphi

pytestmark = gpu_case.marks()

CONFIG, SIZE, DRAWS, SIGMA = gpu_sizes.CONFIG, gpu_sizes.SIZE, 20, 0.3
IMAGES = gpu_sizes.IMAGES


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3), np.uint8)
    np.save(folder / "images.npy", pixels)
    return fastphi.pack(folder / "images.npy", folder / "pack", size=SIZE)


@pytest.mark.parametrize("n", [64, 256, 1024])
def test_extract(n, packed, tmp_path, results, peaks, benchmark):
    batch = gpu_sizes.batch(n)
    model = support.network(CONFIG, backend="cuda").to("cuda")
    options = dict(sigmas=[SIGMA], draws=DRAWS, batch=batch, dtype=torch.bfloat16)
    first = np.arange(
        min(IMAGES, 4 * batch + IMAGES % batch)
    )  # whole chunks and the last, shorter one
    fastphi.extract(model, packed, tmp_path / "warm", indices=first, **options)
    start = time.perf_counter()
    store = fastphi.extract(model, packed, tmp_path / "phi", **options)
    seconds = time.perf_counter() - start
    assert store.complete and np.isfinite(store.array(SIGMA)[:: max(1, IMAGES // 100)]).all()
    flops = support.total_flops(CONFIG, SIZE, decoder=False)
    case = {
        "what": "extract",
        "way": f"ours, batch {batch}",
        "images": IMAGES,
        "draws": DRAWS,
        "seconds": support.summary([seconds]),
        "images_per_second": IMAGES / seconds,
        "bound": IMAGES * DRAWS * flops / peaks["flops"],
        "calculated_seconds_of_imagenet": support.IMAGENET * seconds / IMAGES,
    }
    case["percent_of_bound"] = 100 * case["bound"] / seconds
    results.add(case)
    benchmark.extra_info.update(case)
    benchmark.pedantic(lambda: None)  # once is long enough: the time is the one above
    shutil.rmtree(tmp_path)
