"""What is measured on a GPU; on the pretended one, whose kernels run on the host, a little of each, so that
all of it can be rehearsed.
"""

from __future__ import annotations

import gpu_case
import torch

CONFIG, SIZE = gpu_case.CONFIG, gpu_case.SIZE  # the paper's network
DEVICE, BF16 = torch.device("cuda", 0), torch.bfloat16
BATCHES = (256, 64, 1, 8, 512)  # what is asked for first
IMAGES = 40 if gpu_case.PRETENDED else 20_000  # of a data set


def batch(n: int) -> int:
    return min(n, 2) if gpu_case.PRETENDED else n
