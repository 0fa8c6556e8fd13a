"""Which tile every kernel uses: one table, the reason beside each row, nothing tuned at run time.

A tile is chosen by layer, image size, dtype and architecture, never by the batch: so the order of
every sum, and with it every bit of a result, is the same whoever shares the batch.

The reasons count per step of BLOCK_K = 64 channels in bf16, for one multiprocessor of an H100/H200:
2048 multiply-adds a clock, 24 to 48 bytes a clock from L2 (public figures differ). A step of M pixels
and N channels takes M·N·64/2048 clocks and loads 128·(M + N) bytes. None of it has run on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .support import cdiv, describable, power_of_two


class Tile(NamedTuple):
    """images × rows × columns of pixels, by block_n output channels, in steps of block_k inputs."""

    images: int
    rows: int
    columns: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    descriptors: bool  # operands through the tensor copy engine (sm_90), or through pointers

    def options(self) -> dict[str, int | bool]:
        """What Triton's compiler is told; products and sums are fused, whatever its default."""
        return dict(num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)


class Row(NamedTuple):
    """A row of the table: from this many output channels on."""

    c_out: int
    pixels: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# 3×3 convolution: (kind) -> rows by falling number of output channels
CONV: dict[str, tuple[Row, ...]] = {
    # sm_90, tensor descriptors, 16-bit. Channels are the rows of the products, pixels the columns:
    # m64n256 reads 80 bytes of shared memory a clock, m64n128 96, m64n64 all 128 that there are.
    "sm_90 descriptors": (
        # 48 KB per 1024 clocks, the most that two warpgroups can accumulate; 4 steps in flight
        Row(128, 256, 128, 64, 8, 4),
        # 40 KB per 512 clocks: bound by L2. Two programs share a multiprocessor (2 steps in flight
        # each), so that one's epilogue, long beside nine steps, runs under the other's products.
        Row(64, 256, 64, 64, 8, 2),
        # fewer: bound by the loads whatever the shape
        Row(1, 128, 32, 64, 4, 4),
    ),
    # sm_80 (and odd channels on sm_90): gather through cp.async; addresses and masks take registers
    "pointers": (
        # 128×128 on 8 warps: on 4 the addresses spill
        Row(128, 128, 128, 32, 8, 4),
        Row(64, 128, 64, 64, 4, 3),
        Row(1, 128, 32, 64, 4, 3),
    ),
    # fp32, for validation: "ieee" products run on the plain cores from registers
    "float32": (
        Row(64, 64, 64, 32, 4, 2),
        Row(1, 64, 32, 32, 4, 2),
    ),
}

# The up-sampling: few steps (2 to 8) and much to write, so memory decides. 128×128 leaves room for two
# programs on a multiprocessor, and one writes while the other computes.
UPSAMPLE = {
    "sm_90 descriptors": Row(1, 128, 128, 64, 8, 3),
    "pointers": Row(1, 128, 128, 32, 8, 3),
    "float32": Row(1, 64, 64, 16, 4, 2),  # 32 spills under Triton 3.9
}

# The first layer: one step, bound by what it writes. Small programs, many to a multiprocessor. By
# pointers 8 warps: with 4, an image of 4 channels spills on sm_80.
FIRST = {
    "sm_90 descriptors": Row(1, 128, 64, 64, 4, 1),
    "pointers": Row(1, 128, 64, 64, 8, 1),
    "float32": Row(1, 64, 64, 64, 4, 1),
}

# The epilogue alone: bound by memory. 32 values to a thread, many programs to a multiprocessor.
EPILOGUE = {
    "sm_90 descriptors": Row(1, 64, 64, 64, 4, 1),
    "pointers": Row(1, 64, 64, 64, 4, 1),
    "float32": Row(1, 64, 32, 64, 4, 1),
}

# The last layer: bound by its loads, 16 KB a step; many programs and steps in flight.
LAST = {
    "sm_90 descriptors": Row(1, 128, 16, 64, 4, 4),
    "pointers": Row(1, 128, 16, 64, 4, 3),
    "float32": Row(1, 64, 16, 32, 4, 2),
}

# The pass over d_z: bound by memory. 32 values to a thread are four loads of 16 bytes in flight from
# each of two tensors; 128 channels are 256 bytes in a row; small programs, so that the 8×8 level of
# a few images has some for every multiprocessor.
NORM_BWD_VALUES, NORM_BWD_CHANNELS, NORM_BWD_WARPS = 4096, 128, 4

