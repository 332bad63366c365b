"""Reading recordings as the upstreams want them: mono, one sample rate, whole."""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.transforms import Resample

from s3prl_metaperser.errors import MetaPerSERError

SHORTEST_SECONDS = 0.04
"""What the convolutional front end of wav2vec 2.0 and its kin must hear to give a frame."""
_UNKNOWN_SIZE = 0x7FFFF000
"""Programs that write to a pipe can't know the size beforehand, and put a number of at least this many bytes."""


def fault_of(path: Path) -> str | None:
    """Say what is wrong with a recording as far as its header tells; None where nothing is.

    It is a fraction of the work of reading it. Samples that are not finite are found by reading alone.

    Args:
        path: of the file.

    Returns:
        What :func:`read_audio` would say, or that it is too short for any frame.
    """
    try:
        length = soundfile.info(str(path)).duration
        missing = _missing_bytes(path)
    except (soundfile.LibsndfileError, OSError):
        length, missing = 0.0, 0
    if length and not missing:
        return (
            None
            if length >= SHORTEST_SECONDS
            else f"{path}: lasts {length:.3f} s; expected {SHORTEST_SECONDS} s or more"
        )
    try:
        read_audio(path)
    except MetaPerSERError as error:
        return str(error)
    return None


def read_audio(path: Path | str, sample_rate: int = 16_000) -> torch.Tensor:
    """Read a recording.

    Args:
        path: a file that libsndfile reads (wav, flac, ogg, mp3, …), of any sample rate, mono or not.
        sample_rate: samples per second of the result.

    Returns:
        ``(samples,)`` float32; several channels are averaged.

    Raises:
        MetaPerSERError: the file is missing, not audio, empty, cut off, or holds values that aren't finite.
    """
    path = Path(path)
    if not path.is_file():
        fault = "is a folder" if path.is_dir() else "no such file"
        raise MetaPerSERError(f"{path}: {fault}; expected a recording")
    try:
        if path.stat().st_size == 0:
            raise MetaPerSERError(f"{path}: is empty (0 bytes); expected a recording")
        with soundfile.SoundFile(path) as file:
            promised, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)
        missing = _missing_bytes(path)
    except soundfile.LibsndfileError as error:
        reason = str(error.error_string).rstrip(".")
        raise MetaPerSERError(
            f"{path}: is not a readable recording ({reason}); expected wav, flac, ogg or mp3"
        ) from None
    except OSError as error:
        raise MetaPerSERError(f"{path}: cannot be read ({error.strerror})") from None
    if missing or len(samples) < promised:
        lack = f"{missing:,} bytes" if missing else f"{promised - len(samples):,} of {promised:,} samples"
        raise MetaPerSERError(f"{path}: is cut off: {lack} that its header promises are missing; copy the file again")
    if not len(samples):
        raise MetaPerSERError(f"{path}: holds no samples; expected a recording")
    if not np.isfinite(samples).all():
        raise MetaPerSERError(f"{path}: holds samples that are not finite (NaN or infinite); export the file again")
    mono = torch.from_numpy(samples.mean(axis=1))
    return mono if rate == sample_rate else _resampling(rate, sample_rate)(mono)


@lru_cache(maxsize=16)
def _resampling(rate: int, sample_rate: int) -> Resample:
    """Make a filter once for all recordings of a rate: that takes as long as filtering 2 s with it."""
    return Resample(rate, sample_rate, dtype=torch.float32)


def _missing_bytes(path: Path) -> int:
    """Count the bytes that a wav file's header promises beyond the file's end.

    libsndfile reads what there is of a wav file that was cut off, and says nothing.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return 0
        while len(chunk := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", chunk)
            if name == b"data":
                return 0 if length >= _UNKNOWN_SIZE else max(0, file.tell() + length - size)
            # Chunks are padded to an even number of bytes.
            file.seek(length + length % 2, 1)
    return 0
