"""A folder of image files, a class per first-level sub-folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fastphi.data.source import Payload, Source, beside, folder_classes, tell

# path from the root with "/", bytes, mtime in ns; bytes -1 where it is a pipe or a link to nothing
Found = tuple[str, int, int]


def look(root: Path) -> tuple[list[Found], list[Found]]:
    """All files below a folder, sorted: those that are tried as images, and the others."""
    tried: list[Found] = []
    others: list[Found] = []
    for found in sorted(_walk(root)):
        (others if beside(found[0]) else tried).append(found)
    return tried, others


def folder(root: Path, tried: list[Found], others: list[Found]) -> Source:
    """The images that `look` has found."""
    tell(Counter(str(beside(name)) for name, _, _ in others), str(root))
    lost = [(name, "unreadable: not a regular file") for name, size, _ in tried if size < 0]
    tried = [found for found in tried if found[1] >= 0]
    if not tried:
        raise ValueError(f"source: no image in {root} (nor shards: .tar, .parquet)")
    names = [name for name, _, _ in tried]
    digest = hashlib.sha256()
    for entry in tried:
        digest.update(repr(entry).encode())

    def payloads(start: int, stop: int) -> list[Payload]:
        return [os.path.join(root, name) for name in names[start:stop]]

    classes, fingerprint = folder_classes(names), digest.hexdigest()
    return Source("folder", str(root), names, *classes, fingerprint, payloads, lost)


def _walk(root: Path) -> Iterator[Found]:
    """Links are followed, loops and hidden folders not."""
    seen = set()
    for folder, children, names in os.walk(root, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            children.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        # Of two links to one folder the walk follows the first: make that the same one everywhere.
        children[:] = sorted(c for c in children if not c.startswith("."))
        for name in names:
            file = Path(folder, name)
            path, found = file.relative_to(root).as_posix(), None
            with contextlib.suppress(FileNotFoundError):  # a dangling link
                found = file.stat()
            if found is not None and stat.S_ISREG(found.st_mode):
                yield path, found.st_size, found.st_mtime_ns
            else:  # a pipe would be waited for
                yield path, -1, 0
