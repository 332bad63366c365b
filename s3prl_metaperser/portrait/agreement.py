r"""Do annotators agree beyond chance? Krippendorff's alpha of sets of emotions.

Alpha is :math:`1 - D_o / D_e`: the disagreement between annotators of the same clip against that between labels of any
clips, both as the mean distance of two labels (Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011, with
missing data as in his section C). 1 is agreement, 0 what chance gives. The distance of two sets is MASI's (Passonneau,
"Measuring agreement on set-valued items (MASI) for semantic and pragmatic annotation", LREC 2006); between single
emotions it is 0 or 1, and alpha the nominal one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.sparse import csr_array
from tqdm import tqdm

from s3prl_metaperser.episodes import generator
from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.spread import Estimates, weights

LEAST_SHARED = 20
"""Clips that two annotators must share for their alpha to be told."""
_UNITS_AT_ONCE = 8192


@dataclass(frozen=True)
class Agreement:
    """Who agrees with whom.

    Attributes:
        overall: alpha of all annotators; of the external ones alone, where there are others.
        clips: labelled by two annotators or more, of each of ``overall``.
        labels: of these clips, of each of ``overall``.
        of: what each of ``overall`` is of.
        each: (shown,) alpha's part of each annotator: 1 minus the mean distance of its labels from the others' of the
            same clip, over the same :math:`D_e`. Weighed by labels, the mean of all annotators' parts is alpha.
        shared: (shown, shown) clips that two annotators share.
        pairs: (shown, shown) alpha of two annotators, NaN where they share fewer than :data:`LEAST_SHARED` clips.
    """

    overall: Estimates
    of: tuple[str, ...]
    clips: tuple[int, ...]
    labels: tuple[int, ...]
    each: Estimates
    shared: np.ndarray
    pairs: Estimates


def masi_distances(sets: np.ndarray) -> np.ndarray:
    """Give MASI's distance of every two sets: 1 − J·M.

    J is the share of what either holds that both hold (Jaccard); M is 1 for equal sets, 2/3 where one holds the other,
    1/3 where they overlap, 0 where they don't.

    Args:
        sets: (sets, members) bool, none empty.

    Returns:
        (sets, sets), 0 on the diagonal.

    >>> masi_distances(np.array([[True, False], [True, True]])).round(3).tolist()
    [[0.0, 0.667], [0.667, 0.0]]
    """
    counts = sets.astype(np.int64)
    both = counts @ counts.T
    sizes = counts.sum(axis=1)
    either = sizes[:, None] + sizes - both
    smaller = np.minimum(sizes[:, None], sizes)
    monotonicity = np.where(both == either, 3, np.where(both == smaller, 2, np.where(both > 0, 1, 0))) / 3
    return 1 - both / either * monotonicity


class Labels:
    """The labels of clips that two annotators or more have labelled, and how far each is from the others.

    Args:
        clip: (labels,) which clip each is of.
        kind: (labels,) which set each is, an index into ``distances``.
        distances: (sets, sets) as :func:`masi_distances` gives them.
    """

    def __init__(self, clip: np.ndarray, kind: np.ndarray, distances: np.ndarray) -> None:
        counts = np.bincount(clip) if len(clip) else np.zeros(0, dtype=np.int64)
        self.paired = counts[clip] > 1
        """(labels,) whether another annotator labelled the clip too; what follows is of these labels alone."""
        self._distances = distances
        _, self.clip = np.unique(clip[self.paired], return_inverse=True)
        kind = kind[self.paired]
        self.clips = int(self.clip.max()) + 1 if len(kind) else 0
        """Number of these clips."""
        ones = np.ones(len(kind))
        self._held = csr_array((ones, (self.clip, kind)), shape=(self.clips, len(distances)))
        self._sizes = np.bincount(self.clip, minlength=self.clips)
        self.apart = np.empty(len(kind))
        """(labels,) mean distance of each from the others of its clip."""
        order = np.argsort(self.clip, kind="stable")
        for first in range(0, self.clips, _UNITS_AT_ONCE):
            begin, end = np.searchsorted(self.clip[order], [first, first + _UNITS_AT_ONCE])
            rows = order[begin:end]
            to_all = self._held[first : first + _UNITS_AT_ONCE] @ distances
            self.apart[rows] = to_all[self.clip[rows] - first, kind[rows]] / (self._sizes[self.clip[rows]] - 1)
        self._apart_in_clip = np.bincount(self.clip, self.apart, minlength=self.clips)

    def observed(self, drawn: np.ndarray) -> np.ndarray:
        """Give the mean distance within clips: (draws,) from how often each draw has each clip, (draws, clips)."""
        return _divided(drawn @ self._apart_in_clip, drawn @ self._sizes)

    def expected(self, drawn: np.ndarray) -> np.ndarray:
        """Give the mean distance between any two labels: (draws,) from (draws, clips)."""
        held = (self._held.T @ drawn.T).T
        labels = held.sum(axis=1)
        return _divided(((held @ self._distances) * held).sum(axis=1), labels * (labels - 1))

    def alpha(self, drawn: np.ndarray) -> np.ndarray:
        """Give alpha: (draws,); NaN where there is nothing to disagree about."""
        return 1 - _divided(self.observed(drawn), self.expected(drawn))

    def as_is(self) -> np.ndarray:
        """Give every clip once: what the methods take for the labels as they are."""
        return np.ones((1, self.clips))

    def bootstrapped(self, *key: int | str) -> Estimates:
        """Give alpha with its interval over clips; ``key`` seeds the draws."""
        if self.clips == 0:
            return Estimates.unknown()
        drawn = [self.alpha(some) for some in weights(self.clips, generator(*key))]
        return Estimates.of(self.alpha(self.as_is())[0], np.concatenate(drawn))


def _divided(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def label_sets(named: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the distinct sets of emotions.

    Args:
        named: (labels, classes), above zero where ticked.

    Returns:
        (sets, classes) bool, and (labels,) the index of each label's set.
    """
    ticked = named > 0
    packed = np.packbits(ticked, axis=1)
    _, first, kind = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    return ticked[first], kind.reshape(-1)


