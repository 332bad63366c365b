"""Tasks, splits and episodes: which listener's labels are learned from, and which are kept to judge by.

One annotator is one task. A split deals annotators and sessions into training, dev and test (paper section 3.2). An
episode draws K support and Q query clips from one task; the draw depends on (seed, annotator, episode) and on nothing
else, so that every system meets the same episodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from s3prl_metaperser.corpus.csv_file import categorical
from s3prl_metaperser.corpus.manifest import Corpus
from s3prl_metaperser.errors import MetaPerSERError, suggest
from s3prl_metaperser.settings import DataSettings, Query, Scenario

LARGEST_ROTATION = 12
"""Up to this many external annotators each is a fold of its own, as in the paper; more are dealt into groups."""
GROUPS = 5
LONG_TASK = 1000
"""Above this many labels of an annotator, meta-training draws no longer shuffle all of them, which would take longer
than all else in a draw."""


@dataclass(frozen=True)
class Examples:
    """Labelled clips of one annotator, or of several aggregated.

    Attributes:
        utterances: (n,) ids.
        targets: (n, classes) float32 label distributions.
    """

    utterances: tuple[str, ...]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.utterances)

    def take(self, rows: np.ndarray) -> Examples:
        """Select rows, in the order given."""
        return Examples(tuple(self.utterances[row] for row in rows), self.targets[rows])


@dataclass(frozen=True)
class Annotations:
    """Single annotations of several annotators, each with whose it is.

    Attributes:
        examples: (n,) clips and what was said of them; a clip comes once for each annotator who labelled it.
        annotators: (n,) int64 index of the annotator, in an order that goes with it.
    """

    examples: Examples
    annotators: np.ndarray

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, rows: np.ndarray) -> Annotations:
        """Select rows, in the order given."""
        return Annotations(self.examples.take(rows), self.annotators[rows])


@dataclass(frozen=True)
class Task:
    """One annotator's labelled clips, sorted by utterance."""

    annotator: str
    examples: Examples

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class Split:
    """Who trains, who chooses, who is tested.

    Attributes:
        scenario: ``seen`` or ``unseen``.
        fold: from 1.
        train: the training annotators' tasks.
        dev: the dev annotators' tasks (one, unless folds are groups).
        test: the test annotators' tasks.
        listeners: for each dev and test annotator all labels that may be used of them, sorted by utterance: a dev
            annotator's outside the test sessions, a test annotator's everywhere. The reference model learns from them.
        aggregated: each training utterance with the mean of the training annotators' distributions, for SSL-E.
        kept_sessions: sessions whose recordings only the test annotators have; empty where all are seen.
        left_out: annotators that take no part, with the reason.
    """

    scenario: Scenario
    fold: int
    train: tuple[Task, ...]
    dev: tuple[Task, ...]
    test: tuple[Task, ...]
    listeners: tuple[Task, ...]
    aggregated: Examples
    kept_sessions: frozenset[int]
    left_out: dict[str, str]

    def annotation_targets(self) -> np.ndarray:
        """Give every single training annotation's distribution, (annotations, classes), for the class weights."""
        return np.concatenate([task.examples.targets for task in self.train])

    def annotations(self) -> Annotations:
        """Give every single training annotation, for Multi-Few; annotators are numbered as in ``train``."""
        utterances = tuple(utterance for task in self.train for utterance in task.examples.utterances)
        annotators = np.repeat(np.arange(len(self.train)), [len(task) for task in self.train])
        return Annotations(Examples(utterances, self.annotation_targets()), annotators)


@dataclass(frozen=True)
class Episode:
    """One few-shot problem: adapt on the support, judge on the query; the two are disjoint at meta-test."""

    annotator: str
    index: int
    support: Examples
    query: Examples


