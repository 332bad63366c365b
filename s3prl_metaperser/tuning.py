"""Choosing how a system adapts, on the dev annotator's episodes: every rate with every number of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from s3prl_metaperser.datasets import side_by_side
from s3prl_metaperser.episodes import Episode
from s3prl_metaperser.numerals import exact
from s3prl_metaperser.prediction import Prediction
from s3prl_metaperser.settings import MetricName

Rate = float | None
"""A rate to choose; None where the rates are learned, and only steps are chosen."""
Predict = Callable[[Sequence[Episode], Rate, Sequence[int]], dict[int, Prediction]]
"""Adapts to episodes at one rate and predicts after each of some numbers of steps."""


@dataclass(frozen=True)
class Candidate:
    """One way to adapt."""

    lr: Rate
    steps: int

    def __str__(self) -> str:
        steps = f"{self.steps} steps"
        return steps if self.lr is None else f"lr {exact(self.lr)}, {steps}"


@dataclass(frozen=True)
class Tuning:
    """What was tried on dev, and what it gave.

    Attributes:
        metric: that decides.
        candidates: in the order of the settings: rate by rate, and within a rate steps by steps.
        scores: of each candidate, in percent, mean over the dev episodes.
        predictions: of the best candidate, for each batch of dev episodes by its first episode (annotator, index).
    """

    metric: MetricName
    candidates: tuple[Candidate, ...]
    scores: tuple[float, ...]
    predictions: Mapping[tuple[str, int], Prediction]

    @property
    def best(self) -> Candidate:
        """The candidate of the highest score; of equals the earliest."""
        return self.candidates[int(np.argmax(self.scores))]

    def line(self, system: str) -> str:
        """Say in one line what a system adapts at, and what every candidate scored."""
        of_lr: dict[Rate, list[str]] = {}
        for one, score in zip(self.candidates, self.scores, strict=True):
            of_lr.setdefault(one.lr, []).append(f"{score:.2f}")
        tried = "; ".join(("" if lr is None else f"lr {exact(lr)}: ") + ", ".join(own) for lr, own in of_lr.items())
        steps = ", ".join(dict.fromkeys(str(one.steps) for one in self.candidates))
        return f"{system} adapts at {self.best}, best dev {self.metric} of {{{tried}}} after {steps} steps"


def tune(
    predict: Predict, lrs: Sequence[Rate], steps: Sequence[int], dev: Sequence[Episode], metric: MetricName
) -> Tuning:
    """Score every rate with every number of steps on dev; each rate adapts once, to the largest number.

    Args:
        predict: the system's own way to adapt and predict.
        lrs: rates to choose from.
        steps: numbers of steps to choose from.
        dev: the dev annotators' episodes.
        metric: decides, by its mean over the episodes.
    """
    candidates: list[Candidate] = []
    scores: list[float] = []
    predictions: dict[tuple[str, int], Prediction] = {}
    batches = side_by_side(dev)
    for lr in lrs:
        of_batches = [predict(batch, lr, steps) for batch in batches]
        for number in steps:
            own = [
                getattr(one, metric)
                for batch, given in zip(batches, of_batches, strict=True)
                for one in given[number].scores(batch)
            ]
            value = float(np.mean(own))
            if not scores or value > max(scores):
                predictions = {
                    (batch[0].annotator, batch[0].index): given[number]
                    for batch, given in zip(batches, of_batches, strict=True)
                }
            candidates.append(Candidate(lr, number))
            scores.append(value)
    return Tuning(metric, tuple(candidates), tuple(scores), predictions)
