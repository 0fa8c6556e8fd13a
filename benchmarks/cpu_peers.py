"""What a user could run instead on a CPU: PyTorch eager, torch.compile with freezing, OpenVINO, ONNX
Runtime, ncnn. A way is a function (model, decoder, x) -> (call, what it computes in); it raises
`Absent` with the reason where the peer is not installed or cannot take the network.
"""

from __future__ import annotations

import copy
import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import support
import torch
from torch import Tensor

from fastphi.engine import cpu
from fastphi.unet import UNet

Call = Callable[[Tensor], Tensor]


class Absent(Exception):
    """Why a peer is not there."""


def needs(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"not installed ({error})") from None


def plain(model: UNet, decoder: bool) -> support.Plain:
    return support.Plain(copy.deepcopy(model), decoder=decoder).eval().requires_grad_(False)


def ours(model: UNet, decoder: bool, x: Tensor) -> Call:
    return model if decoder else model.phi


def ours_bf16(model: UNet, decoder: bool, x: Tensor) -> Call:
    if (reason := cpu.refuses(model.config, x.device, torch.bfloat16)) is not None:
        raise Absent(reason)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours(model, decoder, x)(x)

    return call


def eager(model: UNet, decoder: bool, x: Tensor) -> Call:
    return plain(model, decoder)


def authors(model: UNet, decoder: bool, x: Tensor) -> Call:
    """Their program runs the whole network, with a hook where φ is."""
    peer = copy.deepcopy(model)
    peer.backend = "reference"
    mean: list[Tensor] = []
    peer.mid[-1].register_forward_hook(lambda *call: mean.append(call[2].mean(dim=(2, 3))))

    def call(x: Tensor) -> Tensor:
        mean.clear()
        out = peer.walk(None, x)  # the modules, with their hooks
        return out if decoder else mean[0]

    return call


def compiled(model: UNet, decoder: bool, x: Tensor) -> Call:
    """Freezing makes the weights constants, in oneDNN's own layout."""
    torch._dynamo.reset()
    peer = torch.compile(plain(model, decoder), dynamic=False, options={"freezing": True})
    return lambda x: peer(x)


def openvino(precision: str) -> Callable[[UNet, bool, Tensor], Call]:
    def way(model: UNet, decoder: bool, x: Tensor) -> Call:
        ov = needs("openvino")
        converted = ov.convert_model(
            Spelled(plain(model, decoder)), example_input=x, input=list(x.shape)
        )
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        network = ov.Core().compile_model(converted, "CPU", settings)
        return lambda x: torch.from_numpy(network([x.numpy()])[0])

    return way


def onnxruntime(model: UNet, decoder: bool, x: Tensor) -> Call:
    ort, _ = needs("onnxruntime"), needs("onnxscript")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "network.onnx"))
        program = Spelled(plain(model, decoder))
        torch.onnx.export(program, (x,), path, dynamo=True, verbose=False)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def ncnn(model: UNet, decoder: bool, x: Tensor) -> Call:
    """It has no batches: image by image, as its users do."""
    library, pnnx = needs("ncnn"), needs("pnnx")
    net = library.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_bf16_storage = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "network.pt"))
        program = Spelled(plain(model, decoder), batched=False)
        pnnx.export(program, path, x[:1], fp16=False)
        stem = path.removesuffix(".pt")
        if not os.path.exists(stem + ".ncnn.param"):
            raise Absent("pnnx could not convert the network")
        net.load_param(stem + ".ncnn.param")
        net.load_model(stem + ".ncnn.bin")

    def one(image: Tensor) -> Tensor:
        extractor = net.create_extractor()
        extractor.input("in0", library.Mat(image.numpy()).clone())
        return torch.from_numpy(extractor.extract("out0")[1].numpy().copy())

    return lambda x: torch.stack([one(image) for image in x])


class Spelled(torch.nn.Module):
    """`Plain` with the standard deviation written in operations that every converter knows."""

    def __init__(self, network: support.Plain, batched: bool = True) -> None:
        super().__init__()
        self.network = network
        network.std = self.std  # type: ignore[method-assign]

    @staticmethod
    def std(h: Tensor) -> Tensor:
        h = h - h.mean(dim=(1, 2, 3), keepdim=True)
        return (h * h).mean(dim=(1, 2, 3), keepdim=True).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


WAYS: dict[str, Callable[[UNet, bool, Tensor], Call]] = {
    "ours": ours,
    "ours bf16": ours_bf16,
    "eager": eager,
    "torch.compile": compiled,
    "OpenVINO f32": openvino("f32"),
    "OpenVINO bf16": openvino("bf16"),
    "ONNX Runtime": onnxruntime,
    "ncnn": ncnn,
    "authors": authors,
}
