"""What an inner loop is given and what it gives, whichever backend takes its steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""Name → tensor, flat; tensors may carry a leading task dimension."""
Part = Callable[[Params], Tensor]
"""Parameters → scalar, the loss on some of the support set's clips."""


@dataclass(frozen=True)
class Objective:
    """The loss on the support set(s), as a sum over parts of it.

    A gradient of a sum is the sum of the parts' gradients: where one part's graph is all that fits into memory, the
    parts are gone through one after the other. A part must give the same value each time it is called with the same
    parameters, also after the call that it was made in.

    Attributes:
        parts: parameters → scalar each.
        held: tensors that the parts depend on beside the parameters and that do not move in the inner loop, as far as
            the outer loop learns them or what they come from.
    """

    parts: Sequence[Part]
    held: Sequence[Tensor] = ()

    def __call__(self, params: Params) -> Tensor:
        """Give the sum, with the graph of every part."""
        total = self.parts[0](params)
        for part in self.parts[1:]:
            total = total + part(params)
        return total

    def gradient(self, params: Params) -> tuple[Tensor, list[Tensor]]:
        """Give loss and gradient, both without a graph, holding one part's graph at a time.

        Args:
            params: leaves, or tensors whose own graph is of no interest here.

        Returns:
            The scalar loss, and the gradient of each parameter in their order; zeros where it does not matter.
        """
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
        total: Tensor | None = None
        summed = Sums(len(leaves))
        with torch.enable_grad():
            for part in self.parts:
                loss = part(leaves)
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                total = loss.detach() if total is None else total + loss.detach()
                summed.add(gradients)
                # What is of this part must be gone before the next part's graph is built.
                del loss, gradients
        if total is None:
            raise ValueError("an objective needs at least one part")
        filled = zip(summed.totals, leaves.values(), strict=True)
        return total, [torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in filled]


class Sums:
    """Sums of tensors, side by side; None stands for zero.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.totals: list[Tensor | None] = [None] * count
        self._is_own = [False] * count

    def add(self, more: Iterable[Tensor | None]) -> None:
        """Add a tensor to each sum.

        In place from the second on, but never into what autograd gave: it may be one tensor, the gradient of two.
        """
        for place, tensor in enumerate(more):
            total = self.totals[place]
            if tensor is None or total is None:
                self.totals[place] = tensor if total is None else total
            elif self._is_own[place]:
                total.add_(tensor)
            else:
                self.totals[place] = total + tensor
                self._is_own[place] = True


def as_objective(objective: Objective | Part) -> Objective:
    """Take a plain function as an objective of one part."""
    return objective if isinstance(objective, Objective) else Objective([objective])


@dataclass(frozen=True)
class Adapted:
    """What adaptation gives.

    Attributes:
        params: the adapted tensors.
        losses: (steps,) the objective before each step, detached.
        kept: the tensors after some earlier number of steps, by that number.
    """

    params: Params
    losses: Tensor
    kept: dict[int, Params] = field(default_factory=dict)


def check_kept(keep: Collection[int], steps: int) -> None:
    """Refuse to keep what no step gives.

    Raises:
        ValueError: naming what was asked for.
    """
    if not all(1 <= number <= steps for number in keep):
        raise ValueError(f"keep {sorted(keep)} is not within 1 to {steps} steps")
