"""What the tests of the fast path's contract share."""

from __future__ import annotations

import torch


def same(a, b, tolerance: float = 1e-9) -> None:
    a, b = (torch.as_tensor(t).detach().double() for t in (a, b))
    assert a.shape == b.shape and b.abs().max() > 0  # else nothing was tested
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