def agreement(crowd: Crowd, shown: np.ndarray, seed: int) -> Agreement:
    """Measure the agreement of all annotators, of each shown one with all others, and of every two shown ones.

    Args:
        crowd: the labels.
        shown: (shown,) annotators.
        seed: of the bootstrap.
    """
    sets, kind = label_sets(crowd.named)
    distances = masi_distances(sets)
    everyone = Labels(crowd.clip, kind, distances)
    groups = {"all annotators": everyone}
    external = crowd.kinds[crowd.annotator] == "external"
    if external.any() and not external.all():
        groups["external annotators"] = Labels(crowd.clip[external], kind[external], distances)
    overall = [labels.bootstrapped(seed, "alpha", name) for name, labels in groups.items()]
    place = np.full(len(crowd.names), -1)
    place[shown] = np.arange(len(shown))
    shared, pairs = _pairs(crowd, shown, kind, distances, seed)
    return Agreement(
        overall=Estimates.stacked(overall),
        of=tuple(groups),
        clips=tuple(labels.clips for labels in groups.values()),
        labels=tuple(int(labels.paired.sum()) for labels in groups.values()),
        each=_each(everyone, place[crowd.annotator[everyone.paired]], len(shown), seed),
        shared=shared,
        pairs=pairs,
    )


def _each(labels: Labels, who: np.ndarray, number: int, seed: int) -> Estimates:
    """Give alpha's part of each of ``number`` annotators; ``who`` is -1 where a label is someone else's."""
    if labels.clips == 0:
        return Estimates.unknown(number)
    theirs = who >= 0
    cells = (labels.clip[theirs], who[theirs])
    apart = csr_array((labels.apart[theirs], cells), shape=(labels.clips, number))
    has = csr_array((np.ones(theirs.sum()), cells), shape=(labels.clips, number))

    def parts(drawn: np.ndarray) -> np.ndarray:
        observed = _divided(np.asarray(drawn @ apart), np.asarray(drawn @ has))
        expected = np.broadcast_to(labels.expected(drawn)[:, None], observed.shape)
        return 1 - _divided(observed, expected)

    drawn = [parts(some) for some in weights(labels.clips, generator(seed, "each"))]
    return Estimates.of(parts(labels.as_is())[0], np.concatenate(drawn))


def _pairs(
    crowd: Crowd, shown: np.ndarray, kind: np.ndarray, distances: np.ndarray, seed: int
) -> tuple[np.ndarray, Estimates]:
    """Give the clips every two of the shown annotators share, and their alpha."""
    rows = [crowd.rows(one) for one in shown]
    shared = np.zeros((len(shown), len(shown)), dtype=np.int64)
    alphas = Estimates.unknown(*shared.shape)
    both = list(combinations(range(len(shown)), 2))
    for a, b in tqdm(both, desc="agreement of pairs", unit="pair", leave=False, delay=1):
        common, at_a, at_b = np.intersect1d(
            crowd.clip[rows[a]], crowd.clip[rows[b]], assume_unique=True, return_indices=True
        )
        shared[a, b] = shared[b, a] = len(common)
        if len(common) < LEAST_SHARED:
            continue
        kinds = np.concatenate([kind[rows[a]][at_a], kind[rows[b]][at_b]])
        held, kinds = np.unique(kinds, return_inverse=True)
        labels = Labels(np.tile(np.arange(len(common)), 2), kinds, distances[np.ix_(held, held)])
        alpha = labels.bootstrapped(seed, "pair", crowd.names[shown[a]], crowd.names[shown[b]])
        for part in ("value", "low", "high"):
            cells = getattr(alphas, part)
            cells[a, b] = cells[b, a] = getattr(alpha, part)
    return shared, alphas
