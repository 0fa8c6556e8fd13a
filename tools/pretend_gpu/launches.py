"""Every Triton kernel really compiled for sm_90 and really launched, on the pretended libraries alone: what
was launched and what they minded, as JSON. Numbers mean nothing here.
"""

from __future__ import annotations

import ctypes
import json
import warnings
from typing import Any

import torch

DRIVER = ctypes.CDLL("libcuda.so.1")
DRIVER.pretend_counts.restype = DRIVER.pretend_complaints.restype = ctypes.c_char_p


def without_libraries() -> list[torch.library.Library]:
    """What cuDNN and cuBLAS would make, which are not there: memory of the right shape, and one launch."""

    def made(like: torch.Tensor, *shape: int) -> torch.Tensor:
        return like.new_empty(shape).zero_()

    def convolution_backward(grad: Any, source: Any, weight: Any, *_rest: Any) -> Any:
        return None, made(source, *weight.shape), None

    def cudnn_convolution(x: Any, weight: Any, *_rest: Any) -> Any:
        return made(x, len(x), len(weight), *x.shape[2:])

    def mm(a: Any, b: Any) -> Any:
        return made(a, len(a), b.shape[1])

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that are registered twice, which is meant
        for call in (convolution_backward, cudnn_convolution, mm):
            library.impl(call.__name__, call, "CUDA", allow_override=True)
    return [library]


def main() -> None:
    import fastphi
    from fastphi.config import UNetConfig
    from fastphi.engine.gpu import library
    from fastphi.sampling import guidance

    guidance._told_idle.append(True)
    _kept = without_libraries()
    low = dict(device_type="cuda", dtype=torch.bfloat16)
    for bias in (False, True):  # of the up-samplings
        config = UNetConfig(channels=(16, 32, 64), upsample_bias=bias)
        model = fastphi.UNet(config, backend="cuda").cuda()
        x = torch.zeros(3, 3, 16, 16, device="cuda")
        with torch.autocast(**low):
            model(x).float().sum().backward()
            with torch.no_grad():
                model(x)
                model.phi(x)
        target = torch.ones(3, 64, device="cuda")
        guidance.match(model, x, target, 0.01, 4, 0.01, low=True)
    row = {"capability": [9, 0], "c_in": [32], "c_out": 32, "size": 8, "from_batch": 1}
    library.table()["rows"].append(row)  # a layer that is cuDNN's, for the epilogue
    model = fastphi.UNet(UNetConfig(channels=(16, 32, 64)), backend="cuda").cuda().eval()
    with torch.autocast(**low), torch.no_grad():
        model(x)
    counts = json.loads(DRIVER.pretend_counts(1).decode())
    launched = {k.removeprefix("kernel "): n for k, n in counts.items() if k.startswith("kernel ")}
    minded = DRIVER.pretend_complaints().decode().splitlines()
    print(json.dumps({"launched": launched, "minded": minded}))


if __name__ == "__main__":
    main()
