"""Every file that fastphi reads is read here: nine formats, none of them trusted.

Whatever numpy, zipfile, zlib, pickle, json, safetensors or torch raise over its bytes becomes one
ValueError that says which argument, which path, what was expected and why it is not that. Nothing is
allocated on the word of a header that the size of the file does not bear out, and nothing runs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json as _json
import math
import os
import pickle
import stat
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

StrPath = str | os.PathLike[str]
Header = tuple[tuple[int, ...], bool, np.dtype[Any]]  # shape, whether in Fortran order, dtype


def of_the_system(error: Exception) -> bool:
    """Whether a disk, a network or a permission is at fault, and not the bytes of a file (of which EINVAL
    comes, too: a place in the file that cannot be)."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


@contextlib.contextmanager
def whole(path: StrPath, expected: str, name: str) -> Iterator[None]:
    """Any error of the block, as a ValueError: "{name}: {path} is not {expected} ({why})"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats, which are read all the same
            yield
    except Exception as error:
        if of_the_system(error):
            raise
        raise ValueError(f"{name}: {os.fspath(path)} is not {expected} ({_why(error)})") from None


def _why(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's text tells how to switch protection off
        return "it is damaged or holds more than tensors and plain values"
    if isinstance(error, KeyError):
        return f"no {error}"
    text = str(error).strip().split("\n", 1)[0]
    plain = isinstance(error, (ValueError, zipfile.BadZipFile)) and text
    return f"{text if plain else f'{type(error).__name__}: {text}'.rstrip(': ')}"[:300]


@contextlib.contextmanager
def _opened(path: StrPath, expected: str, name: str) -> Iterator[IO[bytes]]:
    """A regular file (a pipe would be waited for), its bytes' errors turned as `whole` does."""
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        raise ValueError(f"{name}: no file {os.fspath(path)}") from None
    if not stat.S_ISREG(kind):
        raise ValueError(f"{name}: {os.fspath(path)} is not {expected} (not a regular file)")
    with open(path, "rb") as f, whole(path, expected, name):
        yield f


# --- JSON ----------------------------------------------------------------------------------------


def json(path: StrPath, name: str) -> dict[str, Any]:
    """The object of a JSON file."""
    with _opened(path, "valid JSON", name) as f:
        return json_object(f.read())


def json_object(text: str | bytes) -> dict[str, Any]:
    """The object of a JSON text; ValueError where there is another value, or NaN or Infinity."""
    found = json_value(text)
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {type(found).__name__}")
    return found


