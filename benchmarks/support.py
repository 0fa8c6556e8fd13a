"""What the benchmarks share: the layers of a network and their bounds, peers, timing, results.

Times of a GPU come from CUDA events, of a CPU from the clock: a list of seconds per call, of which
`summary` makes percentiles. A case goes to pytest-benchmark's extra_info, and to the file of --results
as soon as it ends: what is measured survives whatever ends the run.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastphi
from fastphi.config import UNetConfig
from fastphi.unet import UNet

IMAGENET = 1_281_167  # images of the training set

# --- layers and bounds -------------------------------------------------------------------------------


class LayerShape(NamedTuple):
    """A layer of the network. size: height and width of its input."""

    kind: str  # first, fused, up, last
    c_in: tuple[int, ...]  # of each source
    c_out: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.kind} {'+'.join(map(str, self.c_in))}→{self.c_out} @{self.size}"

    @property
    def flops(self) -> int:
        """Of an image: two per multiply-add."""
        taps = 4 if self.kind == "up" else 9
        return 2 * taps * self.size**2 * sum(self.c_in) * self.c_out

    def bytes(self, itemsize: int = 2) -> int:
        """That must move for an image: what is read once and written once, without the weights."""
        written = (4 if self.kind == "up" else 1) * self.c_out
        each = 4 if self.kind == "last" else itemsize  # the image is float32
        return self.size**2 * (itemsize * sum(self.c_in) + each * written)

    def bound(self, flops: float, bytes_per_second: float, itemsize: int = 2) -> float:
        """Seconds of an image: of whichever of the two takes longer."""
        return max(self.flops / flops, self.bytes(itemsize) / bytes_per_second)


def layers(config: UNetConfig, size: int, *, decoder: bool) -> Counter[LayerShape]:
    """The layers of encoder and middle block, or of the whole network, and how often each occurs."""
    c, found = config.channels, Counter[LayerShape]()
    enc, dec = config.enc_layers, config.dec_layers
    assert isinstance(enc, tuple) and isinstance(dec, tuple)
    c_in = config.image_channels
    for b, c_out in enumerate(c):
        count = enc[b] if b < config.blocks else config.mid_layers
        for i in range(count):
            kind = "first" if b == i == 0 else "fused"
            found[LayerShape(kind, (c_in,), c_out, size >> b)] += 1
            c_in = c_out
    for b in reversed(range(config.blocks if decoder else 0)):
        found[LayerShape("up", (c[b + 1],), c[b], size >> (b + 1))] += 1
        found[LayerShape("fused", (c[b], c[b]), c[b], size >> b)] += 1
        found[LayerShape("fused", (c[b],), c[b], size >> b)] += dec[b] - 1 - (b == 0)
    if decoder:
        found[LayerShape("last", (c[0],), config.image_channels, size)] += 1
    return +found


def total_flops(config: UNetConfig, size: int, *, decoder: bool) -> int:
    return sum(n * layer.flops for layer, n in layers(config, size, decoder=decoder).items())


# --- models and peers --------------------------------------------------------------------------------


def network(config: UNetConfig, seed: int = 0, **options: Any) -> UNet:
    """Random, with gains of both signs, so that what is timed is checked in every term."""
    torch.manual_seed(seed)
    model = UNet(config, **options).eval().requires_grad_(False)
    for name, values in model.named_parameters():
        if name.endswith("bias"):
            values.normal_(0, 0.1)
        elif name.endswith("gamma"):
            values.normal_(0.3, 1.0)
    return model


def images(n: int, config: UNetConfig, size: int, device: Any, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, config.image_channels, size, size, generator=generator).to(device)


class Plain(nn.Module):
    """The network as one writes it in PyTorch, for eager and torch.compile: no more casts than autocast
    would make, no generator, statistics by torch.std in the dtype that runs."""

    def __init__(self, model: UNet, *, decoder: bool) -> None:
        super().__init__()
        self.model, self.decoder = model, decoder

    def forward(self, x: Tensor) -> Tensor:
        model, skips, h = self.model, [], x
        for b in range(1, model.config.blocks + 1):
            h = self._block(f"enc{b}", h)
            skips.append(h)
            h = F.avg_pool2d(h, 2)
        h = self._block("mid", h)
        if not self.decoder:
            return h.mean(dim=(2, 3))
        for b in range(model.config.blocks, 0, -1):
            up: Any = model.get_submodule(f"up{b}")
            h = F.conv_transpose2d(h, up.weight, up.bias, stride=2)
            h = self._block(f"dec{b}", torch.cat([h, skips.pop()], dim=1))
        return h

    def _block(self, name: str, h: Tensor) -> Tensor:
        block: Any = self.model.get_submodule(name)
        for layer in block:
            h = F.conv2d(h, layer.weight, layer.bias, padding=1)
            if layer.gamma is not None:
                h = layer.gamma[:, None, None] * h / (self.std(h) + layer.eps)
            if layer.relu:
                h = F.relu(h)
        return h

    @staticmethod
    def std(h: Tensor) -> Tensor:
        return h.std(dim=(1, 2, 3), keepdim=True, correction=0)


# --- timing ------------------------------------------------------------------------------------------


def gpu_times(
    call: Callable[[], Any], *, rounds: int = 20, least: float = 0.01, warm: int = 3
) -> list[float]:
    """Seconds per call, by CUDA events round so many calls that a round takes `least` seconds."""
    from gpu_case import PRETENDED  # tests/engine/gpu, in the path of what runs on a GPU

    if PRETENDED:
        rounds, least, warm = 2, 0.0, 1
    for _ in range(warm):
        call()
    torch.cuda.synchronize()

    def seconds(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    calls = max(1, math.ceil(least / seconds(3)))
    return [seconds(calls) for _ in range(rounds)]


def wall_times(
    call: Callable[[], Any], *, rounds: int = 20, least: float = 0.01, warm: int = 1
) -> list[float]:
    """Seconds per call by the clock, of calls that return when they are done."""
    for _ in range(warm):
        call()

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    calls = max(1, math.ceil(least / seconds(1)))
    return [seconds(calls) for _ in range(rounds)]


def in_turn(
    calls: dict[str, Callable[[], Any]], *, rounds: int = 10, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each call by the clock; a round has every call once, so that a machine whose speed
    drifts drifts for all. `warm`: a round before that does not count. Between calls is a pause: the threads
    of some peers (ONNX Runtime) spin on after theirs, and the next one would take half as long again."""
    pause = 0.05
    times: dict[str, list[float]] = {way: [] for way in calls}
    for i in range(rounds + warm):
        for way, call in calls.items():
            time.sleep(pause)
            start = time.perf_counter()
            call()
            if i >= warm:
                times[way].append(time.perf_counter() - start)
    return times


