"""Files of ``torch.save``: written whole or not at all, and compared with their checksums before they are read.

torch's format is a zip archive with a CRC-32 for each record, which ``torch.save`` writes and ``torch.load`` does not
look at: https://pytorch.org/docs/stable/notes/serialization.html.
"""

from __future__ import annotations

import errno
import zlib
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import torch

from s3prl_metaperser.atomic import replacing
from s3prl_metaperser.errors import UnreadableError

DOS_FOLDER = 0x10
"""The bit of a zip record's attributes."""

OLD_FORMAT = b"\x80"
"""What a file of torch before version 1.6 begins with, as every pickle does."""


def save(content: object, path: Path, **options: Any) -> None:
    """Do what ``torch.save`` does, atomically.

    Args:
        content: what is saved.
        path: of the file to be made or replaced.
        **options: further arguments of ``torch.save``.

    Raises:
        UnwritableError: for what the file system refuses; ``path`` is then as it was.
    """
    # Into an open file, not by path: torch would put the temporary name into the file.
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file, **options)
        except RuntimeError as error:
            # Closing the archive, torch stumbles once more and hides what stopped it.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def damage(path: Path) -> str | None:
    """Say what is wrong with the bytes of a torch file.

    Reads all of the file, 2 GB a second and 1 MB at a time.

    Args:
        path: of an existing file.

    Returns:
        Such as ``record archive/data/3 does not match its checksum``; None where nothing is, or where the file is in
        torch's format before version 1.6, which has no checksums.

    Raises:
        UnreadableError: when the bytes cannot be read, so that nothing is known of them.
    """
    try:
        with path.open("rb") as file:
            is_old = file.read(1) == OLD_FORMAT
        if not is_zipfile(path):
            return None if is_old else f"{path.stat().st_size} bytes, no torch file or only a part of one"
        with ZipFile(path) as archive:
            for record in archive.infolist():
                # torch's reader takes what is marked as a folder for empty, and leaves its tensor uninitialised.
                if record.compress_type != ZIP_STORED or record.external_attr & DOS_FOLDER:
                    return f"record {record.filename} is marked as compressed or as a folder, which torch's never are"
            bad = archive.testzip()
    except OSError as error:
        # An offset before the file's begin, which only a damaged directory gives, is no valid argument of a seek.
        if error.errno != errno.EINVAL:
            raise UnreadableError(path, error) from None
        return "its directory of records is damaged (an offset is outside of the file)"
    except (BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, zlib.error) as error:
        return f"its directory of records is damaged ({' '.join(str(error).split())})"
    return None if bad is None else f"record {bad} does not match its checksum"
