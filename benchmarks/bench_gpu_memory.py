"""Peak GPU memory of one call, beyond the model and its input, ours beside eager in bf16."""

from __future__ import annotations

import bench_gpu_network as networks
import gpu_case
import gpu_sizes
import pytest
import support
import torch

pytestmark = gpu_case.marks()


@pytest.mark.parametrize("n", [1, 64, 256, 512])
@pytest.mark.parametrize("way", ["ours", "eager", "authors"])
@pytest.mark.parametrize("work", ["phi", "denoise"])
@torch.no_grad()
def test_memory(work, way, n, results, benchmark):
    n = gpu_sizes.batch(n)
    model = support.network(networks.CONFIG, backend="cuda").to(networks.DEVICE)
    x = support.images(n, networks.CONFIG, networks.SIZE, networks.DEVICE)
    call = networks.WAYS[way](model, work == "denoise")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(x), call(x)
    torch.cuda.synchronize()
    case = {
        "what": f"memory of {work}",
        "way": way,
        "images": n,
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }
    results.add(case)
    benchmark.extra_info.update(case)
    benchmark.pedantic(lambda: call(x), rounds=1)
