"""Weights in bfloat16, in the order in which the CPU kernels read them (csrc/cpu/bf16.h).

The first and the last layer's are kept in two parts, rounded and what was lost: there nothing averages
the rounding out (φ of a smooth image would be off by 4 %).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastphi.engine.rounding import rounded, two_parts

BLOCK = 32  # channels of a block, outputs of a panel
IMAGE_CHANNELS = 8  # at most: two parts of each fill the 16 columns of a tile


def conv(weight: Tensor, own: int) -> Tensor:
    """(cout, cin, 3, 3), the first `own` channels from the first source -> 1-D, bfloat16."""
    low = rounded(weight, torch.bfloat16)
    return torch.cat(
        [_tiles(part) for part in low.split([own, low.shape[1] - own], 1)], 1
    ).flatten()


def first(weight: Tensor) -> Tensor:
    """(cout, C, 3, 3) -> 1-D, bfloat16: for the image rounded, for its rest, and for the image again what
    was lost; each in one block of 32 (kernel row, column, channel), or in one for each kernel row."""
    cout, c = weight.shape[:2]
    blocks = 1 if 9 * c <= BLOCK else 3
    rows = padded(weight.permute(0, 2, 3, 1).reshape(cout, blocks, -1)).transpose(1, 2)
    high, low = two_parts(rows, torch.bfloat16)  # (cout, 32, blocks)
    return _tiles(torch.cat([high, high, low], dim=2)).flatten()


def last(weight: Tensor) -> Tensor:
    """(C, cin, 3, 3) -> 1-D of (block, tap, pair, 16, 2), bfloat16: columns rounded, then what was lost."""
    return _tiles(torch.cat(two_parts(weight, torch.bfloat16)))[0, :, :, 0].flatten()


def transposed(weight: Tensor, first: bool) -> Tensor:
    """(cout, cin, 3, 3) -> the kernel of the gradient to the input, of the same rounded weights; first:
    to the image, as a last layer's."""
    rotated = (weight if first else rounded(weight, torch.bfloat16)).flip(2, 3).transpose(0, 1)
    return last(rotated) if first else conv(rotated, rotated.shape[1])


def upsample(weight: Tensor) -> Tensor:
    """(cin, cout, 2, 2) -> 1-D of (tap, panel, block, ...), bfloat16."""
    low = rounded(weight, torch.bfloat16).flatten(2).permute(2, 1, 0)
    return torch.cat([_tiles(tap[:, :, None]).flatten() for tap in low])


def together(packed: list[Tensor]) -> list[Tensor]:
    """The same tensors, one after the other in large pages."""
    whole = torch.ops.fastphi.in_large_pages(torch.cat(packed))
    return list(whole.split([len(part) for part in packed]))


def padded(x: Tensor) -> Tensor:
    """The last dimension filled up to whole panels with zeros, float32."""
    return F.pad(x.detach().float(), (0, -x.shape[-1] % BLOCK)).contiguous()


def _tiles(weight: Tensor) -> Tensor:
    """(cout, cin, ...) -> (panel, block, tap, half, pair, 16, 2): a tile holds, for each pair of channels,
    the pair's weights of 16 outputs."""
    cout, cin = weight.shape[:2]
    full = F.pad(weight.flatten(2), (0, 0, 0, -cin % BLOCK, 0, -cout % BLOCK))
    split = full.view(len(full) // BLOCK, 2, 16, full.shape[1] // BLOCK, 16, 2, full.shape[2])
    return split.permute(0, 3, 6, 1, 4, 2, 5)
