"""From probabilities to decisions, and from decisions to the paper's three scores (section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

METRICS = ("maF1", "miF1", "UA")


@dataclass(frozen=True)
class Scores:
    """One episode's scores, in percent."""

    maF1: float  # noqa: N815 - the paper's name, and the column of results.csv
    """F1 averaged over the classes."""
    miF1: float  # noqa: N815 - the paper's name, and the column of results.csv
    """F1 of all decisions pooled."""
    UA: float
    """Mean over classes of the per-class binary accuracy: one minus the Hamming loss."""


FAILED = Scores(0.0, 0.0, 0.0)
"""Of an episode that has failed: no system gains by it, in any metric."""


def decide(probabilities: np.ndarray) -> np.ndarray:
    """Decide for every emotion whose probability is above chance, 1/classes, strictly.

    Args:
        probabilities: (queries, classes), rows sum to one.

    Returns:
        (queries, classes) bool.

    >>> decide(np.array([[0.6, 0.4, 0.0]])).tolist()
    [[True, True, False]]
    """
    return probabilities > 1.0 / probabilities.shape[-1]


def score(probabilities: np.ndarray, targets: np.ndarray) -> Scores:
    """Compare decisions with the emotions a listener ticked; the same as scikit-learn's scores, ``zero_division=0``.

    Args:
        probabilities: (queries, classes), rows sum to one.
        targets: (queries, classes) label distributions; an emotion is ticked where the mass is above zero.

    Returns:
        The scores in percent.
    """
    # Tuning on dev scores thousands of episodes, and scikit-learn's checks of its input take fifty times the counting.
    decided, ticked = decide(probabilities), targets > 0
    right, wrong = (decided & ticked).sum(axis=0), (decided ^ ticked).sum(axis=0)
    per_class = 2 * right / np.maximum(2 * right + wrong, 1)
    pooled = 2 * right.sum() / max(2 * right.sum() + wrong.sum(), 1)
    return Scores(
        maF1=100 * float(per_class.mean()),
        miF1=100 * float(pooled),
        UA=100 * (1 - float(wrong.sum()) / targets.size),
    )
