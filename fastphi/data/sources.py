"""Where images to pack come from: a folder, files of many kinds, or a data set in memory."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastphi.data import arrays, datasets, folders
from fastphi.data.parquet import parquet
from fastphi.data.source import Source, suffixes
from fastphi.data.tar import tar
from fastphi.data.zips import zipped

_EXPECTED = "a folder, an .npy, .npz or .zip, or .tar or .parquet files"
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_source(source: Any, split: str, key: str | None) -> Source:
    """Look at a source without reading its pixels; see `fastphi.data.pack` for its kinds."""
    if isinstance(source, (str, os.PathLike)):
        paths = expanded(source)
    elif _paths(source):
        paths = [Path(path).absolute() for path in source]
    else:
        return datasets.source(source, key)
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"source: no file or folder {path}")
    if len(paths) == 1 and paths[0].is_dir():
        return _folder(paths[0], split, key)
    return _files(paths, split, key)


def _paths(source: Any) -> bool:
    return isinstance(source, (list, tuple)) and any(
        isinstance(path, (str, os.PathLike)) for path in source[:1]
    )


def expanded(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a pattern, in order: {000..003}, {a,b} and, of what is there, * and ?. A path that is
    there stands for itself."""
    text = os.fspath(Path(path).absolute())
    if os.path.exists(text):
        return [Path(text)]
    found = []
    for name in _braces(text):
        found += sorted(glob.glob(name)) if glob.has_magic(name) else [name]
    if not found:
        raise FileNotFoundError(f"source: no file {text}")
    return [Path(name) for name in found]


def _braces(text: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if match is None:
        return [text]
    first, last, words = match.groups()
    if words is None:
        if not 0 <= int(last) - int(first) < 1_000_000:
            raise ValueError(f"source: expected a pattern as {{000..003}}, got {match[0]}")
        among = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    else:
        among = words.split(",")
    return [
        text[: match.start()] + w + rest for w in among for rest in _braces(text[match.end() :])
    ]


def _folder(root: Path, split: str, key: str | None) -> Source:
    tried, others = folders.look(root)
    if not any(os.path.splitext(name)[1].lower() in suffixes() for name, _, _ in tried):
        for suffix in (".tar", ".parquet"):
            shards = [root / name for name, _, _ in others if name.lower().endswith(suffix)]
            if shards:
                return _files(shards, split, key)
    if key is not None:
        raise ValueError(
            f"key: {key!r} names an array, column or field, but {root} is a folder of images"
        )
    return folders.folder(root, tried, others)


def _files(paths: Sequence[Path], split: str, key: str | None) -> Source:
    path, kinds = paths[0], sorted({p.suffix.lower() for p in paths})
    if kinds == [".tar"]:
        return tar(paths, key)
    if kinds == [".parquet"]:
        return parquet(paths, split, key)
    if len(paths) > 1:
        raise ValueError(
            f"source: of several files expected all .tar or all .parquet, got {' '.join(kinds)}"
        )
    if kinds == [".npy"]:
        return arrays.npy(path)
    if kinds == [".npz"]:
        return arrays.npz(path, split, key)
    if kinds == [".zip"]:
        if key is not None:
            raise ValueError(f"key: {key!r} names an array, column or field, but {path} is a .zip")
        return zipped(path)
    hint = ""
    if path.name.lower().endswith(_PACKED):
        hint = ": images are read at random, which a compressed .tar does not allow; decompress it first"
    raise ValueError(f"source: expected {_EXPECTED}, got {path}{hint}")
