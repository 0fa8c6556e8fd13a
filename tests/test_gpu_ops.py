"""The GPU engine's small operators: on the CPU always, and on CUDA tensors where a GPU is.

The noisy image's bits are compared with the definition of the noise and with the decoding of
fastphi/data.py. The combined statistics are compared in float64; in float32 each of up to a few
hundred merges adds about 6e-8.
"""

from __future__ import annotations

import gpu_case
import numpy as np
import pytest
import torch

from fastphi import data, noise, ops, reference

pytestmark = pytest.mark.skipif(ops.missing() is not None, reason=str(ops.missing()))


ON_GPU = gpu_case.marks(whole_engine=False)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])


def GPU(test):
    for mark in ON_GPU:
        test = mark(test)
    return test


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EPS = 1e-5


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: str) -> torch.Tensor:
    """A buffer in which whatever is not written shows."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    kind = torch.int32 if got.dtype == torch.float32 else torch.int16
    assert torch.equal(got.cpu().contiguous().view(kind), want.contiguous().view(kind))


# --- combine_stats, combine_means ------------------------------------------------------------------


def partial_statistics(z: torch.Tensor, slots: int) -> torch.Tensor:
    """(N, values) -> (N, slots, 3): count, mean, M2 of parts that differ in size."""
    n, size = z.shape
    cuts = sorted({0, size, *(int(size * (t / slots) ** 1.2) for t in range(1, slots))})
    parts = [z[:, a:b].double() for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    rows = [
        torch.stack(
            [
                torch.full((n,), p.shape[1], dtype=torch.float64),
                p.mean(1),
                p.var(1, correction=0) * p.shape[1],
            ],
            1,
        )
        for p in parts
    ]
    return torch.stack(rows, 1).float()


@DEVICES
@pytest.mark.parametrize("slots", [1, 2, 31, 127, 128, 129, 700])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_combine_stats(slots, mean, device):
    """Where the mean is 1000 times the spread, its rounding in float32 (6e-5 / 1) remains."""
    z = random(1, 3, 20_000) + mean
    partials = partial_statistics(z, slots).to(device)
    s = poisoned(3, device=device)
    ops.combine_stats(partials, EPS, s)
    want = 1 / (z.double().std(1, correction=0) + EPS)
    torch.testing.assert_close(s.cpu().double(), want, rtol=1e-6 if mean == 0 else 3e-4, atol=0)


@DEVICES
def test_combine_stats_of_constant_images(device):
    """std 0, and parts of no values, which change nothing."""
    partials = torch.zeros(2, 5, 3, device=device)
    partials[:, 1] = partials.new_tensor([7.0, 0.25, 0.0])
    partials[1, 3] = partials.new_tensor([9.0, 0.25, 0.0])
    s = poisoned(2, device=device)
    ops.combine_stats(partials, EPS, s)
    np.testing.assert_allclose(s.cpu(), 1 / EPS, rtol=1e-6)


@DEVICES
@pytest.mark.parametrize("slots, channels", [(1, 3), (2, 512), (7, 33), (300, 64)])
def test_combine_means(slots, channels, device):
    sums, s = random(2, 3, slots, channels), random(3, 3).abs() + 0.1
    means = poisoned(3, channels, device=device)
    ops.combine_means(sums.to(device), s.to(device), 100, means)
    want = s.double()[:, None] * sums.double().sum(1) / 100
    # against the sum of the sizes of what is added: sums of both signs cancel
    scale = s.double()[:, None] * sums.double().abs().sum(1) / 100
    assert ((means.cpu() - want).abs() <= 1e-6 * scale).all()


@DEVICES
def test_combined_bits_do_not_depend_on_the_batch(device):
    partials = partial_statistics(random(4, 5, 9_000), 200).to(device)
    sums, s = random(5, 5, 50, 70).to(device), random(6, 5).abs().to(device)
    rows = torch.tensor([3, 0], device=device)

    def run(which):
        scalars, means = (
            poisoned(len(which), device=device),
            poisoned(len(which), 70, device=device),
        )
        ops.combine_stats(partials[which], EPS, scalars)
        ops.combine_means(sums[which], s[which], 64, means)
        return scalars, means

    for whole, part in zip(run(torch.arange(5, device=device)), run(rows), strict=True):
        assert torch.equal(whole[rows], part)


# --- noisy_image -----------------------------------------------------------------------------------

# The GPU has a kernel for H W a multiple of 8 and 1 or 3 channels, and one for all else; a block of
# the generator that ends in the next channel; an image of less than one block.
SIZES = [
    (1, 8, 8),
    (3, 16, 24),
    (3, 64, 64),
    (3, 5, 7),
    (4, 8, 8),
    (2, 3, 5),
    (1, 1, 1),
    (20, 4, 4),
]
SEED, STREAM = 2**63 - 5, 2**32 - 1
SIGMA = (0.0, 0.5, 2.55, 1e-3, 0.0)
ROWS = (2, 0, 2, 1, 2)
SAMPLE, DRAW = (7, 2**32 - 1, 0, 3, 5), (0, 1, 2**32 - 1, 7, 3)


def expected_noisy(clean: torch.Tensor) -> torch.Tensor:
    """NCHW, from the definition: product and sum rounded each."""
    z = reference.noise_normal(
        SEED, torch.tensor(SAMPLE), STREAM, torch.tensor(DRAW), *clean.shape[1:]
    )
    product = torch.tensor(SIGMA)[:, None, None, None] * z
    return clean[list(ROWS)] + product


def make_noisy(images, dtype, device, rows=ROWS):
    c, h, w = images.shape[1:]
    if images.dtype == torch.uint8:
        h, w, c = images.shape[1:]
    out = poisoned(len(SIGMA), h, w, c, dtype=dtype, device=device)
    ids = [torch.tensor(v, device=device) for v in (SAMPLE, DRAW)]
    sigma = torch.tensor(SIGMA, device=device)
    which = None if rows is None else torch.tensor(rows, device=device)
    ops.noisy_image(images.to(device), which, sigma, SEED, ids[0], STREAM, ids[1], out)
    return out


@DEVICES
@DTYPES
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_noisy_image_has_the_defined_bits(kind, size, dtype, device):
    c, h, w = size
    if kind == "uint8":
        pixels = np.random.default_rng(0).integers(0, 256, (3, h, w, c), np.uint8)
        images = torch.from_numpy(pixels)
        clean = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
    else:
        images = clean = random(7, 3, *size)
    got = make_noisy(images, dtype, device)
    same_bits(got, expected_noisy(clean).to(dtype).permute(0, 2, 3, 1))


@DEVICES
def test_noisy_image_of_a_pack_is_what_the_package_computes(tmp_path, device):
    """Every byte, decoded by fastphi.data and by the operator; noise by fastphi.noise."""
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    clean = decoded(tmp_path, pixels)
    z = noise.normal(3, [11], noise.stream("extract"), 4, (3, 16, 16))
    out = poisoned(1, 16, 16, 3, device=device)
    one = {"device": device, "dtype": torch.int64}
    ops.noisy_image(
        torch.from_numpy(pixels).to(device),
        None,
        torch.tensor([0.3], device=device),
        3,
        torch.tensor([11], **one),
        noise.stream("extract"),
        torch.tensor([4], **one),
        out,
    )
    same_bits(out, (clean + 0.3 * z).permute(0, 2, 3, 1))


def decoded(folder, pixels: np.ndarray) -> torch.Tensor:
    """What a pack of these pixels gives out, by way of its own reader."""
    np.save(folder / "images.npy", pixels)
    pack = object.__new__(data.PackedImages)
    pack.images = np.load(folder / "images.npy", mmap_mode="r")
    pack.shape = (pixels.shape[3], *pixels.shape[1:3])
    return pack._read(np.arange(len(pixels)))


@DEVICES
def test_sigma_0_adds_nothing_and_no_rows_is_every_image(device):
    """Not even to a negative zero, which a sum with zero would turn."""
    clean = random(8, 5, 3, 8, 8)
    clean[0, 0, 0, 0] = -0.0
    same_bits(make_noisy(clean, torch.float32, device, rows=None)[0], clean[0].permute(1, 2, 0))


@DEVICES
def test_rows_that_are_not_there(device):
    """The CPU says so; a GPU, whose rows cannot be looked at without waiting, answers NaN."""
    images = random(9, 3, 3, 8, 8)
    rows = (2, 0, 3, 1, -1)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=r"rows: expected numbers in \[0, 3\), got 3"):
            make_noisy(images, torch.float32, device, rows)
    else:
        got = make_noisy(images, torch.float32, device, rows).isnan().flatten(1).cpu()
        assert got[[2, 4]].all() and not got[[0, 1, 3]].any()


@DEVICES
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_noise_normal_has_the_defined_bits(size, device):
    sample, draw = torch.tensor(SAMPLE), torch.tensor(DRAW)
    want = reference.noise_normal(SEED, sample, STREAM, draw, *size)
    got = ops.noise_normal(SEED, sample.to(device), STREAM, draw.to(device), *size)
    assert got.device.type == device
    same_bits(got, want)


# --- image_to_nhwc, image_to_nchw ------------------------------------------------------------------


@DEVICES
@DTYPES
@pytest.mark.parametrize("source", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_image_layouts(size, source, dtype, device):
    c, h, w = size
    x = random(10, 2, c, h, w)
    x[0, 0, 0, 0] = 1 + 2.0**-8  # half way between two numbers of bfloat16: to the even one
    x[-1, -1, -1, -1] = torch.inf
    if source == torch.uint8:
        x = (x.nan_to_num(0, 1).abs() * 100).clamp(0, 255)
    x = x.to(source)
    want = (x.float() / 255 if source == torch.uint8 else x).to(dtype)
    out = poisoned(2, h, w, c, dtype=dtype, device=device)
    ops.image_to_nhwc(x.to(device), out)
    same_bits(out, want.permute(0, 2, 3, 1))
    back = poisoned(2, c, h, w, dtype=dtype, device=device)
    ops.image_to_nchw(x.permute(0, 2, 3, 1).contiguous().to(device), back)
    same_bits(back, want)


@DEVICES
def test_nan_becomes_torchs(device):
    x = torch.tensor([torch.nan, -torch.nan, 1e39, -0.0]).reshape(1, 1, 2, 2)
    out = poisoned(1, 2, 2, 1, dtype=torch.bfloat16, device=device)
    ops.image_to_nhwc(x.to(device), out)
    assert out.cpu().flatten().isnan().tolist() == [True, True, False, False]
    assert out.cpu().flatten()[2:].view(torch.int16).tolist() == [0x7F80, -0x8000]


@GPU
@DTYPES
def test_buffers_that_start_anywhere(dtype):
    """A view one element into its memory: no 16-byte words there."""
    clean = random(11, 5, 3, 8, 8)
    whole = poisoned(5 * 3 * 64 + 1, dtype=dtype, device="cuda")
    out = whole[1:].view(5, 8, 8, 3)
    ops.image_to_nhwc(clean.cuda(), out)
    same_bits(out, clean.to(dtype).permute(0, 2, 3, 1))
    back = poisoned(5, 3, 8, 8, dtype=dtype, device="cuda")
    ops.image_to_nchw(out, back)
    same_bits(back, clean.to(dtype))


# --- spatial_mean on the GPU -----------------------------------------------------------------------


@GPU
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(2, 5, 7, 3), (1, 1, 1, 17), (3, 8, 4, 48), (2, 8, 8, 512), (1, 3, 3, 2100), (1, 512, 512, 8)],
)
def test_spatial_mean(shape, dtype):
    """float32 sums in a tree: 1e-6 of the mean size; bfloat16 rounds the result by up to 2^-8."""
    r = random(12, *shape).abs().to(dtype)
    got = ops.spatial_mean(r.cuda())
    assert got.dtype == dtype
    want = r.double().mean((1, 2))
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(got.cpu().double(), want, rtol=tolerance, atol=0)
    one = ops.spatial_mean(r[-1:].cuda())
    assert torch.equal(one, got[-1:])


# --- the CPU's bits, graphs, streams ---------------------------------------------------------------


@GPU
def test_the_gpu_has_the_cpus_bits():
    partials = partial_statistics(random(13, 4, 9_000), 150)
    sums, s = random(14, 4, 37, 70), random(15, 4).abs()
    results = []
    for device in ("cpu", "cuda"):
        scalars, means = poisoned(4, device=device), poisoned(4, 70, device=device)
        ops.combine_stats(partials.to(device), EPS, scalars)
        ops.combine_means(sums.to(device), s.to(device), 64, means)
        results.append((scalars, means))
    for cpu, cuda in zip(*results, strict=True):
        same_bits(cuda, cpu)


@GPU
def test_a_captured_graph_replays_what_eager_computes():
    images = random(16, 5, 3, 16, 16).cuda()
    sigma = torch.full((5,), 0.5, device="cuda")
    ids, draw = torch.arange(5, device="cuda"), torch.zeros(5, dtype=torch.int64, device="cuda")
    partials = partial_statistics(random(17, 5, 900), 20).cuda()
    out, s = poisoned(5, 16, 16, 3, device="cuda"), poisoned(5, device="cuda")

    def run():
        ops.noisy_image(images, None, sigma, 1, ids, 2, draw, out)
        ops.combine_stats(partials, EPS, s)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    draw += 1  # read when the graph runs, not when it was captured
    partials *= 2
    out.fill_(torch.nan), s.fill_(torch.nan)
    graph.replay()
    got = out.clone(), s.clone()
    run()
    assert torch.equal(got[0], out) and torch.equal(got[1], s)


# --- what torch asks of an operator ----------------------------------------------------------------


def op_cases(device: str = "cpu"):
    ids = torch.arange(2, device=device)
    image = random(18, 2, 3, 4, 5).to(device)
    byte = torch.zeros(2, 4, 5, 3, dtype=torch.uint8, device=device)
    out = torch.zeros(2, 4, 5, 3, device=device)
    ones = torch.ones(2, device=device)
    yield "combine_stats", (torch.ones(2, 4, 3, device=device), EPS, ones.clone())
    means = torch.zeros(2, 3, device=device)
    yield "combine_means", (torch.ones(2, 4, 3, device=device), ones, 20, means)
    yield "noisy_image", (image, None, ones, 1, ids, 2, ids, out)
    yield "noisy_image", (byte, ids, ones, 1, ids, 2, ids, out.bfloat16())
    yield "image_to_nhwc", (image, out)
    yield "image_to_nchw", (out, image.bfloat16())
    yield "noise_normal", (1, ids, 2, ids, 3, 4, 5)


NAMES = ["stats", "means", "noisy", "noisy_uint8", "nhwc", "nchw", "normal"]


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
    stats, means, noisy = ops.combine_stats, ops.combine_means, ops.noisy_image
    x, y = f(2, 3, 4, 5), f(2, 4, 5, 3)
    yield stats, (f(2, 4), EPS, f(2)), "partials: expected shape"
    yield stats, (f(2, 0, 3), EPS, f(2)), "partials: expected shape"
    yield stats, (f(2, 4, 3), EPS, f(3)), "s: expected shape"
    yield stats, (f(2, 4, 3, **wide), EPS, f(2)), "partials: expected .*loat.*, got .*(D|float64)"
    yield means, (f(2, 4, 3), f(2), 0, f(2, 3)), "pixels: expected a positive number, got 0"
    yield means, (f(2, 4, 3), f(2), 9, f(2, 4)), "means: expected shape"
    yield means, (f(2, 4, 3), f(1), 9, f(2, 3)), "s: expected shape"
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
        arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
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
        ops.combine_stats(torch.ones(2, 4, 3, device="cuda"), EPS, torch.ones(2))


def test_the_reason_without_the_cuda_library():
    if torch.version.cuda is None:
        assert ops.missing("cuda") == "this torch has no CUDA"


def test_no_images_make_none():
    none = torch.zeros(0, dtype=torch.int64)
    out = torch.zeros(0, 4, 5, 3)
    ops.noisy_image(torch.zeros(2, 3, 4, 5), none, torch.zeros(0), 1, none, 2, none, out)
    ops.image_to_nhwc(torch.zeros(0, 3, 4, 5), out)
    ops.combine_stats(torch.zeros(0, 4, 3), EPS, torch.zeros(0))
