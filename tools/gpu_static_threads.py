"""The CUDA kernels on the CPU's threads, against the CPU's operators, to the bit: no GPU, no speed.

    python tools/gpu_static_threads.py --toolkit /usr/local/cuda

The .cu files are compiled as C++ with tools/cuda_threads.h in place of CUDA's own words. Part of
make gpu-static; needs a g++ with C++20.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastphi.engine import ops

CSRC = Path(__file__).resolve().parents[1] / "csrc"
TYPES = {torch.uint8: 0, torch.bfloat16: 1, torch.float32: 2}  # Dtype of csrc/pixel.h
WRAPPERS = """
using namespace fastphi;
#define DTYPE(x) static_cast<Dtype>(x)
extern "C" {
void noise(i64 n, i64 size, uint64_t seed, const i64* sample, uint32_t stream, const i64* draw,
           float* out) {
  launch_noise_normal(n, size, seed, sample, stream, draw, out, nullptr);
}
void noisy(i64 n, i64 m, int c, int p, const void* images, const i64* rows, const float* sigma,
           uint64_t seed, uint32_t stream, const i64* sample, const i64* draw, void* out, int in,
           int to) {
  launch_noisy_image({n, m, c, p, images, rows, sigma, seed, stream, sample, draw, out}, DTYPE(in),
                     DTYPE(to), nullptr);
}
void nhwc(i64 n, int c, int p, const void* image, int in, void* out, int to) {
  launch_image_to_nhwc(n, c, p, image, DTYPE(in), out, DTYPE(to), nullptr);
}
void nchw(i64 n, int c, int p, const void* image, int in, void* out, int to) {
  launch_image_to_nchw(n, c, p, image, DTYPE(in), out, DTYPE(to), nullptr);
}
void moments(i64 n, int slots, const float* partials, float eps, float* s, float* mean,
             float* std) {
  launch_combine_moments(n, slots, partials, eps, s, mean, std, nullptr);
}
void loss(i64 n, i64 rows, int c, float pixels, const float* phi, const float* target,
          const float* weight, const float* s, const double* settings, float* losses, i64* updates,
          int32_t* active, int32_t* converged, float* d_r, float* d_s) {
  launch_match_loss({n, rows, c, pixels, phi, target, weight, s, settings, losses, updates, active,
                     converged, d_r, d_s}, nullptr);
}
void adam(i64 n, int c, int pixels, const float* gradient, const int32_t* active,
          const i64* updates, const double* settings, float* x, float* m, float* v, void* image,
          int to) {
  launch_match_adam({n, c, pixels, gradient, active, updates, settings, x, m, v, image}, DTYPE(to),
                    nullptr);
}
void content(int n, const void* const* at, const i64* bytes, i64* sums) {
  ContentParts parts{n};
  for (int i = 0; i < n; ++i) parts.at[i] = at[i], parts.bytes[i] = bytes[i];
  launch_weights_content(parts, sums, nullptr);
}
void remaining(i64 n, const int32_t* active, int32_t* left) {
  launch_match_remaining(n, active, left, nullptr);
}
void means(i64 n, int slots, int c, const float* sums, float* s, float pixels, float* out,
           const float* partials, int parts, float eps, float* mean, float* std) {
  Means a{n, 2};  // the same sums twice, of which the second merges its scalars
  for (int b = 0; b < 2; ++b) {
    a.sums[b] = sums, a.s[b] = s + b * n, a.slots[b] = slots, a.channels[b] = c;
    a.pixels[b] = pixels, a.means[b] = out + b * n * c;
  }
  a.partials = partials, a.parts = parts, a.eps = eps, a.mean = mean, a.std = std;
  launch_combine_means(a, Dtype::FLOAT32, nullptr);
}
int slots(int pixels, int c) { return spatial_mean_slots(pixels, c); }
void spatial(i64 n, int pixels, int c, const void* r, int dtype, float* sums, void* out) {
  launch_spatial_mean_fwd(n, pixels, c, r, DTYPE(dtype), sums, out, nullptr);
}
}
"""


def as_cpp(source: str) -> str:
    """A .cu file without what only nvcc reads."""
    source = source.replace("extern __shared__ float shared[];", "float* shared = shared_memory;")
    source = re.sub(r"asm volatile\(.*?\);\n", "store(memory, w);\n", source, flags=re.S)
    launch = r"([\w:]+(?:<[\w, ]+>)?)\s*<<<(.*?),([^,]*),[^,]*,[^,]*>>>\s*\("
    source = re.sub(launch, r"LAUNCH((\1), dim3(\2), dim3(\3), ", source, flags=re.S)
    assert "<<<" not in source and "asm" not in source
    return source


def build(toolkit: Path, folder: Path) -> ctypes.CDLL:
    """Every kernel in one library, each file in an object of its own, as nvcc has it."""
    (folder / "cuda").mkdir()
    for file in [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.h"), *CSRC.glob("cuda/*.cu*")]:
        (folder / file.relative_to(CSRC)).write_text(as_cpp(file.read_text()))
    (folder / "cuda/wrappers.cu").write_text('#include "launch.h"\n' + WRAPPERS)
    header = Path(__file__).with_name("cuda_threads.h")
    command = [
        *("g++", "-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"),
        *("-I", toolkit / "include", "-include", header, "-x", "c++"),
        *sorted(folder.glob("cuda/*.cu")), "-o", folder / "threads.so",
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return ctypes.CDLL(str(folder / "threads.so"))


def call(function: Any, *arguments: Any) -> Any:
    """Tensors as pointers, Python's numbers as the 64 bits or the float that they fit."""
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    return function(*pointers)


