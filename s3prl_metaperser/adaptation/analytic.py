r"""Inner steps of a weighted sum and two linear layers, their gradients written out: backend ``analytic``.

Without a nonlinearity between the layers, the logits of a task's n clips are

    Z = X W₁ᵀ W₂ᵀ + 1 (W₂ b₁ + b₂)ᵀ,    X = Σ_l w_l S_l,

with S_l the clips' (n, D) statistics of layer l, w = softmax(a) the weighted sum, W₁ (P, D) the projector and W₂ (C, P)
the classifier. With δ = ∂L/∂Z (n, C), the projector's gradient is W₂ᵀ B, B = δᵀ X, of rank C at most. After t steps

    W₁(t) = W₁(0) − Σ_{s<t} α_s W₂(s)ᵀ B_s,

so neither W₁(t) nor its gradient has to be formed: a step needs W₂(t) W₁(t) and B_t W₁(t)ᵀ, which are C rows times
W₁(0), shared by all tasks, and products of factors of rank C. Where the weighted sum does not adapt (scope ``head``),
X stays, and the clips' Gram matrix takes W₁'s place: H = X W₁ᵀ + 1 b₁ᵀ moves by −(α X Xᵀ + β 1 1ᵀ) δ W₂.

All tasks go side by side, and every step is made of differentiable operations: one backward pass through them gives the
meta-gradient, the same as that of backend ``higher``. A step of first order takes its gradient as a constant. Logits
and their gradients are kept as (T, C, n): with so few emotions, products that end in C columns are the slow ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
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

    def slope(self, logits: Tensor) -> Tensor:
        """Give δᵀ, the (T, C, n) gradient of the loss with respect to the (T, C, n) logits."""
        return self.mass * logits.softmax(1) - self.targets

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


def _times_transposed(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = _TimesTransposed.apply(left, right)
    return product


class LayeredClips:
    """Statistics of tasks' clips, layer by layer, so that weighted sum and slope are each one pass over memory.

    Args:
        statistics: (T, n, S, D); not copied where its memory is layered already, (S, T, n, D).
        layers: L; S is L, or 2 L where deviations follow the means.
    """

    def __init__(self, statistics: Tensor, layers: int) -> None:
        self.tasks, self._clips = statistics.shape[:2]
        layered = statistics.movedim(2, 0).contiguous()
        self._blocks = [block.transpose(0, 1).flatten(2) for block in layered.split(layers)]

    def weighted(self, weights: Tensor) -> Tensor:
        """Give X, (T, n, D or 2 D), of each task's (T, L) weights."""
        sums = [torch.bmm(weights.unsqueeze(1), block) for block in self._blocks]
        pooled = [own.view(self.tasks, self._clips, -1) for own in sums]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, -1)

    def slope(self, of_sum: Tensor) -> Tensor:
        """Give the (T, L) gradient with respect to the weights, from that with respect to X."""
        # Rows on the left: torch multiplies a batch of matrices with one column each over ten times slower.
        rows = [own.reshape(self.tasks, 1, -1) for own in of_sum.chunk(len(self._blocks), -1)]
        slopes = [torch.bmm(row, block.mT).squeeze(1) for row, block in zip(rows, self._blocks, strict=True)]
        return slopes[0] if len(slopes) == 1 else torch.stack(slopes).sum(0)


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
        slope = labels.mass * probabilities - labels.targets
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
        d_gram = torch.bmm(by_clip.mT, d_along)
        d_rates = (
            -(d_by_clip * slope).sum(),
            -(d_by_bias * bias_slope).sum(),
            -(d_classifier * classifier_slope).sum(),
            -(d_classifier_bias * bias_slope).sum(),
        )
        if ctx.second_order:
            d_bias_slope = of_projector_bias * d_by_bias + of_classifier_bias * d_classifier_bias
            followed = of_classifier * d_classifier
            d_slope = -torch.baddbmm(of_projector * d_by_clip + d_bias_slope, followed, hidden.mT)
            d_logits = probabilities * d_slope
            d_logits = ctx.labels.mass * (d_logits - probabilities * d_logits.sum(1, keepdim=True))
            # H and W₂ each enter through the logits, through the step's direction, and as what is moved.
            d_classifier = d_classifier + torch.bmm(along, d_hidden) + torch.bmm(d_logits, hidden)
            d_hidden = torch.baddbmm(d_hidden, d_logits.mT, classifier) - torch.bmm(slope.mT, followed)
            d_classifier_bias = d_classifier_bias + d_logits.sum(-1, keepdim=True)
        return (None, None, d_hidden, d_classifier, d_classifier_bias, d_gram, *d_rates)


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
            self._gram[second_order] = _times_transposed(self._right(second_order), self._support)
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

    def _moved(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Give, of the steps of each order, (T, k C, P) rows of W₂, (T, k C, n) factors, and the X that they multiply.

        W₁ has moved by rowsᵀ factors X.
        """
        for second_order in self._gram:
            moves = [move for move in self._moves if move.second_order == second_order]
            rows, factors = ([move.classifier for move in moves], [move.by_clip for move in moves])
            yield torch.cat(rows, 1), torch.cat(factors, 1), self._right(second_order)

    def _projector_bias(self) -> Tensor:
        initial = self._initial.projector_bias.expand(len(self._support), 1, -1)
        by_bias = torch.cat([move.by_bias for move in self._moves], 1)
        return torch.baddbmm(initial, by_bias.mT, torch.cat([move.classifier for move in self._moves], 1))

    def logits(self, pooled: Tensor) -> Tensor:
        """Give the (T, m, C) logits of (T, m, D) pooled clips, where the tasks are now."""
        # Through W₂ W₁, C rows a task, rather than through the m clips' embeddings.
        composed = self._classifier @ self._initial.projector
        for rows, factors, right in self._moved():
            composed = torch.baddbmm(composed, _times_transposed(self._classifier, rows) @ factors, right)
        bias = _times_transposed(self._classifier, self._projector_bias()) + self._classifier_bias
        return (_times_transposed(composed, pooled) + bias).mT

    def adapted(self) -> list[Tensor]:
        """See :class:`AnalyticSteps`."""
        projector = self._initial.projector.expand(len(self._support), -1, -1)
        for rows, factors, right in self._moved():
            projector = torch.baddbmm(projector, rows.mT, factors @ right)
        return [projector, self._projector_bias().squeeze(1), self._classifier, self._classifier_bias.squeeze(-1)]


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


class Projector(ABC):
    """W₁(t) of all tasks, as far as steps need it."""

    @abstractmethod
    def project(self, rows: Tensor) -> Tensor:
        """Give (T, C, P) rows times W₁(t): (T, C, D)."""

    @abstractmethod
    def embed(self, rows: Tensor) -> Tensor:
        """Give (T, C, D) rows times W₁(t)ᵀ: (T, C, P)."""

    @abstractmethod
    def move(self, left: Tensor, right: Tensor) -> None:
        """Go to W₁(t) + leftᵀ right, of (T, C, P) and (T, C, D)."""

    @abstractmethod
    def formed(self) -> Tensor:
        """Give W₁(t), (T, P, D)."""


class FactoredProjector(Projector):
    """The initialisation, which all tasks share, and the steps' factors; may be differentiated.

    A step costs little, and more with each that went before.

    Args:
        initial: W₁(0), (P, D).
    """

    def __init__(self, initial: Tensor) -> None:
        self._initial = initial
        self._left: Tensor | None = None
        self._right: Tensor | None = None

    def project(self, rows: Tensor) -> Tensor:
        """See :class:`Projector`."""
        shared = rows @ self._initial
        if self._left is None or self._right is None:
            return shared
        return torch.baddbmm(shared, _times_transposed(rows, self._left), self._right)

    def embed(self, rows: Tensor) -> Tensor:
        """See :class:`Projector`."""
        shared = rows @ self._initial.mT
        if self._left is None or self._right is None:
            return shared
        return torch.baddbmm(shared, _times_transposed(rows, self._right), self._left)

    def move(self, left: Tensor, right: Tensor) -> None:
        """See :class:`Projector`."""
        self._left = left if self._left is None else torch.cat([self._left, left], 1)
        self._right = right if self._right is None else torch.cat([self._right, right], 1)

    def formed(self) -> Tensor:
        """See :class:`Projector`."""
        if self._left is None or self._right is None:
            raise ValueError("no step has been taken")
        return self._initial + self._left.mT @ self._right


class FormedProjector(Projector):
    """W₁(t) itself, moved in place: for many steps, of which none is differentiated.

    Args:
        initial: W₁(0), (P, D).
        tasks: T.
    """

    def __init__(self, initial: Tensor, tasks: int) -> None:
        self._projector = initial.detach().repeat(tasks, 1, 1)

    def project(self, rows: Tensor) -> Tensor:
        """See :class:`Projector`."""
        return torch.bmm(rows, self._projector)

    def embed(self, rows: Tensor) -> Tensor:
        """See :class:`Projector`."""
        return torch.bmm(rows, self._projector.mT)

    def move(self, left: Tensor, right: Tensor) -> None:
        """See :class:`Projector`."""
        self._projector.baddbmm_(left.mT, right)

    def formed(self) -> Tensor:
        """See :class:`Projector`."""
        return self._projector.clone()


class LinearSteps(AnalyticSteps):
    """Weighted sum and two linear layers that adapt on clips' statistics.

    Args:
        support: the clips.
        labels: theirs.
        initial: the layers' initialisation.
        layer_weights: a, (L,) before softmax.
        projector: keeps W₁.
    """

    def __init__(
        self, support: LayeredClips, labels: Labels, initial: TwoLayers, layer_weights: Tensor, projector: Projector
    ) -> None:
        tasks = support.tasks
        self._support = support
        self._labels = labels
        self._projector = projector
        self._projector_bias = initial.projector_bias.expand(tasks, 1, -1)
        self._classifier = initial.classifier.expand(tasks, -1, -1)
        self._classifier_bias = initial.classifier_bias.unsqueeze(-1).expand(tasks, -1, -1)
        self._layer_weights = layer_weights.expand(tasks, -1)

    def step(self, rates: StepRates, second_order: bool = True) -> Tensor:
        """See :class:`AnalyticSteps`."""
        of_projector, of_projector_bias, of_classifier, of_classifier_bias, of_layer_weights = rates
        classifier = self._classifier
        weights = self._layer_weights.softmax(-1)
        pooled = self._support.weighted(weights)
        composed = self._projector.project(classifier)
        logits = self._logits(pooled, composed)
        slope = self._labels.slope(logits)

        inner = slope @ pooled
        bias_slope = slope.sum(-1, keepdim=True)
        classifier_slope = torch.baddbmm(self._projector.embed(inner), bias_slope, self._projector_bias)
        of_weights = self._support.slope(slope.mT @ composed)
        weights_slope = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        if not second_order:
            classifier, inner, bias_slope = classifier.detach(), inner.detach(), bias_slope.detach()
            classifier_slope, weights_slope = classifier_slope.detach(), weights_slope.detach()
        self._projector.move(-of_projector * classifier, inner)
        self._projector_bias = self._projector_bias - of_projector_bias * (bias_slope.mT @ classifier)
        self._classifier = self._classifier - of_classifier * classifier_slope
        self._classifier_bias = self._classifier_bias - of_classifier_bias * bias_slope
        self._layer_weights = self._layer_weights - of_layer_weights * weights_slope
        return self._labels.loss(logits)

    def _logits(self, pooled: Tensor, composed: Tensor) -> Tensor:
        bias = _times_transposed(self._classifier, self._projector_bias) + self._classifier_bias
        return _times_transposed(composed, pooled) + bias

    def logits(self, clips: LayeredClips) -> Tensor:
        """Give the (T, m, C) logits of clips, where the tasks are now."""
        pooled = clips.weighted(self._layer_weights.softmax(-1))
        return self._logits(pooled, self._projector.project(self._classifier)).mT

    def adapted(self) -> list[Tensor]:
        """See :class:`AnalyticSteps`."""
        biases = self._projector_bias.squeeze(1), self._classifier_bias.squeeze(-1)
        return [self._projector.formed(), biases[0], self._classifier, biases[1], self._layer_weights]


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
