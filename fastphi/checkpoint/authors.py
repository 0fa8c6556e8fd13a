"""Checkpoints of the authors' program: a folder with model.pt and exp_arguments.pkl.

model.pt is a state dict, possibly with `module.` before every name; exp_arguments.pkl is a pickled
dict of plain values and one torch.device. Both are untrusted: a pickle can name any function to
call, so only values are read and nothing in either file runs.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastphi.config import TrainingInfo, UNetConfig
from fastphi.support import reading, validate
from fastphi.unet import UNet

WEIGHTS, ARGUMENTS = FILES = ("model.pt", "exp_arguments.pkl")

_REQUIRED = ("num_kernels", "num_channels", "num_enc_conv", "num_mid_conv", "num_dec_conv", "bias")
# What the authors' program takes where an argument is absent, and all that is supported.
_FIXED = {"inter_skip": True, "dilations": None, "kernel_size": 3, "padding": 1}
_MAX_ARGUMENTS = 1 << 20  # bytes; a real file has two thousand
_MAX_SHARED = 16  # references to a list, tuple or dict made before; a real file has one or two


def read(folder: Path) -> tuple[UNetConfig, TrainingInfo, dict[str, Tensor]]:
    """Configuration, training information, and the parameters under the authors' names."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: no folder {folder}")
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"folder: {folder} lacks {name}; it needs {' and '.join(FILES)}"
            )
    config, info = configuration(read_arguments(folder / ARGUMENTS), folder / ARGUMENTS)
    return config, info, read_weights(folder / WEIGHTS)


# --- exp_arguments.pkl ----------------------------------------------------------------------------


# Opcodes that make plain values. REDUCE calls, but only what find_class gives out. Left out: those
# that build objects another way or reach outside (INST, OBJ, NEWOBJ, BUILD, PERSID, EXT).
_PLAIN_OPCODES = frozenset(
    """PROTO FRAME STOP MARK POP POP_MARK MEMOIZE GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2
    TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE""".split()
)


