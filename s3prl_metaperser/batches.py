"""What the learner is given: labelled clips of tasks that adapt side by side."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TaskBatch:
    """Labelled clips of T tasks.

    Attributes:
        statistics: (T, n, S, dim), standardised.
        targets: (T, n, classes) label distributions.
        weights: (T, n), each task's sum to 1; 0 pads tasks that have fewer clips.
    """

    statistics: Tensor
    targets: Tensor
    weights: Tensor
