r"""Steps of a linear layer by its clips' Gram matrix instead of its weights; at test time.

With clips X (n, D), a layer H = X Wᵀ + 1 bᵀ and any loss L(H, rest), the layer's gradient is δᵀ X, δ = ∂L/∂H. A step at
rates α and β moves H by −(α X Xᵀ + β 1 1ᵀ) δ: W does not appear. After the steps, W has moved by −(Σ α δ)ᵀ X. A step
takes n² P multiplications instead of 2 n D P, for P the layer's width: less as long as n < 2 D.

Where a weighted sum over layers S_l adapts too, X = Σ_l w_l S_l moves, and the same holds of all layers' clips at once:
R_l = S_l W₁ᵀ takes the place of S_l, P dimensions instead of D, and moves by −α (S_l Xᵀ) δ W₂, where S_l Xᵀ is the
Gram matrix of all clips of all layers, summed over one side by w.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from s3prl_metaperser.adaptation.analytic import AnalyticSteps, Labels, StepRates, TwoLayers
from s3prl_metaperser.adaptation.problem import Params

LossAbove = Callable[[Tensor, Params], Tensor]
"""(T, n, P) outputs of the layer, and the other tensors with a leading task dimension → scalar, summed over tasks."""


def takes_less(clips: int, dim: int) -> bool:
    """Tell whether steps by the Gram matrix of ``clips`` clips of ``dim`` dimensions take less arithmetic."""
    return clips < 2 * dim


class GramSteps(AnalyticSteps):
    """A linear layer and what stands on it, of tasks that adapt side by side; nothing stays differentiable.

    Args:
        support: X, (T, n, D).
        weight: of the layer, (P, D); shared by all tasks.
        bias: of the layer, (P,).
        rest: the other tensors that adapt, (T, …) each, in the order of a step's rates after the layer's two.
        loss: of the layer's output and the rest.
    """

    def __init__(self, support: Tensor, weight: Tensor, bias: Tensor, rest: Params, loss: LossAbove) -> None:
        self._support = support.detach()
        self._initial = weight.detach()
        self._gram = self._support @ self._support.mT
        self._hidden = self._support @ weight.detach().mT + bias.detach()
        self._followed = torch.zeros_like(self._hidden)
        self._bias = bias.detach().repeat(len(support), 1)
        self._rest = {name: tensor.detach().clone() for name, tensor in rest.items()}
        self._loss = loss

    @torch.no_grad()
    def step(self, rates: StepRates, second_order: bool = True) -> Tensor:
        """See :class:`AnalyticSteps`."""
        of_weight, of_bias, *of_rest = rates
        with torch.enable_grad():
            hidden = self._hidden.requires_grad_()
            rest = {name: tensor.requires_grad_() for name, tensor in self._rest.items()}
            loss = self._loss(hidden, rest)
            slope, *slopes = torch.autograd.grad(loss, [hidden, *rest.values()])
        followed = of_weight * slope
        by_bias = of_bias * slope.sum(1)
        self._hidden = torch.baddbmm(self._hidden.detach() - by_bias.unsqueeze(1), self._gram, followed, alpha=-1)
        self._followed += followed
        self._bias -= by_bias
        stepped = zip(self._rest.items(), of_rest, slopes, strict=True)
        self._rest = {name: tensor.detach() - rate * own for (name, tensor), rate, own in stepped}
        return loss.detach()

    @torch.no_grad()
    def adapted(self) -> list[Tensor]:
        """See :class:`AnalyticSteps`."""
        weight = self._initial - self._followed.mT @ self._support
        return [weight, self._bias.clone(), *(tensor.detach().clone() for tensor in self._rest.values())]


class LayeredGramSteps(AnalyticSteps):
    """Weighted sum and two linear layers of few clips, side by side; nothing stays differentiable.

    The same steps as :class:`~s3prl_metaperser.adaptation.linear.LinearSteps` takes, which it is quicker than where
    steps are many and layers × clips are fewer than dimensions.

    Args:
        statistics: (T, n, L, D).
        labels: of the clips.
        initial: the layers' initialisation.
        layer_weights: a, (L,) before softmax.
    """

    @torch.no_grad()
    def __init__(self, statistics: Tensor, labels: Labels, initial: TwoLayers, layer_weights: Tensor) -> None:
        tasks, self._clips, self._layers, _ = statistics.shape
        self._labels = labels
        self._initial = initial.projector.detach()
        # Rows are (layer, clip) throughout.
        self._statistics = statistics.detach().movedim(2, 1).flatten(1, 2)
        self._gram = (self._statistics @ self._statistics.mT).view(tasks, self._layers, -1)
        self._projected = self._statistics @ self._initial.mT
        self._projector_bias = initial.projector_bias.detach().expand(tasks, 1, -1)
        self._classifier = initial.classifier.detach().expand(tasks, -1, -1)
        self._classifier_bias = initial.classifier_bias.detach().unsqueeze(-1).expand(tasks, -1, -1)
        self._layer_weights = layer_weights.detach().expand(tasks, -1)
        self._moves: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def step(self, rates: StepRates, second_order: bool = True) -> Tensor:
        """See :class:`AnalyticSteps`."""
        of_projector, of_projector_bias, of_classifier, of_classifier_bias, of_layer_weights = rates
        tasks = len(self._classifier)
        classifier = self._classifier
        weights = self._layer_weights.softmax(-1)
        by_layer = self._projected.view(tasks, self._layers, -1)
        hidden = torch.bmm(weights.unsqueeze(1), by_layer).view(tasks, self._clips, -1) + self._projector_bias
        logits = torch.baddbmm(self._classifier_bias, classifier, hidden.mT)
        slope = self._labels.slope(logits.softmax(1))

        bias_slope = slope.sum(-1, keepdim=True)
        of_hidden = torch.bmm(slope.mT, classifier).view(tasks, 1, -1)
        of_weights = torch.bmm(of_hidden, by_layer.mT).squeeze(1)
        followed = -of_projector * slope
        # (T, n, L n): the products of the weighted sum's clips with those of every layer.
        products = torch.bmm(weights.unsqueeze(1), self._gram).view(tasks, self._clips, -1)
        self._moves.append((classifier, (weights.unsqueeze(1).unsqueeze(-1) * followed.unsqueeze(2)).flatten(2)))
        self._projected.baddbmm_(torch.bmm(followed, products).mT, classifier)
        self._classifier = torch.baddbmm(classifier, -of_classifier * slope, hidden)
        self._projector_bias = self._projector_bias - of_projector_bias * torch.bmm(bias_slope.mT, classifier)
        self._classifier_bias = self._classifier_bias - of_classifier_bias * bias_slope
        weights_slope = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        self._layer_weights = self._layer_weights - of_layer_weights * weights_slope
        return self._labels.loss(logits)

    @torch.no_grad()
    def adapted(self) -> list[Tensor]:
        """See :class:`AnalyticSteps`."""
        rows, factors = (torch.cat(part, 1) for part in zip(*self._moves, strict=True))
        projector = torch.baddbmm(self._initial.expand(len(rows), -1, -1), rows.mT @ factors, self._statistics)
        biases = self._projector_bias.squeeze(1), self._classifier_bias.squeeze(-1)
        return [projector, biases[0], self._classifier, biases[1], self._layer_weights]
