"""How one listener's model differs from the generic one, in numbers and in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from s3prl_metaperser.personalize import Judgement

LEAST_CLIPS = 3
"""A sentence about fewer clips would be about those clips, not about the listener."""
LEAST_CHANGE = 0.02
"""Of a mean probability; a smaller one is not worth a sentence."""


@dataclass(frozen=True)
class Difference:
    """What one listener hears where others hear an emotion.

    Attributes:
        others: the emotion that the generic model finds most probable in the clips it is about.
        you: the emotion whose probability differs.
        generic: its mean probability in these clips by the generic model.
        personal: the same by the listener's.
        clips: how many clips these are.
    """

    others: str
    you: str
    generic: float
    personal: float
    clips: int

    def __str__(self) -> str:
        more = "more" if self.personal > self.generic else "less"
        return (
            f"Where others hear {self.others}, you hear {self.you} {more} often "
            f"({self.generic:.0%} → {self.personal:.0%} on average, {self.clips} clips)."
        )


@dataclass(frozen=True)
class Differences:
    """Mean probabilities, generic and personal, of clips grouped by what others hear in them.

    Attributes:
        emotions: the classes, in order.
        clips: (classes,) int, how many clips have their highest generic probability there.
        generic: (classes, classes) mean probabilities of the clips of a row; NaN in a row without clips.
        personal: the same by the listener's model.
    """

    emotions: tuple[str, ...]
    clips: np.ndarray
    generic: np.ndarray
    personal: np.ndarray

    @property
    def change(self) -> np.ndarray:
        """(classes, classes) personal minus generic; NaN in a row without clips."""
        return self.personal - self.generic

    def largest(self, number: int = 3) -> list[Difference]:
        """Give the largest differences between two emotions, without those of few clips and those hardly there.

        That an emotion is less probable where others hear that very one says little: these clips were chosen for it.

        Args:
            number: at most so many.

        Returns:
            The largest first.
        """
        told = np.abs(np.where((self.clips >= LEAST_CLIPS)[:, None], np.nan_to_num(self.change), 0.0))
        np.fill_diagonal(told, 0.0)
        order = np.argsort(-told, axis=None, kind="stable")[:number]
        return [
            Difference(
                self.emotions[others],
                self.emotions[you],
                float(self.generic[others, you]),
                float(self.personal[others, you]),
                int(self.clips[others]),
            )
            for others, you in zip(*np.unravel_index(order, told.shape), strict=True)
            if told[others, you] >= LEAST_CHANGE
        ]


def differences(generic: np.ndarray, personal: np.ndarray, emotions: Sequence[str]) -> Differences:
    """Group clips by what others hear in them, and compare what the two models say of each group.

    Args:
        generic: (clips, classes) probabilities by the generic model.
        personal: (clips, classes) probabilities by the listener's.
        emotions: the classes, in order.

    Returns:
        The groups' means.
    """
    heard = generic.argmax(axis=1)
    count = np.bincount(heard, minlength=len(emotions))
    belongs = np.eye(len(emotions))[heard]
    with np.errstate(invalid="ignore"):
        means = [belongs.T @ probabilities / count[:, None] for probabilities in (generic, personal)]
    return Differences(tuple(emotions), count, *means)


def judged(judgement: Judgement) -> str:
    """Say in plain words whether the listener's model hears like them better than the generic one does."""
    verdict = {
        "personal": "Yours is the better one for you.",
        "generic": "So far yours is worse than the generic one; label more clips.",
        "open": "That is too close to call; more labels will tell.",
    }[judgement.verdict]
    return (
        f"Tried on your {judgement.clips} labelled clips, each of them left out of adaptation once: your model agrees "
        f"with you to {judgement.personal.miF1:.0f}%, the generic one to {judgement.generic.miF1:.0f}% (miF1). "
        f"{verdict}"
    )
