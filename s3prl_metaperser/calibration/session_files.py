"""Where a calibration is kept, beside the checkpoint to be made, and who works on it: one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from s3prl_metaperser.errors import MetaPerSERError


@dataclass(frozen=True)
class SessionFiles:
    """Where a session is kept.

    Attributes:
        out: the personal checkpoint that is made in the end, such as ``MY.ckpt``.
    """

    out: Path

    @property
    def labels(self) -> Path:
        """``MY.labels.csv``."""
        return self.out.with_name(f"{self._name}.labels.csv")

    @property
    def state(self) -> Path:
        """``MY.calibration.json``."""
        return self.out.with_name(f"{self._name}.calibration.json")

    @property
    def entrance(self) -> Path:
        """``MY.calibration.html``, there while the session is open in a browser: it leads to the page."""
        return self.out.with_name(f"{self._name}.calibration.html")

    @property
    def lock(self) -> Path:
        """``.MY.calibration.lock``, there while the session is open; it says where."""
        return self.out.with_name(f".{self._name}.calibration.lock")

    @property
    def _name(self) -> str:
        # Not all that follows a dot is an ending: the sessions of dr.smith and dr.jones are two.
        return self.out.name.removesuffix(".ckpt")

    def check_free(self) -> None:
        """Refuse to begin a session where something else lies.

        Raises:
            MetaPerSERError: naming the file that would be replaced.
        """
        for path in (self.out, self.labels):
            if path.exists():
                raise MetaPerSERError(
                    f"{path} exists, and is no part of a calibration that could go on; choose another --out, or pass "
                    "--overwrite to replace it"
                )

    def discard(self) -> None:
        """Remove an earlier session's answers; its checkpoint stays until the new one replaces it."""
        # The labels first: answers must never be found by a session that they don't belong to.
        for path in (self.labels, self.state):
            path.unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[Lock]:
        """Keep every other process off the session until the block ends or the process does, however it does.

        Raises:
            MetaPerSERError: another process holds it, or the folder cannot be written to.
        """
        made = [folder for folder in self.lock.parents if not folder.exists()]
        with self._locked() as file:
            try:
                yield Lock(file)
            finally:
                self.lock.unlink(missing_ok=True)
                # Of a command that was refused no folder is left either.
                with suppress(OSError):
                    for folder in made:
                        folder.rmdir()

    def _locked(self) -> IO[str]:
        while True:
            try:
                self.lock.parent.mkdir(parents=True, exist_ok=True)
                file = self.lock.open("a+", encoding="utf-8")
            except OSError as error:
                raise MetaPerSERError(f"{self.lock.parent}: cannot be written to ({error.strerror})") from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it a moment ago may have removed the file that was opened here.
                if os.fstat(file.fileno()).st_nlink:
                    return file
            except BlockingIOError:
                file.seek(0)
                place = file.read().strip() or "in another terminal"
                raise MetaPerSERError(
                    f"the calibration of {self.out} is open already, {place}; use that one, or stop it first"
                ) from None
            file.close()


@dataclass(frozen=True)
class Lock:
    """A session's lock while it is held.

    Attributes:
        file: that is locked.
    """

    file: IO[str]

    def say(self, place: str) -> None:
        """Leave a note of where the session is open, for whoever finds it locked."""
        self.file.truncate(0)
        self.file.write(place)
        self.file.flush()
