"""Gradient descent with one rate per tensor, and its differentiable twin for ``higher``.

θ_i ← θ_i − α_i ∂L/∂θ_i, where α_i may be a learned tensor (MAML++ section 4, LSLR).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import higher
import torch
from torch import Tensor


class PerTensorSGD(torch.optim.Optimizer):
    """Plain gradient descent; each tensor is a parameter group with a rate of its own.

    Args:
        params: leaf tensors.
        rates: one rate a tensor.
    """

    def __init__(self, params: Iterable[Tensor], rates: Sequence[float]) -> None:
        groups: list[dict[str, Any]] = [{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)]
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step along the gradients in ``.grad``."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad)
        return value


class DifferentiablePerTensorSGD(higher.optim.DifferentiableOptimizer):
    """The same step with the graph kept, so that gradients flow to parameters and rates."""

    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: object) -> None:
        for group, gradients in zip(self.param_groups, grouped_grads, strict=True):
            for index, (parameter, gradient) in enumerate(zip(group["params"], gradients, strict=True)):
                if gradient is not None:
                    group["params"][index] = parameter - group["lr"] * gradient

    def first_order_step(self, loss: Tensor, params: Sequence[Tensor], rates: Sequence[Tensor]) -> list[Tensor]:
        """Step with the gradient as a constant: its graph is never built, the path through θ and α is kept.

        ``higher``'s own ``step`` either builds the gradient's graph or cuts every path; neither is first-order MAML.

        Args:
            loss: a scalar.
            params: the tensors to update, one a parameter group, in that order.
            rates: one scalar a tensor.

        Returns:
            The updated tensors.
        """
        gradients = torch.autograd.grad(loss, list(params), allow_unused=True)
        self._apply_override({"lr": list(rates)})
        for group, parameter in zip(self.param_groups, params, strict=True):
            group["params"][0] = parameter
        self._update([[gradient] for gradient in gradients])
        return [group["params"][0] for group in self.param_groups]


higher.register_optim(PerTensorSGD, DifferentiablePerTensorSGD)
