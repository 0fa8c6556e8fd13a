"""The compiled operators (csrc/ops.cpp): differentiable, known to torch.compile and torch.export.

Activations are NHWC, dense, (N, H, W, C), float32 or float64 on the CPU, with one scalar per image
beside them: the true activation is s·r. That defers the norm's division by the standard deviation,
which commutes with everything up to the next norm (csrc/README.md): the norm costs no pass over the
data.

The GPU engine's operators (combine_moments ... image_to_nchw) are of another kind: float32 and bfloat16,
into buffers that are there, so that a graph can be captured, and without gradients. A second
library, fastphi/_cuda, has them for CUDA tensors; the first has them for the CPU, to the same bits.

Without a compiled library the package imports all the same; `missing()` then says why, and each
op raises that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastphi.engine import op_rules

HOW = "build it with: pip install --no-build-isolation -e ."
# what the runner calls beside the differentiable ops: the latest of it tells an old library
RUNNER_OPS = ("unet_train_bwd", "weights_content", "in_large_pages", "move_to_large_pages")


def _load(name: str) -> str | None:
    """Loads a shared object of the package's own folder; the reason where that fails."""
    found = sorted(Path(__file__).parents[1].glob(f"{name}*.so"))
    how = HOW
    if not found:
        return f"the compiled library (fastphi/{name}*.so) is not there; {how}"
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return f"{found[0].name} does not load ({str(error).splitlines()[0]}); {how}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    reason = _load("_cuda")
    return reason and f"{reason}, where nvcc and a CUDA torch are found"


def _check_age() -> str | None:
    """What is wrong with a library that was built from older sources."""
    names = (*op_rules.FAKES_OF_ALL, *RUNNER_OPS)
    lacking = [name for name in names if not hasattr(torch.ops.fastphi, name)]
    return (
        f"the compiled library is older than the package (no {lacking[0]}); {HOW}"
        if lacking
        else None
    )


def _check_isa() -> str | None:
    """What is wrong with FASTPHI_ISA: the library looks at it when it is first used."""
    try:
        torch.ops.fastphi.build_info()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


_missing = _load("_cpu") or _check_age()
_missing_cuda = _missing or _load_cuda()
_wrong_isa = _check_isa() if _missing is None else None


def missing(library: Literal["cpu", "cuda"] = "cpu") -> str | None:
    """Why the compiled operators of a library cannot be used, or None.

    "cuda" asks whether it was built and loads; whether there is a GPU is another question.

    Raises ValueError where FASTPHI_ISA asks for an instruction set that is unknown or not there.
    """
    if _wrong_isa is not None:
        raise ValueError(_wrong_isa)
    return _missing if library == "cpu" else _missing_cuda


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: x's own, or autocast's where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def transform() -> str | None:
    """What follows a call from outside, and would not find these operators' derivatives; or None."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func (grad, vjp, jvp, vmap) is at work"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is at work"
    return "torch.jit.trace is at work" if torch.jit.is_tracing() else None


def _differentiable(name: str) -> Any:
    """An op that has a gradient, by torch.autograd; once more differentiated, the plain form's."""
    if not torch.compiler.is_compiling() and (found := transform()) is not None:
        raise RuntimeError(
            f"fastphi.ops.{name}: {found}, which it has no rule for; fastphi.reference.ReferenceOps is "
            f"plain PyTorch, and a UNet goes over to that by itself"
        )
    return _op(f"{name}_fwd")


def _op(name: str) -> Any:
    if missing() is not None:
        raise RuntimeError(f"fastphi.ops.{name}: {_missing}")
    return getattr(torch.ops.fastphi, name)


