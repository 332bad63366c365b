r"""Steps of a linear layer on clips that stay, by their Gram matrix, whatever follows the layer; at test time.

With clips X (n, D), a layer H = X Wᵀ + 1 bᵀ and any loss L(H, rest), the layer's gradient is δᵀ X, δ = ∂L/∂H. A step at
rates α and β moves H by −(α X Xᵀ + β 1 1ᵀ) δ: W does not appear. After the steps, W has moved by −(Σ α δ)ᵀ X. A step
takes n² P multiplications instead of 2 n D P, for P the layer's width: less as long as n < 2 D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from s3prl_metaperser.adaptation.analytic import AnalyticSteps, StepRates
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
