"""What a listener's labels are to the model: distributions over emotions, and a class-balanced loss on them."""

from __future__ import annotations

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


def example_losses(logits: Tensor, targets: Tensor, class_weights: Tensor) -> Tensor:
    """Class-balanced cross-entropy of each example against its label distribution.

    An example's weight is the target-weighted mean of the class weights.

    Args:
        logits: (..., classes).
        targets: (..., classes), each a distribution.
        class_weights: (classes,).

    Returns:
        (...,) losses.
    """
    cross_entropy = -(targets * F.log_softmax(logits, dim=-1)).sum(dim=-1)
    return (targets * class_weights).sum(dim=-1) * cross_entropy
