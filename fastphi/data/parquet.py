"""Encoded images in a column of .parquet files, as Hugging Face writes them: a struct {bytes, path}, or
plain bytes; beside them a column `label`. Read a row group at a time: that much memory a process needs.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastphi.data.source import Source, label, log, numbered
from fastphi.support import reading

_LABELS = ("label", "labels")


class Cell(NamedTuple):
    """A row of a row group, and the leaf column that holds its bytes."""

    path: str
    leaf: str
    group: int
    row: int

    def read(self) -> bytes:
        found = _group(self.path, self.leaf, self.group)[self.row].as_py()
        if isinstance(found, dict):
            found = found["bytes"]
        if found is None:
            raise ValueError("the row has no bytes")
        return found


@functools.lru_cache(maxsize=1)  # rows come in order
def _group(path: str, leaf: str, group: int) -> Any:
    with _opened(Path(path)) as file:
        return file.read_row_group(group, columns=[leaf], use_threads=False).column(0)


def parquet(paths: Sequence[Path], split: str, key: str | None) -> Source:
    """One source of all files, in their order. key: the column of the images. split: which files, where
    their names tell, as train-00000-of-00005.parquet."""
    _check_installed(paths[0])
    paths = _of_split(paths, split)
    leaf, its_label, class_names = _columns(paths[0], key)
    names: list[str] = []
    labels: list[int | str | None] = []
    groups: list[tuple[int, int]] = []  # which file, and its row group
    starts = [0]
    for number, path in enumerate(paths):
        with reading.whole(path, f"a .parquet with {leaf}, as {paths[0].name} is", "source"):
            with _opened(path) as file:
                _read_rows(file, path, leaf, its_label, names, labels)
                counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        groups += [(number, g) for g in range(len(counts))]
        starts += itertools.accumulate(counts, initial=starts.pop())
    if not names:
        raise ValueError(f"source: {paths[0]} has no rows")
    classes = numbered(labels, class_names)
    found = [(p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in paths]
    fingerprint = hashlib.sha256(repr((found, leaf)).encode()).hexdigest()

    def payloads(start: int, stop: int) -> list[Cell]:
        cells = []
        for i in range(start, stop):
            g = bisect.bisect_right(starts, i) - 1
            number, group = groups[g]
            cells.append(Cell(str(paths[number]), leaf, group, i - starts[g]))
        return cells

    where = f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}"
    return Source("parquet", where, names, *classes, fingerprint, payloads)


def _opened(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path)


def _check_installed(path: Path) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError(
            f"source: {path} needs pyarrow, which is not installed (pip install pyarrow)"
        ) from None


def _of_split(paths: Sequence[Path], split: str) -> Sequence[Path]:
    of = {p: m[1] for p in paths if (m := re.match(r"(\w+)-\d+-of-\d+", p.name))}
    if len(set(of.values())) < 2:
        return paths
    chosen = [p for p in paths if of.get(p) == split]
    if not chosen:
        splits = ", ".join(sorted(set(of.values())))
        raise ValueError(f"split: expected one of {splits} for {paths[0].parent}, got {split!r}")
    log.info("source: %d of %d files are of split %s", len(chosen), len(paths), split)
    return chosen


def _columns(path: Path, key: str | None) -> tuple[str, str | None, list[str] | None]:
    """The leaf column of the images' bytes, and where there are, that of labels and the classes' names."""
    with reading.whole(path, "a whole .parquet", "source"):
        with _opened(path) as file:
            schema = file.schema_arrow
        said = reading.json_object((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = said.get("info", {}).get("features", {})
        its_label = next((name for name in _LABELS if name in schema.names), None)
        class_names = features.get(its_label, {}).get("names")
    leaves = {f.name: leaf for f in schema if (leaf := _leaf(f)) is not None}
    usual = [name for name in ("image", "img") if name in leaves] or [*leaves]
    wanted = usual[0] if key is None and len(usual) == 1 else key
    if wanted not in leaves:
        came = f"{len(leaves)} of them" if key is None else repr(key)
        raise ValueError(
            f"{'source' if key is None and not leaves else 'key'}: expected a column of encoded images "
            f"(binary, or a struct with bytes) in {path}, got {came}; its columns: "
            + ", ".join(f"{f.name} {f.type}" for f in schema)
        )
    if its_label is not None and not _of_classes(schema.field(its_label).type):
        log.warning("source: %s: column %s is no class: left out", path, schema.field(its_label))
        its_label, class_names = None, None
    return leaves[wanted], its_label, class_names


def _leaf(field: Any) -> str | None:
    """The column of encoded bytes in a field of a schema."""
    from pyarrow import types

    def binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    if binary(field.type):
        return field.name
    if types.is_struct(field.type) and any(
        c.name == "bytes" and binary(c.type) for c in field.type
    ):
        return f"{field.name}.bytes"
    return None


def _of_classes(kind: Any) -> bool:
    from pyarrow import types

    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)


def _read_rows(
    file: Any,
    path: Path,
    leaf: str,
    its_label: str | None,
    names: list[str],
    labels: list[int | str | None],
) -> None:
    """Append the names and the labels of a file's rows."""
    schema, image = file.schema_arrow, leaf.removesuffix(".bytes")
    struct = schema.field(image).type  # KeyError: files of other columns do not belong together
    n = file.metadata.num_rows
    paths: list[str | None] = [None] * n
    if leaf != image and any(c.name == "path" for c in struct):
        column = file.read(columns=[f"{image}.path"]).column(0)
        paths = [value["path"] for value in column.to_pylist()]
    names += [p or f"{path.stem}/{i}" for i, p in enumerate(paths)]
    values = [None] * n
    if its_label is not None:
        values = file.read(columns=[its_label]).column(its_label).to_pylist()
    labels += map(label, values)
