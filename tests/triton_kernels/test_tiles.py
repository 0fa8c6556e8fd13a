"""The tile table: every size is covered, and the batch has no say."""

from __future__ import annotations

import pytest
import torch
from triton_case import skip_reason

if (reason := skip_reason()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fastphi.triton_kernels import tiles  # noqa: E402


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_has_a_tile(dtype, capability):
    channels = (1, 3, 12, 16, 20, 36, 52, 64, 100, 128, 256, 512)
    for c_in in channels:
        for c_out in channels:
            for size in (1, 3, 8, 10, 20, 40, 64, 80):
                t = tiles.tile((c_in, c_in), c_out, size, size, dtype, capability)
                assert all(is_power_of_two(v) for v in t[:6]), t
                assert t.rows >= 2 and t.columns >= 2, "pooling needs whole quads in a box"
                assert t.block_n >= 16 and t.block_k >= 16, "smaller ones are no matrix product"
                assert tiles.padded(c_in) % t.block_k == 0, "a step must not straddle two taps"


@pytest.mark.parametrize(
    "size, covered",
    [(64, 64), (32, 32), (16, 16), (8, 8), (80, 80), (40, 40), (20, 20), (10, 12)],
)
def test_the_networks_sizes_waste_no_pixels(size, covered):
    for pixels in (128, 256):
        images, rows, columns = tiles.pixel_box(pixels, size, size)
        assert images * rows * columns == pixels and images <= tiles.MAX_IMAGES
        assert -(-size // rows) * rows * (-(-size // columns) * columns) <= covered * covered


def test_padded_channels():
    assert [tiles.padded(c) for c in (1, 12, 16, 20, 36, 64, 65, 100, 512)] == [
        *(16, 16, 16, 32, 64, 64, 128, 128, 512)
    ]
