"""Recordings through a frozen upstream: read ahead of it, batch by batch, on as many cores as torch may use.

One forward pass of a few seconds of audio does not fill several cores, and s3prl's upstreams keep their layers' outputs
on themselves, so that threads cannot share one. So on the CPU, long extractions run in processes forked from this one,
each with one thread and a clip of its own. Computed alone and by one thread wherever it is, a clip's features are the
same to the bit, however many processes there are and whatever else is extracted.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from s3prl_metaperser.audio import read_audio
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.upstream.pooling import SAMPLE_RATE, PooledClip, PooledUpstream

PROCESSES = "METAPERSER_EXTRACTION_PROCESSES"
"""Environment variable: how many processes extract, where it is not to be as many as torch has threads."""
READERS = 2
"""Threads that read ahead. soundfile and torch let go of Python's lock; one alone keeps up with a speech model."""
READ_AHEAD_SECONDS = 64.0
"""Audio that is read and not yet extracted, at most: 4 MB."""

Clips = Generator[dict[int, PooledClip], None, None]


def batch_seconds_on(device: torch.device) -> float:
    """Say how much audio goes through an upstream at once, at most; a longer clip is alone.

    On the CPU every clip is: the last bits of its features would depend on those beside it, and so on what a cache
    already holds. One core is as quick with one clip as with several, but for a fifth where all are of one length.
    """
    return 0.0 if device.type == "cpu" else 32.0


def lengths_of(paths: Sequence[Path]) -> list[int]:
    """Read from the files' headers how many samples each has at 16 kHz.

    Raises:
        MetaPerSERError: for a file that is missing, not audio, empty or truncated.
    """
    return [_samples(path) for path in paths]


