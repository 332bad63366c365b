"""A listener's naming: from what a clip expresses to what this listener calls it.

The body gives p(z | clip), a distribution over what is expressed. A naming N is a row-stochastic matrix, and
p(c | clip) = Σ_z p(z | clip) N[z, c]. It is all that has to be learned of a listener, and small enough for 8 labels.

Predictions are compared with the threshold 1/classes (paper section 3.3), which well-calibrated probabilities pass too
easily: a clip that one listener in five calls sad would be called sad. Sharpening, p^s / Σ p^s with a learned exponent
s, moves the threshold to where it serves the scores. It does not change what the support's likelihood is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NAMING = "naming.weight"
"""Name of a listener's naming among the tensors that adapt."""
SCALE = 8.0
"""Rows are kept as logits divided by this: a step of the inner loop at rate α moves them as one at rate 64 α would.
With about four labels an expressed emotion, weighed 1/K each, rates of the size that suits other tensors do nothing."""
FLOOR = 1e-6
"""Probability that nothing falls below: a listener may always slip."""
INITIAL_SHARPNESS = 2.0
UNTAUGHT = 4.0
"""Logit of a row's own name where no labels have taught the naming yet."""


class Naming(nn.Module):
    """Population naming, which is where a listener's own starts from, and the learned sharpness.

    Args:
        classes: number of emotions, expressed and named alike.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(UNTAUGHT / SCALE * torch.eye(classes))
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(INITIAL_SHARPNESS)))

    @torch.no_grad()
    def teach(self, naming: Tensor) -> None:
        """Set the population naming from a (classes, classes) row-stochastic matrix without zeros."""
        self.weight.copy_(naming.log() / SCALE)

    def sharpen(self, log_probabilities: Tensor) -> Tensor:
        """Give logits of the sharpened probabilities."""
        return log_probabilities * self.log_sharpness.exp()


def name_emotions(expressed: Tensor, weight: Tensor) -> Tensor:
    """Mix a naming's rows by what is expressed.

    Args:
        expressed: (..., n, classes) logits of what each clip expresses.
        weight: (..., classes, classes) naming as :class:`Naming` keeps it; leading dimensions as in ``expressed``.

    Returns:
        (..., n, classes) log probabilities of names.
    """
    named = expressed.softmax(dim=-1) @ (SCALE * weight).softmax(dim=-1)
    return named.clamp(min=FLOOR).log()
