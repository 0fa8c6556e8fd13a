"""What torch asks of the GPU engine's small operators, and what they answer to bad arguments."""

from __future__ import annotations

import pytest
import torch
from gpu_ops_case import DEVICES, EPS, GPU, random
from torch.utils._pytree import tree_map_only

from fastphi.engine import ops

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))


# --- what torch asks of an operator ----------------------------------------------------------------


def op_cases(device: str = "cpu"):
    ids = torch.arange(2, device=device)
    image = random(18, 2, 3, 4, 5).to(device)
    byte = torch.zeros(2, 4, 5, 3, dtype=torch.uint8, device=device)
    out = torch.zeros(2, 4, 5, 3, device=device)
    ones = torch.ones(2, device=device)
    parts, means = torch.ones(2, 4, 3, device=device), torch.zeros(2, 3, device=device)
    blocks = ([parts] * 2, [ones, ones.clone()], [20, 5], [means, means.clone()])
    yield "combine_means", (*blocks, parts, EPS, ones.clone(), ones.clone())
    yield "noisy_image", (image, None, ones, 1, ids, 2, ids, out)
    yield "noisy_image", (byte, ids, ones, 1, ids, 2, ids, out.bfloat16())
    yield "image_to_nhwc", (image, out)
    yield "image_to_nchw", (out, image.bfloat16())
    yield "noise_normal", (1, ids, 2, ids, 3, 4, 5)