def _samples(path: Path) -> int:
    try:
        header = soundfile.info(str(path))
    except (soundfile.LibsndfileError, TypeError, ValueError):
        # Also of raw samples, and of names that are not UTF-8. The same file, read in full, says what is wrong with it.
        return len(read_audio(path))
    return -(-header.frames * SAMPLE_RATE // header.samplerate)


def extract(
    pooled: PooledUpstream, paths: Sequence[Path], lengths: Sequence[int], batch_seconds: float | None = None
) -> Clips:
    """Read audio files and pool them, batch by batch, in this process, while the next files are being read.

    Args:
        pooled: the frozen upstream.
        paths: of the files.
        lengths: of the files, as :func:`lengths_of` gives them.
        batch_seconds: audio of one forward pass at most; None: as suits the device.

    Yields:
        For each forward pass, index into ``paths`` → pooled clip.

    Raises:
        MetaPerSERError: for a file that is missing, not audio, empty, truncated or too short.
    """
    return _in_this_process(pooled, paths, lengths, _plan(pooled, lengths, batch_seconds))


def extract_on_all_cores(
    pooled: PooledUpstream, paths: Sequence[Path], lengths: Sequence[int], processes: int | None = None
) -> Clips:
    """Do what :func:`extract` does, on a CPU in several processes; to the same bits, however many.

    While it runs, torch keeps to one thread in each. Outside Linux, where processes cannot be forked, the upstream runs
    in this one with all of torch's threads, on whose number its last bits then depend; on a GPU it runs in this one.

    Args:
        pooled: the frozen upstream.
        paths: of the files.
        lengths: of the files, as :func:`lengths_of` gives them.
        processes: at most; None: as many as ``$METAPERSER_EXTRACTION_PROCESSES`` says, else as torch has threads.

    Yields:
        For each forward pass, index into ``paths`` → pooled clip; in the same order however many processes there are.

    Raises:
        MetaPerSERError: for a file that is missing, not audio, empty, truncated or too short; for an environment
            variable that is no number.
    """
    if pooled.device.type != "cpu" or sys.platform != "linux":
        yield from extract(pooled, paths, lengths)
        return
    if processes is None:
        processes = min(wanted_processes(), len(os.sched_getaffinity(0)))
    plan = _plan(pooled, lengths, None)
    processes = min(processes, len(plan))
    with _one_thread():
        if processes < 2 or multiprocessing.current_process().daemon:
            yield from _in_this_process(pooled, paths, lengths, plan)
        else:
            yield from _in_processes(_Batches(pooled, paths, plan), processes)


def wanted_processes() -> int:
    """Give how many processes extract on a CPU, if there are as many cores.

    Raises:
        MetaPerSERError: where the environment variable is no number.
    """
    given = os.environ.get(PROCESSES)
    if given is None:
        return torch.get_num_threads()
    if not (given.isascii() and given.isdecimal() and int(given) > 0):
        raise MetaPerSERError(f"{PROCESSES} is {given!r}; expected a number of processes from 1 on, or unset it")
    return int(given)


def _plan(pooled: PooledUpstream, lengths: Sequence[int], batch_seconds: float | None) -> list[list[int]]:
    return list(pooled.batches(lengths, batch_seconds_on(pooled.device) if batch_seconds is None else batch_seconds))


def _in_this_process(
    pooled: PooledUpstream, paths: Sequence[Path], lengths: Sequence[int], plan: Sequence[list[int]]
) -> Clips:
    order = [index for batch in plan for index in batch]
    with closing(_read_ahead([paths[index] for index in order], [lengths[index] for index in order])) as wavs:
        for batch in plan:
            clips = _pool(pooled, [paths[index] for index in batch], [next(wavs) for _ in batch])
            yield dict(zip(batch, clips, strict=True))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_ahead(paths: Sequence[Path], lengths: Sequence[int]) -> Generator[Tensor, None, None]:
    """Give the files' waveforms in their order; an error comes when its file's turn does."""
    readers = ThreadPoolExecutor(READERS, "metaperser-reader")
    waiting: deque[tuple[Future[Tensor], int]] = deque()
    ahead = 0
    try:
        for path, length in zip(paths, lengths, strict=True):
            waiting.append((readers.submit(read_audio, path), length))
            ahead += length
            while ahead > READ_AHEAD_SECONDS * SAMPLE_RATE:
                future, own = waiting.popleft()
                ahead -= own
                yield future.result()
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        readers.shutdown(cancel_futures=True)


def _pool(pooled: PooledUpstream, paths: Sequence[Path], wavs: Sequence[Tensor]) -> list[PooledClip]:
    try:
        clips = pooled(wavs)
    except MetaPerSERError as error:
        raise MetaPerSERError(f"audio file {paths[0]}: {error}") from None
    except (RuntimeError, AssertionError, ValueError) as error:
        if "out of memory" in str(error):
            raise
        names = ", ".join(map(str, paths))
        raise MetaPerSERError(f"the upstream failed on {names}: {error}; is the clip too short for it?") from None
    for path, clip in zip(paths, clips, strict=True):
        if not bool(clip.statistics.isfinite().all()):
            raise MetaPerSERError(
                f"audio file {path}: {pooled.name} makes features of it that are not finite; leave the recording out, "
                "or see whether the upstream's checkpoint is whole"
            )
    return clips


@dataclass(frozen=True)
class _Extracted:
    """What a process sends back of a batch: arrays, since tensors would go through shared memory, which may be scarce.

    Attributes:
        statistics: (S, dim) of each clip.
        frame_deviations: of each clip.
        error: what was wrong with it; the arrays are empty then.
    """

    statistics: list[np.ndarray]
    frame_deviations: list[float]
    error: str | None = None


class _Batches(Dataset[_Extracted]):
    """Batches of recordings, extracted in the process that asks for them.

    Args:
        pooled: the frozen upstream.
        paths: of all files.
        plan: indices into them, batch by batch.
    """

    def __init__(self, pooled: PooledUpstream, paths: Sequence[Path], plan: Sequence[list[int]]) -> None:
        self._pooled = pooled
        self._paths = paths
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> _Extracted:
        paths = [self._paths[index] for index in self.plan[number]]
        try:
            clips = _pool(self._pooled, paths, [read_audio(path) for path in paths])
        except MetaPerSERError as error:
            # DataLoader would put a traceback into its message.
            return _Extracted([], [], str(error))
        return _Extracted([clip.statistics.numpy() for clip in clips], [clip.frame_deviation for clip in clips])


def _in_processes(batches: _Batches, processes: int) -> Clips:
    """Let torch's DataLoader spread batches over processes: it keeps their order, and they end when this one does."""
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=processes,
        multiprocessing_context="fork",
        generator=torch.Generator(),  # not the global one, whose state is the run's
    )
    for batch, extracted in zip(batches.plan, loader, strict=True):
        if extracted.error is not None:
            raise MetaPerSERError(extracted.error)
        clips = map(PooledClip, map(torch.from_numpy, extracted.statistics), extracted.frame_deviations)
        yield dict(zip(batch, clips, strict=True))
