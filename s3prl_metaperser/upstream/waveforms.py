"""Waveforms for an upstream that runs at every step: read and resampled once, as far as they fit into memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from s3prl_metaperser.audio import read_audio

MOST_BYTES = 2**30
"""4.6 hours of speech."""


class Waveforms:
    """Utterances' waveforms; those used last stay in memory.

    Args:
        audio: utterance → file, or its (samples,) waveform at 16 kHz.
        most_bytes: memory that they may take.
    """

    def __init__(self, audio: Mapping[str, Path] | Mapping[str, Tensor], most_bytes: int = MOST_BYTES) -> None:
        self._audio = audio
        self._most_bytes = most_bytes
        self._bytes = 0
        self._recent: OrderedDict[str, Tensor] = OrderedDict()

    def of(self, utterances: Sequence[str]) -> list[Tensor]:
        """Give (samples,) waveforms at 16 kHz, on CPU.

        Raises:
            MetaPerSERError: for a file that is missing, not audio, empty or truncated.
        """
        return [self._one(utterance) for utterance in utterances]

    def _one(self, utterance: str) -> Tensor:
        wav = self._recent.pop(utterance, None)
        if wav is None:
            recording = self._audio[utterance]
            wav = recording if isinstance(recording, Tensor) else read_audio(recording)
            self._bytes += wav.nbytes
        self._recent[utterance] = wav
        while self._bytes > self._most_bytes and len(self._recent) > 1:
            self._bytes -= self._recent.popitem(last=False)[1].nbytes
        return wav
