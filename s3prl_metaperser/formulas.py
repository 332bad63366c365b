"""Which of the adaptation's formulas apply to a model, and setting out its tasks for them.

Adaptation of any model goes through torch's differentiation (``adaptation/inner_loop.py``). Of a weighted sum and two
linear layers the gradients are written out (``adaptation/head.py``, ``adaptation/linear.py``); where a linear layer
stands on features that stay, its steps are taken on the clips' Gram matrix (``adaptation/gram.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s3prl_metaperser.adaptation import gram, head
from s3prl_metaperser.adaptation.analytic import AnalyticSteps, Labels, TwoLayers
from s3prl_metaperser.adaptation.gram import GramSteps, LayeredGramSteps
from s3prl_metaperser.adaptation.head import HeadSteps
from s3prl_metaperser.adaptation.linear import FactoredProjector, FormedProjector, LayeredClips, LinearSteps, Projector
from s3prl_metaperser.adaptation.problem import Params
from s3prl_metaperser.batches import TaskBatch
from s3prl_metaperser.model import ListenerModel, combine_layers
from s3prl_metaperser.naming import NAMING, name_emotions
from s3prl_metaperser.objective import example_losses, example_weights
from s3prl_metaperser.settings import Pooling


@dataclass(frozen=True)
class Formulas:
    """A model as it is now, all of which adapts.

    Attributes:
        model: projector, classifier, and what stands between and on them.
        layers: of the upstream.
        pooling: what its features were pooled with.
        layer_weights: the weighted sum, (layers,) before softmax; None where the upstream has one layer.
        adapting_layer_weights: the same where it adapts too, else None.
        class_weights: (classes,) of the loss.
    """

    model: ListenerModel
    layers: int
    pooling: Pooling
    layer_weights: Tensor | None
    adapting_layer_weights: Tensor | None
    class_weights: Tensor

    def differentiable(self, support: TaskBatch) -> HeadSteps | LinearSteps:
        """Set out tasks of two linear layers for meta-training."""
        return self._two_layers(support, lambda: FactoredProjector(self.model.projector.weight))

    @torch.no_grad()
    def at_meta_test(self, support: TaskBatch, names: Sequence[str], two_layers: bool) -> AnalyticSteps | None:
        """Set out tasks for adaptation that is not differentiated.

        Args:
            support: the tasks' labelled clips.
            names: of the tensors that adapt: all of the model's, in the order of a step's rates.
            two_layers: whether the model is a weighted sum and two linear layers and nothing else.

        Returns:
            The tasks; None where no formula applies, or none takes less arithmetic.
        """
        tasks, clips = support.weights.shape
        by_rows = clips * self.layers < support.statistics.shape[-1] and self.pooling == "mean"
        if two_layers and by_rows and self.adapting_layer_weights is not None:
            return LayeredGramSteps(
                support.statistics, self._labels(support), self._initial, self.adapting_layer_weights
            )
        if two_layers:
            return self._two_layers(support, lambda: FormedProjector(self.model.projector.weight, tasks))
        if self.adapting_layer_weights is not None or not gram.takes_less(clips, self.model.projector.in_features):
            return None
        own = dict(self.model.named_parameters())
        above = {name: own[name].expand(tasks, *own[name].shape) for name in names if not name.startswith("projector.")}
        projector = self.model.projector

        def loss(hidden: Tensor, rest: Params) -> Tensor:
            losses = example_losses(self._above(hidden, rest), support.targets, self.class_weights)
            return (losses * support.weights).sum()

        return GramSteps(self._pooled(support.statistics), projector.weight, projector.bias, above, loss)

    def logits(self, tasks: HeadSteps | LinearSteps, statistics: Tensor) -> Tensor:
        """Give the (T, n, classes) logits of (T, n, S, dim) statistics, where the tasks are now."""
        if isinstance(tasks, LinearSteps):
            return tasks.logits(self._layered(statistics))
        return tasks.logits(self._pooled(statistics))

    def _two_layers(self, support: TaskBatch, projector: Callable[[], Projector]) -> HeadSteps | LinearSteps:
        labels, own = self._labels(support), self.model.projector
        stays = self.adapting_layer_weights is None
        if stays and head.takes_less(support.weights.shape[1], own.in_features, own.out_features):
            return HeadSteps(self._pooled(support.statistics), labels, self._initial)
        clips = self._layered(support.statistics)
        return LinearSteps(clips, labels, self._initial, self.adapting_layer_weights, projector())

    def _layered(self, statistics: Tensor) -> LayeredClips:
        """Give clips whose weighted sum adapts, or, where it stays, pooled ones as clips of one layer."""
        if self.adapting_layer_weights is None:
            return LayeredClips(self._pooled(statistics).unsqueeze(2), 1)
        return LayeredClips(statistics, self.layers)

    @property
    def _initial(self) -> TwoLayers:
        first, second = self.model.projector, self.model.classifier
        return TwoLayers(first.weight, first.bias, second.weight, second.bias)

    def _labels(self, batch: TaskBatch) -> Labels:
        return Labels(batch.targets, example_weights(batch.targets, self.class_weights) * batch.weights)

    def _pooled(self, statistics: Tensor) -> Tensor:
        """Pool (T, n, S, dim) statistics of all tasks by the shared weighted sum."""
        if self.layer_weights is None or self.pooling == "mean_std":
            return combine_layers(statistics, self.layer_weights, self.layers, self.pooling)
        # Task by task, since a sum over all tasks' clips at once would lose a digit of the weights' gradient.
        weights = self.layer_weights.softmax(dim=-1).expand(len(statistics), -1)
        return LayeredClips(statistics, self.layers).weighted(weights)

    def _above(self, hidden: Tensor, rest: Params) -> Tensor:
        """Give the logits from the (T, n, P) output of the projector."""
        logits = self.model.activation(hidden) @ rest["classifier.weight"].mT + rest["classifier.bias"].unsqueeze(1)
        return name_emotions(logits, rest[NAMING]) if NAMING in rest else logits
