"""What is learned: the model, the inner loop's rates, and the losses that train them.

The learner sees tensors only. The weighted sum over layers belongs to the runner's Featurizer, which saves and
optimises it; the learner holds a reference to its weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from s3prl_metaperser.adaptation.annealing import ALWAYS_SECOND_ORDER, DerivativeAnnealing
from s3prl_metaperser.adaptation.inner_loop import Adapted, Objective, Params, adapt
from s3prl_metaperser.adaptation.rates import LSLR, FixedRate, Rates
from s3prl_metaperser.model import ListenerModel, Standardization, combine_layers
from s3prl_metaperser.multi_task import MultiTaskModel
from s3prl_metaperser.objective import example_losses
from s3prl_metaperser.settings import Settings

LAYER_WEIGHTS = "layer_weights"
"""Name of the featurizer's weighted sum among the adapted parameters."""


@dataclass(frozen=True)
class TaskBatch:
    """Labelled clips of T tasks.

    Attributes:
        statistics: (T, n, S, dim), standardised.
        targets: (T, n, classes) label distributions.
        weights: (T, n), each task's sum to 1; 0 pads tasks that have fewer clips.
    """

    statistics: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True)
class MetaLoss:
    """One outer step.

    Attributes:
        loss: scalar, mean over tasks of the query loss after adaptation; to be differentiated.
        support: (inner_steps,) mean support loss before each inner step, detached.
    """

    loss: Tensor
    support: Tensor


