"""The systems that are compared (paper section 2.4): how each is initialised, how it adapts, how it predicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from s3prl_metaperser.adaptation.rates import FixedRate, Rates
from s3prl_metaperser.datasets import EPISODES_PER_BATCH
from s3prl_metaperser.episodes import Episode, Examples, generator
from s3prl_metaperser.learner import Learner, TaskBatch
from s3prl_metaperser.metrics import score
from s3prl_metaperser.settings import AdaptationSettings, MetricName, Settings, SystemName
from s3prl_metaperser.upstream.features import Features

Training = Literal["nothing", "aggregated", "episodes"]
"""What a system's initialisation is trained on: not at all, SSL-E's aggregated labels, or meta-training episodes."""

DISPLAY_NAMES: dict[SystemName, str] = {
    "random": "Random",
    "entire_zero": "Entire-Zero",
    "entire_few": "Entire-Few",
    "meta_perser": "Meta-PerSER",
}
"""Names as in Table 1, and in the column ``system`` of results."""


@dataclass(frozen=True)
class Prediction:
    """What a system says of some episodes' queries.

    Attributes:
        probabilities: (episodes, Q, classes).
        support_losses: (episodes' mean at each step,) of the adaptation; empty where nothing adapts.
    """

    probabilities: np.ndarray
    support_losses: np.ndarray


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


class System(ABC):
    """One row of Table 1."""

    training: Training

    def tune(self, learner: Learner, features: Features, dev: Sequence[Episode]) -> str | None:
        """Choose what is left to choose, on the dev annotator's episodes.

        Returns:
            What was chosen, for the log; None where there is nothing to choose.
        """
        return None

    @property
    def needs_tuning(self) -> bool:
        """Whether :meth:`tune` has a choice to make."""
        return False

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


class EntireZero(System):
    """SSL-E as it is, without adaptation."""

    training: Training = "aggregated"

    def predict(self, learner: Learner, features: Features, episodes: Sequence[Episode]) -> Prediction:
        """See :class:`System`."""
        query = task_batch([episode.query for episode in episodes], features, learner.class_weights.device)
        return Prediction(learner.probabilities(query.statistics).cpu().numpy(), np.empty(0))


class AdaptingSystem(System):
    """Takes gradient steps on the support set before it predicts."""

    def __init__(self, adaptation: AdaptationSettings) -> None:
        self.steps = adaptation.steps

    @abstractmethod
    def rates(self, learner: Learner) -> Rates:
        """Give the rates of the adaptation."""

    def predict(self, learner: Learner, features: Features, episodes: Sequence[Episode]) -> Prediction:
        """See :class:`System`."""
        device = learner.class_weights.device
        support = task_batch([episode.support for episode in episodes], features, device)
        query = task_batch([episode.query for episode in episodes], features, device)
        adapted = learner.adapt_to(support, self.rates(learner), self.steps)
        probabilities = learner.probabilities(query.statistics, adapted.params)
        return Prediction(probabilities.cpu().numpy(), (adapted.losses / len(episodes)).cpu().numpy())


class EntireFew(AdaptingSystem):
    """SSL-E fine-tuned on the support set at one rate, the best of some on the dev annotator."""

    training: Training = "aggregated"

    def __init__(self, adaptation: AdaptationSettings, select_by: MetricName) -> None:
        super().__init__(adaptation)
        self.candidates = adaptation.lr if isinstance(adaptation.lr, list) else [adaptation.lr]
        self.select_by = select_by
        self.lr = self.candidates[0]

    @property
    def needs_tuning(self) -> bool:
        """See :class:`System`."""
        return len(self.candidates) > 1

    def rates(self, learner: Learner) -> Rates:
        """See :class:`AdaptingSystem`."""
        return FixedRate(self.lr).to(learner.class_weights.device)

    def tune(self, learner: Learner, features: Features, dev: Sequence[Episode]) -> str | None:
        """See :class:`System`."""
        if not self.needs_tuning:
            return None
        scores = []
        for lr in self.candidates:
            self.lr = lr
            own = []
            for begin in range(0, len(dev), EPISODES_PER_BATCH):
                batch = dev[begin : begin + EPISODES_PER_BATCH]
                probabilities = self.predict(learner, features, batch).probabilities
                own += [score(p, episode.query.targets) for p, episode in zip(probabilities, batch, strict=True)]
            scores.append(float(np.mean([getattr(one, self.select_by) for one in own])))
        self.lr = self.candidates[int(np.argmax(scores))]
        tried = ", ".join(f"{lr:g}: {value:.2f}" for lr, value in zip(self.candidates, scores, strict=True))
        return f"Entire-Few adapts at lr {self.lr:g}, best dev {self.select_by} of {{{tried}}}"


class MetaPerSER(AdaptingSystem):
    """The meta-learned initialisation, adapted at the meta-learned rates."""

    training: Training = "episodes"

    def rates(self, learner: Learner) -> Rates:
        """See :class:`AdaptingSystem`."""
        if learner.rates is None:
            raise ValueError("Meta-PerSER needs a learner with inner-loop rates")
        return learner.rates


def make_system(settings: Settings, seed: int) -> System:
    """Make the system that the settings name.

    Args:
        settings: of the run.
        seed: of Random's guesses.
    """
    match settings.system:
        case "random":
            return Random(seed)
        case "entire_zero":
            return EntireZero()
        case "entire_few":
            return EntireFew(settings.adaptation, settings.select_by)
        case "meta_perser":
            return MetaPerSER(settings.adaptation)
