"""Utterances' statistics for the learner: read once from the cache, or made anew at every batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.model import Moments
from s3prl_metaperser.upstream.cache import DamagedShardError, FeatureCache, FileHashes, StoredRows
from s3prl_metaperser.upstream.extraction import extract, extract_on_all_cores, lengths_of
from s3prl_metaperser.upstream.pooling import SAMPLE_RATE, PooledClip, PooledUpstream
from s3prl_metaperser.upstream.trainable import Chunk, TrainableUpstream
from s3prl_metaperser.upstream.waveforms import Waveforms

SHARD_CLIPS = 256
"""Clips a shard: what a killed extraction loses at most."""
MOST_BYTES = 2 * 10**9
"""Of a corpus's statistics that are kept in memory: 50,000 utterances of a base model's 13 layers of 768; with pooling
``mean_std``, which has 104 rows an utterance, 6,000."""
ROWS_AT_ONCE = 1024
"""Rows of a table that are read and transformed together: what that takes in memory does not grow with the table."""
SMALLEST_SPREAD = 5e-2
"""Pooled means of which nine in ten dimensions spread over utterances by less than this share of the frames' deviation
carry nothing but clips' edges: ``mel`` and ``linear`` leave up to 0.04, what has not been normalised 0.2 and more."""
MOST_DIMENSIONS = 0.9
SMALLEST_DEVIATION_SPREAD = 3e-2
"""The same for deviations; an upstream that brings each clip to deviation 1 leaves some, by the clip's length."""

SHORTEST_SAMPLES = 640
"""A little more than what the convolutional front end of wav2vec 2.0 and its kin must see to give a frame."""

T = TypeVar("T")
Transform = Callable[[Tensor], Tensor]
"""(utterances, S, dim) → the same shape."""


class Features(ABC):
    """Gives utterances' statistics as (n, S, dim) tensors on the learner's device."""

    @abstractmethod
    def raw(self, utterances: Sequence[str]) -> tuple[Iterator[Tensor], Tensor]:
        """Give statistics as the upstream made them, before a transform.

        Returns:
            Each of the S rows of all utterances' statistics, (n, dim), when it is asked for; and (n,) deviations of
            frames.
        """

    @abstractmethod
    def gather(self, utterances: Sequence[str]) -> Tensor:
        """Give transformed statistics, in the order asked for; an utterance may be asked for more than once."""

    @abstractmethod
    def transform(self, transform: Transform) -> None:
        """Set, once, what is done to every utterance's statistics before they are given."""


