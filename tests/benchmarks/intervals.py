"""Scores of a listener's models, and intervals of how much better one is than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s3prl_metaperser.metrics import METRICS, decide, score

LOG_LOSS = "log loss"
MEASURES = (*METRICS, LOG_LOSS)
RESAMPLINGS, SEED = 2000, 1337


def scored(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Give the paper's scores in percent and the log loss in nats, of (clips, classes)."""
    scores = score(probabilities, targets)
    return {name: getattr(scores, name) for name in METRICS} | {LOG_LOSS: float(_losses(probabilities, targets).mean())}


def _losses(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -(targets * np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))).sum(axis=-1)


class Tally:
    """What a model does on each of a listener's clips, on average over the draws in which it is judged on it.

    Scores of a tally are those of all clips pooled.

    Args:
        targets: (clips, classes) label distributions.
    """

    def __init__(self, targets: np.ndarray) -> None:
        self._targets = targets
        self._right, self._wrong = np.zeros(targets.shape), np.zeros(targets.shape)
        self._loss, self.times = np.zeros(len(targets)), np.zeros(len(targets))

    def add(self, clips: np.ndarray, probabilities: np.ndarray) -> None:
        """Judge a model on a draw of different clips: (n,) places and (n, classes) probabilities."""
        targets = self._targets[clips]
        decided, ticked = decide(probabilities), targets > 0
        self._right[clips] += decided & ticked
        self._wrong[clips] += decided ^ ticked
        self._loss[clips] += _losses(probabilities, targets)
        self.times[clips] += 1

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Score resamplings of the clips, given as (resamplings, clips) weights; clips never judged count for none."""
        times = np.maximum(self.times, 1)[:, None]
        weights = weights * (self.times > 0)
        right, wrong = weights @ (self._right / times), weights @ (self._wrong / times)
        total, classes = weights.sum(axis=1), right.shape[1]
        return {
            "maF1": 100 * (2 * right / np.maximum(2 * right + wrong, 1e-9)).mean(axis=1),
            "miF1": 100 * 2 * right.sum(axis=1) / (2 * right + wrong).sum(axis=1),
            "UA": 100 * (1 - wrong.sum(axis=1) / total / classes),
            LOG_LOSS: weights @ (self._loss / times[:, 0]) / total,
        }


@dataclass(frozen=True)
class Difference:
    """A paired difference with the 95% interval of its bootstrap."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, resampled: np.ndarray) -> Difference:
        """Take the interval from what resampling gave."""
        low, high = np.quantile(resampled, [0.025, 0.975])
        return cls(mean, float(low), float(high))

    def shown(self, decimals: int = 1) -> str:
        """Write it with its sign, the interval in brackets."""
        text = f"{self.mean:+.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"
        return text.replace("-", "−")


def differences(ours: Tally, other: Tally) -> dict[str, Difference]:
    """Compare two models on a listener's clips, with an interval by bootstrap over the clips.

    Clips are drawn again, not draws of them: draws of one listener share clips, and any number of them could be made.
    Both models are judged on the same resampling.
    """
    clips = len(ours.times)
    everyone = np.ones((1, clips))
    drawn = np.random.default_rng(SEED).multinomial(clips, np.full(clips, 1 / clips), size=RESAMPLINGS)
    mean, resampled = ([one.scores(weights) for one in (ours, other)] for weights in (everyone, drawn))
    return {
        name: Difference.of(float((mean[0][name] - mean[1][name])[0]), resampled[0][name] - resampled[1][name])
        for name in MEASURES
    }


def over_listeners(means: Sequence[float]) -> Difference:
    """Give the mean of listeners' differences, with an interval by bootstrap over the listeners."""
    values = np.asarray(means)
    drawn = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLINGS, len(values)))
    return Difference.of(float(values.mean()), values[drawn].mean(axis=1))


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
