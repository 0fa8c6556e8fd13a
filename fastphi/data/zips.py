"""Image files in a .zip: in folders, a class each, or as EDM2's dataset tool writes them, with classes in
dataset.json. Its table of contents says where each lies; images are read there, by who decodes them.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastphi.data.source import Source, beside, folder_classes, label, log, numbered, tell
from fastphi.data.tar import without_root
from fastphi.support import reading

_TABLE = "dataset.json"
_MOST = 1 << 30  # bytes of it


class Entry(NamedTuple):
    """A member: where its header is; its bytes, how they are packed, how many they are then, CRC-32."""

    path: str
    offset: int
    packed: int
    method: int
    size: int
    crc: int

    def read(self) -> bytes:
        with open(self.path, "rb") as f:
            f.seek(self.offset)
            local = f.read(30)  # its last two shorts are the lengths of the name and an extra field
            if len(local) < 30:
                raise EOFError("truncated .zip")
            f.seek(sum(struct.unpack("<2H", local[26:])), 1)
            found = f.read(self.packed)
        if self.method == zipfile.ZIP_DEFLATED:
            found = zlib.decompressobj(-zlib.MAX_WBITS).decompress(found, self.size + 1)
        elif self.method != zipfile.ZIP_STORED:
            raise ValueError(f"packed by method {self.method}; expected stored or deflated")
        if len(found) != self.size or zlib.crc32(found) != self.crc:
            raise ValueError("not the bytes of the .zip's table (length or CRC-32)")
        return found


def zipped(path: Path) -> Source:
    table: Any = None
    passed_over: Counter[str] = Counter()
    entries: dict[str, Entry] = {}
    with reading.whole(path, "a whole .zip", "source"), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename
            if name == _TABLE:
                if info.file_size > _MOST:
                    raise ValueError(f"{_TABLE} has {info.file_size} bytes")
                table = reading.json_object(archive.read(info))
            elif not info.is_dir():
                if kind := beside(name):
                    passed_over[kind] += 1
                    continue
                place = info.header_offset, info.compress_size, info.compress_type
                entries[name] = Entry(str(path), *place, info.file_size, info.CRC)
    tell(passed_over, str(path))
    if not entries:
        raise ValueError(f"source: no image in {path}")
    names = sorted(entries)
    if table is None:
        classes = folder_classes(without_root(names))
    else:
        classes = _classes(names, table, path)
    digest = hashlib.sha256(repr(table).encode())
    for name in names:
        digest.update(repr((name, entries[name].size, entries[name].crc)).encode())

    def payloads(start: int, stop: int) -> list[Entry]:
        return [entries[name] for name in names[start:stop]]

    return Source("zip", str(path), names, *classes, digest.hexdigest(), payloads)


def _classes(
    names: Sequence[str], table: dict[str, Any], path: Path
) -> tuple[np.ndarray | None, list[str] | None]:
    pairs = table.get("labels") or []
    whole = isinstance(pairs, list) and all(isinstance(p, list) and len(p) == 2 for p in pairs)
    if not whole:
        raise ValueError(
            f'source: {path}: {_TABLE} needs "labels": null, or a list of [file name, class]'
        )
    of = {str(name).replace("\\", "/"): label(value) for name, value in pairs}
    if pairs and not any(v is not None for v in of.values()):
        log.warning("source: %s: the labels of %s are no class numbers: left out", path, _TABLE)
    return numbered([of.get(name) for name in names])
