"""Layers that the GPU engine gives to cuDNN, with an epilogue of its own: those where that measured
faster than the fused layer.

The table, library.json, is written from measurements by tools/gpu_report.py, and is empty
until there are some. cuDNN chooses its algorithm by batch size: for the layers of the table, and for
no others, the last bits of a result may depend on how many images share a launch.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastphi.engine.rounding import rounded

TABLE = Path(__file__).parent / "library.json"


@cache
def table() -> dict[str, Any]:
    """{"machine": what measured it, or None; "rows": [{"capability": [9, 0], "c_in": [64, 64],
    "c_out": 64, "size": 64, "from_batch": 64, "ours": seconds, "library": seconds}]}."""
    return json.loads(TABLE.read_text())


def takes(
    c_in: tuple[int, ...], c_out: int, height: int, width: int, n: int, device: torch.device
) -> bool:
    """Whether cuDNN makes this layer's convolution, in bfloat16."""
    rows = table()["rows"]
    if not rows or height != width:
        return False
    here = list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    return any(
        (row["capability"], tuple(row["c_in"]), row["c_out"], row["size"])
        == (here, c_in, c_out, height)
        and n >= row["from_batch"]
        for row in rows
    )


def text() -> str:
    """What `fastphi doctor` says."""
    rows = table()["rows"]
    if not rows:
        measured = "measured, none is faster" if table()["machine"] else "not measured yet"
        return f"none of the GPU engine's layers ({measured})"
    each = (
        f"{'+'.join(map(str, r['c_in']))}→{r['c_out']} @{r['size']} from batch {r['from_batch']}"
        for r in rows
    )
    return f"on {table()['machine']['gpu']}: {', '.join(each)}"


def split(weight: Tensor, sources: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """torch's (Cout, Cin, 3, 3) -> one for each source, in the layout that cuDNN is fast in."""
    return tuple(
        part.clone(memory_format=torch.channels_last)
        for part in rounded(weight, dtype).chunk(sources, dim=1)
    )


def conv(r: Tensor, weight: Tensor) -> Tensor:
    """(N, H, W, C), (Cout, C, 3, 3) -> (N, H, W, Cout), zeros round the image."""
    x = r.permute(0, 3, 1, 2)
    if r.is_cuda:  # the same algorithm every time: neither tried out nor with atomics
        one = [1, 1]
        c = torch.ops.aten.cudnn_convolution(x, weight, one, one, one, 1, False, True, False)
    else:
        c = F.conv2d(x, weight, padding=1)
    return c.permute(0, 2, 3, 1).contiguous()


def layer_fwd(
    r: Tensor,
    s: Any,  # (N,), or Parts
    weights: tuple[Tensor, ...],  # from `split`
    bias: Tensor | None,
    gamma: Tensor | None,
    *,
    r2: Tensor | None = None,
    s2: Tensor | None = None,
    **outputs: Any,
) -> None:
    """`fused_layer_fwd` in two steps, for the same arguments; partials and sums as of `epilogue`."""
    from fastphi.triton_kernels import epilogue

    c2 = None if r2 is None else conv(r2, weights[1])
    epilogue.epilogue_fwd(conv(r, weights[0]), s, bias, gamma, c2=c2, s2=s2, **outputs)
