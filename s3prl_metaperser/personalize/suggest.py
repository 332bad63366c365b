"""Which clips to have labelled next: those that tell most of what a new listener would say of all clips.

A listener is taken for a draw from the population that the training annotators are samples of. How alike two clips are
to listeners, and where listeners part, is what the annotators' own models say, adapted to each one's labels. Measured
against random clips and other ways to choose in docs/findings.md.
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

DISAGREEMENT = 4.0
"""How much more what annotators part on counts than what they agree on."""
NOISE = 1.0
"""Variance of one label, where a clip that all name alike, and surely, has 1. Both were chosen on dev listeners, as was
the criterion (docs/findings.md)."""
DIGITS = 9
"""Gains that are the same to so many digits are the same: the earlier clip is chosen."""
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
        corpus: that it was trained on, as far as its emotions and its training annotators' names tell; labels are
            taken as they are now.
        audio: recordings to choose from.
        number: how many to choose.
        labelled: recordings that are labelled already, of ``audio`` or others: they are not suggested, and what they
            tell is known.
        progress: whether to show how far the upstream is, on stderr.

    Returns:
        Indices into ``audio``, most informative first; all that are not labelled, where there are fewer than
        ``number``.

    Raises:
        MetaPerSERError: for a listener's model, a corpus that has other emotions, or a training annotator whom the
            model was not trained or chosen on, a recording that cannot be read.
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
        _adapted(model, task, [paths[utterance] for utterance in task.examples.utterances], progress)
        for task in _training_annotators(model, corpus)
    ]
    probabilities = _said(model, adapted, clips, progress)
    converged = np.isfinite(probabilities).all(axis=(1, 2))
    if not converged.any():
        raise MetaPerSERError(f"{model.checkpoint} diverges when it is adapted to the annotators it was trained on")
    return choose(probabilities[converged], number, taken)


def choose(probabilities: np.ndarray, number: int, labelled: Sequence[int] = ()) -> list[int]:
    """Choose the clips whose labels leave least to guess of what the listener would say of all clips.

    What a listener says of the clips is taken for a Gaussian process. Two clips' covariance is how alike they are named
    on average, plus how alike the annotators deviate from that average on them: the listener may name what sounds
    alike otherwise than all, and will do so in the ways in which the annotators do. A label tells of all clips that go
    with its own. The next clip is the one that reduces the variances of all clips most, summed, given those before:
    clips that stand for many and are disputed come first, and what is told does not come again. What is said of a clip
    does not matter, so that any number can be chosen at once.

    Source: Cohn, Ghahramani and Jordan 1996, "Active Learning with Statistical Models": the expected variance over all
    inputs, which the design of experiments calls V-optimality.

    Args:
        probabilities: (annotators, clips, classes): what each annotator would say, by a model of their own.
        number: how many to choose.
        labelled: clips that are labelled already.

    Returns:
        Indices of clips, most informative first; all that are not labelled, where there are fewer than ``number``.

    >>> agreed, disputed = [[0.9, 0.1], [0.9, 0.1]], [[0.9, 0.1], [0.1, 0.9]]
    >>> choose(np.array([agreed, disputed, disputed]).swapaxes(0, 1), 3)
    [1, 2, 0]
    """
    views = _views(probabilities)
    free = np.ones(len(views), dtype=bool)
    for clip in labelled:
        free[clip] = False
        views = _after_label(views, clip)
    chosen: list[int] = []
    for _ in range(min(number, int(free.sum()))):
        reduction = ((views @ (views.T @ views)) * views).sum(axis=1) / (NOISE + (views**2).sum(axis=1))
        best = int(np.where(free, reduction.round(DIGITS), -np.inf).argmax())
        free[best] = False
        views = _after_label(views, best)
        chosen.append(best)
    return chosen


def _views(probabilities: np.ndarray) -> np.ndarray:
    """Give the clips as (clips, features), whose inner products are their covariances."""
    named = probabilities.astype(float)
    average = named.mean(axis=0)
    deviations = np.sqrt(DISAGREEMENT / len(named)) * (named - average)
    return np.concatenate([average, *deviations], axis=1)


def _after_label(views: np.ndarray, clip: int) -> np.ndarray:
    """Give views whose inner products are the covariances that are left once a clip is labelled."""
    own = views[clip]
    variance = own @ own
    share = (1 - np.sqrt(NOISE / (NOISE + variance))) / max(variance, np.finfo(float).tiny)
    return views - share * np.outer(views @ own, own)


def _training_annotators(model: Recogniser, corpus: Corpus) -> list[Task]:
    """Give the corpus's labels that training takes, as they are now, at most so many of so many annotators."""
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


def _adapted(model: Recogniser, task: Task, paths: Sequence[Path], progress: bool) -> Params:
    """Adapt all but the upstream to an annotator, and give the tensors that moved, (1, ...) each."""
    learner = model.network.learner
    statistics = model.statistics(paths, progress).unsqueeze(0)
    targets = torch.from_numpy(task.examples.targets).to(statistics.device).unsqueeze(0)
    support = TaskBatch(statistics, targets, targets.new_full(targets.shape[:2], 1 / len(task)))
    # SSL-E has learned no rates; these are what meta-training would start from.
    rates = learner.rates or FixedRate(model.settings.meta.inner_lr).to(statistics.device)
    names = [name for name in learner.meta_names if name not in learner.upstream_names]
    return learner.adapt_to(support, rates, STEPS, [STEPS], names).kept[STEPS]


def _said(model: Recogniser, adapted: Sequence[Params], clips: Sequence[Path], progress: bool) -> np.ndarray:
    """Give each annotator's probabilities of names, (annotators, clips, classes).

    They are what support labels are compared with: not sharpened, which serves decisions alone.
    """
    learner = model.network.learner
    sharpness = float(learner.sharpened(torch.ones(()).to(learner.class_weights.device)).detach())
    parts = []
    for begin in range(0, len(clips), AT_ONCE):
        statistics = model.statistics(clips[begin : begin + AT_ONCE], progress).unsqueeze(0)
        parts.append(np.concatenate([learner.probabilities(statistics, params).cpu().numpy() for params in adapted]))
    said = np.concatenate(parts, axis=1) ** (1 / sharpness)
    probabilities: np.ndarray = said / said.sum(axis=-1, keepdims=True)
    return probabilities
