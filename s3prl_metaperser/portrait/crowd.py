"""A corpus seen from its annotators: who labelled which clip with which emotions, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from s3prl_metaperser.corpus.checks import KINDS
from s3prl_metaperser.corpus.csv_file import categorical
from s3prl_metaperser.corpus.manifest import Corpus


@dataclass(frozen=True)
class Crowd:
    """Annotators and their labels; a label is one annotator's set of ticked emotions of one clip.

    Attributes:
        emotions: the classes, in order.
        names: of the annotators: external ones first, of a kind those with most labels first.
        kinds: (annotators,) ``external`` or ``self``.
        utterances: of the clips.
        annotator: (labels,) index into ``names``; ascending.
        clip: (labels,) index into ``utterances``.
        named: (labels, classes) distributions: one ticked emotion gets 1, each of two 0.5.
    """

    emotions: tuple[str, ...]
    names: tuple[str, ...]
    kinds: np.ndarray
    utterances: tuple[str, ...]
    annotator: np.ndarray
    clip: np.ndarray
    named: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus) -> Crowd:
        """Take a corpus apart."""
        rows = corpus.annotations
        annotators, clips = categorical(rows["annotator"]), categorical(rows["utterance"])
        counts = np.bincount(annotators.codes)
        kinds = np.empty(len(counts), dtype=object)
        kinds[annotators.codes] = rows["kind"].astype(str).to_numpy()
        order = np.lexsort((np.arange(len(counts)), -counts, pd.Categorical(kinds, KINDS).codes))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        annotator = place[annotators.codes]
        by_annotator = np.argsort(annotator, kind="stable")
        return cls(
            emotions=corpus.emotions,
            names=tuple(str(annotators.categories[one]) for one in order),
            kinds=kinds[order],
            utterances=tuple(str(one) for one in clips.categories),
            annotator=annotator[by_annotator],
            clip=clips.codes.astype(np.int64)[by_annotator],
            named=corpus.targets().astype(np.float64)[by_annotator],
        )

    def counts(self) -> np.ndarray:
        """Count each annotator's labels: (annotators,)."""
        return np.bincount(self.annotator, minlength=len(self.names))

    def rows(self, annotator: int) -> slice:
        """Give where an annotator's labels are."""
        first, last = np.searchsorted(self.annotator, [annotator, annotator + 1])
        return slice(int(first), int(last))

    def most_labels(self, most: int) -> np.ndarray:
        """Choose the annotators with most labels: their indices, ascending; of equal counts the earlier."""
        return np.sort(np.argsort(-self.counts(), kind="stable")[:most])
