"""Recordings as a user gives them, files or waveforms, as features that the network adapts to and predicts from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from s3prl_metaperser.audio import read_audio
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.inference import Inference
from s3prl_metaperser.upstream.extraction import batch_seconds_on
from s3prl_metaperser.upstream.features import Features, FeatureTable
from s3prl_metaperser.upstream.pooling import PooledClip

Recording: TypeAlias = Path | str | np.ndarray | Tensor
"""A file, or (samples,) at 16 kHz."""


def waveform(recording: Recording) -> Tensor:
    """Give a recording as (samples,) float32 at 16 kHz, on the CPU.

    Raises:
        MetaPerSERError: for a file that is no readable recording, or an array of another shape.
    """
    if isinstance(recording, (str, Path)):
        return read_audio(recording)
    wav = torch.as_tensor(recording).detach().cpu()
    if wav.ndim != 1 or not wav.numel() or not wav.is_floating_point() or not bool(wav.isfinite().all()):
        raise MetaPerSERError(
            f"a waveform of shape {tuple(wav.shape)} and type {wav.dtype}; expected finite floating-point samples of "
            "one channel at 16 kHz, (samples,), or the path of a file"
        )
    return wav.float()


def listed(recordings: Sequence[Recording]) -> Sequence[Recording]:
    """Refuse what is one recording where several are expected, and files that are not there.

    Raises:
        MetaPerSERError: naming it.
    """
    if isinstance(recordings, (str, Path, np.ndarray, Tensor)):
        raise MetaPerSERError("one recording is given where a list of them is expected; put it into brackets: [clip]")
    for one in recordings:
        if isinstance(one, (str, Path)) and not Path(one).is_file():
            raise MetaPerSERError(f"{one}: no such recording")
    return recordings


def _names(recordings: Sequence[Recording]) -> tuple[str, ...]:
    return tuple(
        str(one) if isinstance(one, (str, Path)) else f"waveform {place}" for place, one in enumerate(recordings)
    )


def clip_features(
    network: Inference, recordings: Sequence[Recording], progress: bool = False
) -> tuple[Features, tuple[str, ...]]:
    """Give the features that the network adapts on.

    Files go through a frozen upstream once, ever (the feature cache); waveforms every time.

    Args:
        network: with its upstream bound.
        recordings: files or waveforms.
        progress: whether to show how far the upstream is.

    Returns:
        The features, and the name of each recording by which they are asked for.
    """
    if not recordings:
        raise MetaPerSERError("no recordings are given; expected at least one")
    names = _names(recordings)
    files = {str(one): Path(one).absolute() for one in recordings if isinstance(one, (str, Path))}
    if len(files) == len(set(names)):
        return network.of_upstream.of_recordings(files, common_folder(files.values()), progress), names
    wavs = {name: waveform(one) for name, one in zip(names, recordings, strict=True)}
    if network.is_entire:
        return network.of_upstream.of_waveforms(wavs), names
    statistics, deviations = _through_the_upstream(network, list(wavs.values()), progress)
    table = FeatureTable(list(wavs), statistics, deviations, network.of_upstream.pooled.device)
    if network.settings.model.standardize:
        table.transform(network.learner.standardization)
    return table, names


def common_folder(files: Iterable[Path]) -> Path:
    """Give the folder that all these files lie in or below."""
    return Path(os.path.commonpath([path.parent for path in files]))


def _through_the_upstream(network: Inference, wavs: Sequence[Tensor], progress: bool) -> tuple[Tensor, Tensor]:
    """Pool waveforms: (n, S, dim) statistics and (n,) deviations of frames."""
    pooled = network.of_upstream.pooled
    clips: dict[int, PooledClip] = {}
    batches = list(pooled.batches([len(wav) for wav in wavs], batch_seconds_on(pooled.device)))
    for batch in tqdm(batches, desc="features", unit="batch", disable=not progress, dynamic_ncols=True):
        clips |= dict(zip(batch, pooled([wavs[index] for index in batch]), strict=True))
    ordered = [clips[index] for index in range(len(wavs))]
    return torch.stack([clip.statistics for clip in ordered]), torch.tensor([clip.frame_deviation for clip in ordered])
