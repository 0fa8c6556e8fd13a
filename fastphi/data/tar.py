"""WebDataset's .tar shards: samples of consecutive members that share a name up to its first dot.

A .tar has no table of contents: one pass over its headers finds where each image lies, and images are
then read there, by the process that decodes them. Measured on one of 2 busy cores, in processor time:
the pass 20,000 samples/s (of an image and its .cls).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastphi.data.source import Source, folder_classes, label, log, numbered, suffixes
from fastphi.support import reading

_SMALL = 1 << 20  # bytes that a label, or the JSON that holds it, may have
_FIELDS = ("label", "cls", "class")  # of that JSON


class Span(NamedTuple):
    """Bytes of a file."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.path, "rb") as f:
            f.seek(self.offset)
            found = f.read(self.size)
        if len(found) < self.size:
            raise EOFError(f"{len(found)} of {self.size} bytes")
        return found


@dataclasses.dataclass
class _Sample:
    """Members by extension: what follows the name's first dot, in lower case."""

    key: str
    members: dict[str, tuple[str, int, int]] = dataclasses.field(default_factory=dict)
    label: int | str | None = None
    broken: bool = False  # its .json


def tar(paths: Sequence[Path], key: str | None) -> Source:
    """One source of all shards, in their order. key: the extension of a sample's image."""
    names: list[str] = []
    labels: list[int | str | None] = []
    spans: list[tuple[int, int, int]] = []  # which shard, offset, size
    lost: list[tuple[str, str]] = []
    broken: list[str] = []
    for shard, path in enumerate(paths):
        for sample in _samples(path):
            if (extension := _image(sample, key, path)) is None:
                there = ", ".join(sorted(sample.members))
                wanted = "image" if key is None else key
                lost.append((sample.key, f"unreadable: no {wanted} among {there}"))
                continue
            name, offset, size = sample.members[extension]
            if sample.broken:
                broken.append(name)
            names.append(name)
            labels.append(sample.label)
            spans.append((shard, offset, size))
    where = f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}"
    if not names:
        raise ValueError(
            f"source: no image in {where}; expected samples with an image each, got {len(lost)} without"
            + (f" (the first: {lost[0][0]}, {lost[0][1]})" if lost else "")
        )
    if broken:
        log.warning("source: %d samples have no valid .json, the first %s", len(broken), broken[0])
    classes = numbered(labels)
    if classes[0] is None:
        classes = folder_classes(without_root(names))
    found = [(p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in paths]
    fingerprint = hashlib.sha256(repr(found).encode()).hexdigest()
    files = [str(p) for p in paths]

    def payloads(start: int, stop: int) -> list[Span]:
        return [Span(files[shard], *place) for shard, *place in spans[start:stop]]

    return Source("tar", where, names, *classes, fingerprint, payloads, lost)


def without_root(names: Sequence[str]) -> list[str]:
    """The names below the folders that all of them share: an archive of a folder begins with its name."""
    root = os.path.commonpath([os.path.dirname(name) for name in names])
    return [name[len(root) + 1 if root else 0 :] for name in names]


def _samples(path: Path) -> Iterator[_Sample]:
    sample: _Sample | None = None
    expected = "a whole .tar, uncompressed"
    with reading.whole(path, expected, "source"), open(path, "rb") as f:
        if f.read(6)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
            raise ValueError("it is compressed; images are read at random: decompress it first")
        f.seek(0)
        with tarfile.open(fileobj=f, mode="r:") as archive:
            while (member := archive.next()) is not None:
                # which would grow with the archive
                archive.members.clear()  # type: ignore[attr-defined]
                if archive.offset <= member.offset:  # or it would be read for ever
                    raise ValueError(f"damaged at byte {member.offset}")
                name = member.name.removeprefix("./")
                folder, _, file = name.rpartition("/")
                if not member.isreg() or member.issparse() or file.startswith("."):
                    continue
                stem, _, extension = file.lower().partition(".")
                key = name[: len(name) - len(file) + len(stem)]
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = _Sample(key)
                if extension in ("cls", "json") and member.size <= _SMALL:
                    f.seek(member.offset_data)
                    _read_label(sample, extension, f.read(member.size))
                sample.members[extension] = name, member.offset_data, member.size
            f.seek(archive.offset)
            if f.read(512) != bytes(512):
                raise ValueError(f"truncated or damaged at byte {archive.offset}")
    if sample is not None:
        yield sample


def _read_label(sample: _Sample, extension: str, content: bytes) -> None:
    if extension == "cls":
        sample.label = label(content)
        return
    try:
        fields = reading.json_object(content)
    except ValueError:
        sample.broken = True
        return
    if sample.label is None:  # .cls comes first
        found = (label(fields.get(name)) for name in _FIELDS)
        sample.label = next((value for value in found if value is not None), None)


def _image(sample: _Sample, key: str | None, path: Path) -> str | None:
    """The extension of the sample's image."""
    if key is not None:
        wanted = key.lower().removeprefix(".")
        return wanted if wanted in sample.members else None
    images = [e for e in sample.members if f".{e.rpartition('.')[2]}" in suffixes()]
    plain = [e for e in images if "." not in e] or images
    if len(plain) > 1:
        raise ValueError(
            f"key: sample {sample.key} of {path} has several images; name one of {', '.join(plain)}"
        )
    return plain[0] if plain else None
