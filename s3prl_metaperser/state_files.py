"""``states-STEP.ckpt``, as s3prl's runner names the checkpoints that a training goes on from."""

from __future__ import annotations

import errno
import glob
import os
from pathlib import Path

from s3prl_metaperser.errors import MetaPerSERError, UnreadableError


def states(folder: Path | str, flag: str | None = None) -> list[Path]:
    """List ``states-STEP.ckpt`` as s3prl does, newest first.

    Args:
        folder: that holds them; it need not be there.
        flag: by which the command line has named it, for the error; None: none has.

    Raises:
        UnreadableError: for a folder that is there and cannot be looked into.
        MetaPerSERError: for one without a step number, on which s3prl would fail.
    """
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise UnreadableError(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    found = [Path(path) for path in glob.glob(f"{glob.escape(str(folder))}/states-*.ckpt")]
    odd = next((path.name for path in found if not _number(path).isdecimal()), None)
    if odd is not None:
        where = str(folder) if flag is None else f"{flag} {folder}"
        raise MetaPerSERError(f"{where}: holds {odd}, which has no step number; expected states-STEP.ckpt: rename it")
    return sorted(found, key=step, reverse=True)


def step(state: Path) -> int:
    """Give the step after which a state that :func:`states` has listed was saved."""
    return int(_number(state))


def _number(state: Path) -> str:
    return state.name.split("-")[-1].split(".")[0]