def make_split(corpus: Corpus, scenario: Scenario, fold: int, data: DataSettings) -> Split:
    """Deal a corpus into training, dev and test annotators and sessions.

    Seen: everybody's labels on all sessions. Unseen: the test sessions belong to the test annotator alone; training
    and dev use the others. The external annotators rotate: fold i tests the i-th and chooses on the next.

    Args:
        corpus: a validated corpus.
        scenario: ``seen`` or ``unseen``.
        fold: from 1; the test annotator's own where ``data`` names one.
        data: thresholds, number of folds, test sessions.

    Returns:
        The split. No label of a test or dev annotator is in ``train`` or ``aggregated``; in ``unseen`` no utterance
        of a test session is in ``train``, ``aggregated`` or ``dev``.

    Raises:
        MetaPerSERError: when the fold or a session does not exist, or nobody is left to train, choose or test on.
    """
    frame = corpus.annotations
    targets = corpus.targets()
    annotators = categorical(frame["annotator"])
    left_out = _too_few(annotators, data)
    kept = ~annotators.isin(list(left_out))
    fold, test_names, dev_names = _fold_annotators(_external(corpus, data), fold, data)

    session = frame["session"].to_numpy()
    test_sessions = _test_sessions(session, data.test_sessions)
    kept_sessions = frozenset(test_sessions) if scenario == "unseen" else frozenset()
    reserved = np.isin(session, list(kept_sessions))
    of_test, of_dev = annotators.isin(test_names), annotators.isin(dev_names)

    train_rows = kept & ~of_test & ~of_dev & ~reserved
    dev_rows = kept & of_dev & ~reserved
    test_rows = kept & of_test & (reserved if scenario == "unseen" else True)
    labels = np.bincount(annotators.codes[train_rows], minlength=len(annotators.categories))
    of_train = train_rows & (labels > 1)[annotators.codes]
    split = Split(
        scenario=scenario,
        fold=fold,
        aggregated=_aggregate(frame, targets, of_train),
        train=_tasks(frame, targets, of_train),
        dev=_tasks(frame, targets, dev_rows),
        test=_tasks(frame, targets, test_rows),
        listeners=_tasks(frame, targets, dev_rows | (kept & of_test)),
        kept_sessions=kept_sessions,
        left_out=left_out
        | _unused(
            annotators,
            of_train | dev_rows | test_rows,
            (kept & of_test, "no labels in the test sessions"),
            (train_rows, f"fewer than 2 labels{' outside the test sessions' if kept_sessions else ''}"),
            (kept, "no labels outside the test sessions"),
        ),
    )
    if scenario == "unseen" and len(np.unique(session)) == 1:
        raise MetaPerSERError(
            f"corpus {corpus.name!r} is all of one session, so scenario unseen has no recordings to keep from "
            "training; give its clips sessions (the column session of `metaperser prepare table`), or use scenario seen"
        )
    for role, tasks in (("train", split.train), ("choose (dev)", split.dev), ("test", split.test)):
        if not tasks:
            raise MetaPerSERError(
                f"corpus {corpus.name!r}, scenario {scenario}, fold {fold}: no annotator is left to {role} on; "
                f"left out: {_listing(split.left_out)}; lower data.min_annotations or change data.test_sessions"
            )
    _assert_no_leak(frame, split, set(test_names), set(dev_names))
    return split


def fold_count(corpus: Corpus, data: DataSettings) -> int:
    """Count the folds of a corpus: one for each external annotator with enough labels, or groups of a crowd."""
    return _fold_count(_external(corpus, data), data.fold_count)


def _too_few(annotators: pd.Categorical, data: DataSettings) -> dict[str, str]:
    return {
        str(name): f"{count} labels, fewer than min_annotations {data.min_annotations}"
        for name, count in zip(annotators.categories, np.bincount(annotators.codes), strict=True)
        if count < data.min_annotations
    }


def _external(corpus: Corpus, data: DataSettings) -> list[str]:
    annotators = categorical(corpus.annotations["annotator"])
    names = set(annotators[(corpus.annotations["kind"] == "external").to_numpy()].unique())
    return sorted(names - set(_too_few(annotators, data)))


def _fold_count(external: list[str], wanted: int | None) -> int:
    if len(external) < 2:
        raise MetaPerSERError(
            f"folds need at least 2 external annotators with enough labels, found {len(external)}"
            f" ({', '.join(external) or 'none'}); lower data.min_annotations"
        )
    count = wanted or (len(external) if len(external) <= LARGEST_ROTATION else GROUPS)
    if not 2 <= count <= len(external):
        raise MetaPerSERError(
            f"data.fold_count {count} does not fit {len(external)} external annotators; expected 2 to {len(external)}"
        )
    return count


def _fold_annotators(external: list[str], fold: int, data: DataSettings) -> tuple[int, list[str], list[str]]:
    count = _fold_count(external, data.fold_count)
    if data.test_annotator is not None:
        if data.test_annotator not in external:
            raise MetaPerSERError(
                f"data.test_annotator {data.test_annotator!r} is no external annotator with enough labels; "
                f"{suggest(data.test_annotator, external)}"
            )
        fold = external.index(data.test_annotator) % count + 1
    if fold > count:
        raise MetaPerSERError(f"fold {fold} does not exist; this corpus has fold1 to fold{count}")
    return fold, external[fold - 1 :: count], external[fold % count :: count]


