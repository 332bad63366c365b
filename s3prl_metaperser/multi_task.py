"""Multi-Few: a body that annotators share, and a classification head for each of them (paper section 2.4).

A head belongs to one annotator. In training each annotation's loss goes through its annotator's head only; at meta-test
an unseen annotator gets a new head, from random values, and the body stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from s3prl_metaperser.adaptation.problem import Params
from s3prl_metaperser.episodes import Episode, generator
from s3prl_metaperser.model import Body
from s3prl_metaperser.settings import Activation, Pooling

WEIGHT, BIAS = "weight", "bias"


def _bound(projector_dim: int) -> float:
    """Give the range of ``nn.Linear``'s own initialisation, uniform within ±1/√(inputs) for weights and biases."""
    return float(projector_dim**-0.5)


class AnnotatorHeads(nn.Module):
    """One linear classifier an annotator, stacked so that a batch of annotations needs no loop over annotators.

    Args:
        annotators: how many.
        projector_dim: width of the embeddings.
        classes: number of emotions.
    """

    def __init__(self, annotators: int, projector_dim: int, classes: int) -> None:
        super().__init__()
        bound = _bound(projector_dim)
        self.weight = nn.Parameter(torch.empty(annotators, classes, projector_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(annotators, classes).uniform_(-bound, bound))

    def forward(self, embeddings: Tensor, annotators: Tensor) -> Tensor:
        """Classify each embedding by one annotator's head.

        Args:
            embeddings: (n, projector_dim).
            annotators: (n,) index of each one's annotator.

        Returns:
            (n, classes) logits.
        """
        # index_select, not indexing: its gradient is summed in a fixed order, so equal seeds give equal bits.
        weight, bias = self.weight.index_select(0, annotators), self.bias.index_select(0, annotators)
        return torch.baddbmm(bias.unsqueeze(-1), weight, embeddings.unsqueeze(-1)).squeeze(-1)


class MultiTaskModel(Body):
    """The shared projector and the training annotators' heads.

    Args:
        dim: feature dimension of the upstream.
        projector_dim: width between projector and heads.
        classes: number of emotions.
        pooling: what the input was pooled with.
        annotators: how many have a head.
        activation: as for :class:`Body`.
        dropout: as for :class:`Body`.
    """

    def __init__(
        self,
        dim: int,
        projector_dim: int,
        classes: int,
        pooling: Pooling,
        annotators: int,
        activation: Activation = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, projector_dim, pooling, activation, dropout)
        self.heads = AnnotatorHeads(annotators, projector_dim, classes)

    def forward(self, pooled: Tensor, annotators: Tensor) -> Tensor:
        """Map (n, dim or 2 dim) pooled utterances to (n, classes) logits, each by its (n,) annotator's head."""
        return self.heads(self.embed(pooled), annotators)


def fresh_heads(
    seed: int, episodes: Sequence[Episode], projector_dim: int, classes: int, device: torch.device
) -> Params:
    """Draw a new head for each episode, as ``nn.Linear`` would initialise it.

    A head depends on (seed, annotator, episode) alone, not on which episodes share its batch.

    Returns:
        ``weight`` (episodes, classes, projector_dim) and ``bias`` (episodes, classes).
    """
    bound, shape = _bound(projector_dim), (classes, 1 + projector_dim)
    drawn = np.stack(
        [generator(seed, "head", one.annotator, one.index).uniform(-bound, bound, shape) for one in episodes]
    )
    heads = torch.from_numpy(drawn).float().to(device)
    return {WEIGHT: heads[..., 1:], BIAS: heads[..., 0]}


def head_logits(heads: Params, embeddings: Tensor) -> Tensor:
    """Classify each task's embeddings by its own head.

    Args:
        heads: as :func:`fresh_heads` gives them, for T tasks.
        embeddings: (T, n, projector_dim).

    Returns:
        (T, n, classes) logits.
    """
    return torch.baddbmm(heads[BIAS].unsqueeze(1), embeddings, heads[WEIGHT].mT)
