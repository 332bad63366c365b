"""Every listener of a corpus, each with models that have not seen a label of theirs.

What ``personal.py`` and ``suggestions.py`` have in common. SSL-E and Meta-PerSER (``recipe: best``) are trained by
s3prl's runner from the installed configs, once a listener and scenario; of two inner rates the one that scores best on
the dev listener is kept. What is done in the folder is not repeated.

A fold tests an external annotator. So a self-reporting one is tested in a copy of the corpus that calls their ``kind``
external and is the same otherwise: every other annotator keeps the part that they have, and all that trains or is
chosen on is the runner's own. In the unseen scenario such a listener's own session, the only one that they labelled,
is the one that is kept from training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd

from s3prl_metaperser.corpus.manifest import CORPUS_FILE, Corpus, load_corpus, write_corpus
from s3prl_metaperser.episodes import Episode, Examples, Task
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments.grid import Grid
from s3prl_metaperser.experiments.launchers import local_launcher
from s3prl_metaperser.experiments.plan import SSL_E, Override, Plan, Setup, Variant
from s3prl_metaperser.experiments.runs import BEST, Upstream
from s3prl_metaperser.personalize.clips import clip_features
from s3prl_metaperser.personalize.recogniser import Recogniser
from s3prl_metaperser.settings import Recipe, Scenario
from s3prl_metaperser.systems import MetaPerSER

RECIPE: Recipe = "best"
SHOTS, QUERIES, EPISODES, SEED = 32, 64, 10, 1337
"""Of the runs, as in the README. Who labelled less has fewer queries and as many more episodes on dev."""
INNER_LRS = (0.1, 0.03)
"""Of Meta-PerSER, to choose from on dev, as in ``metaperser experiment``."""
TUNING = "tuning.csv"


@dataclass(frozen=True)
class Listener:
    """A listener, and the models that have not seen their labels.

    Attributes:
        name: of the annotator.
        reports_on_self: whether the labels are an actor's of their own recordings.
        scenario: whether the models know the recordings that they are judged on (``seen``) or not.
        corpus: in which this annotator is external.
        ssl_e: the checkpoint of SSL-E.
        meta_perser: that of Meta-PerSER, which started from it.
        labels: of the test listener, in the sessions that they are judged on.
        dev: the same of the listener that the models were chosen on.
        dev_steps: how many steps of adaptation are best on dev.
    """

    name: str
    reports_on_self: bool
    scenario: Scenario
    corpus: Corpus
    ssl_e: Path
    meta_perser: Path
    labels: Task
    dev: Task
    dev_steps: int


def trained_listeners(
    corpus: Path, out: Path, scenarios: Sequence[Scenario], upstream: str, jobs: int = 1
) -> Iterator[Listener]:
    """Train what is not trained yet, listener by listener.

    Args:
        corpus: a prepared folder.
        out: folder for corpora and runs.
        scenarios: which.
        upstream: s3prl's name.
        jobs: runs that are under way at once.

    Yields:
        Each listener with more than 32 labels, in each scenario.

    Raises:
        MetaPerSERError: when the corpus cannot be used, or a run failed.
    """
    whole = load_corpus(corpus)
    counts = whole.annotations["annotator"].value_counts()
    launcher = local_launcher("cpu", threads=1)
    for name in sorted(str(name) for name, count in counts.items() if count > SHOTS):
        folder = external_corpus(whole, corpus, name, out / "corpora" / name)
        setup = _setup(name, folder, out / name, scenarios, int(counts[name]), upstream)
        plan = Plan(setup)
        nodes = {scenario: plan.meta_perser(scenario, 1, Variant(RECIPE), INNER_LRS) for scenario in scenarios}
        outcome = Grid(plan.nodes).run(launcher, jobs)
        if outcome.failures:
            raise MetaPerSERError(str(outcome.failures[0]))
        for scenario, node in nodes.items():
            split = setup.splits[scenario, 1]
            (labels,) = (task for task in split.test if task.annotator == name)
            ssl_e, meta_perser = (setup.folder(run) for run in (f"{scenario}/fold1/{SSL_E}", outcome.chosen[node]))
            tuning = pd.read_csv(meta_perser / TUNING)
            (steps,) = tuning["steps"][tuning["chosen"]]
            print(f"{name}, {scenario}: {len(labels)} labels, {outcome.chosen[node]}, {steps} steps", file=sys.stderr)
            best = ssl_e / BEST, meta_perser / BEST
            yield Listener(name, folder != corpus, scenario, setup.listeners, *best, labels, split.dev[0], int(steps))


def external_corpus(whole: Corpus, directory: Path, name: str, copy: Path) -> Path:
    """Give a folder of the corpus in which an annotator is external: a copy, where they are not.

    Args:
        whole: the corpus.
        directory: where it is.
        name: of the annotator.
        copy: the folder of a copy.
    """
    frame = whole.annotations
    own = frame["annotator"] == name
    if (frame["kind"][own] == "external").all():
        return directory
    if not (copy / CORPUS_FILE).exists():
        kinds = frame["kind"].astype(str).mask(own, "external")
        write_corpus(replace(whole, annotations=frame.assign(kind=kinds)), copy)
    return copy


def _setup(name: str, corpus: Path, out: Path, scenarios: Sequence[Scenario], labels: int, upstream: str) -> Setup:
    frame = load_corpus(corpus).annotations
    sessions = sorted(int(one) for one in frame["session"][frame["annotator"] == name].unique())
    queries = min(QUERIES, labels - SHOTS)
    data: dict[str, object] = {"test_annotator": name}
    if len(sessions) == 1:
        data["test_sessions"] = sessions
    return Setup(
        corpus=corpus,
        out=out,
        upstream=Upstream(upstream, None, "cpu"),
        scenarios=tuple(scenarios),
        folds=1,
        scope="linear",
        shots=SHOTS,
        queries=queries,
        episodes=ceil(EPISODES * QUERIES / queries),
        seed=SEED,
        threads=1,
        overrides=tuple(Override(None, f"downstream_expert.data.{key}", value) for key, value in data.items()),
    )


class Judged:
    """A listener's labelled clips, and models that are judged on them.

    Args:
        model: Meta-PerSER's checkpoint.
        corpus: that the labels are of.
        labels: the listener's.
    """

    def __init__(self, model: Recogniser, corpus: Corpus, labels: Task) -> None:
        audio = corpus.audio_paths()
        self.model = model
        self.paths = [audio[utterance] for utterance in labels.examples.utterances]
        self.targets = labels.examples.targets
        self._features, names = clip_features(model.network, self.paths)
        self._examples = Examples(names, self.targets)

    def personal(self, supports: np.ndarray, queries: np.ndarray, steps: Sequence[int]) -> dict[int, np.ndarray]:
        """Adapt to sets of clips as :meth:`Recogniser.adapt` does, but to all sets side by side.

        Args:
            supports: (draws, K) places of labelled clips.
            queries: (draws, Q) places of those to predict.
            steps: after how many steps of adaptation.

        Returns:
            Steps → (draws, Q, classes) probabilities.
        """
        episodes = [
            Episode("listener", draw, self._examples.take(support), self._examples.take(query))
            for draw, (support, query) in enumerate(zip(supports, queries, strict=True))
        ]
        settings = self.model.settings
        system = MetaPerSER(settings.adaptation, settings.select_by)
        given = self.model.network.learner, self._features, episodes
        predicted = system.adapt_and_predict(*given, None, steps)
        return {taken: prediction.probabilities for taken, prediction in predicted.items()}

    def check(self, support: np.ndarray, query: np.ndarray, steps: int, probabilities: np.ndarray) -> None:
        """Stop unless :meth:`Recogniser.adapt` gives the same (Q, classes) probabilities."""
        emotions = self.model.emotions
        said = [
            [emotion for emotion, ticked in zip(emotions, self.targets[clip], strict=True) if ticked]
            for clip in support
        ]
        own = self.model.adapt([self.paths[clip] for clip in support], said, steps)
        np.testing.assert_allclose(own.probabilities([self.paths[clip] for clip in query]), probabilities, atol=1e-5)
