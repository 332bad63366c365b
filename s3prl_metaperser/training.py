"""The loss of one runner batch: of SSL-E, of Multi-Few, or of meta-training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
