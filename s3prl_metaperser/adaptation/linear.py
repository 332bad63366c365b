r"""Written-out steps of scope ``linear``: the weighted sum over layers and two linear layers.

Here X = Σ_l w_l S_l, with S_l the clips' (n, D) statistics of layer l and w = softmax(a), moves too. After t steps

    W₁(t) = W₁(0) − Σ_{s<t} α_s W₂(s)ᵀ B_s,    B_s = δ_sᵀ X_s,

so neither W₁(t) nor its gradient has to be formed: a step needs W₂(t) W₁(t) and B_t W₁(t)ᵀ, which are C rows times
W₁(0), shared by all tasks, and products of factors of rank C.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from s3prl_metaperser.adaptation.analytic import AnalyticSteps, Labels, StepRates, TwoLayers, times_transposed


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
        return torch.baddbmm(shared, times_transposed(rows, self._left), self._right)

    def embed(self, rows: Tensor) -> Tensor:
        """See :class:`Projector`."""
        shared = rows @ self._initial.mT
        if self._left is None or self._right is None:
            return shared
        return torch.baddbmm(shared, times_transposed(rows, self._right), self._left)

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
        layer_weights: a, (L,) before softmax; None for clips of one layer, whose sum is the layer.
        projector: keeps W₁.
    """

    def __init__(
        self,
        support: LayeredClips,
        labels: Labels,
        initial: TwoLayers,
        layer_weights: Tensor | None,
        projector: Projector,
    ) -> None:
        tasks = support.tasks
        self._support = support
        self._labels = labels
        self._projector = projector
        self._projector_bias = initial.projector_bias.expand(tasks, 1, -1)
        self._classifier = initial.classifier.expand(tasks, -1, -1)
        self._classifier_bias = initial.classifier_bias.unsqueeze(-1).expand(tasks, -1, -1)
        self._layer_weights = None if layer_weights is None else layer_weights.expand(tasks, -1)

    def step(self, rates: StepRates, second_order: bool = True) -> Tensor:
        """See :class:`AnalyticSteps`."""
        of_projector, of_projector_bias, of_classifier, of_classifier_bias, *of_layer_weights = rates
        classifier = self._classifier
        weights = self._weights()
        pooled = self._support.weighted(weights)
        composed = self._projector.project(classifier)
        logits = self._logits(pooled, composed)
        slope = self._labels.slope(logits.softmax(1))

        inner = slope @ pooled
        bias_slope = slope.sum(-1, keepdim=True)
        classifier_slope = torch.baddbmm(self._projector.embed(inner), bias_slope, self._projector_bias)
        if self._layer_weights is not None:
            of_weights = self._support.slope(slope.mT @ composed)
            weights_slope = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
            followed = weights_slope if second_order else weights_slope.detach()
            self._layer_weights = self._layer_weights - of_layer_weights[0] * followed
        if not second_order:
            classifier, inner, bias_slope = classifier.detach(), inner.detach(), bias_slope.detach()
            classifier_slope = classifier_slope.detach()
        self._projector.move(-of_projector * classifier, inner)
        self._projector_bias = self._projector_bias - of_projector_bias * (bias_slope.mT @ classifier)
        self._classifier = self._classifier - of_classifier * classifier_slope
        self._classifier_bias = self._classifier_bias - of_classifier_bias * bias_slope
        return self._labels.loss(logits)

    def _weights(self) -> Tensor:
        if self._layer_weights is None:
            return self._classifier.new_ones(len(self._classifier), 1)
        return self._layer_weights.softmax(-1)

    def _logits(self, pooled: Tensor, composed: Tensor) -> Tensor:
        bias = times_transposed(self._classifier, self._projector_bias) + self._classifier_bias
        return times_transposed(composed, pooled) + bias

    def logits(self, clips: LayeredClips) -> Tensor:
        """Give the (T, m, C) logits of clips, where the tasks are now."""
        pooled = clips.weighted(self._weights())
        return self._logits(pooled, self._projector.project(self._classifier)).mT

    def adapted(self) -> list[Tensor]:
        """See :class:`AnalyticSteps`."""
        biases = self._projector_bias.squeeze(1), self._classifier_bias.squeeze(-1)
        adapted = [self._projector.formed(), biases[0], self._classifier, biases[1]]
        return adapted if self._layer_weights is None else [*adapted, self._layer_weights]
