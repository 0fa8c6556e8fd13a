"""Weights packed in one launch: the bits of what torch packs, which test_fused_layer.py and
test_conv_bwd.py prove right.
"""

from __future__ import annotations

import pytest
import torch
from triton_case import DEVICE, each_dtype, need_kernels, poisoned, random

need_kernels()

from fastphi.triton_kernels import conv_bwd, fused_layer, pack_taps  # noqa: E402

SHAPES = {  # (Cout, Cin), split
    "64 channels": ((64, 64), None),
    "two sources": ((20, 48), 16),
    "odd": ((7, 12), None),
    "odd, two sources": ((5, 103), 70),
    "an image's": ((3, 16), None),
}


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    kind = {2: torch.int16, 4: torch.int32}[got.dtype.itemsize]
    assert torch.equal(got.cpu().view(kind), want.view(kind))


@each_dtype
@pytest.mark.parametrize("name", SHAPES)
def test_bits_are_torchs(name, dtype):
    shape, split = SHAPES[name]
    for source in (
        (torch.float32, torch.float64, torch.bfloat16) if name == "odd" else (torch.float32,)
    ):
        check(random(1, *shape, 3, 3).to(source), split, dtype)


def check(weight: torch.Tensor, split: int | None, dtype: torch.dtype) -> None:
    want = fused_layer.pack_weight(weight, split, dtype)
    packed = poisoned(*want.shape, dtype=dtype)
    pack_taps.pack_taps(weight.to(DEVICE), packed, split=split)
    same(packed, want)
    want = conv_bwd.pack_transposed_weight(weight, dtype)
    packed = poisoned(*want.shape, dtype=dtype)
    pack_taps.pack_taps(weight.to(DEVICE), packed, transposed=True)
    same(packed, want)


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_of_any_strides(transposed):
    """A part of the channels, as of a layer of two sources; channels last."""
    whole = random(2, 12, 40, 3, 3).float().to(DEVICE)
    for weight in (whole[:, 8:32], whole.contiguous(memory_format=torch.channels_last)):
        pack = conv_bwd.pack_transposed_weight if transposed else fused_layer.pack_weight
        options = () if transposed else (None,)
        want = pack(weight.cpu().contiguous(), *options, torch.bfloat16)
        packed = poisoned(*want.shape, dtype=torch.bfloat16)
        pack_taps.pack_taps(weight, packed, transposed=transposed)
        same(packed, want)


def test_bad_arguments_are_named():
    weight = torch.zeros(4, 6, 3, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 6, 2, 2\), expected"):
        pack_taps.pack_taps(weight[:, :, :2, :2], poisoned(4, 144))
    with pytest.raises(ValueError, match=r"packed has shape \(4, 54\), expected \(4, 144\)"):
        pack_taps.pack_taps(weight, poisoned(4, 54))
