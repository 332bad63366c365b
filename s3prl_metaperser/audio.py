"""Reading recordings as the upstreams want them: mono, one sample rate, whole."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.transforms import Resample

from s3prl_metaperser.errors import MetaPerSERError

SHORTEST_SECONDS = 0.04
"""What the convolutional front end of wav2vec 2.0 and its kin must hear to give a frame."""
LOWEST_RATE, HIGHEST_RATE = 4_000, 192_000
"""Samples per second that speech is recorded with; a header that says another number is wrong."""
MOST_HOURS = 24
"""A header that promises more is wrong; of what was written through a pipe, libsndfile says 2^63 samples."""
LOUDEST = 100.0
"""Of a sample's size: recordings in floating point may exceed 1 somewhat, numbers of 16 bits do so by far."""
MOST_PHASES = 1_000
"""What torchaudio's filter, a table of new by old rate without their common divisor, may have of either: 640 by 441 at
11,025 Hz are quick to make, 16,000 by 44,101 take gigabytes."""
_UNKNOWN_SIZE = 0x7FFFF000
"""Programs that write to a pipe can't know the size beforehand, and put a number of at least this many bytes."""


def fault_of(path: Path) -> str | None:
    """Say what is wrong with a recording as far as its header tells; None where nothing is.

    It is a fraction of the work of reading it. Samples that are not finite, or too large, are found by reading alone.

    Args:
        path: of the file.

    Returns:
        What :func:`read_audio` or :func:`fault_of_name` would say, or that it is too short for any frame.
    """
    if (fault := fault_of_name(path)) is not None:
        return fault
    try:
        with _opened(path) as file:
            seconds, missing = file.frames / file.samplerate, _missing_bytes(path)
        if missing or not seconds:
            read_audio(path)
    except MetaPerSERError as error:
        return str(error)
    if seconds < SHORTEST_SECONDS:
        return f"{path}: lasts {seconds:.3f} s; expected {SHORTEST_SECONDS} s or more"
    return None


def fault_of_name(path: Path) -> str | None:
    """Say why a recording of this name cannot be taken, whatever is in it; None where nothing is wrong.

    Labels and results are written in UTF-8, which cannot hold every name that a file system does.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        return f"{path}: its name, or a folder's above it, is not UTF-8; rename it"
    if path.suffix.lower() == ".raw":
        return f"{path}: is not a readable recording (raw samples, of no known rate); expected wav, flac, ogg or mp3"
    return None


def read_audio(path: Path | str, sample_rate: int = 16_000) -> torch.Tensor:
    """Read a recording.

    Args:
        path: a file that libsndfile reads (wav, flac, ogg, mp3, …), of 4 to 192 kHz, mono or not.
        sample_rate: samples per second of the result.

    Returns:
        ``(samples,)`` float32; several channels are averaged.

    Raises:
        MetaPerSERError: the file is missing, not audio, empty, cut off, of another rate, or holds values that aren't
            finite or far from -1 to 1.
    """
    path = Path(path)
    with _opened(path) as file:
        promised, rate = file.frames, file.samplerate
        samples = file.read(dtype="float32", always_2d=True)
        missing = _missing_bytes(path)
    if missing or len(samples) < promised:
        lack = f"{missing:,} bytes" if missing else f"{promised - len(samples):,} of {promised:,} samples"
        raise MetaPerSERError(f"{path}: is cut off: {lack} that its header promises are missing; copy the file again")
    if not len(samples):
        raise MetaPerSERError(f"{path}: holds no samples; expected a recording")
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        mono = samples.mean(axis=1)
    peak = max(mono.max(), -mono.min())
    if not np.isfinite(peak):
        raise MetaPerSERError(f"{path}: holds samples that are not finite (NaN or infinite); export the file again")
    if peak > LOUDEST:
        raise MetaPerSERError(f"{path}: holds samples of up to {peak:,.6g}; expected samples from -1 to 1")
    wav = torch.from_numpy(mono)
    return wav if rate == sample_rate else _resampled(wav, rate, sample_rate)


@contextmanager
def _opened(path: Path) -> Iterator[soundfile.SoundFile]:
    """Open a recording whose header can be right.

    Raises:
        MetaPerSERError: when it is none, also while it is being read.
    """
    try:
        if not path.is_file():
            fault = "is a folder" if path.is_dir() else "no such file"
            raise MetaPerSERError(f"{path}: {fault}; expected a recording")
        # libsndfile does not say why a file cannot be opened.
        with path.open("rb") as raw:
            if not raw.read(1):
                raise MetaPerSERError(f"{path}: is empty (0 bytes); expected a recording")
        # soundfile cannot encode every name that Python reads from a folder.
        with soundfile.SoundFile(str(path) if os.name == "nt" else os.fsencode(path)) as file:
            if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
                raise MetaPerSERError(
                    f"{path}: has {file.samplerate:,} samples a second; expected {LOWEST_RATE:,} to {HIGHEST_RATE:,}"
                )
            if file.frames > MOST_HOURS * 3600 * file.samplerate:
                raise MetaPerSERError(f"{path}: its header does not say how long it is; export the file again")
            yield file
    except soundfile.LibsndfileError as error:
        raise _unreadable(path, str(error.error_string).rstrip(".")) from None
    except (TypeError, ValueError) as error:
        raise _unreadable(path, str(error)) from None
    except OSError as error:
        raise MetaPerSERError(f"{path}: cannot be read ({error.strerror})") from None


def _unreadable(path: Path, reason: str) -> MetaPerSERError:
    return MetaPerSERError(f"{path}: is not a readable recording ({reason}); expected wav, flac, ogg or mp3")


def _resampled(mono: torch.Tensor, rate: int, sample_rate: int) -> torch.Tensor:
    """Bring (samples,) to another rate, ``ceil(samples * sample_rate / rate)`` of them."""
    common = math.gcd(rate, sample_rate)
    if max(rate, sample_rate) // common <= MOST_PHASES:
        resampled: torch.Tensor = _resampling(rate, sample_rate)(mono)
        return resampled
    import scipy.signal  # takes as long to import as all the rest here, and is hardly ever needed

    return torch.from_numpy(scipy.signal.resample_poly(mono.numpy(), sample_rate // common, rate // common))


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
