"""The φ store: a folder with one array per (noise level, block), that grows row by row.

    manifest.json               what decides the numbers: model, data, seed, levels, blocks, ...
    phi_mid_sigma0.5.npy        (N, C) float32, `np.load(..., mmap_mode="r")` reads it
    done_sigma0.5.npy           (N,) uint8: 1 where the rows of this level are there (2: on their way)
    .written-on-0-7             which run of which machine writes these rows, or was stopped while it did
    indices.npy                 (N,) int64, image number of each row; absent: row i is image i

A row is on the disk before it is marked done, and an array exists in full before the manifest names it:
whatever moment a writer, or the machine, dies at, the store is whole and says itself what is missing.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastphi.support import files, reading, validate

FORMAT, VERSION = "fastphi-phi", 1
_MANIFEST = "manifest.json"
_OLDER = ("fastphi", "engine", "dtype", "data_name")  # which the first stores lack
_FIELDS: dict[str, validate.Check] = {
    "format": validate.text,
    "version": validate.count,
    "fastphi": validate.text,
    "model": validate.text,
    "engine": validate.text,
    "dtype": validate.text,
    "data": validate.text,
    "data_name": validate.text,
    "rows": validate.count,
    "indices": validate.optional(validate.sha256),
    "sigmas": validate.each(validate.sigma),
    "draws": validate.count,
    "blocks": validate.table(validate.count, re.compile(r"(enc|dec)\d+|mid").fullmatch),
    "seed": validate.seed,
}


Chunk = tuple[float, np.ndarray]  # a noise level, and rows
_WINDOW = 1 << 20  # rows that are looked through at a time
_SECONDS, _BYTES = 1.0, 1 << 26  # between two waits for the disk, of some milliseconds each
_WRITTEN_ON = ".written-on-"
_WRITTEN, _DONE = 2, 1  # marks of a row: handed to the system; on the disk


def phi_file(sigma: float, block: str) -> str:
    return f"phi_{block}_sigma{sigma!r}.npy"


def done_file(sigma: float) -> str:
    return f"done_sigma{sigma!r}.npy"


class PhiStore:
    """φ and block means of N images at several noise levels, read by memory map.

    path: the folder `extract` wrote. sigmas: its noise levels, ascending; blocks: in network order;
    draws: noise draws per image and level; indices: (N,) the image of each row; manifest: a dict.
    Raises FileNotFoundError where there is no folder, ValueError where a file is missing, truncated
    or not the one the manifest describes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path | None = Path(path).absolute()
        self.manifest = _read_manifest(self.path)
        rows = self.manifest["rows"]
        for sigma in self.sigmas:
            for block, width in self.manifest["blocks"].items():
                _check(self.path, phi_file(sigma, block), (rows, width), np.float32)
            _check(self.path, done_file(sigma), (rows,), np.uint8)
        if self.manifest["indices"] is not None:
            _check(self.path, "indices.npy", (rows,), np.int64)

    @classmethod
    def in_memory(cls, manifest: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> PhiStore:
        """A store without a folder (path None): arrays under the names the files would have."""
        store = cls.__new__(cls)
        store.path, store.manifest, store._memory = None, manifest, arrays
        return store

    _memory: Mapping[str, np.ndarray]

    def _array(self, name: str) -> np.ndarray:
        """Opened when asked for: a map holds a file descriptor, and a store may have hundreds."""
        if self.path is None:
            return self._memory[name]
        return reading.array(self.path / name, "store")

    @property
    def sigmas(self) -> tuple[float, ...]:
        return tuple(self.manifest["sigmas"])

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(self.manifest["blocks"])

    @property
    def draws(self) -> int:
        return self.manifest["draws"]

    @property
    def indices(self) -> np.ndarray:
        if self.manifest["indices"] is None:
            return np.arange(len(self))
        return np.array(self._array("indices.npy"))

    def __len__(self) -> int:
        return self.manifest["rows"]

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else repr(str(self.path))
        return f"PhiStore({where}: {len(self)} images, {len(self.sigmas)} levels, {self.blocks})"

    def missing(self) -> dict[float, np.ndarray]:
        """The rows that are not there yet, of each noise level that lacks any."""
        rows = {s: np.flatnonzero(self._array(done_file(s)) != _DONE) for s in self.sigmas}
        return {s: r for s, r in rows.items() if len(r)}

    def lacking(self, sigma: float, part: range | None = None) -> int:
        """How many rows of a stored level (of `part` alone) are not there yet."""
        part = range(len(self)) if part is None else part
        return len(part) - int(np.count_nonzero(self.there(sigma, part)))

    def there(self, sigma: float, part: range) -> np.ndarray:
        """Which rows of `part` a stored level has: (n,) bool."""
        return self._array(done_file(sigma))[part.start : part.stop] == _DONE

    def chunks(
        self, sigmas: Iterable[float], batch: int, part: range | None = None
    ) -> Iterator[Chunk]:
        """The same by level, at most `batch` rows at a time, found as they are asked for: a list of the
        chunks of ten million images would take longer than the first of them."""
        part = range(len(self)) if part is None else part
        for sigma in sigmas:
            done, left = self._array(done_file(sigma)), np.empty(0, np.int64)
            for start in range(part.start, part.stop, _WINDOW):
                stop = min(start + _WINDOW, part.stop)
                here = start + np.flatnonzero(done[start:stop] != _DONE)
                left = np.concatenate((left, here))
                whole = len(left) - len(left) % batch
                for i in range(0, whole, batch):
                    yield sigma, left[i : i + batch]
                left = left[whole:]
            if len(left):
                yield sigma, left

    @property
    def complete(self) -> bool:
        return not any(map(self.lacking, self.sigmas))

    def array(self, sigma: float, block: str = "mid", *, partial: bool = False) -> np.ndarray:
        """E_z[ā] of every image at one stored level: (N, C) float32, a read-only memory map.

        Raises ValueError for a level or block that is not stored, or with rows missing (which read
        as zeros; `partial=True` takes them so).
        """
        sigma = self._level(sigma)
        validate.choice(block, "block", self.blocks)
        if not partial and (lacking := self.lacking(sigma)):
            raise ValueError(
                f"store {self.path}: {lacking} of {len(self)} rows at sigma {sigma:g} are missing; "
                "run the same extract again to go on"
            )
        return self._array(phi_file(sigma, block))

    def phi(self, sigma: float, indices: Any = None, block: str = "mid") -> Tensor:
        """φ at one stored level: a float32 tensor (n, C), a copy.

        indices: n row numbers in [0, N), default all. Raises ValueError where one is missing.
        """
        sigma = self._level(sigma)
        array = self.array(sigma, block, partial=indices is not None)
        if indices is None:
            return torch.from_numpy(np.array(array))
        rows = row_numbers(indices, len(self))
        if len(lacking := rows[self._array(done_file(sigma))[rows] != _DONE]):
            raise ValueError(f"store {self.path}: row {lacking[0]} at sigma {sigma:g} is missing")
        return torch.from_numpy(np.array(array[rows]))

    def _level(self, sigma: float) -> float:
        sigma = validate.sigma(sigma)
        for level in self.sigmas:
            if np.float32(level) == np.float32(sigma):
                return level
        levels = ", ".join(f"{s:g}" for s in self.sigmas)
        raise ValueError(f"sigma: {sigma:g} is not stored; the store has {levels}")


def row_numbers(indices: Any, n: int, name: str = "indices") -> np.ndarray:
    """Whole numbers in [0, n), at least one, as int64."""
    array = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
    if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name}: expected a non-empty list of whole numbers, got {array.dtype} {array.shape}"
        )
    if array.min() < 0 or array.max() >= n:
        raise ValueError(
            f"{name}: expected numbers in [0, {n}), got {array.min()} ... {array.max()}"
        )
    return array.astype(np.int64)


