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

from s3prl_metaperser.audio import LOUDEST, SHORTEST_SECONDS, fault_of_name, read_audio
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.inference import Inference
from s3prl_metaperser.upstream.extraction import batch_seconds_on
from s3prl_metaperser.upstream.features import Features, FeatureTable
from s3prl_metaperser.upstream.pooling import SAMPLE_RATE, PooledClip, PooledUpstream

Recording: TypeAlias = Path | str | np.ndarray | Tensor
"""A file, or (samples,) at 16 kHz."""


def waveform(recording: Recording, called: str = "a waveform") -> Tensor:
    """Give a recording as (samples,) float32 at 16 kHz, on the CPU.

    Args:
        recording: a file or an array.
        called: what an array is called in errors.

    Raises:
        MetaPerSERError: for a file that is no readable recording, an array of another shape, and what is too short or
            too loud.
    """
    if isinstance(recording, (str, Path)):
        called, wav = str(recording), read_audio(recording)
    else:
        wav = _samples(recording, called)
    if len(wav) < SHORTEST_SECONDS * SAMPLE_RATE:
        raise MetaPerSERError(
            f"{called}: lasts {len(wav) / SAMPLE_RATE:.4f} s at 16 kHz; expected {SHORTEST_SECONDS} s or more"
        )
    return wav


def _samples(given: np.ndarray | Tensor, called: str) -> Tensor:
    try:
        if isinstance(given, np.ndarray) and given.dtype.kind == "f":
            with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused below
                # torch takes no strides below 0 and no other machine's byte order.
                given = np.require(given, np.float32, ["C", "W", "E"])
        wav = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise MetaPerSERError(
            f"{called}: is of type {type(given).__name__}; expected floating-point samples of one channel at 16 kHz, "
            "(samples,), or the path of a file"
        ) from None
    if wav.ndim != 1 or not wav.numel() or not wav.is_floating_point() or not bool(wav.float().isfinite().all()):
        raise MetaPerSERError(
            f"{called}: has shape {tuple(wav.shape)} and type {wav.dtype}; expected finite floating-point samples of "
            "one channel at 16 kHz, (samples,), or the path of a file"
        )
    if (peak := float(wav.abs().max())) > LOUDEST:
        raise MetaPerSERError(f"{called}: holds samples of up to {peak:,.6g}; expected samples from -1 to 1")
    return wav.float()


def listed(recordings: Iterable[Recording]) -> Sequence[Recording]:
    """Refuse what is one recording where several are expected, and files that are not there.

    Raises:
        MetaPerSERError: naming it.
    """
    if isinstance(recordings, (str, bytes, Path, np.ndarray, Tensor)):
        raise MetaPerSERError("one recording is given where a list of them is expected; put it into brackets: [clip]")
    if not isinstance(recordings, Iterable):
        raise MetaPerSERError(f"{recordings!r} as recordings; expected a list of files or waveforms")
    taken = list(recordings)
    for one in taken:
        if not isinstance(one, (str, Path)):
            continue
        if not os.path.isfile(one):
            raise MetaPerSERError(f"{one}: no such recording")
        if (fault := fault_of_name(Path(one))) is not None:
            raise MetaPerSERError(fault)
    return taken


def name_of(recording: Recording, place: int) -> str:
    """Give what the recording at a place of a list is called."""
    return str(recording) if isinstance(recording, (str, Path)) else f"waveform {place}"


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
        The features, and the key of each recording by which they are asked for.
    """
    if not recordings:
        raise MetaPerSERError("no recordings are given; expected at least one")
    keys = tuple(_key_of(one, place) for place, one in enumerate(recordings))
    files = {str(one): Path(one).absolute() for one in recordings if isinstance(one, (str, Path))}
    if files.keys() == set(keys):
        return network.of_upstream.of_recordings(files, common_folder(files.values()), progress), keys
    names = {key: name_of(one, place) for place, (key, one) in enumerate(zip(keys, recordings, strict=True))}
    wavs = {key: waveform(one, names[key]) for key, one in zip(keys, recordings, strict=True)}
    if network.is_entire:
        return network.of_upstream.of_waveforms(wavs), keys
    statistics, deviations = _through_the_upstream(
        network.of_upstream.pooled, list(names.values()), list(wavs.values()), progress
    )
    table = FeatureTable(list(wavs), statistics, deviations, network.of_upstream.pooled.device)
    if network.settings.model.standardize:
        table.transform(network.learner.standardization)
    return table, keys


def _key_of(recording: Recording, place: int) -> str:
    """Tell recordings apart: a file may be called ``waveform 1``, but none can have NUL in its path."""
    return str(recording) if isinstance(recording, (str, Path)) else f"\0{place}"


def common_folder(files: Iterable[Path]) -> Path:
    """Give the folder that all these files lie in or below."""
    return Path(os.path.commonpath([path.parent for path in files]))


def _through_the_upstream(
    pooled: PooledUpstream, names: Sequence[str], wavs: Sequence[Tensor], progress: bool
) -> tuple[Tensor, Tensor]:
    """Pool waveforms: (n, S, dim) statistics and (n,) deviations of frames."""
    clips: dict[int, PooledClip] = {}
    batches = list(pooled.batches([len(wav) for wav in wavs], batch_seconds_on(pooled.device)))
    for batch in tqdm(batches, desc="features", unit="batch", disable=not progress, dynamic_ncols=True):
        try:
            made = pooled([wavs[index] for index in batch])
        except (RuntimeError, AssertionError, ValueError) as error:
            if "out of memory" in str(error):
                raise
            failed = ", ".join(names[index] for index in batch)
            raise MetaPerSERError(f"the upstream failed on {failed}: {error}; is the clip too short for it?") from None
        clips |= dict(zip(batch, made, strict=True))
    for index, name in enumerate(names):
        if not bool(clips[index].statistics.isfinite().all()):
            raise MetaPerSERError(
                f"{name}: {pooled.name} makes features of it that are not finite; expected samples from -1 to 1"
            )
    ordered = [clips[index] for index in range(len(wavs))]
    return torch.stack([clip.statistics for clip in ordered]), torch.tensor([clip.frame_deviation for clip in ordered])
