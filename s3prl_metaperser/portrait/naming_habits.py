"""What each annotator calls things: how often which emotion, and what where the others say something else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from tqdm import tqdm

from s3prl_metaperser.episodes import generator
from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.spread import Estimates, weights

LEAST_ROW = 5
"""Clips below which a row of a confusion is shown as too few to say."""
_TIE = 1e-9
"""Votes are sums of fractions such as 1/3, so those that are equal may differ by rounding."""


@dataclass(frozen=True)
class Habits:
    """How the shown annotators name emotions.

    Attributes:
        shares: (shown, classes) mean of an annotator's labels, each a distribution; rows sum to 1.
        ticked: (shown,) emotions ticked a clip.
        all_shares: (classes,) mean of all labels of the corpus.
        all_ticked: of all labels.
    """

    shares: Estimates
    ticked: Estimates
    all_shares: np.ndarray
    all_ticked: float


@dataclass(frozen=True)
class Departure:
    """What an annotator says in place of what the others say.

    Attributes:
        majority: the others' emotion, an index.
        said: the annotator's.
        share: of the majority's clips that it says so of.
        clips: of that majority.
    """

    majority: int
    said: int
    share: Estimates
    clips: float


@dataclass(frozen=True)
class Confusions:
    """What the shown annotators say where the majority of the others says something.

    Attributes:
        mass: (shown, classes, classes) clips by the others' majority (row) and what the annotator says (column). A tie
            of the others, and several ticks, share a clip among cells.
        clips: (shown,) clips that others labelled too.
        others: (shown,) mean number of the others a clip has.
        agreeing: (shown,) share of what is said that is the majority's: the diagonal.
        departures: of each shown annotator, the one that most clips show, in rows of :data:`LEAST_ROW` clips or more.
    """

    mass: np.ndarray
    clips: np.ndarray
    others: np.ndarray
    agreeing: Estimates
    departures: tuple[Departure | None, ...]


def habits(crowd: Crowd, shown: np.ndarray, seed: int) -> Habits:
    """Measure how often each shown annotator names each emotion; ``seed`` is of the bootstrap over its clips."""
    number = (crowd.named > 0).sum(axis=1)
    columns = np.column_stack([crowd.named, number])
    found = [
        _mean(columns[crowd.rows(one)], seed, "habits", crowd.names[one])
        for one in tqdm(shown, desc="naming habits", unit="annotator", leave=False, delay=1)
    ]
    return Habits(
        shares=Estimates.stacked(
            [one[:-1].with_exact_ends(n) for one, n in zip(found, crowd.counts()[shown], strict=True)]
        ),
        ticked=Estimates.stacked([one[-1] for one in found]),
        all_shares=crowd.named.mean(axis=0),
        all_ticked=float(number.mean()),
    )


def _mean(columns: np.ndarray, *key: int | str) -> Estimates:
    """Give the mean of each column over an annotator's clips, with its interval."""
    clips = len(columns)
    drawn = [some @ columns / clips for some in weights(clips, generator(*key))]
    return Estimates.of(columns.mean(axis=0), np.concatenate(drawn))


def majority_of_others(crowd: Crowd) -> tuple[np.ndarray, np.ndarray]:
    """Find what most of the other annotators of a label's clip say, the label's own left out.

    Every annotator has one vote, shared among the emotions it ticked; emotions with equally many votes share the
    majority.

    Args:
        crowd: the labels.

    Returns:
        (labels, classes): a distribution, or zeros where there is no other; and (labels,) the number of others.
    """
    votes = np.zeros((len(crowd.utterances), len(crowd.emotions)))
    for column, of_emotion in enumerate(crowd.named.T):
        votes[:, column] = np.bincount(crowd.clip, of_emotion, minlength=len(votes))
    others = np.bincount(crowd.clip, minlength=len(votes))[crowd.clip] - 1
    of_others = votes[crowd.clip] - crowd.named
    most = (of_others >= of_others.max(axis=1, keepdims=True) - _TIE) & (others > 0)[:, None]
    return most / np.maximum(most.sum(axis=1, keepdims=True), 1), others


def confusion_mass(crowd: Crowd, majority: np.ndarray) -> np.ndarray:
    """Count what each annotator says by what the others' majority says.

    Args:
        crowd: the labels.
        majority: (labels, classes) as :func:`majority_of_others` gives it.

    Returns:
        (annotators, classes, classes), rows the majority's.
    """
    labels = np.arange(len(crowd.annotator))
    belongs = csr_array((np.ones(len(labels)), (crowd.annotator, labels)), shape=(len(crowd.names), len(labels)))
    # An emotion at a time: all products of a large corpus's labels would take gigabytes.
    return np.stack([belongs @ (of_emotion[:, None] * crowd.named) for of_emotion in majority.T], axis=1)


def confusions(crowd: Crowd, shown: np.ndarray, majority: np.ndarray, others: np.ndarray, seed: int) -> Confusions:
    """Compare each shown annotator with the majority of the others.

    Args:
        crowd: the labels.
        shown: (shown,) annotators.
        majority: (labels, classes) and
        others: (labels,) as :func:`majority_of_others` gives them.
        seed: of the bootstrap over an annotator's clips.
    """
    mass = confusion_mass(crowd, majority)[shown]
    clips, mean_others, agreeing = [], [], []
    departures: list[Departure | None] = []
    for place, one in enumerate(tqdm(shown, desc="confusions", unit="annotator", leave=False, delay=1)):
        rows = crowd.rows(one)
        known = np.flatnonzero(others[rows] > 0) + rows.start
        clips.append(len(known))
        mean_others.append(float(others[known].mean()) if len(known) else np.nan)
        if not len(known):
            agreeing.append(Estimates.unknown())
            departures.append(None)
            continue
        same = (majority[known] * crowd.named[known]).sum(axis=1)
        agreeing.append(_mean(same[:, None], seed, "confusion", crowd.names[one])[0].with_exact_ends(len(known)))
        departures.append(_departure(mass[place], majority[known], crowd.named[known], seed, crowd.names[one]))
    return Confusions(mass, np.array(clips), np.array(mean_others), Estimates.stacked(agreeing), tuple(departures))


def _departure(
    mass: np.ndarray, majority: np.ndarray, named: np.ndarray, seed: int, annotator: str
) -> Departure | None:
    """Find where an annotator departs from the majority in most clips, and in what share of those it could."""
    enough = mass.sum(axis=1, keepdims=True) >= LEAST_ROW
    apart = np.where(enough & ~np.eye(len(mass), dtype=bool), mass, 0)
    if not apart.any():
        return None
    row, column = np.unravel_index(np.argmax(apart), apart.shape)
    of_row, both = majority[:, row], majority[:, row] * named[:, column]
    draws = list(weights(len(named), generator(seed, "departure", annotator)))
    numerator, denominator = (np.concatenate([some @ one for some in draws]) for one in (both, of_row))
    drawn = np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)
    share = Estimates.of(np.array(both.sum() / of_row.sum()), drawn)
    return Departure(int(row), int(column), share.with_exact_ends(of_row.sum()), float(of_row.sum()))


def row_normalised(mass: np.ndarray) -> np.ndarray:
    """Divide rows (the last axis) by their sums; NaN where that is 0."""
    sums = mass.sum(axis=-1, keepdims=True)
    return np.divide(mass, sums, out=np.full(mass.shape, np.nan), where=sums > 0)
