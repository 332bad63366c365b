"""An inner loop that leaves the finite numbers: at which step it did, on whose labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s3prl_metaperser.episodes import Episode


@dataclass(frozen=True)
class Divergence:
    """Where adaptation to one episode's support stopped giving finite numbers.

    Attributes:
        episode: whose support it was.
        step: the inner step, from 0, before which the support loss was finite for the last time; as many as there are
            steps where only what came after the last is not finite.
        steps: how many inner steps were to be taken.
    """

    episode: Episode
    step: int
    steps: int

    def __str__(self) -> str:
        where = f"at inner step {self.step} of {self.steps}" if self.step < self.steps else f"after {self.steps} steps"
        return f"adaptation to {self.episode.annotator}, episode {self.episode.index}, diverged {where}"


def find_divergence(episode: Episode, losses: np.ndarray, is_finite_after: bool) -> Divergence | None:
    """Look for the step at which one episode's adaptation left the finite numbers.

    Args:
        episode: that was adapted to, alone.
        losses: (steps,) support loss before each step.
        is_finite_after: whether what the adapted model gives is finite.

    Returns:
        Where it diverged; None where it did not.

    >>> from s3prl_metaperser.episodes import Examples
    >>> nothing = Examples((), np.empty((0, 9)))
    >>> str(find_divergence(Episode("E1", 3, nothing, nothing), np.array([2.2, np.inf, np.nan]), False))
    'adaptation to E1, episode 3, diverged at inner step 1 of 3'
    """
    finite = np.isfinite(losses)
    if finite.all() and is_finite_after:
        return None
    return Divergence(episode, int(np.argmin(finite)) if not finite.all() else len(losses), len(losses))
