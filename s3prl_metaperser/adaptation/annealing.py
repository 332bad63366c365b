"""Derivative annealing: first-order gradients first, second-order later (paper section 2.3.3; MAML++ section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DerivativeAnnealing:
    """Which inner steps are differentiated to second order.

    The paper says "first 30% of inner-loop steps" (``over="inner_steps"``) and cites MAML++, where it is the first
    part of training (``over="training"``). A step or an update belongs to the first part when its index, counted from
    0, is below ``fraction`` of the total.

    >>> annealing = DerivativeAnnealing(0.3, "inner_steps")
    >>> [annealing.second_order(step, inner_steps=5, progress=0.0) for step in range(5)]
    [False, False, True, True, True]
    """

    fraction: float
    over: Literal["inner_steps", "training"]

    def second_order(self, step: int, inner_steps: int, progress: float) -> bool:
        """Tell whether inner step ``step`` of ``inner_steps`` is differentiated to second order.

        Args:
            step: index of the inner step, from 0.
            inner_steps: how many steps the inner loop takes.
            progress: share of training that is done, 0 to 1.
        """
        if self.over == "training":
            return progress >= self.fraction
        return step >= self.fraction * inner_steps


ALWAYS_SECOND_ORDER = DerivativeAnnealing(0.0, "inner_steps")
"""Annealing switched off: plain second-order MAML."""