def _test_sessions(session: np.ndarray, wanted: list[int] | None) -> list[int]:
    present = np.unique(session).tolist()
    if wanted is None:
        return present[-1:]
    missing = [value for value in wanted if value not in present]
    if missing:
        raise MetaPerSERError(f"data.test_sessions names session {missing[0]}; this corpus has {present}")
    return wanted


def _tasks(frame: pd.DataFrame, targets: np.ndarray, rows: np.ndarray) -> tuple[Task, ...]:
    """Give the tasks of the annotators of some rows, sorted by name; their targets share one array."""
    annotators, utterances = categorical(frame["annotator"]), categorical(frame["utterance"])
    chosen = np.flatnonzero(rows)
    order = chosen[np.lexsort((utterances.codes[chosen], annotators.codes[chosen]))]
    names = utterances.categories[utterances.codes[order]].tolist()
    said = targets[order]
    bounds = np.cumsum([0, *np.bincount(annotators.codes[order], minlength=len(annotators.categories))]).tolist()
    return tuple(
        Task(str(annotator), Examples(tuple(names[begin:end]), said[begin:end]))
        for annotator, (begin, end) in zip(annotators.categories, pairwise(bounds), strict=True)
        if end > begin
    )


def _aggregate(frame: pd.DataFrame, targets: np.ndarray, rows: np.ndarray) -> Examples:
    """Give the utterances of some rows, sorted by id, each with the mean of its rows' distributions."""
    utterances = categorical(frame["utterance"])
    # A corpus is sorted by utterance, so that an utterance's rows follow one another.
    codes, begins, counts = np.unique(utterances.codes[rows], return_index=True, return_counts=True)
    means = np.add.reduceat(targets[rows], begins, axis=0, dtype=np.float64)
    means /= counts[:, None]
    return Examples(tuple(utterances.categories[codes].tolist()), means.astype(np.float32))


def _unused(annotators: pd.Categorical, used: np.ndarray, *reasons: tuple[np.ndarray, str]) -> dict[str, str]:
    """Give the annotators of whom no row is used, each with the first reason that holds for rows of theirs."""
    found: dict[str, str] = {}
    for rows, reason in reversed(reasons):
        found |= dict.fromkeys(annotators[rows].unique(), reason)
    return {str(name): found[name] for name in sorted(set(found) - set(annotators[used].unique()))}


def _listing(left_out: dict[str, str], most: int = 5) -> str:
    shown = [f"{name} ({reason})" for name, reason in list(left_out.items())[:most]]
    more = len(left_out) - len(shown)
    return (", ".join(shown) or "nobody") + (f" and {more} more" if more > 0 else "")


def _assert_no_leak(frame: pd.DataFrame, split: Split, test_names: set[str], dev_names: set[str]) -> None:
    """Check the promise that results rest on, from the rows themselves, whatever became of the code above."""
    trainers = {task.annotator for task in split.train}
    if trainers & (test_names | dev_names):
        raise AssertionError(f"labels of {sorted(trainers & (test_names | dev_names))} leak into training")
    reserved_rows = frame["session"].isin(split.kept_sessions)
    allowed = frame["utterance"][~frame["annotator"].isin(test_names | dev_names) & ~reserved_rows]
    if sum(map(len, split.train)) > len(allowed):
        raise AssertionError("training has more annotations than the training annotators made")
    if not set(allowed.unique()).issuperset(split.aggregated.utterances):
        raise AssertionError("the aggregated labels hold utterances that no training annotator labelled")
    reserved = set(frame["utterance"][reserved_rows].unique())
    for role, tasks in (("training", split.train), ("dev", split.dev)):
        if any(reserved.intersection(task.examples.utterances) for task in tasks):
            raise AssertionError(f"utterances of test sessions {sorted(split.kept_sessions)} leak into {role}")
    for task in split.listeners:
        if task.annotator not in test_names | dev_names:
            raise AssertionError(f"{task.annotator} is neither dev nor test, but has labels to be judged on")
        if task.annotator in dev_names and reserved.intersection(task.examples.utterances):
            raise AssertionError(f"the reference of dev {task.annotator} holds utterances of test sessions")
    if reserved and not all(reserved.issuperset(task.examples.utterances) for task in split.test):
        raise AssertionError("the test annotator's clips are not all of the test sessions")


