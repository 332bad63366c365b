"""What a listener's labels are to the model: distributions over emotions, and a class-balanced loss on them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def class_balanced_weights(targets: Tensor) -> Tensor:
    r"""Weigh each class by the inverse of its effective number of samples.

    With N annotations of which n_c (in label mass) name class c, and β = (N − 1)/N, the weight is
    (1 − β)/(1 − β^{n_c}), scaled so that the weights sum to the number of classes. A class that nobody named counts
    as one annotation, so that its weight stays finite.

    Args:
        targets: (annotations, classes) label distributions of the training annotators.

    Returns:
        (classes,) weights, float32.

    Source: Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples", equation 2.

    >>> import torch
    >>> class_balanced_weights(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    tensor([0.6038, 1.3962])
    """
    total = targets.shape[0]
    beta = (total - 1) / total
    counts = targets.double().sum(dim=0).clamp(min=1.0)
    weights = (1 - beta) / (1 - beta**counts)
    return (weights * targets.shape[1] / weights.sum()).float()


def example_weights(targets: Tensor, class_weights: Tensor) -> Tensor:
    """Weigh each example by the target-weighted mean of the class weights.

    Args:
        targets: (..., classes), each a distribution.
        class_weights: (classes,).

    Returns:
        (...,) weights.
    """
    return (targets * class_weights).sum(dim=-1)


def example_losses(logits: Tensor, targets: Tensor, class_weights: Tensor) -> Tensor:
    """Class-balanced cross-entropy of each example against its label distribution, by :func:`example_weights`.

    Args:
        logits: (..., classes).
        targets: (..., classes), each a distribution.
        class_weights: (classes,).

    Returns:
        (...,) losses.
    """
    cross_entropy = -(targets * F.log_softmax(logits, dim=-1)).sum(dim=-1)
    return example_weights(targets, class_weights) * cross_entropy


F1_TEMPERATURE = 0.5
"""Of the smooth decision: an emotion whose probability is e^0.5 times the threshold counts as decided for by 0.73."""


def smooth_f1_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Give one minus the mean of smooth miF1 and smooth maF1 (paper section 3.3), decisions made differentiable.

    A clip decides for emotion c to the degree σ((log p_c − log 1/classes) / temperature). miF1 is taken task by task,
    maF1 over all tasks' clips, on the classes that any of them holds.

    Args:
        logits: (T, n, classes).
        targets: (T, n, classes) label distributions; an emotion is ticked where its mass is above zero.
        weights: (T, n), each task's sum to 1; 0 pads tasks that have fewer clips.

    Returns:
        A scalar between 0 and 1.
    """
    above_threshold = logits.log_softmax(dim=-1) + math.log(logits.shape[-1])
    decided = torch.sigmoid(above_threshold / F1_TEMPERATURE) * weights.unsqueeze(-1)
    ticked = (targets > 0).to(logits.dtype) * weights.unsqueeze(-1)
    right = (decided * (targets > 0)).sum(dim=1)
    said, wanted = decided.sum(dim=1), ticked.sum(dim=1)
    micro = 2 * right.sum(dim=-1) / (said + wanted).sum(dim=-1)
    # Chosen before dividing: where nobody ticks and nothing decides, 0/0 would spoil the gradient.
    present = wanted.sum(dim=0) > 0
    macro = 2 * right.sum(dim=0)[present] / (said + wanted).sum(dim=0)[present]
    return 1 - (micro.mean() + macro.mean()) / 2