def buffer(*shape: int, dtype: torch.dtype = torch.float32, first: int = 0) -> Tensor:
    """NaN (or 255), from a 64-byte boundary or `first` elements behind one, as a GPU allocates."""
    count = torch.Size(shape).numel()
    memory = torch.full(
        (count + first + 64,), 255 if dtype == torch.uint8 else torch.nan, dtype=dtype
    )
    skip = -memory.data_ptr() % 64 // memory.element_size() + first
    return memory[skip : skip + count].view(shape)


def placed(values: Tensor, first: int = 0) -> Tensor:
    return buffer(*values.shape, dtype=values.dtype, first=first).copy_(values)


def same(what: Any, got: Tensor, want: Tensor) -> None:
    kind = torch.int32 if got.dtype == torch.float32 else torch.int16
    if not torch.equal(got.view(kind), want.contiguous().view(kind)):
        sys.exit(f"the kernel and the CPU's operator differ: {what}")


SIZES = (
    (1, 8, 8),
    (3, 16, 24),
    (3, 64, 40),
    (3, 5, 7),
    (4, 8, 8),
    (2, 3, 5),
    (1, 1, 1),
    (20, 4, 4),
)
I64, U64, U32, F32 = ctypes.c_int64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_float
SEED, STREAM = 2**63 - 5, 2**32 - 1
SAMPLE, DRAW = torch.tensor([7, 2**32 - 1, 0, 3]), torch.tensor([0, 1, 2**32 - 1, 7])
ROWS, SIGMA = torch.tensor([2, 0, 2, 1]), torch.tensor([0.0, 0.5, 2.55, 1e-3])


