"""The compiled operators (csrc/ops.cpp): differentiable, known to torch.compile and torch.export.

Activations are NHWC, dense, (N, H, W, C), float32 or float64 on the CPU, with one scalar per image
beside them: the true activation is s·r. That defers the norm's division by the standard deviation,
which commutes with everything up to the next norm (csrc/README.md): the norm costs no pass over the
data.

Without the compiled library the package imports all the same; `missing()` then says why, and each
op raises that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastphi import op_rules


def _load() -> str | None:
    """Loads the shared object beside this file; the reason where that fails."""
    found = sorted(Path(__file__).parent.glob("_cpu*.so"))
    how = "build it with: pip install --no-build-isolation -e ."
    if not found:
        return f"the compiled library (fastphi/_cpu*.so) is not there; {how}"
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return f"{found[0].name} does not load ({str(error).splitlines()[0]}); {how}"
    return None


def _check_isa() -> str | None:
    """What is wrong with FASTPHI_ISA: the library looks at it when it is first used."""
    try:
        torch.ops.fastphi.build_info()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


_missing = _load()
_wrong_isa = _check_isa() if _missing is None else None


def missing() -> str | None:
    """Why the compiled operators cannot be used, or None.

    Raises ValueError where FASTPHI_ISA asks for an instruction set that is unknown or not there.
    """
    if _wrong_isa is not None:
        raise ValueError(_wrong_isa)
    return _missing


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
    out = _op("fused_layer_fwd")(
        r.contiguous(), s, r2, s2, weight.contiguous(), bias, gamma, eps, relu
    )
    return out[0], out[1]


def upsample(r: Tensor, weight: Tensor) -> Tensor:
    """Transposed conv 2×2, stride 2: (N, H, W, Cin), (Cin, Cout, 2, 2) -> (N, 2H, 2W, Cout)."""
    return _op("upsample_fwd")(r.contiguous(), weight.contiguous())


def avg_pool(r: Tensor) -> Tensor:
    """Average pooling 2×2, stride 2: (N, H, W, C) -> (N, H/2, W/2, C); H and W must be even."""
    return _op("avg_pool_fwd")(r.contiguous())


def spatial_mean(r: Tensor) -> Tensor:
    """Mean over the image per channel: (N, H, W, C) -> (N, C); rows are added in double."""
    return _op("spatial_mean_fwd")(r.contiguous())


def noise_normal(
    seed: int, sample: Tensor, stream: int, draw: Tensor, channels: int, height: int, width: int
) -> Tensor:
    """Standard normal noise from counters: (N, C, H, W) float32 (see `fastphi.noise.normal`).

    sample, draw: (N,) int64 in [0, 2^32); stream in [0, 2^32); seed: 64 bits.
    """
    return _op("noise_normal")(seed, sample, stream, draw, channels, height, width)


if _missing is None:
    op_rules.register()
