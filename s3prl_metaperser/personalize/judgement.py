"""Has personalising helped? Scores on labelled clips that the model was not adapted to, beside the generic model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from s3prl_metaperser.episodes import generator
from s3prl_metaperser.metrics import METRICS, Scores, decide, score

MOST_LEFT_OUT_ONE_BY_ONE = 64
"""Up to this many clips each is left out once; above it, and where an upstream adapts, they are dealt into groups."""
GROUPS = 10
GROUPS_OF_AN_UPSTREAM = 5
RESAMPLES = 2000
Verdict = Literal["personal", "generic", "open"]
FEWEST_TO_JUDGE = 4
"""Labelled clips; scores on fewer would say nothing."""
SMALLEST_PROBABILITY = 1e-9


@dataclass(frozen=True)
class Judgement:
    """Personal against generic model, on clips that were left out of adaptation.

    Attributes:
        clips: how many; each was left out once.
        folds: into how many groups they were dealt; as many as clips: each on its own.
        personal: scores of the model adapted to the other groups.
        generic: scores of the model as it was.
        personal_log_loss: mean over clips of −log of the probability given to the ticked emotions, in nats.
        generic_log_loss: the same of the generic model.
        low: the lower end of the 95% interval of personal minus generic miF1, in points; clips are drawn with
            replacement.
        high: the upper end.
    """

    clips: int
    folds: int
    personal: Scores
    generic: Scores
    personal_log_loss: float
    generic_log_loss: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Which model is the listener's better one, as far as the interval tells."""
        return "personal" if self.low > 0 else "generic" if self.high < 0 else "open"

    def lines(self) -> list[str]:
        """Say it in words, a line each."""
        how = "each left out once" if self.folds == self.clips else f"left out in {self.folds} groups"
        gain = self.personal.miF1 - self.generic.miF1
        verdict = {
            "personal": "personalising helped",
            "generic": "personalising made it worse: label more clips, or use the generic model",
            "open": "no clear difference yet: label more clips to know",
        }[self.verdict]
        scores = "; ".join(
            f"{name} {getattr(self.generic, name):.1f} → {getattr(self.personal, name):.1f}" for name in METRICS
        )
        return [
            f"on your {self.clips} clips, {how}, generic → personal: {scores}; "
            f"log loss {self.generic_log_loss:.2f} → {self.personal_log_loss:.2f}",
            f"miF1 {gain:+.1f} points (95% interval {self.low:+.1f} to {self.high:+.1f}): {verdict}",
        ]


def deal(clips: int, folds: int | None, adapts_upstream: bool, seed: int = 0) -> list[np.ndarray]:
    """Deal labelled clips into groups, each of which is left out once.

    Args:
        clips: how many there are, at least two.
        folds: number of groups, at most one a clip; None: one a clip up to 64 clips, else 10, and 5 where the upstream
            adapts too.
        adapts_upstream: whether it does.
        seed: of the deal.

    Returns:
        Indices of each group's clips; sizes differ by one at most.
    """
    if folds is None:
        folds = GROUPS_OF_AN_UPSTREAM if adapts_upstream else clips if clips <= MOST_LEFT_OUT_ONE_BY_ONE else GROUPS
    order = generator(seed, "left out", clips).permutation(clips)
    return [np.sort(group) for group in np.array_split(order, min(folds, clips))]


def compare(personal: np.ndarray, generic: np.ndarray, targets: np.ndarray, folds: int) -> Judgement:
    """Compare two models' probabilities on left-out clips.

    Args:
        personal: (clips, classes), each row of a model that was not adapted to it.
        generic: (clips, classes) of the model as it was.
        targets: (clips, classes) label distributions.
        folds: number of groups.
    """
    drawn = np.random.default_rng(0).integers(len(targets), size=(RESAMPLES, len(targets)))
    difference = _pooled_f1(personal, targets, drawn) - _pooled_f1(generic, targets, drawn)
    low, high = np.percentile(difference, [2.5, 97.5])
    return Judgement(
        clips=len(targets),
        folds=folds,
        personal=score(personal, targets),
        generic=score(generic, targets),
        personal_log_loss=_log_loss(personal, targets),
        generic_log_loss=_log_loss(generic, targets),
        low=float(low),
        high=float(high),
    )


def _log_loss(probabilities: np.ndarray, targets: np.ndarray) -> float:
    return float(-(targets * np.log(probabilities.clip(min=SMALLEST_PROBABILITY))).sum(axis=1).mean())


def _pooled_f1(probabilities: np.ndarray, targets: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Give miF1 in percent of each draw of clips."""
    decided, ticked = decide(probabilities), targets > 0
    right = (decided & ticked).sum(axis=1)[drawn].sum(axis=1)
    wrong = (decided ^ ticked).sum(axis=1)[drawn].sum(axis=1)
    return np.asarray(100 * 2 * right / np.maximum(2 * right + wrong, 1))
