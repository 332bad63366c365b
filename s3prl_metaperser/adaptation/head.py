r"""Written-out steps of scope ``head``: two linear layers on pooled clips, which stay.

Where X stays, the clips' Gram matrix takes the projector's place: H = X W₁ᵀ + 1 b₁ᵀ moves by −(α X Xᵀ + β 1 1ᵀ) δ W₂.
A step's way back is written out too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s3prl_metaperser.adaptation.analytic import AnalyticSteps, Labels, StepRates, TwoLayers, times_transposed


class _HeadStep(torch.autograd.Function):
    r"""One step of two linear layers on clips that stay, and its way back, written out.

    With δᵀ = m ⊙ softmax(W₂ Hᵀ + b₂) − y, (C, n) a task, and the Gram matrix G:

        f = −α δᵀ,  e = −β δᵀ 1,  H ← H + (f G + e 1ᵀ)ᵀ W₂,  W₂ ← W₂ − γ δᵀ H,  b₂ ← b₂ − η δᵀ 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        labels: Labels,
        second_order: bool,
        hidden: Tensor,
        classifier: Tensor,
        classifier_bias: Tensor,
        gram: Tensor,
        *rates: Tensor,
    ) -> tuple[Tensor, ...]:
        of_projector, of_projector_bias, of_classifier, of_classifier_bias = rates
        logits = torch.baddbmm(classifier_bias, classifier, hidden.mT)
        probabilities = logits.softmax(1)
        slope = labels.slope(probabilities)
        bias_slope = slope.sum(-1, keepdim=True)
        by_clip, by_bias = -of_projector * slope, -of_projector_bias * bias_slope
        along = torch.baddbmm(by_bias, by_clip, gram)
        classifier_slope = torch.bmm(slope, hidden)
        loss = labels.loss(logits)
        ctx.labels, ctx.second_order = labels, second_order
        ctx.save_for_backward(
            hidden, classifier, gram, probabilities, slope, bias_slope, by_clip, along, classifier_slope, *rates
        )
        ctx.mark_non_differentiable(loss)
        return (
            torch.baddbmm(hidden, along.mT, classifier),
            classifier - of_classifier * classifier_slope,
            classifier_bias - of_classifier_bias * bias_slope,
            by_clip,
            by_bias,
            loss,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        # d… is the outer loss's gradient with respect to …
        d_hidden, d_classifier, d_classifier_bias, d_by_clip, d_by_bias, _ = given
        hidden, classifier, gram, probabilities, slope, bias_slope, by_clip, along, classifier_slope, *rates = (
            ctx.saved_tensors
        )
        of_projector, of_projector_bias, of_classifier, of_classifier_bias = rates
        d_along = torch.bmm(classifier, d_hidden.mT)
        d_by_clip = torch.baddbmm(d_by_clip, d_along, gram.mT)
        d_by_bias = d_by_bias + d_along.sum(-1, keepdim=True)
        d_gram = torch.bmm(by_clip.mT, d_along) if ctx.needs_input_grad[5] else None
        d_rates = (
            -torch.dot(d_by_clip.flatten(), slope.flatten()),
            -torch.dot(d_by_bias.flatten(), bias_slope.flatten()),
            -torch.dot(d_classifier.flatten(), classifier_slope.flatten()),
            -torch.dot(d_classifier_bias.flatten(), bias_slope.flatten()),
        )
        if ctx.second_order:
            d_bias_slope = of_projector_bias * d_by_bias + of_classifier_bias * d_classifier_bias
            followed = of_classifier * d_classifier
            d_slope = -torch.baddbmm(of_projector * d_by_clip + d_bias_slope, followed, hidden.mT)
            d_logits = probabilities * d_slope
            d_logits = ctx.labels.mass * (d_logits - probabilities * d_logits.sum(1, keepdim=True))
            # H and W₂ each enter through the logits, through the step's direction, and as what is moved.
            d_classifier = torch.baddbmm(torch.baddbmm(d_classifier, along, d_hidden), d_logits, hidden)
            d_hidden = torch.baddbmm(torch.baddbmm(d_hidden, d_logits.mT, classifier), slope.mT, followed, alpha=-1)
            d_classifier_bias = d_classifier_bias + d_logits.sum(-1, keepdim=True)
        return (None, None, d_hidden, d_classifier, d_classifier_bias, d_gram, *d_rates)


def takes_less(clips: int, dim: int, width: int) -> bool:
    """Tell whether steps by the Gram matrix take less arithmetic than those that go through D dimensions.

    For each emotion, n² + 3 n P multiplications instead of 2 D (n + P): less for a support set of few clips.

    Args:
        clips: n, of a task.
        dim: D, of a pooled clip.
        width: P, of the projector.
    """
    return clips * (clips + 3 * width) < 2 * dim * (clips + width)


class HeadSteps(AnalyticSteps):
    """Two linear layers that adapt on pooled clips, which stay.

    Args:
        support: X, (T, n, D).
        labels: of the support.
        initial: the layers' initialisation.
    """

    def __init__(self, support: Tensor, labels: Labels, initial: TwoLayers) -> None:
        self._support = support
        self._labels = labels
        self._initial = initial
        self._hidden = support @ initial.projector.mT + initial.projector_bias
        self._gram: dict[bool, Tensor] = {}
        self._moves: list[_Move] = []
        tasks = len(support)
        self._classifier = initial.classifier.expand(tasks, -1, -1)
        self._classifier_bias = initial.classifier_bias.unsqueeze(-1).expand(tasks, -1, -1)

    def _right(self, second_order: bool) -> Tensor:
        """Give X as a step's gradient has it: a first-order step moves W₁ by a constant."""
        return self._support if second_order else self._support.detach()

    def step(self, rates: StepRates, second_order: bool = True) -> Tensor:
        """See :class:`AnalyticSteps`."""
        if second_order not in self._gram:
            self._gram[second_order] = times_transposed(self._right(second_order), self._support)
        classifier = self._classifier if second_order else self._classifier.detach()
        self._hidden, self._classifier, self._classifier_bias, by_clip, by_bias, loss = _HeadStep.apply(
            self._labels,
            second_order,
            self._hidden,
            self._classifier,
            self._classifier_bias,
            self._gram[second_order],
            *rates,
        )
        self._moves.append(_Move(second_order, by_clip, by_bias, classifier))
        return loss

    def _moves_by_order(self) -> Iterator[tuple[_Move, Tensor]]:
        """Give the steps of each order as one move, k C rows in place of C, and the X that they multiply."""
        for second_order in self._gram:
            moves = [move for move in self._moves if move.second_order == second_order]
            parts = zip(*((move.by_clip, move.by_bias, move.classifier) for move in moves), strict=True)
            yield _Move(second_order, *(torch.cat(part, 1) for part in parts)), self._right(second_order)

    def logits(self, pooled: Tensor) -> Tensor:
        """Give the (T, m, C) logits of (T, m, D) pooled clips, where the tasks are now."""
        # Through W₂ W₁, C rows a task, rather than through the m clips' embeddings.
        composed = self._classifier @ self._initial.projector
        bias = torch.baddbmm(self._classifier_bias, self._classifier, self._initial_bias.mT)
        for move, right in self._moves_by_order():
            rows = times_transposed(self._classifier, move.classifier)
            composed = torch.baddbmm(composed, rows @ move.by_clip, right)
            bias = torch.baddbmm(bias, rows, move.by_bias)
        return (times_transposed(composed, pooled) + bias).mT

    def adapted(self) -> list[Tensor]:
        """See :class:`AnalyticSteps`."""
        projector, bias = self._initial.projector.expand(len(self._support), -1, -1), self._initial_bias
        for move, right in self._moves_by_order():
            projector = torch.baddbmm(projector, move.classifier.mT, move.by_clip @ right)
            bias = torch.baddbmm(bias, move.by_bias.mT, move.classifier)
        return [projector, bias.squeeze(1), self._classifier, self._classifier_bias.squeeze(-1)]

    @property
    def _initial_bias(self) -> Tensor:
        return self._initial.projector_bias.expand(len(self._support), 1, -1)


@dataclass(frozen=True)
class _Move:
    """What a step of a head moves W₁ and b₁ by: W₂ᵀ by_clip X, and W₂ᵀ by_bias.

    Attributes:
        second_order: whether X has its graph in it.
        by_clip: −α δᵀ, (T, C, n).
        by_bias: −β δᵀ 1, (T, C, 1).
        classifier: W₂ before the step, (T, C, P).
    """

    second_order: bool
    by_clip: Tensor
    by_bias: Tensor
    classifier: Tensor
