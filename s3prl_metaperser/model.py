"""The downstream model: weighted sum over layers, pooling over frames, two linear layers (paper section 2.1).

With a frozen upstream, the weighted sum commutes with pooling, so an utterance is exactly its per-layer statistics and
frames are never needed again. For mean pooling these are the per-layer means. The standard deviation of a weighted sum
is not the weighted sum of standard deviations; it follows exactly from the covariances between layers, dimension by
dimension: var_d = Σ_{l,k} w_l w_k cov_{lk,d}. That takes L(L+1)/2 rows; ``mean_std_per_layer`` takes the weighted sum
of the layers' deviations instead, which commutes as the means do, can be standardised row by row, and is the same where
there is one layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.naming import Naming, name_emotions
from s3prl_metaperser.settings import Activation, Pooling

# Keeps the square root differentiable for a dimension that is constant over a clip; far below any real deviation.
VARIANCE_FLOOR = 1e-10


def statistics_rows(layers: int, pooling: Pooling) -> int:
    """Count the rows S of an utterance: L means, and by the pooling L deviations or L(L+1)/2 covariances."""
    match pooling:
        case "mean":
            return layers
        case "mean_std_per_layer":
            return 2 * layers
    return layers + layers * (layers + 1) // 2


def pool_frames(hidden_states: Tensor, pooling: Pooling) -> Tensor:
    """Reduce one utterance's frames to its per-layer statistics.

    Args:
        hidden_states: (layers, frames, dim).
        pooling: ``mean``; ``mean_std_per_layer`` for deviations too; ``mean_std`` for covariances between layers too.

    Returns:
        (S, dim) statistics: L rows of means, then L rows of deviations or the covariances' upper triangle row by row.
    """
    means = hidden_states.mean(dim=1)
    if pooling == "mean":
        return means
    if pooling == "mean_std_per_layer":
        return torch.cat([means, hidden_states.std(dim=1, correction=0)])
    centred = hidden_states - means.unsqueeze(1)
    covariances = torch.einsum("itd,jtd->ijd", centred, centred) / hidden_states.shape[1]
    first, second = torch.triu_indices(len(means), len(means), device=means.device)
    return torch.cat([means, covariances[first, second]])


def combine_layers(statistics: Tensor, layer_weights: Tensor | None, layers: int, pooling: Pooling) -> Tensor:
    """Pool the weighted sum of layers, from per-layer statistics.

    Args:
        statistics: (..., S, dim) as :func:`pool_frames` gives them.
        layer_weights: (layers,) before softmax, as s3prl's Featurizer keeps them; None where it selects one layer.
        layers: how many layers the statistics describe.
        pooling: as for :func:`pool_frames`.

    Returns:
        (..., dim) means, or (..., 2 dim) means and standard deviations.
    """
    weights = statistics.new_ones(1) if layer_weights is None else layer_weights.softmax(dim=-1)
    mean = _weighted_sum(weights, statistics[..., :layers, :])
    if pooling == "mean":
        return mean
    if pooling == "mean_std_per_layer":
        return torch.cat([mean, _weighted_sum(weights, statistics[..., layers:, :])], dim=-1)
    first, second = torch.triu_indices(layers, layers, device=statistics.device)
    # A pair of different layers stands once in the triangle and twice in the quadratic form.
    multiplicity = torch.where(first == second, 1.0, 2.0).to(weights.dtype)
    variance = _weighted_sum(weights[first] * weights[second] * multiplicity, statistics[..., layers:, :])
    return torch.cat([mean, variance.clamp(min=VARIANCE_FLOOR).sqrt()], dim=-1)


def _weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """Sum (..., S, dim) rows by (S,) weights.

    One product of a vector and a matrix is several times quicker, there and back, than one for each utterance; it needs
    no copy where the memory is layered, (S, ..., dim).
    """
    layered = rows.movedim(-2, 0)
    return (weights @ layered.flatten(1)).view(layered.shape[1:])


@dataclass(frozen=True)
class Moments:
    """Mean and deviation of utterances' statistics, over the utterances.

    Attributes:
        mean: (S, dim).
        deviation: (S, dim), of the population.
        root_deviation: (S, dim), that of the values' square roots, negative ones taken as 0; None where not asked for.
    """

    mean: Tensor
    deviation: Tensor
    root_deviation: Tensor | None = None

    @classmethod
    def of(cls, rows: Iterable[Tensor], with_roots: bool = False) -> Moments:
        """Take them from S rows of (utterances, dim) each, of which one is needed at a time."""
        means, deviations, roots = [], [], []
        for row in rows:
            means.append(row.mean(dim=0))
            deviations.append(row.std(dim=0, correction=0))
            if with_roots:
                roots.append(row.clamp(min=0).sqrt().std(dim=0, correction=0))
        return cls(torch.stack(means), torch.stack(deviations), torch.stack(roots) if with_roots else None)


class Standardization(nn.Module):
    """Per-layer affine map to mean 0 and deviation 1 over the training utterances; commutes with pooling.

    The deviation is that of the utterances' means. Covariances within an utterance scale by the same factors. Until it
    is fitted, or loaded from a checkpoint, it is the identity; the number of layers is known only then.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(0, 0))
        self.register_buffer("scale", torch.ones(0, 0))

    @property
    def fitted(self) -> bool:
        """Whether it has seen training utterances."""
        return self.mean.numel() > 0

    def fit(self, moments: Moments, layers: int) -> None:
        """Take mean and deviation from the training utterances.

        Args:
            moments: of their statistics.
            layers: how many of the S rows are scaled each by itself; the rest are covariances, which scale with them.
        """
        deviation = moments.deviation[:layers]
        # A dimension that never varies carries nothing; leave it unscaled rather than blow up rounding noise.
        floor = 1e-6 * deviation.max().clamp(min=torch.finfo(deviation.dtype).tiny)
        self.mean = moments.mean[:layers]
        self.scale = torch.where(deviation > floor, deviation, torch.ones_like(deviation))

    def forward(self, statistics: Tensor) -> Tensor:
        """Standardise (utterances, S, dim) statistics.

        Raises:
            MetaPerSERError: when what was loaded is of other features.
        """
        if not self.fitted:
            return statistics
        layers, rows = len(self.mean), statistics.shape[1]
        own = tuple(self.mean.shape)
        if own != tuple(self.scale.shape) or own[1:] != tuple(statistics.shape[2:]) or layers > rows:
            raise MetaPerSERError(
                f"the checkpoint standardises features of the shape {own}, which does not fit this run's, "
                f"{tuple(statistics.shape[1:])}"
            )
        means = (statistics[:, :layers] - self.mean) / self.scale
        if statistics.shape[1] == layers:
            return means
        first, second = torch.triu_indices(layers, layers, device=statistics.device)
        covariances = statistics[:, layers:] / (self.scale[first] * self.scale[second])
        return torch.cat([means, covariances], dim=1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("mean", "scale"):
            if f"{prefix}{name}" in state_dict:
                setattr(self, name, torch.empty_like(state_dict[f"{prefix}{name}"], device=self.mean.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Body(nn.Module):
    """The first linear layer on a pooled utterance, the projector; classifiers stand on it.

    Args:
        dim: feature dimension of the upstream.
        projector_dim: width of the embeddings it gives.
        pooling: what the input was pooled with; with deviations it is twice as wide.
        activation: after the projector; ``none`` is the paper's model.
        dropout: share of the embeddings' dimensions that training leaves out, clip by clip.
    """

    def __init__(
        self, dim: int, projector_dim: int, pooling: Pooling, activation: Activation = "none", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.projector = nn.Linear(dim if pooling == "mean" else 2 * dim, projector_dim)
        self.activation = nn.ReLU() if activation == "relu" else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def embed(self, pooled: Tensor) -> Tensor:
        """Map (..., dim or 2 dim) pooled utterances to (..., projector_dim) embeddings, the classifier's input."""
        return self.dropout(self.activation(self.projector(pooled)))


class ListenerModel(Body):
    """Two linear layers on a pooled utterance, projector and classifier; and a naming, where there is one.

    Args:
        dim: feature dimension of the upstream.
        projector_dim: width between the two layers.
        classes: number of emotions.
        pooling: as for :class:`Body`.
        activation: as for :class:`Body`.
        dropout: as for :class:`Body`.
        naming: whether the classifier says what is expressed, and a listener's naming what it is called.
    """

    def __init__(
        self,
        dim: int,
        projector_dim: int,
        classes: int,
        pooling: Pooling,
        activation: Activation = "none",
        dropout: float = 0.0,
        naming: bool = False,
    ) -> None:
        super().__init__(dim, projector_dim, pooling, activation, dropout)
        self.classifier = nn.Linear(projector_dim, classes)
        self.naming = Naming(classes) if naming else None

    def expressed(self, pooled: Tensor) -> Tensor:
        """Map (..., dim or 2 dim) pooled utterances to the classifier's (..., classes) logits, before any naming."""
        return self.classifier(self.embed(pooled))

    def forward(self, pooled: Tensor) -> Tensor:
        """Map (..., dim or 2 dim) pooled utterances to (..., classes) logits, named where there is a naming."""
        logits = self.expressed(pooled)
        return logits if self.naming is None else name_emotions(logits, self.naming.weight)

    def sharpen(self, logits: Tensor) -> Tensor:
        """Give the logits that decisions are made by: as they are, or sharpened where there is a naming."""
        return logits if self.naming is None else self.naming.sharpen(logits)
