"""Inner-loop learning rates: fixed, or learned per tensor and step (LSLR; paper section 2.3.3, MAML++ section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Rates(Protocol):
    """Gives the rates of one inner step."""

    def at(self, step: int, names: Sequence[str]) -> list[Tensor]:
        """Give the scalar rate of each named tensor at inner step ``step``, counted from 0."""
        ...


class FixedRate(nn.Module):
    """One rate for every tensor and step, not learned."""

    rate: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(rate), persistent=False)

    def at(self, step: int, names: Sequence[str]) -> list[Tensor]:
        """Give the one rate for each name, whatever the step."""
        return [self.rate] * len(names)


class LSLR(nn.Module):
    """Learned per-layer per-step rates, α[step, tensor]. A rate may become negative: the direction is learned too.

    Args:
        names: the tensors that adapt.
        steps: how many inner steps have rates of their own. Adaptation at test time is longer; beyond the last learned
            step its rates are reused.
        initial: the value all rates start from.
    """

    def __init__(self, names: Sequence[str], steps: int, initial: float) -> None:
        super().__init__()
        self.names = tuple(names)
        self.steps = steps
        self.rates = nn.Parameter(torch.full((steps, len(self.names)), initial))

    def at(self, step: int, names: Sequence[str]) -> list[Tensor]:
        """Give each named tensor's rate at ``step``, with its path to the learned parameter."""
        row = self.rates[min(step, self.steps - 1)]
        return [row[self.names.index(name)] for name in names]
