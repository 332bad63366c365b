"""From waveforms to per-layer statistics through a frozen upstream, exactly as the runner would make its features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from random import getstate as get_python_state
from random import setstate as set_python_state
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.model import pool_frames
from s3prl_metaperser.settings import Pooling, Precision

SAMPLE_RATE = 16000
PADDING_TOLERANCE = 1e-4
"""Largest change of each pooled feature, relative to its size or the frames' deviation, that counts as harmless."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep every global random state as it was: whether features were cached must not change what follows."""
    numpy_state, python_state = np.random.get_state(), get_python_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            set_python_state(python_state)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in ``eval()`` for a while: no dropout, and no layer that LayerDrop leaves out."""
    training = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in training.items():
            child.training = mode


@dataclass(frozen=True)
class PooledClip:
    """One utterance as a frozen upstream gives it.

    Attributes:
        statistics: (S, dim) float32 per-layer statistics, on CPU.
        frame_deviation: root mean square deviation of its frames from their mean: the scale on which differences
            between utterances are judged.
    """

    statistics: Tensor
    frame_deviation: float


class PooledUpstream:
    """A frozen upstream and featurizer as a function from waveforms to per-layer statistics.

    Args:
        upstream: s3prl upstream, unwrapped.
        featurizer: s3prl ``Featurizer``, unwrapped. Its layer selection and normalisation are honoured; its weighted
            sum is left to the model.
        pooling: what to keep of each layer.
        device: where the upstream is.
        precision: of the upstream's forward pass; statistics are float32 in any case.
        name: of the upstream, in errors.
    """

    def __init__(
        self,
        upstream: nn.Module,
        featurizer: Any,
        pooling: Pooling,
        device: torch.device,
        precision: Precision = "float32",
        name: str = "this upstream",
    ) -> None:
        self.upstream = upstream
        self.featurizer = featurizer
        self.pooling = pooling
        self.device = device
        self.precision = precision
        self.name = name

    @property
    def layers(self) -> int:
        """Number of layers that the featurizer sums; 1 where it selects one."""
        weights = getattr(self.featurizer, "weights", None)
        return 1 if weights is None or isinstance(self.featurizer.layer_selection, int) else len(weights)

    @torch.no_grad()
    def __call__(self, wavs: Sequence[Tensor]) -> list[PooledClip]:
        """Run the upstream once on a batch and pool each clip.

        Args:
            wavs: (samples,) each, 16 kHz. Whether clips of different lengths may share a batch is for the caller to
                know (:attr:`padding_is_harmless`).

        Returns:
            One pooled clip a waveform.
        """
        with evaluating(self.upstream), undisturbed():
            return [self._pool(frames) for frames in self.frames([wav.to(self.device) for wav in wavs])]

    def frames(self, wavs: list[Tensor], forward: Callable[[list[Tensor]], Any] | None = None) -> list[Tensor]:
        """Run the upstream as it stands, and give each clip's frames of every layer that the featurizer sums.

        Args:
            wavs: (samples,) each, 16 kHz, on the upstream's device.
            forward: stands in for the upstream's own forward pass.

        Returns:
            (layers, frames, dim) of each clip, float32 (or the upstream's own float64), without those of padding; with
            their graph where there is one.
        """
        rough = self.precision == "bfloat16"
        # s3prl's own autocast is around its step, and would keep casts, also those made without a graph, to its end.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=rough, cache_enabled=False):
            selected = self.featurizer._select_feature((forward or self.upstream)(wavs))
        several = isinstance(selected, (list, tuple))
        # Under autocast some layers come in bfloat16, some in float32; a model in float64 stays what it is.
        given = selected if several else [selected]
        chosen = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in given]
        layers = torch.stack(chosen)
        if several and self.featurizer.normalize:
            layers = F.layer_norm(layers, layers.shape[-1:])
        return [self._own(layers[:, index], wav) for index, wav in enumerate(wavs)]

    def _own(self, frames: Tensor, wav: Tensor) -> Tensor:
        own = frames[:, : round(len(wav) / self.featurizer.downsample_rate)]
        if own.shape[1] == 0:
            raise MetaPerSERError(
                f"a clip of {len(wav)} samples is too short for {self.name}, which needs at least one frame of "
                f"{self.featurizer.downsample_rate} samples"
            )
        return own

    def _pool(self, frames: Tensor) -> PooledClip:
        deviation = (frames - frames.mean(dim=1, keepdim=True)).square().mean().sqrt()
        return PooledClip(pool_frames(frames, self.pooling).cpu(), float(deviation))

    @cached_property
    def padding_is_harmless(self) -> bool:
        """Whether a clip's features stay the same beside a longer one in its batch.

        Compared once: clips of about 1 s, of whole and broken numbers of frames, alone and beside one of 3 s. Upstreams
        with a group-norm front end (wav2vec 2.0, HuBERT and WavLM base) fail, and so does ``fbank``, of which s3prl
        takes padding for frames; there, only clips of equal length share a batch.
        """
        rate = int(self.featurizer.downsample_rate)
        rng = torch.Generator().manual_seed(0)
        long = torch.randn(3 * SAMPLE_RATE, generator=rng) * 0.1
        for samples in (SAMPLE_RATE, *(SAMPLE_RATE + rate * tenth // 10 for tenth in (3, 6, 9))):
            short = torch.randn(samples, generator=rng) * 0.1
            alone, beside = self([short])[0], self([short, long])[0]
            scale = alone.statistics.abs().clamp(min=alone.frame_deviation)
            if bool(((alone.statistics - beside.statistics).abs() > PADDING_TOLERANCE * scale).any()):
                return False
        return True

    def batches(self, lengths: Sequence[int], batch_seconds: float) -> Iterable[list[int]]:
        """Plan which clips share a forward pass.

        Args:
            lengths: samples of each clip.
            batch_seconds: audio (with padding) of one batch at most; a longer clip is alone.

        Returns:
            Lists of indices; every clip is in one.
        """
        budget = batch_seconds * SAMPLE_RATE
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
            # Whether padding is harmless is compared where it matters only: that takes several forward passes.
            fits = (len(batch) + 1) * lengths[index] <= budget
            if batch and not (fits and (lengths[batch[0]] == lengths[index] or self.padding_is_harmless)):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch
