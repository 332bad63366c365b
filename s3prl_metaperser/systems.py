"""The systems that are compared (paper section 2.4): how each is initialised, how it adapts, how it predicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from s3prl_metaperser.adaptation.inner_loop import adapt
from s3prl_metaperser.adaptation.problem import Adapted, Params
from s3prl_metaperser.adaptation.rates import FixedRate, Rates
from s3prl_metaperser.batches import TaskBatch
from s3prl_metaperser.episodes import Episode, Examples, Split, Task, generator
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.multi_task import fresh_heads, head_logits
from s3prl_metaperser.objective import example_losses
from s3prl_metaperser.prediction import Prediction, joined
from s3prl_metaperser.settings import AdaptationSettings, MetricName, Scope, Settings, SystemName
from s3prl_metaperser.similarity import emotion_centres, similarity_probabilities
from s3prl_metaperser.tuning import Candidate, Rate, Tuning, tune
from s3prl_metaperser.upstream.features import Features, TrainableFeatures
from s3prl_metaperser.whole_network import WholeNetwork, adapt_and_predict

Training = Literal["nothing", "aggregated", "annotators", "episodes", "listener"]
"""What a system's initialisation is trained on: not at all, SSL-E's aggregated labels, each annotator's labels under a
head of its own, meta-training episodes, or one listener's labels besides."""

DISPLAY_NAMES: dict[SystemName, str] = {
    "random": "Random",
    "linear_few": "Linear-Few",
    "entire_few": "Entire-Few",
    "entire_zero": "Entire-Zero",
    "multi_few": "Multi-Few",
    "entire_sim": "Entire-Sim.",
    "meta_perser": "Meta-PerSER",
    "reference": "Reference (all labels)",
    "personal": "Personal model",
}
"""Names in the order of Table 1, as in the column ``system`` of results; the last two are no contenders."""

_COINCIDE: dict[Scope, dict[SystemName, SystemName]] = {
    "head": {"linear_few": "entire_few"},
    "linear": {"linear_few": "entire_few"},
    "entire": {},
}


def coinciding_systems(scope: Scope) -> dict[SystemName, SystemName]:
    """Say which systems are one and the same in a scope: system → the one it equals.

    Linear-Few is set apart from Entire-Few by an upstream that stays frozen; scopes ``head`` and ``linear`` freeze it
    for all.
    """
    return dict(_COINCIDE[scope])


def task_batch(examples: Sequence[Examples], features: Features, device: torch.device) -> TaskBatch:
    """Stack tasks' examples, padding those that have fewer with weight 0."""
    longest = max(len(own) for own in examples)
    padded = [[*own.utterances, *[own.utterances[0]] * (longest - len(own))] for own in examples]
    statistics = features.gather([utterance for own in padded for utterance in own])
    targets = np.zeros((len(examples), longest, examples[0].targets.shape[1]), dtype=np.float32)
    weights = np.zeros((len(examples), longest), dtype=np.float32)
    for row, own in enumerate(examples):
        targets[row, : len(own)] = own.targets
        weights[row, : len(own)] = 1 / len(own)
    return TaskBatch(
        statistics.view(len(examples), longest, *statistics.shape[1:]),
        torch.from_numpy(targets).to(device),
        torch.from_numpy(weights).to(device),
    )


def _supports(learner: Learner, features: Features, episodes: Sequence[Episode]) -> TaskBatch:
    return task_batch([episode.support for episode in episodes], features, learner.class_weights.device)


def _queries(learner: Learner, features: Features, episodes: Sequence[Episode]) -> TaskBatch:
    return task_batch([episode.query for episode in episodes], features, learner.class_weights.device)


class System(ABC):
    """One row of Table 1."""

    training: Training

    def tune(self, learner: Learner, features: Features, dev: Sequence[Episode]) -> Tuning | None:
        """Choose what is left to choose, on the dev annotators' episodes.

        Returns:
            What was tried and chosen; None where there is nothing to choose.
        """
        return None

    @abstractmethod
    def predict(self, learner: Learner, features: Features, episodes: Sequence[Episode]) -> Prediction:
        """Adapt to each episode's support where the system adapts, and predict its query."""


class Random(System):
    """Guesses: the softmax of standard normal logits, whatever the clip.

    Table 1's Random row is the same for every upstream, so it is chance, not an untrained network.
    """

    training: Training = "nothing"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def predict(self, learner: Learner, features: Features, episodes: Sequence[Episode]) -> Prediction:
        """See :class:`System`."""
        logits = np.stack(
            [
                generator(self.seed, "random", episode.annotator, episode.index).standard_normal(
                    episode.query.targets.shape
                )
                for episode in episodes
            ]
        )
        exponentials = np.exp(logits)
        return Prediction(exponentials / exponentials.sum(axis=-1, keepdims=True), np.empty(0))


class Unadapted(System):
    """A model as it is."""

    def predict(self, learner: Learner, features: Features, episodes: Sequence[Episode]) -> Prediction:
        """See :class:`System`."""
        query = _queries(learner, features, episodes)
        return Prediction(learner.probabilities(query.statistics).cpu().numpy(), np.empty(0))


class EntireZero(Unadapted):
    """SSL-E as it is, without adaptation."""

    training: Training = "aggregated"


class Personal(Unadapted):
    """One listener's model, which has been adapted to that listener's labels, on other listeners as it is."""

    training: Training = "listener"


class EntireSim(System):
    """SSL-E's embeddings, compared with the support's centre of each emotion (equation 1)."""

    training: Training = "aggregated"

    def predict(self, learner: Learner, features: Features, episodes: Sequence[Episode]) -> Prediction:
        """See :class:`System`."""
        support, query = _supports(learner, features, episodes), _queries(learner, features, episodes)
        centres, present = emotion_centres(learner.embeddings(support.statistics), support.targets, support.weights)
        probabilities = similarity_probabilities(learner.embeddings(query.statistics), centres, present)
        return Prediction(probabilities.cpu().numpy(), np.empty(0))


class AdaptingSystem(System):
    """Takes gradient steps on the support set before it predicts.

    Args:
        adaptation: rates and numbers of steps, to choose from on dev where there are several.
        select_by: the dev metric that chooses.
    """

    def __init__(self, adaptation: AdaptationSettings, select_by: MetricName) -> None:
        self.lrs: list[Rate] = [*adaptation.lr] if isinstance(adaptation.lr, list) else [adaptation.lr]
        self.steps = adaptation.steps if isinstance(adaptation.steps, list) else [adaptation.steps]
        self.select_by = select_by
        self.chosen = Candidate(self.lrs[0], self.steps[0])

    @abstractmethod
    def adapt_and_predict(
        self, learner: Learner, features: Features, episodes: Sequence[Episode], lr: Rate, steps: Sequence[int]
    ) -> dict[int, Prediction]:
        """Adapt once to each episode's support, and predict its query after each of some numbers of steps."""

    def predict(self, learner: Learner, features: Features, episodes: Sequence[Episode]) -> Prediction:
        """See :class:`System`."""
        steps = self.chosen.steps
        return self.adapt_and_predict(learner, features, episodes, self.chosen.lr, [steps])[steps]

    def tune(self, learner: Learner, features: Features, dev: Sequence[Episode]) -> Tuning | None:
        """See :class:`System`."""
        if len(self.lrs) * len(self.steps) == 1:
            return None

        def predict(episodes: Sequence[Episode], lr: Rate, steps: Sequence[int]) -> dict[int, Prediction]:
            return self.adapt_and_predict(learner, features, episodes, lr, steps)

        tuning = tune(predict, self.lrs, self.steps, dev, self.select_by)
        self.chosen = tuning.best
        return tuning


def _after_each(adapted: Adapted, episodes: int, probabilities: Callable[[Params], Tensor]) -> dict[int, Prediction]:
    losses = (adapted.losses / episodes).cpu().numpy()
    return {
        steps: Prediction(probabilities(params).cpu().numpy(), losses[:steps]) for steps, params in adapted.kept.items()
    }


class FineTuning(AdaptingSystem):
    """Gradient descent on the support from the shared initialisation, at one rate for all tensors."""

    training: Training = "aggregated"

    def rates(self, learner: Learner, lr: Rate) -> Rates:
        """Give the rates of the adaptation."""
        if lr is None:
            raise ValueError("fine-tuning needs a rate")
        return FixedRate(lr).to(learner.class_weights.device)

    def names(self, learner: Learner) -> list[str]:
        """Name the tensors that adapt."""
        return learner.adapting_names

    def adapt_and_predict(
        self, learner: Learner, features: Features, episodes: Sequence[Episode], lr: Rate, steps: Sequence[int]
    ) -> dict[int, Prediction]:
        """See :class:`AdaptingSystem`."""
        names = self.names(learner)
        if not set(names).isdisjoint(learner.upstream_names):
            if not isinstance(features, TrainableFeatures):
                raise TypeError("adapting the upstream takes waveforms, not features")
            network = WholeNetwork(learner, features)
            return adapt_and_predict(network, episodes, self.rates(learner, lr), steps, names)
        support, query = _supports(learner, features, episodes), _queries(learner, features, episodes)
        adapted = learner.adapt_to(support, self.rates(learner, lr), max(steps), steps, names)
        return _after_each(adapted, len(episodes), lambda params: learner.probabilities(query.statistics, params))


class EntireFew(FineTuning):
    """SSL-E fine-tuned on the support set: everything that the scope lets adapt."""


class LinearFew(FineTuning):
    """Weighted sum and linear layers of SSL-E fine-tuned on the support set; the upstream is frozen in every scope."""

    def names(self, learner: Learner) -> list[str]:
        """See :class:`FineTuning`."""
        return learner.linear_names


class MetaPerSER(FineTuning):
    """The meta-learned initialisation, adapted at the meta-learned rates; only the number of steps is chosen."""

    training: Training = "episodes"

    def __init__(self, adaptation: AdaptationSettings, select_by: MetricName) -> None:
        super().__init__(adaptation, select_by)
        self.lrs = [None]
        self.chosen = Candidate(None, self.steps[0])

    def names(self, learner: Learner) -> list[str]:
        """See :class:`FineTuning`."""
        return learner.meta_names

    def rates(self, learner: Learner, lr: Rate) -> Rates:
        """See :class:`FineTuning`."""
        if learner.rates is None:
            raise ValueError("Meta-PerSER needs a learner with inner-loop rates")
        return learner.rates


class MultiFew(AdaptingSystem):
    """A new head on the body that the training annotators' heads have shaped; the body stays as it is.

    Args:
        adaptation: as for :class:`AdaptingSystem`.
        select_by: as for :class:`AdaptingSystem`.
        seed: of the heads' random initialisation.
    """

    training: Training = "annotators"

    def __init__(self, adaptation: AdaptationSettings, select_by: MetricName, seed: int) -> None:
        super().__init__(adaptation, select_by)
        self.seed = seed

    def adapt_and_predict(
        self, learner: Learner, features: Features, episodes: Sequence[Episode], lr: Rate, steps: Sequence[int]
    ) -> dict[int, Prediction]:
        """See :class:`AdaptingSystem`."""
        if lr is None:
            raise ValueError("Multi-Few needs a rate")
        support, query = _supports(learner, features, episodes), _queries(learner, features, episodes)
        embeddings, queries = learner.embeddings(support.statistics), learner.embeddings(query.statistics)
        class_weights = learner.class_weights
        heads = fresh_heads(self.seed, episodes, embeddings.shape[-1], len(class_weights), class_weights.device)

        def loss(params: Params) -> Tensor:
            losses = example_losses(head_logits(params, embeddings), support.targets, class_weights)
            return (losses * support.weights).sum()

        adapted = adapt(loss, heads, FixedRate(lr).to(class_weights.device), max(steps), keep=steps)
        return _after_each(adapted, len(episodes), lambda params: head_logits(params, queries).softmax(dim=-1))


MOST_REFERENCE_CLIPS = 8192
"""Support clips that the reference fine-tunes on side by side; with 13 layers of 768 dimensions 0.3 GB."""


class Reference(FineTuning):
    """No contender: SSL-E fine-tuned on everything that the listener labelled except the episode's query.

    It says how much there is to gain from a listener's labels, of which the systems see K.

    Args:
        settings: rates and numbers of steps, to choose from on dev.
        select_by: as for :class:`AdaptingSystem`.
        listeners: dev and test annotators' tasks with all labels that may be used of them.
    """

    def __init__(self, settings: AdaptationSettings, select_by: MetricName, listeners: Sequence[Task]) -> None:
        super().__init__(settings, select_by)
        self.labels = {task.annotator: task.examples for task in listeners}

    def support(self, episode: Episode) -> Examples:
        """Give the listener's labels without those of the episode's query."""
        own, queried = self.labels[episode.annotator], set(episode.query.utterances)
        support = own.take(np.flatnonzero([utterance not in queried for utterance in own.utterances]))
        if queried.intersection(support.utterances) or len(support) + len(queried) != len(own):
            raise AssertionError(f"query and support of {episode.annotator} do not part the listener's labels")
        return support

    def adapt_and_predict(
        self, learner: Learner, features: Features, episodes: Sequence[Episode], lr: Rate, steps: Sequence[int]
    ) -> dict[int, Prediction]:
        """See :class:`AdaptingSystem`."""
        supported = [replace(episode, support=self.support(episode)) for episode in episodes]
        fine_tuned = super().adapt_and_predict
        parts = [fine_tuned(learner, features, part, lr, steps) for part in _of_clips(supported)]
        return {number: joined([part[number] for part in parts]) for number in steps}


def _of_clips(episodes: Sequence[Episode]) -> Iterator[list[Episode]]:
    """Deal episodes, in order, into parts of at most ``MOST_REFERENCE_CLIPS`` support clips, padding included."""
    part: list[Episode] = []
    for episode in episodes:
        longest = max(len(one.support) for one in [*part, episode])
        if part and longest * (len(part) + 1) > MOST_REFERENCE_CLIPS:
            yield part
            part = []
        part.append(episode)
    yield part


TRAINED_ON: dict[SystemName, Training] = {
    "random": Random.training,
    "linear_few": LinearFew.training,
    "entire_few": EntireFew.training,
    "entire_zero": EntireZero.training,
    "multi_few": MultiFew.training,
    "entire_sim": EntireSim.training,
    "meta_perser": MetaPerSER.training,
    "reference": Reference.training,
    "personal": Personal.training,
}
"""System → what its initialisation is trained on."""


def make_system(settings: Settings, seed: int, split: Split) -> System:
    """Make the system that the settings name.

    Args:
        settings: of the run.
        seed: of Random's guesses and Multi-Few's new heads.
        split: gives the labels that the reference learns from.
    """
    adaptation = settings.adaptation, settings.select_by
    match settings.system:
        case "random":
            return Random(seed)
        case "linear_few":
            return LinearFew(*adaptation)
        case "entire_few":
            return EntireFew(*adaptation)
        case "entire_zero":
            return EntireZero()
        case "multi_few":
            return MultiFew(*adaptation, seed)
        case "entire_sim":
            return EntireSim()
        case "meta_perser":
            return MetaPerSER(*adaptation)
        case "reference":
            return Reference(settings.reference, settings.select_by, split.listeners)
        case "personal":
            return Personal()