def captured(call: Callable[[], Any], copies: int = 1) -> Callable[[], None]:
    """Some copies of a call in one CUDA graph: its launches without Python's time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles and allocates what a capture must not
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            call()
    return graph.replay


def summary(times: Iterable[float]) -> dict[str, float]:
    """Seconds: median, 10th and 90th percentile, least; and of how many rounds."""
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return {
        "median": statistics.median(ordered),
        "p10": ordered[tenth],
        "p90": ordered[-1 - tenth],
        "min": ordered[0],
        "rounds": len(ordered),
    }


def peaks() -> dict[str, float]:
    """This GPU's bf16 matrix products, FLOP/s (8192 cubed, random values), and copies, bytes/s."""
    from gpu_case import PRETENDED

    edge, size = (256, 1 << 20) if PRETENDED else (8192, 1 << 31)
    a, b = (torch.randn(edge, edge, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = summary(gpu_times(lambda: torch.mm(a, b), least=0.05))["median"]
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = summary(gpu_times(lambda: target.copy_(source), least=0.05))["median"]
    return {"flops": 2 * edge**3 / product, "bytes_per_second": 2 * size / copy}


# --- results -----------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What ran: beside every figure."""
    found: dict[str, Any] = {
        "fastphi": fastphi.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    if torch.cuda.is_available():
        import triton

        found |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": triton.__version__,
        }
    return found


class Results:
    """{"machine": ..., "peaks": ..., "cases": [...]} in a file that is whole after every case; and
    each case to `also`, which keeps it elsewhere."""

    def __init__(self, path: Path | None, also: Callable[..., None] | None = None) -> None:
        self.path, self.also = path, also
        self.found: dict[str, Any] = {"machine": machine(), "cases": []}
        self._write()

    def put(self, **values: Any) -> None:
        self.found |= values
        self._write()

    def add(self, case: dict[str, Any]) -> None:
        self.found["cases"].append(case)
        self._write()
        if self.also is not None:
            self.also("case", **case)

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.found, indent=1, ensure_ascii=False) + "\n")
        temporary.replace(self.path)


def relative_error(found: Tensor, want: Tensor) -> float:
    """Of the worst image, in the 2-norm."""
    difference, want = (found.double() - want.double()).flatten(1), want.double().flatten(1)
    return float((difference.norm(dim=1) / want.norm(dim=1)).max())