def random_pixels(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.uint8:
        return placed(torch.randint(0, 256, shape).to(dtype))
    return placed(torch.randn(shape).to(dtype))


def check_noise(library: ctypes.CDLL, c: int, h: int, w: int) -> None:
    out = buffer(4, c, h, w)
    call(library.noise, I64(4), I64(c * h * w), U64(SEED), SAMPLE, U32(STREAM), DRAW, out)
    same(("noise_normal", c, h, w), out, ops.noise_normal(SEED, SAMPLE, STREAM, DRAW, c, h, w))
    for source in (torch.uint8, torch.float32):
        images = random_pixels(source, 3, *((h, w, c) if source == torch.uint8 else (c, h, w)))
        for dtype in (torch.float32, torch.bfloat16):
            want, out = (buffer(4, h, w, c, dtype=dtype) for _ in range(2))
            ops.noisy_image(images, ROWS, SIGMA, SEED, SAMPLE, STREAM, DRAW, want)
            call(
                library.noisy, I64(4), I64(3), c, h * w, images, ROWS, SIGMA, U64(SEED),
                U32(STREAM), SAMPLE, DRAW, out, TYPES[source], TYPES[dtype],
            )  # fmt: skip
            same(("noisy_image", c, h, w, source, dtype), out, want)


def check_layouts(library: ctypes.CDLL, c: int, h: int, w: int) -> None:
    planar, packed = (2, c, h, w), (2, h, w, c)
    cases = (
        (library.nhwc, ops.image_to_nhwc, planar, packed),
        (library.nchw, ops.image_to_nchw, packed, planar),
    )
    for function, op, before, after in cases:
        for source in TYPES:
            image = random_pixels(source, *before)
            for dtype in (torch.float32, torch.bfloat16):
                for first in (0, 1):
                    want, out = (buffer(*after, dtype=dtype, first=first) for _ in range(2))
                    op(image, want)
                    call(function, I64(2), c, h * w, image, TYPES[source], out, TYPES[dtype])
                    same((op.__name__, c, h, w, source, dtype, first), out, want)


def check_combine(library: ctypes.CDLL) -> None:
    for slots, c in ((1, 3), (2, 100), (31, 33), (32, 64), (33, 1), (127, 5), (129, 5), (300, 2)):
        partials, sums = torch.rand(3, slots, 3) + 0.1, torch.randn(3, slots, c)
        both = [[buffer(3) for _ in range(3)] for _ in range(2)]
        ops.combine_moments(partials, 1e-5, *both[0])
        call(library.moments, I64(3), slots, partials, F32(1e-5), *both[1])
        for a, b in zip(*both, strict=True):
            same(("combine_moments", slots), b, a)
        shapes = ((2, 3), (2, 3, c), (3,), (3,))  # s, means, mean, std
        both = [[buffer(*shape) for shape in shapes] for _ in range(2)]
        for s, *_ in both:
            s[0] = torch.tensor([0.3, 0.7, 2.0])
        (s, out, mean, std), theirs = both
        ops.combine_means([sums] * 2, [*s], [64] * 2, [*out], partials, 1e-5, mean, std)
        s, out, mean, std = theirs
        call(library.means, I64(3), slots, c, sums, s, F32(64), out, partials, slots, F32(1e-5),
             mean, std)  # fmt: skip
        for a, b in zip(*both, strict=True):
            same(("combine_means", slots, c), b, a)


def check_content(library: ctypes.CDLL) -> None:
    """Of tensors of every size of number, odd counts and halves off a boundary of 4 among them."""
    made = [torch.randn(3, 5, 3, 3), torch.randn(2049).double(), torch.randn(0)]
    made += [torch.randn(777).bfloat16(), torch.randn(64, 33).bfloat16(), torch.randn(9).half()[1:]]
    n = len(made)
    want, out = (torch.full((n, 1024), -1, dtype=torch.int64) for _ in range(2))
    torch.ops.fastphi.weights_content(made, want)
    places = (ctypes.c_void_p * n)(*(t.data_ptr() for t in made))
    sizes = (I64 * n)(*(t.numel() * t.element_size() for t in made))
    call(library.content, n, places, sizes, out)
    if not torch.equal(want, out) or out[3].sum() == 0:
        sys.exit("weights_content: the kernel and the CPU's operator differ")


def check_match(library: ctypes.CDLL, c: int, size: tuple[int, int, int]) -> None:
    """An image that stops, one that goes on, one that has stopped, one at its last update."""
    n, settings = 4, torch.tensor([0.01, 0.5, 7], dtype=torch.float64)
    phi, target, weight = torch.rand(n, c), torch.rand(n, c), torch.rand(c)
    updates = torch.tensor([3, 0, 2, 7])
    losses = torch.full((8, n), 1e9)
    before = [losses, updates, torch.tensor([1, 1, 0, 1], dtype=torch.int32)]
    before += [torch.full((n,), -1, dtype=torch.int32), buffer(n, c), buffer(n, 1)]
    ours, theirs = ([t.clone() for t in before] for _ in range(2))
    s = torch.rand(n) + 0.1
    ops.match_loss(phi, target, weight, s, 64, settings, *ours)
    call(
        library.loss, I64(n), I64(8), c, F32(64), phi, target, weight, s, settings, *theirs
    )  # fmt: skip
    ops.match_remaining(ours[2], left := torch.zeros(1, dtype=torch.int32))
    call(library.remaining, I64(n), theirs[2], also := torch.zeros(1, dtype=torch.int32))
    if not all(
        torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(ours, theirs, strict=True)
    ):
        sys.exit(f"the kernel and the CPU's operator differ: match_loss, {c}")
    if not torch.equal(left, also) or left.item() != 1:
        sys.exit("match_remaining: the kernel and the CPU's operator differ")
    gradient, (_, h, w) = torch.randn(n, *size), size
    state = [torch.rand(n, *size) for _ in range(3)]
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = ([t.clone() for t in state] for _ in range(2))
        want, out = (buffer(n, h, w, size[0], dtype=dtype) for _ in range(2))
        active = torch.tensor([1, 1, 0, 1], dtype=torch.int32)
        ops.match_adam(gradient, active, updates + 1, settings, *ours, want)
        call(
            library.adam, I64(n), size[0], h * w, gradient, active, updates + 1, settings, *theirs,
            out, TYPES[dtype],
        )  # fmt: skip
        for a, b in zip([*ours, want], [*theirs, out], strict=True):
            same(("match_adam", size, dtype), b, a)


def check_spatial_mean(library: ctypes.CDLL) -> None:
    """Against float64: the CPU's operator adds in another order."""
    shapes = ((35, 3), (1, 17), (32, 48), (64, 512), (9, 2100), (4096, 8), (1600, 1), (400, 36))
    for pixels, c in shapes:
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)):
            for first in (0, 1):
                r = placed(torch.rand(2, pixels, c).to(dtype), first)
                sums, out = buffer(2, library.slots(pixels, c), c), buffer(2, c, dtype=dtype)
                call(library.spatial, I64(2), pixels, c, r, TYPES[dtype], sums, out)
                want = r.double().mean(1)
                torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toolkit", type=Path, default=Path("/usr/local/cuda"))
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        library = build(options.toolkit, Path(folder))
        for size in SIZES:
            check_noise(library, *size)
            check_layouts(library, *size)
        check_combine(library)
        check_content(library)
        for c, size in ((1, (3, 8, 8)), (130, (1, 5, 7)), (512, (4, 16, 24))):
            check_match(library, c, size)
        check_spatial_mean(library)
    print("  every kernel gives what the CPU's operator gives")


if __name__ == "__main__":
    main()
