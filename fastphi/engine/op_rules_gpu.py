"""What torch is told about the operators that the GPU has too: shapes without data, the same checks
as csrc/arguments.h. The engine's write into buffers that are there and return nothing; none has a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_F32 = (torch.float32,)
FLOATS = (torch.float32, torch.bfloat16)


def expect_like(
    t: Tensor, name: str, first: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[Any, ...]
) -> None:
    """One tensor, where `first` is. None in `shape` fits any size but 0."""
    if t.device != first.device:
        raise RuntimeError(f"{name}: expected a tensor on {first.device}, got one on {t.device}")
    if t.dtype not in dtypes:
        raise RuntimeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {t.dtype}")
    fits = len(t.shape) == len(shape) and all(
        have > 0 if want is None else want == have
        for have, want in zip(t.shape, shape, strict=True)
    )
    if not fits:
        raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")


def expect_word(value: Any, name: str) -> None:
    if not 0 <= value < 1 << 32:
        raise RuntimeError(f"{name}: expected a number in [0, 2^32), got {value}")


def _size(t: Tensor, dim: int) -> Any:
    return t.shape[dim] if t.dim() > dim else 0


def _combine_moments_fake(partials, eps, s, mean, std) -> None:
    n = _size(partials, 0)
    expect_like(partials, "partials", partials, _F32, (n, None, 3))
    for t, name in ((s, "s"), (mean, "mean"), (std, "std")):
        expect_like(t, name, partials, _F32, (n,))


def _match_loss_fake(
    phi, target, weight, s, pixels, settings, losses, updates, active, converged, d_r, d_s
) -> None:
    n, c = _size(phi, 0), _size(phi, 1)
    expect_like(phi, "phi", phi, _F32, (n, None))
    expect_like(target, "target", phi, _F32, (n, c))
    expect_like(weight, "weight", phi, _F32, (c,))
    expect_like(s, "s", phi, _F32, (n,))
    if pixels <= 0:
        raise RuntimeError(f"pixels: expected a positive number, got {pixels}")
    expect_like(settings, "settings", phi, (torch.float64,), (3,))
    expect_like(losses, "losses", phi, _F32, (None, n))
    expect_like(updates, "updates", phi, (torch.int64,), (n,))
    expect_like(active, "active", phi, (torch.int32,), (n,))
    expect_like(converged, "converged", phi, (torch.int32,), (n,))
    expect_like(d_r, "d_r", phi, _F32, (n, c))
    expect_like(d_s, "d_s", phi, _F32, (n, 1))


def _weights_content_fake(parameters, sums) -> None:
    expect_like(sums, "sums", sums, (torch.int64,), (len(parameters), 1024))


def _match_adam_fake(gradient, active, updates, settings, x, m, v, image) -> None:
    n = _size(x, 0)
    expect_like(x, "x", x, _F32, (n, None, None, None))
    for t, name in ((gradient, "gradient"), (m, "m"), (v, "v")):
        expect_like(t, name, x, _F32, tuple(x.shape))
    expect_like(active, "active", x, (torch.int32,), (n,))
    expect_like(updates, "updates", x, (torch.int64,), (n,))
    expect_like(settings, "settings", x, (torch.float64,), (3,))
    _, c, h, w = x.shape
    expect_like(image, "image", x, FLOATS, (n, h, w, c))


def _match_remaining_fake(active, remaining) -> None:
    expect_like(active, "active", active, (torch.int32,), (active.numel(),))
    expect_like(remaining, "remaining", active, (torch.int32,), (1,))


def _combine_means_fake(sums, s, pixels, means, partials, eps, mean, std) -> None:
    counts = len(sums), len(s), len(pixels), len(means)
    if len(set(counts)) != 1 or not sums:
        raise RuntimeError(
            "sums, s, pixels, means: expected as many of each, at least one, got {}, {}, {} and "
            "{}".format(*counts)
        )
    n = _size(sums[0], 0)
    for added, scale, count, out in zip(sums, s, pixels, means, strict=True):
        expect_like(added, "sums", sums[0], _F32, (n, None, None))
        expect_like(scale, "s", sums[0], _F32, (n,))
        expect_like(out, "means", sums[0], _F32, (n, added.shape[2]))
        if count <= 0:
            raise RuntimeError(f"pixels: expected a positive number, got {count}")
    if (mean is None) != (std is None) or (partials is None and mean is not None):
        raise RuntimeError("mean, std: expected both or none, and none without partials")
    if partials is not None:
        expect_like(partials, "partials", sums[0], _F32, (n, None, 3))
    for t, name in ((mean, "mean"), (std, "std")):
        if t is not None:
            expect_like(t, name, sums[0], _F32, (n,))


def _noisy_image_fake(images, rows, sigma, seed, sample, stream, draw, out) -> None:
    m = _size(images, 0)
    expect_like(images, "images", images, (torch.uint8, torch.float32), (m, None, None, None))
    packed = images.dtype == torch.uint8
    c, h, w = (images.shape[d] for d in ((3, 1, 2) if packed else (1, 2, 3)))
    n = m if rows is None else rows.numel()
    if rows is not None:
        expect_like(rows, "rows", images, (torch.int64,), (n,))
    expect_like(sigma, "sigma", images, _F32, (n,))
    expect_like(sample, "sample", images, (torch.int64,), (n,))
    expect_like(draw, "draw", images, (torch.int64,), (n,))
    expect_word(stream, "stream")
    expect_like(out, "out", images, FLOATS, (n, h, w, c))


def _image_layout_fake(axes: tuple[int, int, int, int]) -> Any:
    def fake(image, out) -> None:
        dtypes = (torch.uint8, *FLOATS)
        expect_like(image, "image", image, dtypes, (_size(image, 0), None, None, None))
        expect_like(out, "out", image, FLOATS, tuple(image.shape[axis] for axis in axes))

    return fake


def _noise_normal_fake(seed, sample, stream, draw, channels, height, width):
    expect_like(draw, "draw", sample, (torch.int64,), (sample.shape[0],))
    expect_word(stream, "stream")
    return sample.new_empty((sample.shape[0], channels, height, width), dtype=torch.float32)


FAKES: dict[str, Any] = {
    "combine_moments": _combine_moments_fake,
    "combine_means": _combine_means_fake,
    "match_loss": _match_loss_fake,
    "match_adam": _match_adam_fake,
    "match_remaining": _match_remaining_fake,
    "weights_content": _weights_content_fake,
    "noisy_image": _noisy_image_fake,
    "image_to_nhwc": _image_layout_fake((0, 2, 3, 1)),
    "image_to_nchw": _image_layout_fake((0, 3, 1, 2)),
    "noise_normal": _noise_normal_fake,
}