# Packing of weights: two values to a thread, so that 64→64 still has 16 programs; a row of 64 channels
# is what one tap writes side by side.
PACK_ROWS, PACK_CHANNELS = 4, 64

MAX_IMAGES = (
    16  # images per tile, at most: small images must not need a large batch to be efficient
)


def padded(channels: int) -> int:
    """Channels of a packed weight: whole steps of block_k for every tile above."""
    return max(16, power_of_two(channels)) if channels <= 64 else cdiv(channels, 64) * 64


def pixel_box(pixels: int, height: int, width: int) -> tuple[int, int, int]:
    """(images, rows, columns), powers of two: the box that wastes least of its pixels on the image,
    then the one with the fewest images, then the squarest (the smallest halo to load again)."""
    best, box = None, (1, 2, pixels // 2)
    for log_images in range(MAX_IMAGES.bit_length()):
        images = 1 << log_images
        rows = 2
        while images * rows * 2 <= pixels:
            columns = pixels // (images * rows)
            tiles = cdiv(height, rows) * cdiv(width, columns)
            cost = (tiles * rows * columns, images, rows + columns, -columns)
            if best is None or cost < best:
                best, box = cost, (images, rows, columns)
            rows *= 2
    return box


def kind_of(dtype: torch.dtype, capability: int, *channels: int) -> str:
    """Which rows serve: descriptors need sm_90, 16 bits and channels that the copy engine can address."""
    if dtype == torch.float32:
        return "float32"
    if capability >= 90 and describable(dtype, *channels):
        return "sm_90 descriptors"
    return "pointers"


def _tile(kind: str, row: Row, channels: int, c_in: tuple[int, ...], H: int, W: int) -> Tile:
    block_n = min(row.block_n, max(16, power_of_two(channels)))
    block_k = min(row.block_k, *(padded(c) for c in c_in))
    box = pixel_box(row.pixels, H, W)
    return Tile(*box, block_n, block_k, row.warps, row.stages, kind == "sm_90 descriptors")


def tile(
    c_in: tuple[int, ...], c_out: int, H: int, W: int, dtype: torch.dtype, capability: int
) -> Tile:
    """Of the fused layer. c_in: the channels of each source."""
    kind = kind_of(dtype, capability, *c_in, c_out)
    row = next(row for row in CONV[kind] if c_out >= row.c_out)
    return _tile(kind, row, c_out, c_in, H, W)


def conv_bwd_tile(c: int, c_in: int, H: int, W: int, dtype: torch.dtype, capability: int) -> Tile:
    """Of `conv_bwd`; c, c_in: channels of d_z and of d_r. The fused layer's: r is read after the last
    step, into memory that the steps have left. In fp32 half a step, as 32 spills under Triton 3.9."""
    t = tile((c,), c_in, H, W, dtype, capability)
    return t._replace(block_k=16) if dtype == torch.float32 else t


def upsample_tile(c: int, c_out: int, H: int, W: int, dtype: torch.dtype, capability: int) -> Tile:
    """Of the up-sampling: the rows of the products are 2·c_out values (dx, channel)."""
    kind = kind_of(dtype, capability, c, c_out)
    return _tile(kind, UPSAMPLE[kind], 2 * c_out, (c,), H, W)


def first_tile(c_out: int, H: int, W: int, dtype: torch.dtype, capability: int) -> Tile:
    """Of the first layer: one step over K, so block_k says nothing; descriptors for what is written."""
    kind = kind_of(dtype, capability, c_out)
    return _tile(kind, FIRST[kind], c_out, (64,), H, W)


def norm_bwd_block(channels: int) -> tuple[int, int]:
    """(pixels, channels) of a program of `norm_bwd`."""
    block_c = min(NORM_BWD_CHANNELS, max(16, power_of_two(channels)))
    return NORM_BWD_VALUES // block_c, block_c


def epilogue_tile(c_out: int, H: int, W: int, dtype: torch.dtype, capability: int) -> Tile:
    """Of the epilogue alone: no product, so block_k says nothing."""
    kind = kind_of(dtype, capability, c_out)
    return _tile(kind, EPILOGUE[kind], c_out, (64,), H, W)


def last_tile(c: int, H: int, W: int, dtype: torch.dtype, capability: int) -> Tile:
    """Of the last layer: up to 4 output channels, padded to 16."""
    kind = kind_of(dtype, capability, c)
    return _tile(kind, LAST[kind], 1, (c,), H, W)
