"""How far personal models move from the generic one, and whose: what a few labels of an annotator do to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.special import rel_entr
from tqdm import tqdm

from s3prl_metaperser.corpus.manifest import Corpus
from s3prl_metaperser.episodes import generator
from s3prl_metaperser.numerals import exact
from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.spread import Estimates, weights

MOST_TENSORS = 12
"""Adapted tensors that are shown: those that move most."""


class Adaptable(Protocol):
    """What is asked of a model; a :class:`~s3prl_metaperser.personalize.Recogniser` is one."""

    def probabilities(self, wavs: Sequence[Path], progress: bool = False) -> np.ndarray:
        """Give (clips, classes) probabilities."""

    def adapt(
        self, wavs: Sequence[Path], labels: Sequence[Sequence[str]], steps: int = ..., lr: float | None = None
    ) -> Adaptable:
        """Give a personal model and leave this one as it is."""

    def moved(self) -> Mapping[str, float]:
        """Give, of a personal model, each adapted tensor's change relative to its norm before."""


@dataclass(frozen=True)
class Comparison:
    """Which models to compare, and on what.

    Attributes:
        model: the generic one.
        name: what it is called.
        trained_on: annotators of this corpus whose labels it was trained or chosen on.
        shots: labels to adapt on; of an annotator with fewer, all.
        draws: how often an annotator's model is made, each time from another draw of labels.
        clips: to compare on, drawn from the whole corpus; all of a corpus with fewer.
        lr: rate to adapt at, of a model that has learned none.
    """

    model: Adaptable
    name: str
    trained_on: frozenset[str]
    shots: int
    draws: int
    clips: int
    lr: float | None = None

    @property
    def options(self) -> str:
        """What was asked for, as on the command line."""
        asked = f"--checkpoint {self.name}, --shots {self.shots}, --draws {self.draws} and --clips {self.clips}"
        return asked if self.lr is None else f"{asked}, at --lr {exact(self.lr)}"


@dataclass(frozen=True)
class Movement:
    """Personal models against the generic one, on the same clips for everyone.

    Attributes:
        clips: number of clips they are compared on.
        shots: (shown,) labels that each model is adapted on.
        draws: how often, each time to another draw of labels.
        divergence: (shown,) mean Jensen–Shannon divergence from the generic model's probabilities, in bits (0 to 1).
        shift: (shown, classes) mean probability minus the generic model's, in percentage points.
        tensors: names of the adapted tensors that move most, most first.
        adapted: number of all adapted tensors.
        moved: (shown, tensors) the change's norm relative to the tensor's before, NaN where that is 0: mean, lowest and
            highest over draws.
        same: mean divergence between models of one annotator, adapted on different draws; NaN where there are none.
        other: the same between models of different annotators; NaN where there is one annotator.
    """

    clips: int
    shots: np.ndarray
    draws: int
    divergence: Estimates
    shift: Estimates
    tensors: tuple[str, ...]
    adapted: int
    moved: Estimates
    same: Estimates
    other: Estimates


def movement(corpus: Corpus, crowd: Crowd, shown: np.ndarray, comparison: Comparison, seed: int) -> Movement:
    """Adapt to each shown annotator and compare.

    Which labels and clips are drawn depends on the seed, the annotator and the draw alone.

    Args:
        corpus: where the recordings are.
        crowd: the same corpus's labels.
        shown: (shown,) annotators.
        comparison: of which models.
        seed: of draws and bootstrap.
    """
    model, shots, draws = comparison.model, comparison.shots, comparison.draws
    recordings = corpus.audio_paths()
    compared = _drawn(len(crowd.utterances), comparison.clips, seed, "compared")
    paths = [recordings[crowd.utterances[one]] for one in compared]
    generic = model.probabilities(paths, progress=True)
    personal = np.empty((len(shown), draws, *generic.shape))
    changes: list[list[Mapping[str, float]]] = []
    with tqdm(total=len(shown) * draws, desc="personal models", unit="model", leave=False, delay=1) as progress:
        for place, one in enumerate(shown):
            rows = crowd.rows(one)
            changes.append([])
            for draw in range(draws):
                support = rows.start + _drawn(rows.stop - rows.start, shots, seed, crowd.names[one], draw)
                labels = [[crowd.emotions[e] for e in np.flatnonzero(named)] for named in crowd.named[support]]
                wavs = [recordings[crowd.utterances[clip]] for clip in crowd.clip[support]]
                adapted = model.adapt(wavs, labels, lr=comparison.lr)
                personal[place, draw] = adapted.probabilities(paths)
                changes[-1].append(adapted.moved())
                progress.update()
    tensors, moved = _tensors(changes)
    counts = crowd.counts()[shown]
    same, other = _between(personal, counts > shots, seed)
    compare = [_compared(personal[place], generic, seed, crowd.names[one]) for place, one in enumerate(shown)]
    return Movement(
        clips=len(paths),
        shots=np.minimum(counts, shots),
        draws=draws,
        divergence=Estimates.stacked([one[-1] for one in compare]),
        shift=Estimates.stacked([one[:-1] for one in compare]),
        tensors=tensors[:MOST_TENSORS],
        adapted=len(tensors),
        moved=moved[:, :MOST_TENSORS],
        same=same,
        other=other,
    )