# --- writing --------------------------------------------------------------------------------------


def finished(path: Path, manifest: dict[str, Any], part: range) -> bool:
    """Whether the rows that are wanted are all there: nothing is to be written, nor need it be possible.

    ValueError where another one is there.
    """
    if not (path / _MANIFEST).exists():
        if path.is_dir():
            _only_ours(path)
        return False
    store = PhiStore(path)
    _agree(store.manifest, manifest, path)
    return all(s in store.sigmas and not store.lacking(s, part) for s in manifest["sigmas"])


class _Rows:
    """A file of rows that is written in place, by no map: so other machines may write the rows beside,
    and a disk that is full is an error."""

    def __init__(self, path: Path) -> None:
        array = cast(np.memmap, reading.array(path, "out"))
        self._start, self._each = array.offset, array.strides[0]
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        cuts = np.flatnonzero(np.diff(rows) != 1) + 1
        for first, run in zip(rows[[0, *cuts]], np.split(values, cuts), strict=True):
            left = np.ascontiguousarray(run).data.cast("B")
            self._file.seek(self._start + int(first) * self._each)
            while left:
                left = left[self._file.write(left) :]

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Writer:
    """Writes the rows `part` of a store, going on from what is there. For `files.claimed`: nobody else
    writes those rows, and none begins at the same time.

    A row is marked twice: when it is handed to the system, which keeps it whatever becomes of this
    process, and, once a second, when it is on the disk. So a process that is killed loses no row, and
    a machine that stops those of a second. A context manager: at its end all is on the disk.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], indices: np.ndarray | None, part: range
    ) -> None:
        self.path, self.part = path, part
        for leftover in path.glob(".*.tmp"):  # of a writer that was killed
            leftover.unlink()
        self.manifest = manifest
        if (path / _MANIFEST).exists():
            existing = PhiStore(path).manifest
            _agree(existing, manifest, path)
            levels = sorted({*existing["sigmas"], *manifest["sigmas"]})
            new = set(levels) - set(existing["sigmas"])
            self.manifest = existing | {"sigmas": levels}
        else:
            new = set(manifest["sigmas"])
            if indices is not None:
                with files.atomic_write(path / "indices.npy") as temporary:
                    temporary.write_bytes(_header((len(indices),), np.int64) + indices.tobytes())
        rows = manifest["rows"]
        for sigma in sorted(new):
            for block, width in manifest["blocks"].items():
                _allocate(path / phi_file(sigma, block), (rows, width), np.float32)
            _allocate(path / done_file(sigma), (rows,), np.uint8)
        if new:
            files.write_json(path / _MANIFEST, self.manifest)
        # files of the level that is being written: φ by block, marks
        self._level: float | None = None
        self._phi: dict[str, _Rows] = {}
        self._done: _Rows | None = None
        self._pending: list[np.ndarray] = []  # rows that are written and not marked as on the disk
        self._bytes, self._flushed = 0, time.monotonic()
        # there while something may not be on the disk
        self._mark = path / f"{_WRITTEN_ON}{part.start}-{part.stop}"
        self._settle()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._open(None)
        self._mark.unlink(missing_ok=True)

    def write(self, sigma: float, rows: np.ndarray, means: Mapping[str, np.ndarray]) -> None:
        """Put {block: (n, C)} at `rows`, then mark them."""
        if sigma != self._level:
            self._open(sigma)
        for block, values in means.items():
            self._phi[block].write(rows, values)
            self._bytes += values.nbytes
        self._set(rows, _WRITTEN)
        self._pending.append(rows)
        if self._bytes >= _BYTES or time.monotonic() - self._flushed >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Waits until what was written is on the disk, and marks it so."""
        if self._pending:
            for file in self._phi.values():
                file.flush()
            self._set(np.concatenate(self._pending), _DONE)
        self._pending, self._bytes, self._flushed = [], 0, time.monotonic()

    def _set(self, rows: np.ndarray, mark: int) -> None:
        assert self._done is not None
        self._done.write(rows, np.full(len(rows), mark, np.uint8))
        if mark != _WRITTEN:
            self._done.flush()

    def _open(self, sigma: float | None) -> None:
        """The files of a level; None: none, all is closed."""
        self.flush()
        for file in (*self._phi.values(), *([self._done] if self._done else [])):
            file.close()
        self._level, self._phi, self._done = sigma, {}, None
        if sigma is not None:
            blocks = self.manifest["blocks"]
            self._phi = {block: _Rows(self.path / phi_file(sigma, block)) for block in blocks}
            self._done = _Rows(self.path / done_file(sigma))

    def _settle(self) -> None:
        """Rows of the part that a writer before this one did not see on the disk: they are there if the
        machine that it ran on is this one, and has not stopped since."""
        boot = _boot()
        others = [*files.overlapping(self.path, _WRITTEN_ON, self.part)]
        kept = {mark.read_text() for mark, _ in others} == {boot}
        for sigma in self.manifest["sigmas"]:
            done = reading.array(self.path / done_file(sigma), "out")[
                self.part.start : self.part.stop
            ]
            rows = self.part.start + np.flatnonzero(done == _WRITTEN)
            if len(rows):
                self._open(sigma)
                for file in self._phi.values() if kept else ():
                    file.flush()
                self._set(rows, _DONE if kept else 0)
        for mark, rows_of_it in others:
            if self.part.start <= rows_of_it.start and rows_of_it.stop <= self.part.stop:
                mark.unlink()
        if boot is not None:
            with files.atomic_write(self._mark) as temporary:
                temporary.write_text(boot)