class Rows(Protocol):
    """A tensor that may be read row by row: a tensor itself, or one that lies on disk."""

    @property
    def shape(self) -> torch.Size:
        """(rows, ...)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        ...

    def __getitem__(self, rows: Tensor | tuple[Tensor, int]) -> Tensor:
        """Give a copy of the rows with these (n,) indices, or of one part of each, on the CPU."""
        ...


class FeatureTable(Features):
    """A corpus's utterances, each read and transformed when it is first asked for, and then kept.

    So a run holds what it uses, and no step reads or transforms anew what an earlier one has. Where a corpus is too
    large to be kept, every batch is read and transformed anew, to the same bits.

    Args:
        utterances: ids.
        statistics: (utterances, S, dim).
        deviations: (utterances,) of frames.
        device: where the learner is.
        keeps: whether utterances are kept once they were asked for.
    """

    def __init__(
        self,
        utterances: Sequence[str],
        statistics: Rows,
        deviations: Rows,
        device: torch.device,
        keeps: bool = True,
    ) -> None:
        self._row_of = {utterance: row for row, utterance in enumerate(utterances)}
        self._statistics = statistics
        self._deviations = deviations
        self._device = device
        self._transform: Transform = torch.nn.Identity()
        self._is_kept = np.zeros(len(utterances), dtype=bool)
        # Untouched rows take no memory on the CPU: the kernel gives a page when it is written to.
        self._kept = torch.empty(statistics.shape, dtype=statistics.dtype, device=device) if keeps else None

    def _rows(self, utterances: Sequence[str]) -> Tensor:
        return torch.tensor([self._row_of[utterance] for utterance in utterances])

    def raw(self, utterances: Sequence[str]) -> tuple[Iterator[Tensor], Tensor]:
        """See :class:`Features`."""
        asked = self._rows(utterances)
        rows = (self._statistics[asked, row].to(self._device) for row in range(self._statistics.shape[1]))
        return rows, self._deviations[asked].to(self._device)

    def gather(self, utterances: Sequence[str]) -> Tensor:
        """See :class:`Features`."""
        rows = self._rows(utterances)
        if self._kept is None:
            return self._transform(self._statistics[rows].to(self._device))
        if not self._is_kept[rows.numpy()].all():
            self._keep(rows.numpy(), self._kept)
        return _layered(self._kept, rows.to(self._device))

    @torch.no_grad()
    def _keep(self, rows: np.ndarray, kept: Tensor) -> None:
        missing = np.unique(rows[~self._is_kept[rows]])
        for some in torch.from_numpy(missing).split(ROWS_AT_ONCE):
            kept[some.to(self._device)] = self._transform(self._statistics[some].to(self._device))
        self._is_kept[missing] = True

    def transform(self, transform: Transform) -> None:
        """See :class:`Features`."""
        self._transform = transform
        self._is_kept[:] = False


def _layered(table: Tensor, rows: Tensor) -> Tensor:
    """Take (n, S, dim) rows of a table into memory layer by layer, which is how a weighted sum goes through them."""
    places = torch.arange(table.shape[1], device=rows.device).unsqueeze(-1) + rows * table.shape[1]
    taken = table.flatten(0, 1).index_select(0, places.flatten())
    return taken.view(table.shape[1], len(rows), table.shape[2]).transpose(0, 1)


class LiveFeatures(Features):
    """Statistics made by the upstream at every batch; nothing is kept.

    Args:
        pooled: the frozen upstream.
        audio: utterance → file.
        device: where the learner is.
        batch_seconds: audio of one forward pass at most; None: as suits the device.
    """

    def __init__(
        self,
        pooled: PooledUpstream,
        audio: Mapping[str, Path],
        device: torch.device,
        batch_seconds: float | None = None,
    ) -> None:
        self._pooled = pooled
        self._audio = audio
        self._device = device
        self._batch_seconds = batch_seconds
        self._transform: Transform = torch.nn.Identity()

    def raw(self, utterances: Sequence[str]) -> tuple[Iterator[Tensor], Tensor]:
        """See :class:`Features`."""
        statistics, deviations = self._made(utterances)
        return iter(statistics.unbind(1)), deviations

    def _made(self, utterances: Sequence[str]) -> tuple[Tensor, Tensor]:
        unique = sorted(set(utterances))
        clips: dict[str, PooledClip] = {}
        paths = [self._audio[utterance] for utterance in unique]
        for batch in extract(self._pooled, paths, lengths_of(paths), self._batch_seconds):
            clips |= {unique[index]: clip for index, clip in batch.items()}
        statistics = torch.stack([clips[utterance].statistics for utterance in utterances])
        deviations = torch.tensor([clips[utterance].frame_deviation for utterance in utterances])
        return statistics.to(self._device), deviations.to(self._device)

    def gather(self, utterances: Sequence[str]) -> Tensor:
        """See :class:`Features`."""
        return self._transform(self._made(utterances)[0])

    def transform(self, transform: Transform) -> None:
        """See :class:`Features`."""
        self._transform = transform


class TrainableFeatures(LiveFeatures):
    """Statistics made by an upstream that is being trained or adapted; nothing of them is kept.

    Where gradients are enabled, what :meth:`gather` gives has its graph back to the upstream's parameters.

    Args:
        upstream: the runner's.
        audio: utterance → file.
        device: where the learner is.
        wavs: utterance → (samples,) waveform at 16 kHz, of those that are no files.
    """

    def __init__(
        self,
        upstream: TrainableUpstream,
        audio: Mapping[str, Path],
        device: torch.device,
        wavs: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(upstream.pooled, audio, device, upstream.chunk_seconds)
        self.upstream = upstream
        self._waveforms = Waveforms(audio if wavs is None else wavs)

    def gather(self, utterances: Sequence[str], dropout_seed: int | None = None) -> Tensor:
        """See :class:`Features`.

        Args:
            utterances: ids.
            dropout_seed: of the upstream's dropout while SSL-E is trained; None: no dropout.
        """
        if not torch.is_grad_enabled():
            return super().gather(utterances)
        return self._transform(self.upstream.gathered(self._read(utterances), dropout_seed))

    def chunks(self, utterances: Sequence[str]) -> list[Chunk]:
        """Plan which of some utterances go through the upstream together, and read them."""
        return self.upstream.chunks(self._read(utterances))

    def standardised(self, statistics: Tensor) -> Tensor:
        """Do to (clips, S, dim) statistics what is done to those that :meth:`gather` gives."""
        return self._transform(statistics)

    def _read(self, utterances: Sequence[str]) -> list[Tensor]:
        wavs = self._waveforms.of(utterances)
        for utterance, wav in zip(utterances, wavs, strict=True):
            if len(wav) < SHORTEST_SAMPLES:
                source = self._audio.get(utterance, utterance)
                raise MetaPerSERError(
                    f"audio file {source}: {len(wav)} samples at 16 kHz are too short for a speech model; expected at "
                    f"least {SHORTEST_SAMPLES}"
                )
        return wavs


def cached_features(
    cache: FeatureCache,
    hashes: FileHashes,
    pooled: PooledUpstream,
    audio: Mapping[str, Path],
    device: torch.device,
    most_bytes: int = MOST_BYTES,
    progress: bool = True,
) -> FeatureTable:
    """Load utterances' statistics, extracting first what no run has extracted yet.

    Args:
        cache: of the upstream's identity.
        hashes: of the corpus's audio.
        pooled: the frozen upstream.
        audio: utterance → file, for all utterances of the corpus: how those that are new are batched then does not
            depend on which fold or scenario came first.
        device: where the learner is.
        most_bytes: of the corpus's statistics, above which they are not kept in memory.
        progress: whether to show how far extraction is.

    Returns:
        The table of all utterances.
    """
    utterances = sorted(audio)
    contents = hashes.of([audio[utterance] for utterance in utterances])

    def fill() -> None:
        cache.refresh()
        missing = {
            content: audio[utterance]
            for utterance, content in zip(utterances, contents, strict=True)
            if content not in cache
        }
        if missing:
            _fill(cache, pooled, missing, progress)

    def mend(shard: Path) -> None:
        with cache.extracting():
            cache.drop(shard)
            fill()

    cache.refresh()
    for shard in sorted(cache.damaged):
        mend(shard)
    if any(content not in cache for content in contents):
        with cache.extracting():
            fill()
    statistics = MendedRows(lambda: cache.stored(contents)[0], mend)
    deviations = MendedRows(lambda: cache.stored(contents)[1], mend)
    return FeatureTable(utterances, statistics, deviations, device, keeps=statistics.nbytes <= most_bytes)


class MendedRows:
    """Rows that lie on disk, of which those that are damaged there are made again when they are asked for.

    A clip's features are the same to the bit then: the clips of a shard go through the upstream in the same batches.

    Args:
        stored: finds the rows on disk.
        mend: makes again what a damaged shard held.
    """

    def __init__(self, stored: Callable[[], StoredRows], mend: Callable[[Path], None]) -> None:
        self._stored = stored
        self._mend = mend
        self._mended: set[Path] = set()
        self._rows = self._mending(stored)

    @property
    def shape(self) -> torch.Size:
        """(rows, ...)."""
        return self._rows.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self._rows.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self._rows.nbytes

    def __getitem__(self, asked: Tensor | tuple[Tensor, int]) -> Tensor:
        """See :class:`Rows`."""
        return self._mending(lambda: self._rows[asked])

    def _mending(self, read: Callable[[], T]) -> T:
        """Read, and mend what is damaged.

        Raises:
            DamagedShardError: when a shard is damaged again, which was mended before.
        """
        while True:
            try:
                return read()
            except DamagedShardError as error:
                if error.shard in self._mended:
                    raise
                self._mended.add(error.shard)
                self._mend(error.shard)
                self._rows = self._mending(self._stored)


def _fill(cache: FeatureCache, pooled: PooledUpstream, missing: dict[str, Path], progress: bool) -> None:
    contents, paths = list(missing), list(missing.values())
    lengths = lengths_of(paths)
    shard: dict[str, PooledClip] = {}
    shown = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}, {rate_fmt}]"
    total = sum(lengths) / SAMPLE_RATE
    with (
        closing(extract_on_all_cores(pooled, paths, lengths)) as batches,
        tqdm(total=total, desc="features", unit="s", bar_format=shown, dynamic_ncols=True, disable=not progress) as bar,
    ):
        for batch in batches:
            shard |= {contents[index]: clip for index, clip in batch.items()}
            bar.update(sum(lengths[index] for index in batch) / SAMPLE_RATE)
            if len(shard) >= SHARD_CLIPS:
                cache.add(shard)
                shard = {}
    if shard:
        cache.add(shard)


def check_features_vary(moments: Moments, frame_deviations: Tensor, pooled: PooledUpstream) -> None:
    """Stop a run whose pooled features are the same for every utterance.

    s3prl's ``fbank``, ``mfcc``, ``mel``, ``spectrogram`` and ``linear`` normalise each utterance to mean 0 and
    deviation 1, so that nothing is left after pooling and every system scores like chance.

    Args:
        moments: of the utterances' statistics; with roots for pooling ``mean_std``.
        frame_deviations: (utterances,) typical deviation of frames within an utterance.
        pooled: names the upstream's layers and pooling.

    Raises:
        MetaPerSERError: when neither means nor deviations vary between utterances.
    """
    if len(frame_deviations) < 2:
        return
    layers = pooled.layers
    scale = frame_deviations.mean()
    # Not the largest: a bin that is silent throughout, divided by its own rounding, spreads widely.
    spread = moments.deviation[:layers].flatten().quantile(MOST_DIMENSIONS)
    varies = bool(spread > SMALLEST_SPREAD * scale)
    of_deviations = None
    if moments.root_deviation is not None:
        diagonal = [layers + row * layers - row * (row - 1) // 2 for row in range(layers)]
        of_deviations = moments.root_deviation[diagonal]
    elif pooled.pooling == "mean_std_per_layer":
        of_deviations = moments.deviation[layers:]
    if of_deviations is not None:
        varies |= bool(of_deviations.max() > SMALLEST_DEVIATION_SPREAD * scale)
    if not varies:
        raise MetaPerSERError(
            f"pooled features do not vary between utterances (spread {float(spread):.1e} at a frame deviation of "
            f"{float(scale):.1e}): {pooled.name} normalises each utterance, so pooling leaves nothing to learn from; "
            "use an upstream without per-utterance normalisation, such as -u fbank_no_cmvn"
        )
