r"""Inner steps of two linear layers with their gradients written out: what scopes ``head`` and ``linear`` share.

Without a nonlinearity between the layers, the logits of a task's n clips are

    Z = X W₁ᵀ W₂ᵀ + 1 (W₂ b₁ + b₂)ᵀ,

with X the clips' (n, D) pooled features, W₁ (P, D) the projector and W₂ (C, P) the classifier. With δ = ∂L/∂Z (n, C),
the projector's gradient is W₂ᵀ δᵀ X, of rank C at most: a step never has to form it. ``head.py`` and ``linear.py`` take
such steps.

All tasks go side by side, and every step is made of differentiable operations: one backward pass through them gives the
meta-gradient, the same as that of backend ``higher``. A step of first order takes its gradient as a constant. Logits
and their gradients are kept as (T, C, n): with so few emotions, products that end in C columns are the slow ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s3prl_metaperser.adaptation.problem import Adapted, Params, check_kept
from s3prl_metaperser.adaptation.rates import Rates

StepRates = Sequence[Tensor]
"""Scalars: of projector's weight and bias, classifier's weight and bias, and, where it adapts, the weighted sum."""


@dataclass(frozen=True)
class TwoLayers:
    """The initialisation that tasks share.

    Attributes:
        projector: W₁, (P, D), or (P, 2 D) where deviations stand beside the means.
        projector_bias: b₁, (P,).
        classifier: W₂, (C, P).
        classifier_bias: b₂, (C,).
    """

    projector: Tensor
    projector_bias: Tensor
    classifier: Tensor
    classifier_bias: Tensor


class Labels:
    """What the loss needs of clips' targets: L = Σ scale · cross-entropy(target, softmax Zᵀ).

    Args:
        targets: (T, n, C), each a distribution.
        scale: (T, n), each clip's share of the loss.

    Attributes:
        targets: y, (T, C, n): scale times target.
        mass: m, (T, 1, n): its sum.
    """

    def __init__(self, targets: Tensor, scale: Tensor) -> None:
        self.targets = (scale.unsqueeze(-1) * targets).mT.contiguous()
        self.mass = self.targets.sum(1, keepdim=True)

    def slope(self, probabilities: Tensor) -> Tensor:
        """Give δᵀ, the (T, C, n) gradient of the loss with respect to the logits, from their softmax."""
        return self.mass * probabilities - self.targets

    @torch.no_grad()
    def loss(self, logits: Tensor) -> Tensor:
        """Give the scalar loss, detached."""
        return -(self.targets * logits.log_softmax(1)).sum()


class _TimesTransposed(torch.autograd.Function):
    """(T, a, c), (T, b, c) → (T, a, b): left rightᵀ.

    Torch's own derivative of this product forms the right side's gradient transposed, (c, b), and that is several times
    slower where b is the number of emotions.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left @ right.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return slope @ right if needed[0] else None, slope.mT @ left if needed[1] else None


def times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (T, a, c) by the transpose of (T, b, c): (T, a, b)."""
    product: Tensor = _TimesTransposed.apply(left, right)
    return product


class AnalyticSteps(ABC):
    """Tasks that adapt side by side: where they are, and how they go a step further."""

    @abstractmethod
    def step(self, rates: StepRates, second_order: bool = True) -> Tensor:
        """Take a step.

        Args:
            rates: of this step.
            second_order: whether the gradient that is followed keeps its own graph, where gradients are enabled.

        Returns:
            The scalar loss before it, summed over tasks; detached.
        """

    @abstractmethod
    def adapted(self) -> list[Tensor]:
        """Form the adapted tensors, each with a leading task dimension, in the order of a step's rates."""


@torch.no_grad()
def adapt_analytically(
    tasks: AnalyticSteps, names: Sequence[str], rates: Rates, steps: int, keep: Collection[int] = ()
) -> Adapted:
    """Adapt at test time; nothing stays differentiable.

    Args:
        tasks: where they start.
        names: of the tensors that adapt, in the order of a step's rates.
        rates: gives each tensor's rate at each step.
        steps: how many to take.
        keep: after how many steps, each from 1 to ``steps``, the parameters are given too.

    Raises:
        ValueError: when parameters are to be kept that no step gives.
    """
    check_kept(keep, steps)
    losses: list[Tensor] = []
    kept: dict[int, Params] = {}
    for step in range(steps):
        losses.append(tasks.step(rates.at(step, names)))
        if step + 1 in keep or step + 1 == steps:
            kept[step + 1] = dict(zip(names, tasks.adapted(), strict=True))
    params = kept[steps] if steps in keep else kept.pop(steps)
    return Adapted(params, torch.stack(losses), kept)
