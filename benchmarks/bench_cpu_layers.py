"""A layer on a CPU as the runner runs it: the difference between a network of twelve such layers and one
of two, over ten, in float32 and, where the processor has it, in bf16; beside it oneDNN's bare convolution
(no norm, no ReLU) in both, likewise from chains of twelve and of two, frozen by torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import support
import torch
from torch import Tensor, nn

from fastphi.config import UNetConfig
from fastphi.engine import cpu

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.compile
LAYERS = [(64, 64), (128, 32), (256, 16), (512, 8), (64, 80), (128, 40), (256, 20), (512, 10)]
LONG, SHORT = 12, 2


def ours(
    channels: int, size: int, images: int, count: int, dtype: torch.dtype
) -> Callable[[], Any] | str:
    config = UNetConfig(channels=(channels, channels), enc_layers=count, mid_layers=1, dec_layers=2)
    if (reason := cpu.refuses(config, torch.device("cpu"), dtype)) is not None:
        return reason
    model, x = support.network(config), support.images(images, config, size, "cpu")

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model.block_means(x, until="enc1")

    return run


def bare(
    channels: int, size: int, images: int, count: int, dtype: torch.dtype
) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(count)]
    chain = nn.Sequential(*convs).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(images, channels, size, size).to(dtype, memory_format=torch.channels_last)
    chain.eval().requires_grad_(False)
    frozen = torch.compile(chain, dynamic=False, options={"freezing": True})
    return lambda: frozen(x)


@pytest.mark.parametrize("images", [8, 1, 64])
@pytest.mark.parametrize(("channels", "size"), LAYERS)
def test_layer(channels: int, size: int, images: int, in_turn) -> None:
    torch._dynamo.reset()
    one = (channels, size, images)
    calls: dict[str, Callable[[], Any] | str] = {}
    for count in (LONG, SHORT):
        calls[f"ours {count}"] = ours(*one, count, torch.float32)
        calls[f"ours bf16 {count}"] = ours(*one, count, torch.bfloat16)
        calls[f"oneDNN f32 {count}"] = bare(*one, count, torch.float32)
        calls[f"oneDNN bf16 {count}"] = bare(*one, count, torch.bfloat16)

    def difference(times: dict[str, list[float]]) -> dict[str, list[float]]:
        """Of the ordered times: of the medians, of the minima; of a round's two it may be negative."""
        return {
            way: [
                (long - short) / (LONG - SHORT)
                for long, short in zip(
                    *(sorted(times[f"{way} {n}"]) for n in (LONG, SHORT)), strict=True
                )
            ]
            for way in ("ours", "ours bf16", "oneDNN f32", "oneDNN bf16")
            if f"{way} {LONG}" in times
        }

    flops = support.LayerShape("fused", (channels,), channels, size).flops * images
    case = {"what": f"{channels} @{size}", "images": images, "size": size, "flops": flops}
    with torch.no_grad():
        in_turn(case, calls, rounds=10 if images < 64 else 3, difference=difference)