def divergence(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Give the Jensen–Shannon divergence of distributions along the last axis, in bits.

    Lin, "Divergence measures based on the Shannon entropy", IEEE Transactions on Information Theory, 1991.

    >>> divergence(np.array([1.0, 0.0]), np.array([0.0, 1.0])).item()
    1.0
    """
    middle = (first + second) / 2
    return (rel_entr(first, middle) + rel_entr(second, middle)).sum(axis=-1) / (2 * np.log(2))


def _drawn(number: int, wanted: int, *key: int | str) -> np.ndarray:
    """Draw some of ``number`` without replacement, ascending; all where there are no more than wanted."""
    if number <= wanted:
        return np.arange(number)
    return np.sort(generator("portrait", *key).choice(number, wanted, replace=False))


def _compared(personal: np.ndarray, generic: np.ndarray, seed: int, annotator: str) -> Estimates:
    """Compare an annotator's models with the generic one.

    Intervals are of a bootstrap that draws clips and draws of labels with replacement, each on its own (Owen, "The
    pigeonhole bootstrap", Annals of Applied Statistics, 2007).

    Args:
        personal: (draws, clips, classes).
        generic: (clips, classes).
        seed: of the bootstrap.
        annotator: whose models.

    Returns:
        (classes + 1,): the shift of each emotion in percentage points, then the divergence in bits.
    """
    values = np.concatenate([100 * (personal - generic), divergence(personal, generic)[..., None]], axis=-1)
    draws, clips, columns = values.shape
    rng = generator(seed, "movement", annotator)
    drawn = []
    for of_clips in weights(clips, rng):
        of_draws = next(weights(draws, rng, len(of_clips)))
        by_clip = (of_draws @ values.reshape(draws, -1)).reshape(-1, clips, columns)
        drawn.append(np.einsum("rc,rck->rk", of_clips, by_clip) / (clips * draws))
    return Estimates.of(values.mean(axis=(0, 1)), np.concatenate(drawn))


def _tensors(changes: Sequence[Sequence[Mapping[str, float]]]) -> tuple[tuple[str, ...], Estimates]:
    """Give the names of the adapted tensors, those that move most first, and how far: (shown, tensors)."""
    names = list(changes[0][0])
    each = np.array([[[change[name] for name in names] for change in of_one] for of_one in changes])
    each = np.where(np.isfinite(each), each, np.nan)
    order = np.argsort(-np.nan_to_num(each).mean(axis=(0, 1)), kind="stable")
    moved = each[:, :, order]
    return tuple(names[one] for one in order), Estimates(moved.mean(axis=1), moved.min(axis=1), moved.max(axis=1))


def _between(personal: np.ndarray, differs: np.ndarray, seed: int) -> tuple[Estimates, Estimates]:
    """Give mean divergences between models of one annotator (whose draws differ), and of different ones.

    Args:
        personal: (annotators, draws, clips, classes).
        differs: (annotators,) whether an annotator's draws differ.
        seed: of the bootstrap over clips.
    """
    annotators, draws, clips, _ = personal.shape
    models = personal.reshape(annotators * draws, *personal.shape[2:])
    whose = np.repeat(np.arange(annotators), draws)
    sums, pairs = np.zeros((2, clips)), np.zeros(2)
    for one in range(len(models) - 1):
        apart = divergence(models[one], models[one + 1 :])
        is_same = whose[one + 1 :] == whose[one]
        for kind, chosen in enumerate((is_same & differs[whose[one]], ~is_same)):
            sums[kind] += apart[chosen].sum(axis=0)
            pairs[kind] += chosen.sum()
    drawn = np.concatenate(list(weights(clips, generator(seed, "between")))) / clips
    same, other = (
        Estimates.of(np.array(total.mean() / number), drawn @ total / number) if number else Estimates.unknown()
        for total, number in zip(sums, pairs, strict=True)
    )
    return same, other
