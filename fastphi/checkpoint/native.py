"""Models on disk: safetensors, with the configuration as JSON in the file's metadata.

    {"fastphi": '{"format": 1, "config": {...}, "training_info": {...}}'}

The authors' own checkpoints (model.pt and exp_arguments.pkl) are read too, see `authors`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastphi.checkpoint import authors
from fastphi.config import TrainingInfo, UNetConfig
from fastphi.support import files, reading, validate
from fastphi.support.device import find
from fastphi.unet import UNet

log = logging.getLogger("fastphi")

FORMAT = 1
_KEY = "fastphi"
_FILE = "model.safetensors"  # within a training folder


def save(model: UNet, path: str | os.PathLike[str]) -> None:
    """Write a model: its parameters, configuration and training information, whole or not at all.

    Raises TypeError for anything but a UNet, ValueError where a parameter has NaN or Inf (such a
    model could not be loaded again), OSError where the file cannot be written.
    """
    if not isinstance(model, UNet):
        raise TypeError(f"model: expected a fastphi.UNet, got {type(model).__name__}")
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    for name, tensor in tensors.items():
        validate.finite(tensor, f"model: {name}")
    description = {
        "format": FORMAT,
        "config": model.config.to_dict(),
        "training_info": asdict(model.training_info),
    }
    content = safetensors.torch.save(tensors, {_KEY: json.dumps(description)})
    with files.atomic_write(path) as temporary:
        temporary.write_bytes(content)


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> UNet:
    """Read a model: a .safetensors file, a training folder, or a folder of the authors' program.

    device: "auto" is a GPU where there is one, of several ranks of a machine to each its own.
    dtype: of the parameters (default: as they were saved). One log line (level INFO) tells name,
    hash and source. Raises FileNotFoundError where there is nothing, ValueError for a file that is
    not a whole model of ours, naming what is wrong.
    """
    source = Path(path)
    if source.is_dir():
        if (source / _FILE).is_file():
            source = source / _FILE
        elif any((source / name).exists() for name in authors.FILES):
            return load_authors_checkpoint(source, device=device, dtype=dtype, backend=backend)
        else:
            raise FileNotFoundError(
                f"path: {source} holds no model: expected {_FILE}, or {' and '.join(authors.FILES)}"
            )
    if not source.exists():
        raise FileNotFoundError(f"path: no file or folder {source}")
    config, info, tensors = _read(source)
    model = _skeleton(config, len(tensors), source, backend)
    return _finish(model, info, tensors, source, device, dtype)


def load_authors_checkpoint(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> UNet:
    """Read a folder written by the authors' program: model.pt and exp_arguments.pkl.

    Neither file is trusted: tensors and plain values are read, anything else is refused and nothing
    in them runs. Raises FileNotFoundError for a missing file, ValueError naming what is not
    supported or does not fit.
    """
    source = Path(folder)
    config, info, state = authors.read(source)
    model = _skeleton(config, len(state), source, backend)
    return _finish(model, info, authors.rename(state, model, source), source, device, dtype)


def fingerprint(model: UNet) -> str:
    """SHA-256 (hex) of the configuration and of every parameter's name, type and bytes.

    What stores and resumed runs compare; the same wherever the model lives.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[UNetConfig, TrainingInfo, dict[str, Tensor]]:
    """Configuration, training information and parameters of our own file."""
    metadata, tensors = reading.safetensors_file(path, "path")
    if _KEY not in metadata:
        raise ValueError(f"path: {path} is a safetensors file without a configuration of fastphi")
    with reading.whole(path, "a model of fastphi: its configuration is damaged", "path"):
        description = reading.json_object(metadata[_KEY])
        version = description["format"]
    if version != FORMAT:
        raise ValueError(
            f"path: {path} has format {version!r}, this version of fastphi reads {FORMAT}; "
            "a newer file needs a newer fastphi"
        )
    config = _fill(UNetConfig, description.get("config"), f"{path}: config")
    info = _training_info(description.get("training_info"), config, path)
    return config, info, tensors


def _fill(kind: type, values: Any, name: str) -> Any:
    """A dataclass from a JSON object; unknown keys are named."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{name}: expected an object, got {values!r}")
    if unknown := sorted(set(values) - {field.name for field in fields(kind)}):
        raise ValueError(f"{name}: unknown {', '.join(unknown)}; is the file from a newer fastphi?")
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _training_info(values: Any, config: UNetConfig, path: Path) -> TrainingInfo:
    name = f"{path}: training_info"
    info: TrainingInfo = _fill(TrainingInfo, values, name)
    try:
        low = validate.sigma(info.sigma_min, "sigma_min")
        validate.number(info.sigma_max, "sigma_max", low=low, open_low=True)
        validate.integer(info.steps, "steps", low=0)
        if not isinstance(info.data, str):
            raise ValueError(f"data: expected a name, got {info.data!r}")
        if info.mean is not None:
            if len(info.mean) != config.image_channels:
                raise ValueError(f"mean: expected {config.image_channels} numbers, got {info.mean}")
            for value in info.mean:
                validate.number(value, "mean", low=0, high=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    return info


def _skeleton(config: UNetConfig, tensors: int, source: Path, backend: str) -> UNet:
    """The model without memory: its parameters come from the file, so none are made or drawn."""
    layers = sum(config.enc_layers) + config.mid_layers + sum(config.dec_layers)  # type: ignore[arg-type]
    if layers > tensors:  # a damaged count must not ask for a billion layers
        raise ValueError(
            f"{source}: {layers} layers in the configuration, {tensors} tensors in the file"
        )
    try:
        with torch.device("meta"):
            return UNet(config, backend=backend)
    except RuntimeError as error:  # sizes that overflow
        raise ValueError(f"{source}: impossible configuration {config} ({error})") from None


def _finish(
    model: UNet,
    info: TrainingInfo,
    tensors: dict[str, Tensor],
    source: Path,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> UNet:
    """The model with these parameters; every name and shape is checked before any is used."""
    place = find(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating point torch.dtype or None, got {dtype!r}")
    _check(model, tensors, source)
    state = {name: t.to(place, dtype).contiguous() for name, t in tensors.items()}
    model.load_state_dict(state, assign=True)
    model.training_info = info
    _tell(model, source)
    return model.eval()


def _tell(model: UNet, source: Path) -> None:
    info, sizes = model.training_info, "-".join(map(str, model.config.channels))
    count = sum(p.numel() for p in model.parameters())
    trained = f"{info.steps} steps on {info.data or 'unnamed data'}" if info.steps else info.data
    log.info(
        f"loaded {source.name}: UNet {sizes}, {count:,} parameters, {trained or 'no data named'}, "
        f"sha256 {fingerprint(model)[:16]}, from {source.resolve()}"
    )


def _check(model: UNet, tensors: Mapping[str, Tensor], source: Path) -> None:
    expected = model.state_dict()
    for what, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{source}: the file {what} {authors.listed(names)}")
    for name in expected:
        tensor = tensors[name]
        if tensor.shape != expected[name].shape:
            want, got = tuple(expected[name].shape), tuple(tensor.shape)
            raise ValueError(f"{source}: {name} has shape {got}, the configuration needs {want}")
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {name} is {tensor.dtype}, expected floating point")
        validate.finite(tensor, f"{source}: {name}")
    if len(dtypes := {str(t.dtype) for t in tensors.values()}) > 1:
        raise ValueError(f"{source}: parameters of several types ({', '.join(sorted(dtypes))})")
