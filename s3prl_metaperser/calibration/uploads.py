"""A clip that comes from the page: taken up to a size, read like any recording, kept nowhere."""

from __future__ import annotations

from collections.abc import AsyncIterable
from pathlib import Path
from tempfile import TemporaryDirectory

import soundfile
from torch import Tensor

from s3prl_metaperser.audio import MOST_HOURS, read_audio
from s3prl_metaperser.errors import MetaPerSERError

MOST_BYTES = 20 * 2**20
MOST_SECONDS = 60
"""An utterance is far shorter; an upstream's memory may grow by the square of it."""


class TooLargeError(MetaPerSERError):
    """An upload of more than :data:`MOST_BYTES`."""

    def __init__(
        self, message: str = f"the file is larger than {MOST_BYTES // 2**20} MB; choose a single utterance"
    ) -> None:
        super().__init__(message)


async def collect(chunks: AsyncIterable[bytes], promised: str | None) -> bytes:
    """Take an upload.

    Args:
        chunks: its bytes as they come.
        promised: its length as its sender gives it, which is not relied on.

    Raises:
        TooLargeError: before anything is read where the length says so, otherwise as soon as there is too much.
    """
    if promised is not None and promised.isdecimal() and int(promised) > MOST_BYTES:
        raise TooLargeError
    content = bytearray()
    async for chunk in chunks:
        content += chunk
        if len(content) > MOST_BYTES:
            raise TooLargeError
    return bytes(content)


def read_upload(name: str, content: bytes) -> Tensor:
    """Read an upload as a recording.

    Args:
        name: what the file is called, for messages.
        content: its bytes.

    Returns:
        (samples,) float32 at 16 kHz.

    Raises:
        MetaPerSERError: it is no recording, empty, cut off, or too long.
    """
    called = repr(Path(name.replace("\\", "/")).name) if name else "the recording"
    with TemporaryDirectory(prefix="metaperser-") as folder:
        path = Path(folder) / "clip"
        path.write_bytes(content)
        # A small file can hold hours of silence: its length is looked at before it is decoded.
        try:
            seconds = soundfile.info(path).duration
        except soundfile.LibsndfileError:
            seconds = 0.0  # what is wrong is said by reading it
        if MOST_SECONDS < seconds <= MOST_HOURS * 3600:
            raise MetaPerSERError(f"{called} is {seconds:.0f} s long; choose a clip of at most {MOST_SECONDS} s")
        try:
            return read_audio(path)
        except MetaPerSERError as error:
            raise MetaPerSERError(f"{called} {str(error).removeprefix(f'{path}: ')}") from None
