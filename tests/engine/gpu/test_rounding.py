"""How the engines that multiply in 16 bits round weights."""

from __future__ import annotations

import copy

import torch

import fastphi
from fastphi.engine.rounding import rounded


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_rounded_weights_keep_the_sum_over_their_taps():
    """To the last tap's rounding; and what needs none stays."""
    weight = random(8, 5, 3, 3)
    low = rounded(weight, torch.bfloat16)
    assert low.dtype == torch.bfloat16 and low.shape == weight.shape
    off = (low.double() - weight.double()).sum(dim=(2, 3)).abs()
    assert (off <= 1.02 * 2.0**-8 * weight.abs().amax(dim=(2, 3))).all()
    largest = weight.abs().amax(dim=(2, 3), keepdim=True)
    assert ((low - weight).abs() <= 1.02 * 2.0**-7 * largest).all()
    assert torch.equal(rounded(low.float(), torch.bfloat16), low)
    assert torch.equal(rounded(weight.double(), torch.float32), weight)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(rounded(weight, dtype), weight.to(dtype))


def test_a_trained_network_errs_half_as_much():
    """Its image, with float32 sums and activations: rounded tap by tap, and with the loss carried on."""
    model = fastphi.load_pretrained(backend="reference").requires_grad_(False)
    smooth = torch.nn.functional.interpolate(random(2, 3, 4, 4).sigmoid(), 32, mode="bicubic")
    x = smooth + 0.03 * random(2, 3, 32, 32)
    want, errors = model(x), []
    for to_low in (lambda w: w.bfloat16(), lambda w: rounded(w, torch.bfloat16)):
        low = copy.deepcopy(model)
        for module in low.modules():
            if getattr(module, "weight", None) is not None:
                module.weight.copy_(to_low(module.weight))
        errors.append(float((low(x) - want).norm() / want.norm()))
    assert errors[1] <= 0.5 * errors[0] <= 0.5e-2, errors
