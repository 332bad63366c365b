"""Entire-Sim.: emotions by similarity to their centres in the embedding space (paper section 2.4, equation 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def emotion_centres(embeddings: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Average the support embeddings that are labelled with each emotion.

    A clip with two emotions counts in full for both.

    Args:
        embeddings: (T, n, width) of T tasks' support clips.
        targets: (T, n, classes) label distributions; an emotion is labelled where its mass is above zero.
        weights: (T, n); clips of weight 0 pad tasks that have fewer, and count for nothing.

    Returns:
        (T, classes, width) centres, and (T, classes) bool: whether the emotion has any support clip, and so a centre.
    """
    labelled = ((targets > 0) & (weights > 0).unsqueeze(-1)).to(embeddings.dtype)
    counts = labelled.sum(dim=1)
    return labelled.mT @ embeddings / counts.clamp(min=1).unsqueeze(-1), counts > 0


def similarity_probabilities(queries: Tensor, centres: Tensor, present: Tensor) -> Tensor:
    """Give the softmax of cosine similarities to the centres (equation 1).

    Args:
        queries: (T, Q, width) embeddings.
        centres: (T, classes, width).
        present: (T, classes) bool; at least one of each task.

    Returns:
        (T, Q, classes) probabilities; 0 for an emotion without a centre. A zero vector is similar to nothing, 0.

    >>> queries = torch.tensor([[[3.0, 0.0]]])
    >>> centres = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    >>> similarity_probabilities(queries, centres, torch.tensor([[True, True, False]]))
    tensor([[[0.7311, 0.2689, 0.0000]]])
    """
    similarities = F.normalize(queries, dim=-1) @ F.normalize(centres, dim=-1).mT
    return similarities.masked_fill(~present.unsqueeze(1), -torch.inf).softmax(dim=-1)