def generator(*key: int | str) -> np.random.Generator:
    """Make a random generator that depends on its key alone, on any machine.

    >>> int(generator(1337, "E1", 0).integers(1000)) == int(generator(1337, "E1", 0).integers(1000))
    True
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in key).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32).tolist())


def draw_episode(task: Task, shots: int, queries: int, seed: int, index: int) -> Episode:
    """Draw one meta-test episode: K support and Q query clips, disjoint.

    The query is drawn first, so that episodes with other K share it, and a smaller support is part of a larger one.

    Args:
        task: the annotator to be adapted to.
        shots: K.
        queries: Q.
        seed: of all draws.
        index: the episode, from 0.

    Raises:
        MetaPerSERError: when the annotator has fewer than K + Q labelled clips.
    """
    if len(task) < shots + queries:
        raise MetaPerSERError(
            f"annotator {task.annotator!r} has {len(task)} labelled utterances here; "
            f"shots {shots} + queries {queries} need {shots + queries}; lower episodes.shots or episodes.queries"
        )
    order = generator(seed, task.annotator, index).permutation(len(task))
    query, support = order[:queries], order[queries : queries + shots]
    return Episode(task.annotator, index, task.examples.take(support), task.examples.take(query))


def meta_test_episodes(
    tasks: Sequence[Task], shots: int, queries: int, number: int, seed: int
) -> tuple[list[Episode], list[str]]:
    """Draw the episodes of all evaluated annotators.

    In a fold of one annotator, too few labels are an error. In a fold of many (a crowd), those who labelled too little
    are passed over, as long as somebody is left.

    Returns:
        The episodes, annotator by annotator, and the names passed over.
    """
    able = [task for task in tasks if len(task) >= shots + queries]
    if not able:
        able = [max(tasks, key=len)]
    episodes = [draw_episode(task, shots, queries, seed, index) for task in able for index in range(number)]
    passed_over = sorted({task.annotator for task in tasks} - {task.annotator for task in able})
    return episodes, passed_over


def draw_training_episode(task: Task, shots: int, queries: int, query: Query, seed: int, index: int) -> Episode:
    """Draw one meta-training episode.

    Args:
        task: a training annotator's task.
        shots: K.
        queries: size of the outer loss's examples where they are not the support itself.
        query: ``combined`` uses the support itself (CSMT, paper section 2.3.2); ``resampled`` a fresh draw from all of
            the annotator's clips; ``disjoint`` clips outside the support (MAML).
        seed: of all draws.
        index: the outer step.

    Returns:
        The episode. An annotator with fewer clips than asked for gives fewer; where ``disjoint`` needs more than there
        are, support and query share the clips in the proportion K : queries, at least one each.
    """
    rng = generator(seed, "train", task.annotator, index)
    order = _drawn(rng, len(task), shots + queries)
    if query == "disjoint":
        available = len(task)
        size = shots
        if available < shots + queries:
            size = max(1, min(available - 1, round(available * shots / (shots + queries))))
        outer = task.examples.take(order[size : size + queries])
        return Episode(task.annotator, index, task.examples.take(order[:size]), outer)
    support = task.examples.take(order[:shots])
    outer = support if query == "combined" else task.examples.take(_drawn(rng, len(task), queries))
    return Episode(task.annotator, index, support, outer)


def _drawn(rng: np.random.Generator, clips: int, number: int) -> np.ndarray:
    """Draw up to a number of different clips, in a random order."""
    if clips > LONG_TASK:
        return rng.choice(clips, min(number, clips), replace=False)
    return rng.permutation(clips)[:number]


def tasks_of_step(tasks: Sequence[Task], per_step: int, seed: int, step: int) -> list[Task]:
    """Choose the training tasks of one outer step: every task once before any comes again.

    Args:
        tasks: all training tasks.
        per_step: how many; all of them when there are no more.
        seed: of the order.
        step: the outer step, from 0.
    """
    if per_step >= len(tasks):
        return list(tasks)
    first, last = step * per_step, (step + 1) * per_step - 1
    rounds = range(first // len(tasks), last // len(tasks) + 1)
    order = np.concatenate([generator(seed, "tasks", number).permutation(len(tasks)) for number in rounds])
    begin = first - rounds[0] * len(tasks)
    return [tasks[place] for place in order[begin : begin + per_step]]
