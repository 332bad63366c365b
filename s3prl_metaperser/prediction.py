"""What a system says of some episodes' queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s3prl_metaperser.episodes import Episode
from s3prl_metaperser.metrics import FAILED, Scores, score


@dataclass(frozen=True)
class Prediction:
    """Predictions of episodes that share a batch.

    Attributes:
        probabilities: (episodes, Q, classes); not finite where adaptation diverged.
        support_losses: (steps,) of the adaptation, mean over the episodes; empty where nothing adapts.
    """

    probabilities: np.ndarray
    support_losses: np.ndarray

    def scores(self, episodes: Sequence[Episode]) -> list[Scores]:
        """Score each of the episodes against its query's labels; one whose adaptation diverged has failed, with 0.

        Deciding for no emotion, as numbers that are none would, has a UA above that of most systems.
        """
        return [
            score(own, episode.query.targets) if np.isfinite(own).all() else FAILED
            for own, episode in zip(self.probabilities, episodes, strict=True)
        ]


def joined(parts: Sequence[Prediction]) -> Prediction:
    """Make one prediction of several, of consecutive episodes and equally many steps."""
    episodes = [len(part.probabilities) for part in parts]
    return Prediction(
        np.concatenate([part.probabilities for part in parts]),
        np.average([part.support_losses for part in parts], axis=0, weights=episodes),
    )