def fused_layer(
    r: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    eps: float,
    *,
    relu: bool = True,
    r2: Tensor | None = None,
    s2: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """conv 3×3 → norm → ReLU of s·r (and s2·r2, its further channels), the norm deferred.

    r: (N, H, W, C1); s: (N,); r2: (N, H, W, C2); s2: (N,); weight: (Cout, C1 + C2, 3, 3);
    bias, gamma: (Cout,). With z = conv(s·r ‖ s2·r2) + bias returns
    r_out = ReLU(γ z), (N, H, W, Cout), and s_out = 1/(std(z) + eps), (N,), with the biased std over
    one image.
    gamma None: no norm, s_out = 1; relu False: no ReLU.

    Raises RuntimeError where a tensor does not fit, naming it.
    """
    r2 = None if r2 is None else r2.contiguous()
    out = _differentiable("fused_layer")(
        r.contiguous(), s, r2, s2, weight.contiguous(), bias, gamma, eps, relu
    )
    return out[0], out[1]


def upsample(r: Tensor, weight: Tensor) -> Tensor:
    """Transposed conv 2×2, stride 2: (N, H, W, Cin), (Cin, Cout, 2, 2) -> (N, 2H, 2W, Cout)."""
    return _differentiable("upsample")(r.contiguous(), weight.contiguous())


def avg_pool(r: Tensor) -> Tensor:
    """Average pooling 2×2, stride 2: (N, H, W, C) -> (N, H/2, W/2, C); H and W must be even."""
    return _differentiable("avg_pool")(r.contiguous())


def spatial_mean(r: Tensor) -> Tensor:
    """Mean over the image per channel: (N, H, W, C) -> (N, C), in the dtype of `r`.

    CPU: float32 or float64, rows are added in double. CUDA: float32 or bfloat16, added in float32
    in a fixed tree; no gradient.
    """
    return _differentiable("spatial_mean")(r.contiguous())


def noise_normal(
    seed: int, sample: Tensor, stream: int, draw: Tensor, channels: int, height: int, width: int
) -> Tensor:
    """Standard normal noise from counters: (N, C, H, W) float32 (see `fastphi.noise.normal`).

    sample, draw: (N,) int64 in [0, 2^32), on the CPU or a GPU; stream in [0, 2^32); seed: 64 bits,
    with sign. A number beyond is an error; in CUDA's `sample` and `draw`, which cannot be looked at
    without waiting for the GPU, its low 32 bits count instead.
    """
    return _op("noise_normal")(seed, sample, stream, draw, channels, height, width)


def combine_moments(partials: Tensor, eps: float, s: Tensor, mean: Tensor, std: Tensor) -> None:
    """Partial statistics to the scalar of the deferred norm, s[n] = 1/(std + eps), and what a gradient
    needs beside it.

    partials: (N, T, 3) float32, (count, mean, sum of squared deviations M2) of T parts of an image;
    s, mean, std: (N,) float32, written. The std is that of all parts together, biased. The order of the
    sums depends on T alone: the same bits in every batch.
    """
    _op("combine_moments")(partials, eps, s, mean, std)


def combine_means(
    sums: list[Tensor],
    s: list[Tensor],
    pixels: list[int],
    means: list[Tensor],
    partials: Tensor | None = None,
    eps: float = 0.0,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> None:
    """Sums over parts of an image to channel means, of several blocks of the network at once:
    means[n, c] = s[n] Σ_t sums[n, t, c] / pixels.

    sums: (N, T, C) float32; s: (N,) float32; pixels: H·W; means: (N, C) float32, written.
    partials: (N, T, 3), where the last block's s is still in parts: it is merged first, as by
    `combine_moments`, into s[-1], mean and std (where they are given).
    """
    _op("combine_means")(sums, s, pixels, means, partials, eps, mean, std)


def noisy_image(
    images: Tensor,
    rows: Tensor | None,
    sigma: Tensor,
    seed: int,
    sample: Tensor,
    stream: int,
    draw: Tensor,
    out: Tensor,
) -> None:
    """Images with noise, in the engine's layout: out[i] = clean[rows[i]] + sigma[i] z_i.

    images: (M, H, W, C) uint8, levels of 255, or (M, C, H, W) float32; rows: (N,) int64, or None
    for every image in its place; sigma: (N,) float32; out: (N, H, W, C) float32 or bfloat16,
    written. z_i is the noise of `noise_normal` (which see for seed, sample, stream, draw). In
    float32 the bits are those of clean + sigma * z, rounded after each of the two; σ = 0 adds
    nothing; bfloat16 rounds that to nearest even.

    A row that is not there is an error; on CUDA, where rows cannot be looked at, NaN instead.
    """
    _op("noisy_image")(images, rows, sigma, seed, sample, stream, draw, out)


def image_to_nhwc(image: Tensor, out: Tensor) -> None:
    """(N, C, H, W) uint8 (levels of 255), float32 or bfloat16 -> (N, H, W, C) float32 or bfloat16."""
    _op("image_to_nhwc")(image, out)


def image_to_nchw(image: Tensor, out: Tensor) -> None:
    """(N, H, W, C) uint8 (levels of 255), float32 or bfloat16 -> (N, C, H, W) float32 or bfloat16."""
    _op("image_to_nchw")(image, out)


def match_loss(
    phi: Tensor,
    target: Tensor,
    weight: Tensor,
    s: Tensor,
    pixels: int,
    settings: Tensor,
    losses: Tensor,
    updates: Tensor,
    active: Tensor,
    converged: Tensor,
    d_r: Tensor,
    d_s: Tensor,
) -> None:
    """L_i = Σ_c weight_c (φ_ic − target_ic)² of the images that are active, and whether they go on.

    phi = s·mean(r), target: (N, C); weight: (C,); s: (N,); pixels: H·W of r; settings: (3,) float64,
    lr, tolerance (0: never stop), max_iter. Of active image i, whose updates[i] is t, are written:
    losses[t, i]; converged[i], whether L_i <= tolerance · losses[0, i]; active[i], 0 where it has
    converged or t = max_iter; updates[i] = t + 1 where it goes on; and the gradients of its r, the
    same for every pixel, d_r (N, C), and of its s, d_s (N, 1).

    losses: (T, N); updates: (N,) int64; active, converged: (N,) int32; all else float32.
    """
    _op("match_loss")(
        phi, target, weight, s, pixels, settings, losses, updates, active, converged, d_r, d_s
    )


def match_adam(
    gradient: Tensor,
    active: Tensor,
    updates: Tensor,
    settings: Tensor,
    x: Tensor,
    m: Tensor,
    v: Tensor,
    image: Tensor,
) -> None:
    """Adam (β 0.9 and 0.999, ε 1e-8) on the active images, update number updates[i], from 1.

    gradient: (N, C, H, W); x, m, v: the same, written; image: (N, H, W, C) float32 or bfloat16,
    written: x as the network reads it. settings: as in `match_loss`.
    """
    _op("match_adam")(gradient, active, updates, settings, x, m, v, image)


def weights_content(parameters: list[Tensor], sums: Tensor) -> None:
    """Sums of the bits of each tensor, on its device, without a wait.

    Any change of one number changes the sum of its row. parameters: P tensors, dense, on one device, of 2,
    4 or 8 bytes a number. sums: (P, 1024) int64, written.
    """
    _op("weights_content")(parameters, sums)


def move_to_large_pages(tensors: list[Tensor]) -> None:
    """Moves what is read whole again and again into pages of 2 MB, which the processor finds sooner
    (csrc/cpu/pack_weights.cpp); addresses and values stay. Once: it takes some milliseconds per page.
    Nothing happens where it would not matter, or the system cannot."""
    dense = [t for t in tensors if t.device.type == "cpu" and t.is_contiguous()]
    if missing() is None and sum(t.numel() * t.element_size() for t in dense) >= 1 << 22:
        torch.ops.fastphi.move_to_large_pages(dense)


def new_stream(device: int) -> int:
    """A CUDA stream of that device, which nobody else has and which does not wait for the legacy one: its
    handle. It is there until the process ends."""
    return _op("new_stream")(device)


def match_remaining(active: Tensor, remaining: Tensor) -> None:
    """How many of the images (N,) are active, into remaining (1,); both int32."""
    _op("match_remaining")(active, remaining)


if _missing is None:
    op_rules.register()