class Learner(nn.Module):
    """Model, standardisation and inner-loop rates of one run.

    Args:
        settings: of the run.
        dim: feature dimension of the upstream.
        class_weights: (classes,) of the class-balanced loss.
        annotators: how many training annotators have a head of their own, in Multi-Few; 0: one classifier for all.
    """

    class_weights: Tensor

    def __init__(self, settings: Settings, dim: int, class_weights: Tensor, annotators: int = 0) -> None:
        super().__init__()
        self.scope = settings.scope
        self.pooling = settings.model.pooling
        self.inner_steps = settings.meta.inner_steps
        shape = (dim, settings.model.projector_dim, len(class_weights), self.pooling)
        self.model = MultiTaskModel(*shape, annotators) if annotators else ListenerModel(*shape)
        self.standardization = Standardization()
        self.register_buffer("class_weights", class_weights)
        self.rates: Rates | None = None
        if settings.system == "meta_perser":
            self.rates = (
                LSLR(self.linear_names, self.inner_steps, settings.meta.inner_lr)
                if settings.meta.lslr
                else FixedRate(settings.meta.inner_lr)
            )
        annealing = settings.meta.annealing
        self.annealing = DerivativeAnnealing(annealing.fraction, annealing.over) if annealing else ALWAYS_SECOND_ORDER
        self._shared: dict[str, nn.Parameter | None] = {LAYER_WEIGHTS: None}
        self.layers = 1

    def bind_layer_weights(self, weights: nn.Parameter | None, layers: int) -> None:
        """Take the featurizer's weighted sum: its parameter before softmax, (layers,), or None where it has none."""
        self._shared[LAYER_WEIGHTS] = weights
        self.layers = layers

    @property
    def layer_weights(self) -> nn.Parameter | None:
        """The featurizer's parameter, shared with the runner."""
        return self._shared[LAYER_WEIGHTS]

    @property
    def linear_names(self) -> list[str]:
        """Names of the tensors that adapt without the upstream: two linear layers and, by scope, the weighted sum."""
        names = [name for name, _ in self.model.named_parameters()]
        return [*names, LAYER_WEIGHTS] if self.scope == "linear" else names

    def initialisation(self) -> Params:
        """Give the tensors that adapt, by name: the two linear layers and, in scope ``linear``, the weighted sum."""
        params: Params = dict(self.model.named_parameters())
        if self.scope == "linear" and self.layer_weights is not None:
            params[LAYER_WEIGHTS] = self.layer_weights
        return params

    def aggregated_loss(self, statistics: Tensor, targets: Tensor) -> Tensor:
        """Give the class-balanced loss of the shared model on aggregated labels (SSL-E, paper section 2.3.1).

        Args:
            statistics: (n, S, dim), standardised.
            targets: (n, classes).
        """
        return example_losses(self.model(self._pooled(statistics)), targets, self.class_weights).mean()

    def annotator_loss(self, statistics: Tensor, targets: Tensor, annotators: Tensor) -> Tensor:
        """Give the class-balanced loss of each annotation under its own annotator's head (Multi-Few, section 2.4).

        Args:
            statistics: (n, S, dim), standardised.
            targets: (n, classes).
            annotators: (n,) index of each annotation's annotator.
        """
        logits = self.model(self._pooled(statistics), annotators)
        return example_losses(logits, targets, self.class_weights).mean()

    def meta_loss(self, support: TaskBatch, query: TaskBatch, progress: float) -> MetaLoss:
        """Adapt to each task's support and give the loss on its query (paper section 2.3.4).

        Args:
            support: what the inner loop sees.
            query: what the outer loss sees; the same object for combined-set training.
            progress: share of training that is done, for derivative annealing.
        """
        if self.rates is None:
            raise ValueError("this learner was made without inner-loop rates")
        adapted = adapt(
            self._objective(support),
            self._stacked(len(support.targets)),
            self.rates,
            self.inner_steps,
            lambda step: self.annealing.second_order(step, self.inner_steps, progress),
        )
        tasks = len(query.targets)
        return MetaLoss(self._objective(query)(adapted.params) / tasks, adapted.losses / tasks)

    def adapt_to(
        self,
        support: TaskBatch,
        rates: Rates,
        steps: int,
        keep: Collection[int] = (),
        names: Collection[str] | None = None,
    ) -> Adapted:
        """Adapt to each task's support at meta-test; nothing stays differentiable.

        Args:
            support: the tasks' labelled clips.
            rates: of each tensor and step.
            steps: how many to take.
            keep: after how many steps the parameters are given too.
            names: which tensors of the initialisation adapt; None: all.
        """
        params = self._stacked(len(support.targets))
        chosen = {name: tensor for name, tensor in params.items() if names is None or name in names}
        return adapt(self._objective(support), chosen, rates, steps, keep=keep)

    @torch.no_grad()
    def embeddings(self, statistics: Tensor) -> Tensor:
        """Give the classifier's input: (..., projector_dim) for (..., S, dim) standardised statistics."""
        return self.model.embed(self._pooled(statistics))

    @torch.no_grad()
    def probabilities(self, statistics: Tensor, adapted: Params | None = None) -> Tensor:
        """Predict each clip's emotions.

        Args:
            statistics: (T, n, S, dim), standardised.
            adapted: parameters with a leading task dimension; the shared initialisation, if None.

        Returns:
            (T, n, classes) probabilities.
        """
        params = self._stacked(len(statistics)) if adapted is None else adapted
        return self._logits(params, self._inputs(statistics)).softmax(dim=-1)

    def _stacked(self, tasks: int) -> Params:
        return {name: tensor.expand(tasks, *tensor.shape) for name, tensor in self.initialisation().items()}

    def _pooled(self, statistics: Tensor) -> Tensor:
        return combine_layers(statistics, self.layer_weights, self.layers, self.pooling)

    def _inputs(self, statistics: Tensor) -> Tensor:
        """Combine layers once where the weighted sum stays put during adaptation."""
        return statistics if LAYER_WEIGHTS in self.initialisation() else self._pooled(statistics)

    def _logits(self, params: Params, inputs: Tensor) -> Tensor:
        def of_task(own: Params, own_inputs: Tensor) -> Tensor:
            weights = own.pop(LAYER_WEIGHTS, None)
            if weights is not None:
                own_inputs = combine_layers(own_inputs, weights, self.layers, self.pooling)
            return functional_call(self.model, own, own_inputs)

        return vmap(of_task)(dict(params), inputs)

    def _objective(self, batch: TaskBatch) -> Objective:
        """Give the sum over tasks of their mean losses, as a function of the stacked parameters."""
        inputs = self._inputs(batch.statistics)

        def loss(params: Params) -> Tensor:
            losses = example_losses(self._logits(params, inputs), batch.targets, self.class_weights)
            return (losses * batch.weights).sum()

        return loss
