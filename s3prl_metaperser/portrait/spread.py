"""How sure a number is: bootstrap over clips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
_CELLS = 1_000_000
"""Weights that are in memory at once."""


@dataclass(frozen=True)
class Estimates:
    """Numbers with their 95% percentile bootstrap intervals, all of one shape; NaN where there is none."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, value: np.ndarray, drawn: np.ndarray) -> Estimates:
        """Put numbers together with what came out of resampling.

        Args:
            value: (...) from the clips as they are.
            drawn: (resamples, ...) from each draw; NaN where a draw gave no number.
        """
        low, high = np.full(np.shape(value), np.nan), np.full(np.shape(value), np.nan)
        known = np.isfinite(value) & np.isfinite(drawn).any(axis=0)
        if known.any():
            low[known], high[known] = np.nanpercentile(drawn[:, known], [2.5, 97.5], axis=0)
        return cls(np.asarray(value, dtype=np.float64), low, high)

    def with_exact_ends(self, clips: float) -> Estimates:
        """Widen the intervals of shares that are 0 or 1, where resampling finds no spread, to the exact binomial ones.

        Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
        Biometrika, 1934: the other end is 1 − 0.025^(1/n), as a share of n clips.

        Args:
            clips: that each share is of.

        >>> Estimates(np.zeros(1), np.zeros(1), np.zeros(1)).with_exact_ends(19).high.round(3).tolist()
        [0.176]
        """
        far = 0.025 ** (1 / clips)
        low = np.where(self.value >= 1, np.minimum(self.low, far), self.low)
        return Estimates(self.value, low, np.where(self.value <= 0, np.maximum(self.high, 1 - far), self.high))

    @classmethod
    def unknown(cls, *shape: int) -> Estimates:
        """Give numbers that are not there."""
        return cls(*(np.full(shape, np.nan) for _ in range(3)))

    @classmethod
    def stacked(cls, several: Sequence[Estimates]) -> Estimates:
        """Put numbers of one shape together, along a new first axis."""
        return cls(*(np.stack([getattr(one, part) for one in several]) for part in ("value", "low", "high")))

    def __iter__(self) -> Iterator[Estimates]:
        return (self[place] for place in range(len(self.value)))

    def __getitem__(self, key: Any) -> Estimates:
        return Estimates(self.value[key], self.low[key], self.high[key])


def weights(clips: int, rng: np.random.Generator, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Draw clips with replacement, as many as there are, again and again.

    Args:
        clips: how many there are, one or more.
        rng: draws.
        resamples: how often.

    Yields:
        (some, clips) float64, how often each draw has each clip; ``resamples`` rows in all. A chunk at a time, since
        those of a large corpus don't fit into memory together.
    """
    at_once = max(1, _CELLS // clips)
    for first in range(0, resamples, at_once):
        size = min(at_once, resamples - first)
        yield rng.multinomial(clips, np.full(clips, 1 / clips), size=size).astype(np.float64)
