"""A checkpoint that only listens: what it hears in recordings. It needs no corpus, only what is in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s3prl_metaperser.checkpoints import CONTRACT, DOWNSTREAM, extra_state, read_checkpoint, weights_fit
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.network import Network
from s3prl_metaperser.settings import read_settings

LEARNER_PREFIX = "learner."


class Inference(Network):
    """The network of s3prl's ``-m inference``, from the config and the checkpoint that ``-e`` names.

    Args:
        section: the ``downstream_expert`` section.
        upstream_dim: feature dimension of the upstream.
        arguments: s3prl's command line and the other sections of the config.

    Raises:
        MetaPerSERError: when the config cannot be used, or there is no checkpoint that fits.
    """

    def __init__(self, section: Mapping[str, Any] | None, upstream_dim: int, arguments: Mapping[str, Any]) -> None:
        settings = read_settings(section, arguments.get("downstream_variant"))
        if not arguments.get("init_ckpt"):
            raise MetaPerSERError("-m inference needs a trained checkpoint; give -e CHECKPOINT")
        path = Path(arguments["init_ckpt"])
        self._extra = extra_state(read_checkpoint(path)[DOWNSTREAM], f"checkpoint {path}")
        self.emotions: tuple[str, ...] = tuple(self._extra[CONTRACT]["emotions"])
        super().__init__(settings, arguments, upstream_dim, self.emotions, torch.ones(len(self.emotions)))

    def saved_state(self) -> dict[str, Any]:
        """Give what the checkpoint says of itself."""
        return dict(self._extra)

    def _check_provenance(self, found: Mapping[str, Any], source: str) -> None:
        """Accept any: nobody is judged."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the weights of a whole checkpoint's downstream state, as s3prl does through the expert.

        Raises:
            MetaPerSERError: when they are of another upstream or model than the config's.
        """
        own = {name: tensor for name, tensor in self.fitting(state).items() if name.startswith(LEARNER_PREFIX)}
        weights = {name.removeprefix(LEARNER_PREFIX): tensor for name, tensor in own.items()}
        with weights_fit(f"checkpoint {self.arguments['init_ckpt']}: its {DOWNSTREAM}"):
            self.learner.load_state_dict(weights)

    def hear(self, wavs: Sequence[Tensor]) -> np.ndarray:
        """Give the shared model's probabilities.

        Args:
            wavs: (samples,) each, at 16 kHz, which may share a forward pass.

        Returns:
            (wavs, classes).
        """
        pooled = self.of_upstream.pooled
        statistics = torch.stack([clip.statistics for clip in pooled(wavs)]).to(pooled.device)
        standardised = self.learner.standardization(statistics).unsqueeze(0)
        probabilities: np.ndarray = self.learner.probabilities(standardised)[0].cpu().numpy()
        return probabilities
