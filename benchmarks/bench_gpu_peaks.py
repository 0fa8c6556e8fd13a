"""What the GPU can do at most: bf16 matrix products, copies, and reads from L2 by TMA. The other benchmarks
say how much of it they get.
"""

from __future__ import annotations

import gpu_case
import gpu_lines
import gpu_sizes
import pytest
import support
import torch

pytestmark = gpu_case.marks()

BYTES = (
    1 << 20 if gpu_case.PRETENDED else 24 << 20
)  # fit into L2: 50 MB of an H100, half of it near
PASSES = 1 if gpu_case.PRETENDED else 8


def test_products_and_copies(results):
    found = support.peaks()
    assert found["flops"] > 0 and found["bytes_per_second"] > 0
    results.put(peaks=found)
    if gpu_lines.wanted():
        gpu_lines.append("peaks", **found)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="it has no TMA",
)
def test_reads_from_l2(results):
    import l2_read

    properties = torch.cuda.get_device_properties(gpu_sizes.DEVICE)
    programs = 2 * properties.multi_processor_count  # of 96 KB shared memory
    source = l2_read.source_of(BYTES, gpu_sizes.DEVICE)
    sums = torch.full((programs, l2_read.ROWS), -1, dtype=torch.int32, device=gpu_sizes.DEVICE)
    l2_read.l2_read(source, sums, PASSES)
    want = PASSES * source.numel() // l2_read.ROWS
    if not gpu_case.PRETENDED:  # where no kernel is run
        assert (sums == want).all(), "it did not read what it was timed for"
    times = support.gpu_times(lambda: l2_read.l2_read(source, sums, PASSES), rounds=10)
    read = programs * PASSES * source.nbytes
    found = {"l2_bytes_per_second": read / support.summary(times)["median"]}
    results.put(l2=found)
    if gpu_lines.wanted():
        gpu_lines.append("peaks", **found)
