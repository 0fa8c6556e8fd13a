"""Host tensor descriptors against plain pointers, with one tile: each kernel that has both forms gives the
same values, in full boxes and in ones that reach beyond the image, the batch or the channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from layer_case import Case, make
from triton_case import (
    DEVICE,
    INTERPRETED,
    STORED,
    guarded,
    need_kernels,
    nhwc,
    poisoned,
    random,
    scalars,
)

need_kernels()

from fastphi.triton_kernels import (  # noqa: E402
    conv_bwd,
    epilogue,
    first_layer,
    fused_layer,
    last_layer,
    support,
    tiles,
    upsample,
)

BF16 = torch.bfloat16
Found = dict[str, torch.Tensor]


@contextlib.contextmanager
def by_pointers() -> Iterator[None]:
    """The tile that descriptors have, without them."""
    with contextlib.ExitStack() as stack:
        for name in (
            "tile",
            "conv_bwd_tile",
            "upsample_tile",
            "first_tile",
            "epilogue_tile",
            "last_tile",
        ):
            function = getattr(tiles, name)

            def plain(*args, function=function):
                return function(*args)._replace(descriptors=False)

            stack.enter_context(mock.patch.object(tiles, name, plain))
        yield


def fused(n: int, size: int, c: int) -> Found:
    x = make(Case(n, size, size, (c, 16), 2 * c), BF16)
    out: Found = {name: poisoned(n, size, size, 2 * c, dtype=BF16) for name in ("r_out", "z_out")}
    if size % 2 == 0:
        out["pooled"] = poisoned(n, size // 2, size // 2, 2 * c, dtype=BF16)
    weight = guarded(fused_layer.pack_weight(x.weight, c, BF16))
    fused_layer.fused_layer_fwd(x.r, x.s, weight, x.bias, x.gamma, r2=x.r2, s2=x.s2, **out)
    return out


def gradient(n: int, size: int, c: int) -> Found:
    weight = guarded(conv_bwd.pack_transposed_weight(random(2, c, c, 3, 3).to(BF16), BF16))
    d_z, r = nhwc(random(0, n, c, size, size), BF16), nhwc(random(1, n, c, size, size), BF16)
    slots = conv_bwd.d_s_per_image(c, c, size, size, BF16, DEVICE)
    out = {"d_r": poisoned(n, size, size, c, dtype=BF16), "d_s": poisoned(n, slots)}
    conv_bwd.conv_bwd(d_z, weight, out["d_r"], r=r, s=scalars(3, n), d_s=out["d_s"])
    return out


def up(n: int, size: int, c: int) -> Found:
    weight = guarded(upsample.pack_upsample_weight(random(1, c, c, 2, 2).to(BF16), BF16))
    out = {"out": poisoned(n, 2 * size, 2 * size, c, dtype=BF16)}
    upsample.upsample_fwd(nhwc(random(0, n, c, size, size), BF16), None, weight, None, out["out"])
    return out


def first(n: int, size: int, c: int) -> Found:
    weight = guarded(first_layer.pack_first_weight(random(1, c, 3, 3, 3).float(), BF16))
    out = {"r_out": poisoned(n, size, size, c, dtype=BF16)}
    if size % 2 == 0:
        out["pooled"] = poisoned(n, size // 2, size // 2, c, dtype=BF16)
    image, bias = nhwc(random(0, n, 3, size, size), BF16), guarded(random(2, c).float())
    first_layer.first_layer_fwd(image, weight, bias, **out)
    return out


def after(n: int, size: int, c: int) -> Found:
    out: Found = {"r_out": poisoned(n, size, size, c, dtype=BF16)}
    if size % 2 == 0:
        out["pooled"] = poisoned(n, size // 2, size // 2, c, dtype=BF16)
    vectors = [guarded(random(i, c).float()) for i in (1, 2)]
    epilogue.epilogue_fwd(nhwc(random(0, n, c, size, size), BF16), scalars(3, n), *vectors, **out)
    return out


def last(n: int, size: int, c: int) -> Found:
    weight = guarded(fused_layer.pack_weight(random(1, 3, c, 3, 3).to(BF16), None, BF16))
    out = {"out": poisoned(n, 3, size, size)}
    r = nhwc(random(0, n, c, size, size), BF16)
    last_layer.last_layer_fwd(r, scalars(3, n), weight, None, out["out"])
    return out


KERNELS = {f.__name__: f for f in (fused, gradient, up, first, after, last)}


@pytest.mark.parametrize("n, size, c", [(3, 8, 16), (5, 5, 48)], ids=["full", "beyond"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_descriptors_give_what_pointers_give(kernel: Callable[..., Found], n, size, c):
    if DEVICE.type == "cuda" and support.capability(DEVICE) < 90:
        pytest.skip("host descriptors need sm_90")
    found = kernel(n, size, c)
    with by_pointers():
        want = kernel(n, size, c)
    for name, value in found.items():
        assert value.isfinite().all(), f"{name}: {int((~value.isfinite()).sum())} are not finite"
        if INTERPRETED:
            assert torch.equal(value, want[name]), name
        else:  # the compiler may put the same products in another order
            off = (value.double() - want[name].double()).abs().max()
            assert off <= STORED[BF16] * want[name].double().abs().max(), name
