"""The epilogue in Triton: what the fused layer does after its products, on the same convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_case import Case, Inputs, Outputs, check_outputs, make
from triton_case import DEVICE, each_dtype, need_kernels, nhwc, poisoned, random

need_kernels()

from fastphi.triton_kernels import epilogue  # noqa: E402

CASES = {
    "64 channels": Case(3, 8, 8, (16,), 64),
    "two sources, odd channels": Case(2, 10, 6, (12, 16), 20),
    "one pixel": Case(3, 1, 1, (16,), 16),
    "3×5, two blocks of channels": Case(1, 3, 5, (16,), 100),
}


def launch(x: Inputs, convs: list[torch.Tensor], dtype: torch.dtype) -> Outputs:
    n, c_out, h, w = convs[0].shape
    place = (c_out, h, w, dtype, DEVICE)
    even = h % 2 == 0 and w % 2 == 0
    out = Outputs(
        poisoned(n, h, w, c_out, dtype=dtype),
        poisoned(n, h // 2, w // 2, c_out, dtype=dtype) if even else None,
        poisoned(n, epilogue.partials_per_image(*place), 3),
        poisoned(n, epilogue.sums_per_image(*place), c_out),
    )
    c = [nhwc(conv, dtype) for conv in convs]
    c2, s2 = (c[1], x.s2) if len(c) == 2 else (None, None)
    epilogue.epilogue_fwd(c[0], x.s, x.bias, x.gamma, c2=c2, s2=s2, **out._asdict())
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@each_dtype
def test_values(case, dtype):
    """Against the fused layer's oracle: the rounded convolutions as images, the identity as kernel."""
    x = make(case, dtype)
    sources = [x.r] if x.r2 is None else [x.r, x.r2]
    parts = x.weight.double().cpu().split([r.shape[3] for r in sources], dim=1)
    convs = [
        F.conv2d(r.double().cpu().permute(0, 3, 1, 2), w, padding=1).to(dtype)
        for r, w in zip(sources, parts, strict=True)
    ]
    out = launch(x, convs, dtype)
    eye = torch.zeros(case.c_out, case.c_out * len(convs), 3, 3, dtype=dtype, device=DEVICE)
    for i in range(len(convs)):
        eye[:, i * case.c_out : (i + 1) * case.c_out, 1, 1] = torch.eye(case.c_out)
    r = [nhwc(conv, dtype) for conv in convs]
    r2 = r[1] if len(r) == 2 else None
    check_outputs(x._replace(r=r[0], r2=r2, weight=eye), out)


def test_bits_do_not_depend_on_company():
    x = make(Case(7, 4, 4, (16,), 32), torch.bfloat16)
    conv = random(3, 7, 32, 4, 4)
    whole = launch(x, [conv], torch.bfloat16)
    for i in (0, 3, 6):
        alone = launch(x._replace(s=x.s[i : i + 1]), [conv[i : i + 1]], torch.bfloat16)
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a[0], b[i])


def test_errors_say_what_came_and_what_was_expected():
    x = make(Case(2, 4, 3, (16,), 16), torch.float16)
    for message, options in {
        "c2 and s2 belong together, got only c2": dict(c2=x.r),
        "r_out is float32, expected float16": dict(r_out=x.r.float()),
        "pooled needs even height and width, got 4×3": dict(pooled=poisoned(2, 2, 1, 16).half()),
        r"sums has shape \(1,\), expected": dict(sums=poisoned(1)),
        "nothing to write": {},
    }.items():
        with pytest.raises(ValueError, match="epilogue_fwd: " + message):
            epilogue.epilogue_fwd(x.r, x.s, x.bias, x.gamma, **options)
