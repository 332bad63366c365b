"""What is learned: the model, the inner loop's rates, and the losses that train them.

The learner sees tensors only. The weighted sum over layers belongs to the runner's Featurizer, which saves and
optimises it; the learner holds a reference to its weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from s3prl_metaperser.adaptation.analytic import adapt_analytically
from s3prl_metaperser.adaptation.annealing import ALWAYS_SECOND_ORDER, DerivativeAnnealing
from s3prl_metaperser.adaptation.inner_loop import adapt
from s3prl_metaperser.adaptation.problem import Adapted, Objective, Params
from s3prl_metaperser.adaptation.rates import LSLR, FixedRate, Rates
from s3prl_metaperser.batches import TaskBatch
from s3prl_metaperser.formulas import Formulas
from s3prl_metaperser.model import ListenerModel, Moments, Standardization, combine_layers
from s3prl_metaperser.multi_task import MultiTaskModel
from s3prl_metaperser.naming import NAMING, name_emotions
from s3prl_metaperser.objective import example_losses, smooth_f1_loss
from s3prl_metaperser.settings import Settings, resolved_backend

LAYER_WEIGHTS = "layer_weights"
"""Name of the featurizer's weighted sum among the adapted parameters."""
NEVER_ADAPT = ("naming.log_sharpness",)
"""What the support's likelihood does not depend on."""


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
        self.outer_loss = settings.meta.outer_loss
        shape = (dim, settings.model.projector_dim, len(class_weights), self.pooling)
        between = (settings.model.activation, settings.model.dropout)
        self.model: MultiTaskModel | ListenerModel = (
            MultiTaskModel(*shape, annotators, *between)
            if annotators
            else ListenerModel(*shape, *between, naming=settings.model.naming)
        )
        self.naming_only = settings.meta.adapts == "naming"
        self.standardization = Standardization()
        self.register_buffer("class_weights", class_weights)
        self.upstream_names: list[str] = []
        self.rates: Rates | None = None
        self._meta = settings.meta
        self._learns_rates = settings.system == "meta_perser"
        if not self.needs_upstream:
            self._make_rates()
        self.backend = resolved_backend(settings)
        self._by_formulas = settings.meta.backend != "higher"
        annealing = settings.meta.annealing
        self.annealing = DerivativeAnnealing(annealing.fraction, annealing.over) if annealing else ALWAYS_SECOND_ORDER
        self._shared: dict[str, nn.Parameter | None] = {LAYER_WEIGHTS: None}
        self.layers = 1

    @property
    def needs_upstream(self) -> bool:
        """Whether what the inner loop moves is known only when the upstream is."""
        return self.scope == "entire" and not self.naming_only and not self.upstream_names

    def _make_rates(self) -> None:
        if not self._learns_rates:
            return
        meta = self._meta
        of_upstream = dict.fromkeys(self.upstream_names, meta.upstream_inner_lr)
        if meta.lslr:
            initial = [of_upstream.get(name, meta.inner_lr) for name in self.meta_names]
            self.rates = LSLR(self.meta_names, self.inner_steps, initial)
        else:
            self.rates = FixedRate(meta.inner_lr, of_upstream)

    def bind_upstream(self, names: Sequence[str]) -> None:
        """Take the names of the upstream's tensors that adapt, in scope ``entire``; makes their inner-loop rates.

        An optimizer that is to learn the rates must be made after this.
        """
        if self.needs_upstream:
            self.upstream_names = list(names)
            self._make_rates()

    def fit_standardization(self, moments: Moments) -> None:
        """Take the features' scale from what the training utterances' statistics are as the upstream gives them."""
        self.standardization.fit(moments, self.layers if self.pooling == "mean_std" else len(moments.mean))

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
        names = [name for name, _ in self.model.named_parameters() if name not in NEVER_ADAPT]
        return names if self.scope == "head" else [*names, LAYER_WEIGHTS]

    @property
    def adapting_names(self) -> list[str]:
        """Names of all tensors that the scope lets adapt."""
        return [*self.linear_names, *self.upstream_names]

    @property
    def meta_names(self) -> list[str]:
        """Names of the tensors that Meta-PerSER's inner loop moves, in the order of its rates."""
        return [NAMING] if self.naming_only else self.adapting_names

    def shared_tensors(self) -> Params:
        """Give what is learned here, by name: the model's tensors and the weighted sum."""
        params: Params = dict(self.model.named_parameters())
        if self.layer_weights is not None:
            params[LAYER_WEIGHTS] = self.layer_weights
        return params

    def initialisation(self, names: Collection[str] | None = None) -> Params:
        """Give the tensors that adapt, by name; those of the upstream apart.

        Args:
            names: which; None: the two linear layers, the naming where there is one, and, except in scope ``head``, the
                weighted sum.
        """
        wanted = self.linear_names if names is None else names
        return {name: tensor for name, tensor in self.shared_tensors().items() if name in wanted}

    def aggregated_loss(self, statistics: Tensor, targets: Tensor) -> Tensor:
        """Give the class-balanced loss of the shared model on aggregated labels (SSL-E, paper section 2.3.1).

        Where the model has a naming, the targets are what is expressed, and so is what the classifier says.

        Args:
            statistics: (n, S, dim), standardised.
            targets: (n, classes).
        """
        if isinstance(self.model, MultiTaskModel):
            raise TypeError("aggregated labels need one classifier for all")
        return example_losses(self.model.expressed(self._pooled(statistics)), targets, self.class_weights).mean()

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
        orders = [self.annealing.second_order(step, self.inner_steps, progress) for step in range(self.inner_steps)]
        if self.backend == "analytic":
            formulas = self._formulas
            if formulas is None:
                raise TypeError("the analytic backend is of one classifier for all")
            names = list(self.initialisation(self.meta_names))
            tasks = formulas.differentiable(support)
            taken = [tasks.step(self.rates.at(step, names), order) for step, order in enumerate(orders)]
            losses, logits = torch.stack(taken), formulas.logits(tasks, query.statistics)
        else:
            adapted = adapt(
                self._objective(support, self.meta_names),
                self._stacked(len(support.targets), self.meta_names),
                self.rates,
                self.inner_steps,
                orders.__getitem__,
                backend=self.backend,
            )
            losses = adapted.losses
            logits = self._logits(adapted.params, self._inputs(query.statistics, self.meta_names))
        count = len(query.targets)
        loss = (example_losses(logits, query.targets, self.class_weights) * query.weights).sum() / count
        if self.outer_loss == "cross_entropy_f1":
            loss = loss + smooth_f1_loss(self.sharpened(logits), query.targets, query.weights)
        return MetaLoss(loss, losses / count)

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
            names: which tensors adapt; None: all that may.
        """
        params = self._stacked(len(support.targets), names)
        with no_dropout(self.model):
            formulas = self._formulas
            if formulas is not None and params.keys() == self.initialisation().keys():
                tasks = formulas.at_meta_test(support, list(params), two_layers=self.backend == "analytic")
                if tasks is not None:
                    return adapt_analytically(tasks, list(params), rates, steps, keep)
            return adapt(self._objective(support, params), params, rates, steps, keep=keep)

    @torch.no_grad()
    def embeddings(self, statistics: Tensor) -> Tensor:
        """Give the classifier's input: (..., projector_dim) for (..., S, dim) standardised statistics."""
        with no_dropout(self.model):
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
        params = self._stacked(len(statistics), None) if adapted is None else adapted
        with no_dropout(self.model):
            logits = self._logits(params, self._inputs(statistics, params))
        return self.sharpened(logits).softmax(dim=-1)

    def _stacked(self, tasks: int, names: Collection[str] | None) -> Params:
        return {name: tensor.expand(tasks, *tensor.shape) for name, tensor in self.initialisation(names).items()}

    @property
    def _formulas(self) -> Formulas | None:
        """What of this learner adapts by formulas; None where the settings ask for the reference."""
        if not self._by_formulas or not isinstance(self.model, ListenerModel):
            return None
        adapting = None if self.scope == "head" else self.layer_weights
        return Formulas(self.model, self.layers, self.pooling, self.layer_weights, adapting, self.class_weights)

    def _pooled(self, statistics: Tensor) -> Tensor:
        return combine_layers(statistics, self.layer_weights, self.layers, self.pooling)

    def _inputs(self, statistics: Tensor, names: Collection[str]) -> Tensor:
        """Compute once what stays put while the named tensors adapt: the weighted sum, or all but the naming."""
        if LAYER_WEIGHTS in names and self.layer_weights is not None:
            return statistics
        pooled = self._pooled(statistics)
        return self.model.expressed(pooled) if isinstance(self.model, ListenerModel) and _is_naming(names) else pooled

    def _logits(self, params: Params, inputs: Tensor) -> Tensor:
        if _is_naming(params):
            return name_emotions(inputs, params[NAMING])

        def of_task(own: Params, own_inputs: Tensor) -> Tensor:
            weights = own.pop(LAYER_WEIGHTS, None)
            if weights is not None:
                own_inputs = combine_layers(own_inputs, weights, self.layers, self.pooling)
            return functional_call(self.model, own, own_inputs)

        # Dropout, where there is any, is drawn for each clip of each task.
        return vmap(of_task, randomness="different")(dict(params), inputs)

    def sharpened(self, logits: Tensor) -> Tensor:
        """Give the logits that decisions are made by."""
        return logits if isinstance(self.model, MultiTaskModel) else self.model.sharpen(logits)

    def _objective(self, batch: TaskBatch, names: Collection[str]) -> Objective:
        """Give the sum over tasks of their mean losses, as a function of the named, stacked parameters."""
        inputs = self._inputs(batch.statistics, names)

        def loss(params: Params) -> Tensor:
            losses = example_losses(self._logits(params, inputs), batch.targets, self.class_weights)
            return (losses * batch.weights).sum()

        return Objective([loss], [inputs] if inputs.requires_grad else [])


@contextmanager
def no_dropout(model: nn.Module) -> Iterator[None]:
    """Adaptation and prediction leave nothing out, in whichever mode the runner has put the model."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _is_naming(names: Collection[str]) -> bool:
    return len(names) == 1 and NAMING in names