class _Unpickler(pickle.Unpickler):
    """Gives out torch.device (as its name) and OrderedDict; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "device"):
            return lambda *args: _device_name(args)
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: OrderedDict()
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _device_name(args: tuple[Any, ...]) -> str:
    kinds = (str, int)[: len(args)]
    if not 1 <= len(args) <= 2 or any(type(a) is not k for a, k in zip(args, kinds, strict=True)):
        raise pickle.UnpicklingError(f"it calls torch.device with {args!r:.80}")
    return ":".join(map(str, args))


def _check_opcodes(content: bytes) -> None:
    """Before anything is made: plain opcodes only, and nothing small that grows without bound."""
    containers: set[int] = set()  # places of the memo
    memoized = shared = 0
    last = ""
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        place = int(argument or 0) if name.endswith(("GET", "PUT")) else 0
        if name not in _PLAIN_OPCODES:
            raise pickle.UnpicklingError(f"it has the instruction {name}")
        if "PUT" in name or name == "MEMOIZE":
            place = memoized if name == "MEMOIZE" else place
            memoized += 1
            if place > len(content):  # a memo that long would be made
                raise pickle.UnpicklingError(f"it has the instruction {name} {place}")
            if any(kind in last for kind in ("TUPLE", "LIST", "DICT")):
                containers.add(place)
        elif "GET" in name and place in containers:
            shared += 1  # tuples of one tuple twice, and so on: hashing them takes for ever
            if shared > _MAX_SHARED:
                raise pickle.UnpicklingError(f"it refers to lists and tuples {shared} times over")
        last = name


def read_arguments(path: Path) -> dict[str, Any]:
    """The pickled dict of plain values (a torch.device comes out as its name)."""
    content = reading.content(path, "folder", most=_MAX_ARGUMENTS)
    with reading.whole(path, "a readable pickle", "folder"):
        try:
            _check_opcodes(content)
            found = _Unpickler(io.BytesIO(content)).load()
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"refused, {error}; only plain values and a torch.device are read"
            ) from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{path}: expected a dict of arguments, got {type(found).__name__}")
    return found


def configuration(arguments: dict[str, Any], path: Path) -> tuple[UNetConfig, TrainingInfo]:
    """Our configuration from the authors' arguments; ValueError names what is not supported."""
    if lacking := [name for name in (*_REQUIRED, "NormType") if name not in arguments]:
        raise ValueError(f"{path}: lacks {', '.join(lacking)}")
    for name, supported in _FIXED.items():
        if (got := arguments.get(name, supported)) != supported:
            raise ValueError(f"{path}: {name} = {got!r} is not supported, only {supported!r}")
    norm = arguments["NormType"]
    if not isinstance(norm, str) or norm.lower() != "layernorm":
        raise ValueError(f"{path}: NormType = {norm!r} is not supported, only 'LayerNorm'")
    channels, encoder, mid, decoder, bias = (
        arguments[name]
        for name in ("num_kernels", "num_enc_conv", "num_mid_conv", "num_dec_conv", "bias")
    )
    try:
        config = UNetConfig(
            channels=channels,
            image_channels=arguments["num_channels"],
            enc_layers=encoder,
            mid_layers=mid,
            dec_layers=decoder,
            bias=bias,
            upsample_bias=arguments.get("upsample_with_bias", bias),
            residual=arguments.get("skip", False),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return config, _training_info(arguments, path)


def _training_info(arguments: dict[str, Any], path: Path) -> TrainingInfo:
    data = str(arguments.get("data_name", "authors' checkpoint"))
    levels = arguments.get("noise_level_range")
    if levels is None:
        return TrainingInfo(data=data)
    try:
        low, high = (validate.sigma(level, "noise_level_range") / 255 for level in levels)
        validate.number(high, "noise_level_range", low=low, open_low=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: noise_level_range = {levels!r} ({error})") from None
    return TrainingInfo(sigma_min=low, sigma_max=high, data=data)


# --- model.pt -------------------------------------------------------------------------------------


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict, without `module.` before its names."""
    state = reading.torch_file(path, "a readable state dict", "folder")
    if not state:
        raise ValueError(f"{path}: expected a state dict, got an empty one")
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = str(key).removeprefix("module.")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{path}: {key} is not a plain tensor but {type(tensor).__name__}")
        if name in out:
            raise ValueError(f"{path}: two tensors for {name}")
        out[name] = tensor.detach()
    return out


def names(model: UNet) -> Iterator[tuple[str, str]]:
    """(the authors' name, ours) of every parameter.

    Within a block they count conv, norm and ReLU modules in sequence; b = 0 is full resolution.
    """
    blocks = range(model.config.blocks)
    table = {"mid": "mid"}
    table |= {f"encoder.{b}": f"enc{b + 1}" for b in blocks}
    table |= {f"decoder.{b}": f"dec{b + 1}" for b in blocks}
    for theirs, ours in table.items():
        i = 0
        block: Any = model.get_submodule(ours)
        for k, layer in enumerate(block):
            yield f"{theirs}.{i}.weight", f"{ours}.{k}.weight"
            if layer.bias is not None:
                yield f"{theirs}.{i}.bias", f"{ours}.{k}.bias"
            if layer.gamma is not None:
                yield f"{theirs}.{i + 1}.gammas", f"{ours}.{k}.gamma"
            i += 1 + (layer.gamma is not None) + layer.relu
    for b in blocks:
        for name, _ in model.get_submodule(f"up{b + 1}").named_parameters():
            yield f"upsample.{b}.{name}", f"up{b + 1}.{name}"


def rename(state: dict[str, Tensor], model: UNet, folder: Path) -> dict[str, Tensor]:
    """The state dict under our names; a gain (1, C, 1, 1) becomes (C,). Every shape is checked."""
    path = folder / WEIGHTS
    table = dict(names(model))
    if lacking := table.keys() - state.keys():
        raise ValueError(f"{path}: lacks {listed(lacking)}, which {ARGUMENTS} asks for")
    if extra := state.keys() - table.keys():
        raise ValueError(f"{path}: has {listed(extra)}, which {ARGUMENTS} does not ask for")
    out = {}
    for theirs, ours in table.items():
        want = tuple(model.get_parameter(ours).shape)
        if theirs.endswith(".gammas"):
            want = (1, *want, 1, 1)
        if (got := tuple(state[theirs].shape)) != want:
            raise ValueError(f"{path}: {theirs} has shape {got}, {ARGUMENTS} asks for {want}")
        out[ours] = state[theirs].reshape(model.get_parameter(ours).shape)
    return out


def listed(found: Collection[str], most: int = 4) -> str:
    """A few names of many, for a message."""
    shown = sorted(found)[:most]
    return ", ".join(shown) + (f" and {len(found) - most} more" if len(found) > most else "")
