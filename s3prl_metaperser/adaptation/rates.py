"""Inner-loop learning rates: fixed, or learned per tensor and step (LSLR; paper section 2.3.3, MAML++ section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Rates(Protocol):
    """Gives the rates of one inner step."""

    def at(self, step: int, names: Sequence[str]) -> list[Tensor]:
        """Give the scalar rate of each named tensor at inner step ``step``, counted from 0."""
        ...


class FixedRate(nn.Module):
    """Rates that are not learned, the same at every step.

    Args:
        rate: of every tensor.
        exceptions: tensors with another rate, by name.
    """

    rate: Tensor

    def __init__(self, rate: float, exceptions: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(rate), persistent=False)
        self._exceptions = dict(exceptions or {})

    def at(self, step: int, names: Sequence[str]) -> list[Tensor]:
        """Give each named tensor's rate, whatever the step."""
        other = {rate: torch.full_like(self.rate, rate) for rate in set(self._exceptions.values())}
        return [other[self._exceptions[name]] if name in self._exceptions else self.rate for name in names]


class LSLR(nn.Module):
    """Learned per-layer per-step rates, α[step, tensor]. A rate may become negative: the direction is learned too.

    Args:
        names: the tensors that adapt.
        steps: how many inner steps have rates of their own. Adaptation at test time is longer; beyond the last learned
            step its rates are reused.
        initial: the value all rates start from, or each tensor's own.
    """

    def __init__(self, names: Sequence[str], steps: int, initial: float | Sequence[float]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.steps = steps
        self._places = {name: place for place, name in enumerate(self.names)}
        row = torch.tensor(initial if isinstance(initial, Sequence) else [initial] * len(self.names))
        self.rates = nn.Parameter(row.repeat(steps, 1))

    def at(self, step: int, names: Sequence[str]) -> list[Tensor]:
        """Give each named tensor's rate at ``step``, with its path to the learned parameter."""
        row = self.rates[min(step, self.steps - 1)].unbind()
        return [row[self._places[name]] for name in names]