def _boot() -> str | None:
    """Of the running system, since it started; None where it has no name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return None


def _allocate(path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    """A file of zeros whose blocks are all there: a disk that fills up is an error here, with a
    message, not a signal (SIGBUS) in the middle of writing to a map."""
    header = _header(shape, dtype)
    size = len(header) + int(np.prod(shape)) * np.dtype(dtype).itemsize
    with files.atomic_write(path) as temporary, open(temporary, "wb") as f:
        f.write(header)
        f.flush()
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(f.fileno(), 0, size)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None
        f.truncate(size)


def _header(shape: tuple[int, ...], dtype: Any) -> bytes:
    """The beginning of an .npy file."""
    f = io.BytesIO()
    description = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(f, description)
    return f.getvalue()


def _agree(existing: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """ValueError naming every field in which an existing store is another one."""
    differ = [
        f"{name} (there {_short(existing.get(name))}, now {_short(wanted[name])})"
        for name in wanted
        if name not in ("sigmas", "fastphi", "data_name") and existing.get(name) != wanted[name]
    ]
    if differ:
        raise ValueError(f"out: the store {path} is of another {', '.join(differ)}")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{block} of {width}" for block, width in value.items())
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."


def _only_ours(path: Path) -> None:
    files.refuse_foreign(path, "out", _MANIFEST)
    strange = [p.name for p in path.iterdir() if not p.name.startswith((".", "phi_", "done_"))]
    if strange := [name for name in strange if name != "indices.npy"]:
        raise ValueError(f"out: {path} is no φ store and holds other files ({strange[0]}, ...)")


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FileNotFoundError(f"store: no folder {path}; make one with fastphi extract")
    what = f"store {path}"
    manifest = reading.json(path / _MANIFEST, "store")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{what}: {_MANIFEST} is not that of a φ store")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{what}: format version {manifest.get('version')}, this fastphi reads {VERSION}"
        )
    with reading.whole(path / _MANIFEST, "that of a whole φ store", "store"):
        validate.record(manifest, "it", _FIELDS, _OLDER)
        validate.sigmas(manifest["sigmas"])
        if not manifest["blocks"]:
            raise ValueError("blocks: expected at least one, got none")
    return manifest


def _check(path: Path, name: str, shape: Sequence[int], dtype: Any) -> None:
    if not (path / name).exists():
        raise ValueError(f"store {path}: {name} is missing")
    reading.array(path / name, "store", like=(tuple(shape), dtype))
