"""Files that are either whole or not there: written under a temporary name beside the target, then renamed.

A process that is killed while it writes leaves its temporary file behind, hidden (``.NAME.XXXXXXXX.part``) and without
a lock. Whoever writes the same file next removes it, or whoever next takes a lock under which such files are written.
"""

from __future__ import annotations

import fcntl
import glob
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from weakref import WeakSet

from s3prl_metaperser.errors import MetaPerSERError, RefusedFileError

PART = ".part"
"""What the names of temporary files end with."""
LEFTOVER_SECONDS = 60.0
"""A temporary file that nobody has a lock on may just be about to be locked; after so long it is a killed process's."""


class UnwritableError(RefusedFileError):
    """A file that cannot be written."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}; what was there before is as it was"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and rename it over ``path`` when the block ends well.

    The content is on the disk before it has its name, so that not even a power cut leaves half a file.

    Args:
        path: the file to be made or replaced; its folder is created. Where it is a link, the file that it leads to.

    Yields:
        The temporary path to write to. After an exception it is removed and ``path`` is as it was.

    Raises:
        UnwritableError: for what the file system refuses, in the block too.
        MetaPerSERError: for a link to nothing, a folder, a pipe or a device.
    """
    path = _written_through(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, glob.escape(path.name), LEFTOVER_SECONDS)
        handle, name = tempfile.mkstemp(PART, f".{path.name}.", path.parent)
        temporary = Path(name)
        try:
            # Held until the file has its name: it tells a file that is being written from one of a killed process.
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            _bring_to_disk(temporary)
            os.replace(temporary, path)
        finally:
            os.close(handle)
            temporary.unlink(missing_ok=True)
    except MetaPerSERError:
        raise
    except OSError as error:
        raise UnwritableError(path, error) from None


def _written_through(path: Path) -> Path:
    """Follow links, which would be replaced otherwise, and keep to what a file can take the place of."""
    try:
        if path.is_symlink() and not path.exists():
            raise MetaPerSERError(
                f"{path}: a link to {os.readlink(path)}, which is not there; expected a file to write"
            )
        if path.exists() and not path.is_file():
            raise MetaPerSERError(f"{path}: is no file, but a folder, a pipe or a device; expected a file to write")
        return Path(os.path.realpath(path)) if path.is_symlink() else path
    except OSError as error:
        raise UnwritableError(path, error) from None


def _bring_to_disk(path: Path) -> None:
    # Whoever wrote it may have put another file in the place of the one that was made for it.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, name: str, seconds: float = 0.0) -> None:
    """Remove what processes that were killed while they wrote files have left; never what is being written.

    Args:
        folder: of the files.
        name: of the files, as a pattern of :mod:`fnmatch`.
        seconds: age that nothing younger is taken for a leftover at. 0 is for who holds a lock without which nobody
            writes these files.
    """
    for leftover in folder.glob(f".{name}.????????{PART}"):
        try:
            if time.time() - leftover.stat().st_mtime < seconds:
                continue
            with leftover.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
        except OSError:
            continue  # locked, so it is being written; or another process was quicker


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to ``path`` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def locked(file: IO[str], waiting: str) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel releases it when the process ends, however it ends.

    Args:
        file: an open file that stands for what is locked.
        waiting: said on stderr when another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(waiting, file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    _held.add(file)
    yield


def hold(path: Path, taken: str) -> None:
    """Take an exclusive lock between processes until this process ends, however it ends; once is enough.

    Args:
        path: a file that stands for what is locked, made if need be.
        taken: the error's message when another process holds the lock.

    Raises:
        MetaPerSERError: when another process holds the lock, or the file cannot be made.
    """
    if path.resolve() in _held_to_the_end:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UnwritableError(path, error) from None
    try:
        # Not flock, whose locks a forked process would share and keep.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise MetaPerSERError(taken) from None
    _held_to_the_end[path.resolve()] = file


_held_to_the_end: dict[Path, IO[str]] = {}
_held: WeakSet[IO[str]] = WeakSet()


def _let_go() -> None:
    """Close a forked process's copies: a lock is to end with the process that took it, not with one it has forked."""
    for file in _held:
        file.close()


os.register_at_fork(after_in_child=_let_go)
