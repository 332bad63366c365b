"""The loss of one runner batch: of SSL-E, of Multi-Few, or of meta-training, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s3prl_metaperser.episodes import Annotations, Episode, Examples
from s3prl_metaperser.learner import Learner, MetaLoss
from s3prl_metaperser.settings import Query
from s3prl_metaperser.systems import task_batch
from s3prl_metaperser.upstream.features import Features, TrainableFeatures
from s3prl_metaperser.whole_network import WholeNetwork


def minibatch_loss(learner: Learner, features: Features, batch: Examples | Annotations, dropout_seed: int) -> Tensor:
    """Give the loss of a minibatch of aggregated labels (SSL-E) or single annotations (Multi-Few).

    Args:
        learner: the model.
        features: of the utterances.
        batch: utterances and targets.
        dropout_seed: of the upstream's dropout, where it is trained.
    """
    device = learner.class_weights.device
    examples = batch if isinstance(batch, Examples) else batch.examples
    if isinstance(features, TrainableFeatures):
        statistics = features.gather(examples.utterances, dropout_seed)
    else:
        statistics = features.gather(examples.utterances)
    targets = torch.from_numpy(examples.targets).to(device)
    if isinstance(batch, Examples):
        return learner.aggregated_loss(statistics, targets)
    return learner.annotator_loss(statistics, targets, torch.from_numpy(batch.annotators).to(device))


def episodes_loss(
    learner: Learner, features: Features, episodes: Sequence[Episode], query: Query, progress: float
) -> MetaLoss:
    """Give the loss of a batch of training episodes: of one, where the inner loop goes through the upstream.

    Args:
        learner: the initialisation and the inner loop's rates.
        features: of the utterances.
        episodes: one a task.
        query: whether the outer loss is on the support itself.
        progress: share of training that is done.
    """
    combined = query == "combined"
    if isinstance(features, TrainableFeatures) and not learner.naming_only:
        (episode,) = episodes
        network = WholeNetwork(learner, features)
        clips = network.clips(episode.support)
        return network.meta_loss(clips, clips if combined else network.clips(episode.query), progress)
    device = learner.class_weights.device
    support = task_batch([episode.support for episode in episodes], features, device)
    queried = support if combined else task_batch([episode.query for episode in episodes], features, device)
    return learner.meta_loss(support, queried, progress)


class _Differentiated(torch.autograd.Function):
    """A scalar whose gradients are known, for one backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slope: Tensor, gradients: list[Tensor], *_: Tensor) -> Tensor:
        ctx.slope, ctx.gradients = slope, gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        # What nothing else holds on to becomes the tensors' own without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        factor = (slope / ctx.slope).item()
        return (None, None, None, *(gradients if factor == 1 else [factor * one for one in gradients]))


def differentiated(loss: Tensor, learned: Sequence[Tensor], accumulated: int) -> Tensor:
    """Work out a loss's gradient now rather than in the backward pass, while its batch can still be passed over.

    Args:
        loss: scalar.
        learned: all leaves that are to have a gradient of it, each once.
        accumulated: s3prl divides the loss by this. So is what is worked out here: the bits are those of its backward
            pass.

    Returns:
        The loss, which hands its gradient on in the backward pass. Without one, and not finite, where the loss is not,
        or where the gradient's norm is not: clipping by that would make every gradient of the step zero.
    """
    value = loss.detach()
    if not bool(value.isfinite()):
        return value
    slope = torch.ones_like(value) / accumulated
    found = torch.autograd.grad(loss, learned, slope, allow_unused=True)
    reached = [(tensor, one) for tensor, one in zip(learned, found, strict=True) if one is not None]
    tensors, gradients = zip(*reached, strict=True)
    norm = torch.stack([torch.linalg.vector_norm(one) for one in gradients]).norm()
    if not bool(norm.isfinite()):
        return torch.full_like(value, torch.nan)
    return _Differentiated.apply(value, slope, list(gradients), *tensors)
