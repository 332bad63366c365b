"""Which clips to have labelled next: those that tell most about a listener who has yet to be known.

A listener is taken for a draw from the population that the training annotators are samples of. What is uncertain of
them is how the annotators' own models, adapted to each one's labels, disagree; and a clip tells more of it the less
the clips chosen before it have told. Measured against random clips and other ways to choose in docs/findings.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from s3prl_metaperser.adaptation.problem import Params
from s3prl_metaperser.adaptation.rates import FixedRate
from s3prl_metaperser.batches import TaskBatch
from s3prl_metaperser.corpus.manifest import Corpus
from s3prl_metaperser.episodes import Task, generator, make_split
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.personalize.recogniser import AT_ONCE, STEPS, Recogniser

NOISE = 0.1
"""Variance of one label; of the square root of a probability, as everything here."""
UNFORESEEN = 0.1
"""Variance of what a listener may hear otherwise than any training annotator, alike in clips of like features. Both
were chosen on dev listeners; from half to twice as much does nearly as well (docs/findings.md)."""
DIGITS = 9
"""Clips that tell the same to so many digits tell the same: the earlier is chosen."""
MOST_ANNOTATORS = 64
"""Of a crowd, those who labelled most: their models are known best, and more of them add little."""
MOST_LABELS = 256
"""Of one annotator, drawn at random: enough for what adapts, and it fits into memory with every upstream."""
SEED = 1337
"""Of that draw."""


def suggest(
    model: Recogniser,
    corpus: Corpus,
    audio: Sequence[Path],
    number: int,
    labelled: Sequence[Path] = (),
    progress: bool = False,
) -> list[int]:
    """Suggest which recordings to label next; see :func:`choose`.

    The model is adapted to each of the annotators that it was trained on. In scope ``entire`` their weighted sums and
    linear layers adapt and the upstream stays as it was trained: clips go through it once then, not once for each
    annotator and step.

    Args:
        model: a trained checkpoint's, not one listener's.
        corpus: that it was trained on.
        audio: recordings to choose from.
        number: how many to choose.
        labelled: recordings that are labelled already, of ``audio`` or others: they are not suggested, and what they
            tell is known.
        progress: whether to show how far the upstream is, on stderr.

    Returns:
        Indices into ``audio``, most informative first; all that are not labelled, where there are fewer than
        ``number``.

    Raises:
        MetaPerSERError: for a listener's model, a corpus that the model was not trained on, a recording that cannot be
            read.
    """
    if model.is_personal:
        raise MetaPerSERError(f"{model.checkpoint} is one listener's model; suggest with the one it was adapted from")
    known = {path.resolve() for path in labelled}
    clips = [*audio, *sorted(known - {path.resolve() for path in audio})]
    taken = [place for place, path in enumerate(clips) if path.resolve() in known]
    if len(taken) == len(clips):
        return []
    paths = corpus.audio_paths()
    adapted = [
        _adapted(model, task, [paths[utterance] for utterance in task.examples.utterances])
        for task in _training_annotators(model, corpus)
    ]
    probabilities, embeddings = _heard(model, adapted, clips, progress)
    converged = np.isfinite(probabilities).all(axis=(1, 2))
    if not converged.any():
        raise MetaPerSERError(f"{model.checkpoint} diverges when it is adapted to the annotators it was trained on")
    return choose(probabilities[converged], embeddings, number, taken)


def choose(probabilities: np.ndarray, embeddings: np.ndarray, number: int, labelled: Sequence[int] = ()) -> list[int]:
    """Choose the clips whose labels have most mutual information with the listener who will give them.

    The square roots of a listener's probabilities are taken for a Gaussian process over the clips. The covariance of
    two clips is that of the annotators' roots, summed over emotions, and a small one by the cosine of their embeddings:
    it spreads the clips where annotators agree, or where there is but one. The mutual information of the labels of
    clips S with the process is 1/2 log det(I + K_S / noise). Greedily, the next clip is the one whose variance is
    greatest given those before; what will be said of them does not matter.

    Source: labels that tell most about what is to be learned, Houlsby et al. 2011 (BALD), and jointly so, Kirsch et al.
    2019 (BatchBALD); for a Gaussian process, and greedily, Srinivas et al. 2010, "Gaussian Process Optimization in the
    Bandit Setting", section 2.

    Args:
        probabilities: (annotators, clips, classes) of each annotator's own model.
        embeddings: (clips, dim) features of the clips, of which directions are compared.
        number: how many to choose.
        labelled: clips that are labelled already.

    Returns:
        Indices of clips, most informative first; all that are not labelled, where there are fewer than ``number``.

    >>> agreed, disputed = [[0.9, 0.1], [0.9, 0.1]], [[0.9, 0.1], [0.1, 0.9]]
    >>> choose(np.array([agreed, disputed, disputed]).swapaxes(0, 1), np.eye(3), 3)
    [1, 2, 0]
    """
    views = _views(probabilities, embeddings)
    variance = (views**2).sum(axis=1)
    told: list[np.ndarray] = []

    def learn_of(clip: int) -> None:
        """Take what a clip's label will tell off the variances: one row of K's Cholesky factor."""
        row = views @ views[clip] - sum(earlier * earlier[clip] for earlier in told)
        told.append(row / np.sqrt(variance[clip] + NOISE))
        variance[:] -= told[-1] ** 2

    free = np.ones(len(views), dtype=bool)
    for clip in labelled:
        free[clip] = False
        learn_of(clip)
    chosen: list[int] = []
    for _ in range(min(number, int(free.sum()))):
        best = int(np.where(free, variance.round(DIGITS), -np.inf).argmax())
        free[best] = False
        learn_of(best)
        chosen.append(best)
    return chosen


def _views(probabilities: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """Give the clips as (clips, features), whose inner products are their covariances."""
    roots = np.sqrt(probabilities.astype(float))
    deviations = (roots - roots.mean(axis=0)) / np.sqrt(len(roots))
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    directions = embeddings / np.maximum(lengths, np.finfo(embeddings.dtype).tiny)
    own = deviations.transpose(1, 0, 2).reshape(len(embeddings), -1)
    return np.concatenate([own, np.sqrt(UNFORESEEN) * directions], axis=1)


def _training_annotators(model: Recogniser, corpus: Corpus) -> list[Task]:
    """Give the labels that the model was trained on, at most so many of so many annotators."""
    settings = model.settings
    tasks = make_split(corpus, settings.scenario, settings.fold, settings.data).train
    unknown = {task.annotator for task in tasks} - set(model.known_annotators)
    if unknown or corpus.emotions != model.emotions:
        what = f"annotator {min(unknown)!r}" if unknown else "emotions"
        raise MetaPerSERError(
            f"corpus {corpus.name!r} has {what} that {model.checkpoint} was not trained on; give the corpus that it was"
        )
    largest = sorted(tasks, key=lambda task: (-len(task), task.annotator))[:MOST_ANNOTATORS]
    return [
        Task(task.annotator, task.examples.take(generator(SEED, task.annotator).permutation(len(task))[:MOST_LABELS]))
        for task in largest
    ]


def _adapted(model: Recogniser, task: Task, paths: Sequence[Path]) -> Params:
    """Adapt all but the upstream to an annotator, and give the tensors that moved, (1, ...) each."""
    learner = model.network.learner
    statistics = model.statistics(paths).unsqueeze(0)
    targets = torch.from_numpy(task.examples.targets).to(statistics.device).unsqueeze(0)
    support = TaskBatch(statistics, targets, targets.new_full(targets.shape[:2], 1 / len(task)))
    # SSL-E has learned no rates; these are what meta-training would start from.
    rates = learner.rates or FixedRate(model.settings.meta.inner_lr).to(statistics.device)
    names = [name for name in learner.meta_names if name not in learner.upstream_names]
    return learner.adapt_to(support, rates, STEPS, [STEPS], names).kept[STEPS]


def _heard(
    model: Recogniser, adapted: Sequence[Params], clips: Sequence[Path], progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Give the adapted models' probabilities, (annotators, clips, classes), and the clips' embeddings, (clips, dim)."""
    learner = model.network.learner
    probabilities, embeddings = [], []
    for begin in range(0, len(clips), AT_ONCE):
        statistics = model.statistics(clips[begin : begin + AT_ONCE], progress).unsqueeze(0)
        embeddings.append(learner.embeddings(statistics)[0].cpu().numpy())
        probabilities.append(
            np.concatenate([learner.probabilities(statistics, params).cpu().numpy() for params in adapted])
        )
    return np.concatenate(probabilities, axis=1), np.concatenate(embeddings)
