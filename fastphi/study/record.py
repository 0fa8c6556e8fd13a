"""Results on disk: an .npz of arrays with the structure as JSON; nothing in it runs when it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from fastphi.analysis.common import Result
from fastphi.support import files, reading


def save(result: Result, path: str | os.PathLike[str]) -> None:
    """Write a result, whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    structure = json.dumps(_encode(result, arrays))
    with files.atomic_write(path) as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, structure=np.array(structure), **arrays)  # type: ignore[arg-type]


def load(path: str | os.PathLike[str], kinds: Mapping[str, type[Result]]) -> Result:
    """Read what `save` wrote. kinds: the classes that may be in it, by name. ValueError otherwise."""
    expected = "a whole result: delete it"
    archive = reading.Archive(path, "out", expected)
    with reading.whole(path, expected, "out"):
        arrays = archive.arrays()
        found = _decode(reading.json_value(str(arrays.pop("structure")), nan=True), arrays, kinds)
        if not isinstance(found, Result):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found


def _encode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, Result):
        kind = type(value)
        own = {f.name: _encode(getattr(value, f.name), arrays) for f in fields(kind)}  # type: ignore
        return {"result": kind.__name__, "fields": own}
    if isinstance(value, np.ndarray):
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, Mapping):
        return {"mapping": [[k, _encode(v, arrays)] for k, v in value.items()]}
    if isinstance(value, (tuple, list)):
        return {"tuple": [_encode(v, arrays) for v in value]}
    return value.item() if isinstance(value, np.generic) else value


def _decode(value: Any, arrays: Mapping[str, np.ndarray], kinds: Mapping[str, type[Result]]) -> Any:
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "mapping" in value:
        return {k: _decode(v, arrays, kinds) for k, v in value["mapping"]}
    if "tuple" in value:
        return tuple(_decode(v, arrays, kinds) for v in value["tuple"])
    own = {name: _decode(v, arrays, kinds) for name, v in value["fields"].items()}
    return kinds[value["result"]](**own)