NAMES = ["means", "noisy", "noisy_uint8", "nhwc", "nchw", "normal"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
@DEVICES
@pytest.mark.parametrize("which", range(len(NAMES)), ids=NAMES)
def test_opcheck(which, device):
    name, arguments = list(op_cases(device))[which]
    torch.library.opcheck(getattr(torch.ops.fastphi, name).default, arguments)


# --- bad input -------------------------------------------------------------------------------------


def bad_calls():
    f, n = torch.zeros, torch.arange(2)
    wide = {"dtype": torch.float64}
    stats, noisy = ops.combine_moments, ops.noisy_image
    x, y = f(2, 3, 4, 5), f(2, 4, 5, 3)
    s = (f(2), f(2), f(2))
    yield stats, (f(2, 4), EPS, *s), "partials: expected shape"
    yield stats, (f(2, 0, 3), EPS, *s), "partials: expected shape"
    yield stats, (f(2, 4, 3), EPS, f(3), *s[1:]), "s: expected shape"
    yield stats, (f(2, 4, 3, **wide), EPS, *s), "partials: expected .*loat.*, got .*(D|float64)"

    def means(sums, s, pixels, out, *rest):
        ops.combine_means([sums], [s], [pixels], [out], *rest)

    yield means, (f(2, 4, 3), f(2), 0, f(2, 3)), "pixels: expected a positive number, got 0"
    yield means, (f(2, 4, 3), f(2), 9, f(2, 4)), "means: expected shape"
    yield means, (f(2, 4, 3), f(1), 9, f(2, 3)), "s: expected shape"
    one = (f(2, 4, 3), f(2), 9, f(2, 3))
    yield means, (*one, f(2, 3)), "partials: expected shape"
    yield means, (*one, f(2, 4, 3), EPS, f(2)), "mean, std: expected both or none"
    yield means, (*one, None, EPS, f(2), f(2)), "none without partials"
    yield means, (*one, f(2, 4, 3), EPS, f(2), f(3)), "std: expected shape"
    each = ([f(2, 4, 3)] * 2, [f(2)], [9], [f(2, 3)])
    yield ops.combine_means, each, "as many of each, at least one, got 2, 1, 1 and 1"
    yield noisy, (x, None, f(3), 1, n, 2, n, y), "sigma: expected shape"
    yield noisy, (x, n[:1], f(2), 1, n, 2, n, y), "sigma: expected shape"
    yield noisy, (x, n.float(), f(2), 1, n, 2, n, y), "rows: expected .*(Long|int64)"
    yield noisy, (x, None, f(2), 1, n.int(), 2, n, y), "sample: expected .*(Long|int64)"
    yield noisy, (x, None, f(2), 1, n, 2, n[:1], y), "draw: expected shape"
    yield (
        noisy,
        (x, None, f(2), 1, n, -1, n, y),
        r"stream: expected a number in \[0, 2\^32\), got -1",
    )
    yield noisy, (x, None, f(2), 1, n, 2**32, n, y), r"stream: .* got 4294967296"
    yield noisy, (x, None, f(2), 1, n, 2, n, f(2, 3, 4, 5)), "out: expected shape"
    yield noisy, (x, None, f(2), 1, n, 2, n, y.half()), "out: expected .*(Half|float16)"
    yield noisy, (x.double(), None, f(2), 1, n, 2, n, y), "images: expected"
    yield ops.image_to_nhwc, (x, x), "out: expected shape"
    yield ops.image_to_nchw, (y[:, :0], x), "image: expected shape"
    yield ops.image_to_nchw, (y.int(), x), "image: expected"
    yield ops.noise_normal, (1, n, 2**32, n, 3, 4, 4), r"stream: expected a number in \[0, 2\^32\)"
    yield ops.noise_normal, (1, n, -1, n, 3, 4, 4), r"stream: expected a number in \[0, 2\^32\)"


def in_words(value) -> str:
    """The same in every process, which pytest-xdist asks for."""
    return getattr(value, "__name__", value if isinstance(value, str) else "arguments")


@pytest.mark.parametrize("meta", [False, True], ids=["data", "fake"])
@pytest.mark.parametrize("call, arguments, words", list(bad_calls()), ids=in_words)
def test_bad_arguments_are_named(call, arguments, words, meta):
    if meta:
        arguments = tree_map_only(torch.Tensor, lambda a: a.to("meta"), arguments)
    with pytest.raises(RuntimeError, match=words):
        call(*arguments)


def test_ids_beyond_32_bits_are_named():
    """On the CPU, where they can be looked at."""
    good, x, y = torch.tensor([1, 2]), torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, 1)
    for value in (-1, 2**32):
        bad = torch.tensor([1, value])
        words = rf"expected a number in \[0, 2\^32\), got {value}"
        with pytest.raises(RuntimeError, match=f"sample: {words}"):
            ops.noise_normal(0, bad, 0, good, 1, 4, 4)
        with pytest.raises(RuntimeError, match=f"draw: {words}"):
            ops.noise_normal(0, good, 0, bad, 1, 4, 4)
        with pytest.raises(RuntimeError, match=f"sample: {words}"):
            ops.noisy_image(x, None, torch.ones(2), 0, bad, 0, good, y)
        with pytest.raises(RuntimeError, match=f"draw: {words}"):
            ops.noisy_image(x, None, torch.ones(2), 0, good, 0, bad, y)


def test_views_must_be_made_contiguous():
    with pytest.raises(RuntimeError, match=r"image: expected a contiguous tensor; call .contig"):
        ops.image_to_nhwc(torch.zeros(2, 4, 5, 3).permute(0, 3, 1, 2), torch.zeros(2, 4, 5, 3))


@GPU
def test_tensors_on_two_devices_are_named():
    with pytest.raises(RuntimeError, match="s: expected a CUDA tensor"):
        ops.combine_moments(torch.ones(2, 4, 3, device="cuda"), EPS, *torch.ones(3, 2))


def test_the_reason_without_the_cuda_library():
    if torch.version.cuda is None:
        assert ops.missing("cuda") == "this torch has no CUDA"


def test_no_images_make_none():
    none = torch.zeros(0, dtype=torch.int64)
    out = torch.zeros(0, 4, 5, 3)
    ops.noisy_image(torch.zeros(2, 3, 4, 5), none, torch.zeros(0), 1, none, 2, none, out)
    ops.image_to_nhwc(torch.zeros(0, 3, 4, 5), out)
    ops.combine_moments(torch.zeros(0, 4, 3), EPS, *torch.zeros(3, 0))