def json_value(text: str | bytes, *, nan: bool = False) -> Any:
    """The value of a JSON text; NaN and Infinity, which RFC 8259 lacks, only with `nan`."""
    try:
        return _json.loads(text, parse_constant=float if nan else _no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


# --- numpy ---------------------------------------------------------------------------------------


def array(
    path: StrPath,
    name: str,
    *,
    mode: Literal["r", "r+", "read"] = "r",
    like: tuple[tuple[int, ...], Any] | None = None,
) -> np.ndarray:
    """An .npy: a memory map ("r", "r+"), or read into memory.

    like: the shape and dtype that it must have, checked before a byte of the array is looked at.
    """
    with _opened(path, "a whole .npy", name) as f:
        shape, fortran, dtype = header = _header(f)
        if like is not None and (shape, dtype) != (tuple(like[0]), np.dtype(like[1])):
            raise ValueError(f"it is {dtype} {shape}, expected {np.dtype(like[1])} {like[0]}")
        left = os.fstat(f.fileno()).st_size - f.tell()
        if _bytes(header) > left:
            raise ValueError(f"truncated: {left} bytes of {dtype} {shape}")
        order: Literal["F", "C"] = "F" if fortran else "C"
        if mode == "read" or 0 in shape:
            values = np.fromfile(f, dtype, math.prod(shape))
            return values.reshape(shape, order=order)
        return np.memmap(path, dtype, mode, f.tell(), shape, order)


class Archive:
    """An .npz, looked into without reading its arrays. names: of its arrays, in order."""

    def __init__(self, path: StrPath, name: str, expected: str = "a whole .npz") -> None:
        self.path, self._name, self._expected = path, name, expected
        with self._looked_into() as archive:
            members = archive.infolist()
        self._members = {info.filename.removesuffix(".npy"): info for info in members}
        self.names = tuple(self._members)

    @contextlib.contextmanager
    def _looked_into(self) -> Iterator[zipfile.ZipFile]:
        with _opened(self.path, self._expected, self._name) as f, zipfile.ZipFile(f) as archive:
            yield archive

    def headers(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of each member that is an array."""
        found = {}
        with self._looked_into() as archive:
            for name, info in self._members.items():
                with archive.open(info) as f, contextlib.suppress(ValueError):
                    shape, _, dtype = _header(f)
                    found[name] = (shape, dtype)
        return found

    def arrays(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Arrays, read into memory: the named ones, or all."""
        with self._looked_into() as archive:
            return {
                name: self._read(archive, name) for name in (self.names if names is None else names)
            }

    def array(self, name: str, *, mapped: bool = False) -> np.ndarray:
        """One array; with `mapped` a memory map, where it is stored as it is."""
        if mapped and self._members[name].compress_type == zipfile.ZIP_STORED:
            return self._map(name)
        return self.arrays((name,))[name]

    def texts(self, name: str) -> list[str]:
        """The strings of an array of any shape."""
        values = self.array(name)
        with whole(self.path, self._expected, self._name):  # not every number is a character
            return [str(s) for s in values.reshape(-1)]

    def _read(self, archive: zipfile.ZipFile, name: str) -> np.ndarray:
        info = self._members[name]  # a KeyError names what is missing
        with archive.open(info) as f:
            header = _header(f)
            size, there = _bytes(header), info.file_size
        if size > there:
            raise ValueError(f"truncated: {name} has {there} bytes for {header[2]} {header[0]}")
        with archive.open(info) as f:
            return np.lib.format.read_array(f, allow_pickle=False)

    def _map(self, name: str) -> np.ndarray:
        with _opened(self.path, self._expected, self._name) as f:
            f.seek(self._members[name].header_offset)
            local = f.read(30)  # its last two shorts are the lengths of the name and an extra field
            f.seek(sum(struct.unpack("<2H", local[26:30])), os.SEEK_CUR)
            header = shape, fortran, dtype = _header(f)
            if _bytes(header) > self._members[name].file_size or 0 in shape:
                return self.arrays((name,))[name]  # which says what is wrong
            return np.memmap(self.path, dtype, "r", f.tell(), shape, "F" if fortran else "C")

    def checksum(self, names: Iterable[str]) -> str:
        """Of the named arrays, from the archive's own checksums: by content, and nothing is read."""
        entries = [(k, self._members[k].file_size, self._members[k].CRC) for k in names]
        return hashlib.sha256(repr(entries).encode()).hexdigest()


def _header(f: IO[bytes]) -> Header:
    """Of the .npy that begins here."""
    version = np.lib.format.read_magic(f)
    if version == (1, 0):
        found = np.lib.format.read_array_header_1_0(f)
    else:
        found = np.lib.format.read_array_header_2_0(f)
    shape, _, dtype = found
    if any(n < 0 for n in shape) or dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"an array of {dtype} {shape}")
    return found


def _bytes(header: Header) -> int:
    return math.prod(header[0]) * header[2].itemsize


# --- torch ---------------------------------------------------------------------------------------


def safetensors_file(path: StrPath, name: str) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a .safetensors."""
    import safetensors  # which `import fastphi` does not need

    with _opened(path, "a whole safetensors file", name):
        with safetensors.safe_open(path, framework="pt") as f:
            # Cloned: the file's own tensors are views of a mapping, gone or changed if the file is.
            return f.metadata() or {}, {key: f.get_tensor(key).clone() for key in f.keys()}


def torch_file(path: StrPath, expected: str, name: str) -> dict[Any, Any]:
    """The dict that torch.save wrote, on the CPU: tensors and plain values, checksums looked at."""
    with _opened(path, expected, name) as f:
        if zipfile.is_zipfile(f):
            with zipfile.ZipFile(f) as archive:
                if bad := archive.testzip():  # torch.load does not look
                    raise ValueError(f"wrong checksum of {bad}")
        f.seek(0)
        state = torch.load(f, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"expected a dict, got {type(state).__name__}")
        return state


# --- anything else -------------------------------------------------------------------------------


def content(path: StrPath, name: str, *, most: int) -> bytes:
    """The bytes of a file that has at most `most`."""
    with _opened(path, f"a file of at most {most} bytes", name) as f:
        found = f.read(most + 1)
        if len(found) > most:
            raise ValueError(f"{os.fstat(f.fileno()).st_size} bytes")
        return found


def lines(path: StrPath) -> list[bytes]:
    """The lines of a text file, each with its end."""
    return Path(path).read_bytes().splitlines(True)
