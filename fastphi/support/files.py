"""Files that are whole or absent: every output of fastphi is written through here."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import filelock

log = logging.getLogger("fastphi")

# What a file system says that has no locks: NFS without its lock server, Lustre, some of FUSE.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, 524)  # 524: ENOTSUPP


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path; move it to `path`, synced, if the block succeeds.

    On any error (a full disk, Ctrl-C) the temporary file is removed and `path` is as it was. A link
    stays one: the file that it names is the one that is replaced. A pipe or a device is written into.
    """
    if is_stream(path):
        with _streamed(Path(path)) as temporary:
            yield temporary
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp gives 0600; an output is an ordinary file
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, name):
            error.filename = str(path)  # the message names the file that was wanted
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is there and no file to replace, but a pipe or a device (/dev/stdout, too)."""
    within = Path(path).absolute().parts[:2]
    special = within in (("/", "dev"), ("/", "proc"))
    return (os.path.exists(path) and not os.path.isdir(path)) and (
        special or not os.path.isfile(path)
    )


@contextlib.contextmanager
def _streamed(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fastphi-") as folder:
        temporary = Path(folder) / (path.name or "output")
        temporary.touch()
        yield temporary
        with open(temporary, "rb") as content, os.fdopen(_descriptor(path), "wb") as f:
            shutil.copyfileobj(content, f)


def _descriptor(path: Path) -> int:
    """Of a stream; this process's own output is not opened anew, which would begin at its start."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, closed, not a file
            if os.path.samestat(os.stat(path), os.fstat(stream.fileno())):
                stream.flush()
                return os.dup(stream.fileno())
    return os.open(path, os.O_WRONLY)


def sync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(obj, indent=2) + "\n")


def sha256(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


_MARKS = {
    "manifest.json": "a pack or a φ store",
    "study.json": "a study",
    "checkpoints": "a training run",
}


def refuse_foreign(folder: Path, what: str, mark: str) -> None:
    """ValueError where the folder is an output of fastphi of another kind than the one with this mark."""
    for other, kind in _MARKS.items():
        if other != mark and (folder / other).exists():
            raise ValueError(f"{what}: {folder} is {kind}; give another folder")


# --- one writer ------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(
    folder: str | os.PathLike[str], what: str, *, mark: str | None = None, wait: float = 0
) -> Iterator[None]:
    """Hold `folder`, made where it is not there, for one writer; ValueError at once (or after `wait`
    seconds) if another does, or where the folder is another kind of output than the one that has the
    file `mark`.

    The lock is the kernel's, so it goes with the process however that ends. On a file system without
    such locks it is a file that says who holds it; that of a dead process is taken over, on its own
    machine. OSError, with the reason, where the folder cannot be written to.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{what}: {folder} is a file; give a folder")
    if mark is not None:
        refuse_foreign(folder, what, mark)
    folder.mkdir(parents=True, exist_ok=True)
    with _held(
        folder / ".lock", f"{what}: another process is writing to {folder}; wait for it", wait
    ):
        yield


@contextlib.contextmanager
def claimed(
    folder: str | os.PathLike[str], what: str, part: range, begin: Callable[[], T], *, mark: str
) -> Iterator[T]:
    """Hold rows of `folder` for one writer of several, who begin one after the other: gives begin().

    ValueError where a living process holds any of the rows, or as of `locked`.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        with locked(folder, what, mark=mark, wait=_BEGINS):
            for lock, theirs in overlapping(folder, ".rows-", part, ".lock"):
                rows = f"rows {theirs.start} to {theirs.stop - 1} of {folder}"
                with _held(lock, f"{what}: another process is writing {rows}; wait for it"):
                    lock.unlink(missing_ok=True)  # of a process that is gone
            mine = folder / f".rows-{part.start}-{part.stop}.lock"
            stack.enter_context(_held(mine, f"{what}: another process is writing to {folder}"))
            stack.callback(mine.unlink, missing_ok=True)  # while it is held
            made = begin()
        yield made


def overlapping(
    folder: Path, prefix: str, part: range, suffix: str = ""
) -> Iterator[tuple[Path, range]]:
    """The files "{prefix}{first}-{stop}{suffix}" whose rows are some of `part`'s, and their rows."""
    for path in [*folder.glob(f"{prefix}*-*{suffix}")]:
        rows = range(*map(int, path.name.removeprefix(prefix).removesuffix(suffix).split("-")))
        if rows.start < part.stop and part.start < rows.stop:
            yield path, rows


T = TypeVar("T")
_BEGINS = 600.0  # seconds that another may take to make its files


@contextlib.contextmanager
def owned(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Hold one output file for one writer, in the same way; nothing stays beside it afterwards."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with _held(lock, f"{what}: another run is writing {path}; give another path"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # while it is held: whoever waits sees that it is gone


@contextlib.contextmanager
def _held(path: Path, taken: str, wait: float = 0) -> Iterator[None]:
    try:
        lock: Any = _acquire(filelock.FileLock(path), taken, wait)
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks; a file stands for one", path.parent)
        lock = _acquire(filelock.SoftFileLock(path.with_name(f"{path.name}.soft")), taken, wait)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: Any, taken: str, wait: float) -> Any:
    with warnings.catch_warnings(record=True) as told:  # of a file that stands for a lock
        warnings.simplefilter("always")
        try:
            try:
                lock.acquire(timeout=min(wait, 1))
            except filelock.Timeout:
                if not wait:
                    raise
                log.warning("%s (for at most %g s)", taken, wait)
                lock.acquire(timeout=wait)
        except filelock.Timeout:  # an OSError, too
            raise ValueError(taken) from None
    for warning in told:
        log.warning("%s: %s", lock.lock_file, warning.message)
    return lock
