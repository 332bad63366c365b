"""A portrait of a corpus, put together from its parts."""

from __future__ import annotations

import numpy as np

from s3prl_metaperser import __version__
from s3prl_metaperser.corpus.manifest import Corpus
from s3prl_metaperser.portrait.agreement import agreement
from s3prl_metaperser.portrait.agreement_part import agreement_part
from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.likeness import annotator_map
from s3prl_metaperser.portrait.map_part import map_part
from s3prl_metaperser.portrait.movement import Comparison
from s3prl_metaperser.portrait.movement_part import movement_part
from s3prl_metaperser.portrait.naming_habits import confusions, habits, majority_of_others
from s3prl_metaperser.portrait.naming_parts import confusions_part, habits_part
from s3prl_metaperser.portrait.page import Portrait
from s3prl_metaperser.portrait.spread import RESAMPLES
from s3prl_metaperser.portrait.wording import counted, listed

_KINDS = {"external": "external annotator", "self": "self-reporting annotator"}


def compose(corpus: Corpus, most: int, seed: int, comparison: Comparison | None = None) -> Portrait:
    """Measure a corpus and put it into words.

    Args:
        corpus: whose listeners.
        most: annotators in the figures, those with most labels.
        seed: of the bootstrap and of all draws.
        comparison: of personal models with the generic one; None: without a model.

    Raises:
        MetaPerSERError: for a recording that the model cannot hear, and when adaptation fails.
    """
    crowd = Crowd.of(corpus)
    shown = crowd.most_labels(most)
    majority, others = majority_of_others(crowd)
    options = "" if comparison is None else f", {comparison.options}"
    return Portrait(
        corpus=corpus.name,
        lead=_lead(crowd, shown),
        parts=(
            habits_part(crowd, shown, habits(crowd, shown, seed)),
            agreement_part(crowd, shown, agreement(crowd, shown, seed)),
            confusions_part(crowd, shown, confusions(crowd, shown, majority, others, seed)),
            map_part(crowd, annotator_map(crowd, shown, majority, others, seed)),
            *(() if comparison is None else (movement_part(corpus, crowd, shown, comparison, seed),)),
        ),
        made=(
            f"metaperser portrait, version {__version__}, with --seed {seed} and --most {most}{options}. Intervals in "
            f"brackets are 95% percentile bootstrap intervals over clips ({RESAMPLES:,} resamples) unless something "
            "else is said; those of a share of 0% or 100% are exact binomial ones. They hold for one number at a "
            "time.",
            "Each figure as PNG and PDF, and the numbers as CSV, are in the folder beside this page.",
        ),
    )


def _lead(crowd: Crowd, shown: np.ndarray) -> list[str]:
    per_clip = np.bincount(crowd.clip)
    of_kind = {name: int((crowd.kinds == kind).sum()) for kind, name in _KINDS.items()}
    kinds = [counted(number_of, name) for name, number_of in of_kind.items() if number_of]
    several = int(((crowd.named > 0).sum(axis=1) > 1).sum())
    lines = [
        f"{counted(len(crowd.annotator), 'label')} of {counted(len(crowd.utterances), 'clip')} by {listed(kinds)}; a "
        f"label is what one annotator ticked for one clip. A clip has {per_clip.min()} to {per_clip.max()} labels, "
        f"{per_clip.mean():.1f} in the mean; {100 * several / len(crowd.annotator):.1f}% of the labels name more than "
        "one emotion."
    ]
    if len(shown) < len(crowd.names):
        least = crowd.counts()[shown].min()
        lines.append(
            f"Figures of single annotators show the {len(shown)} with most labels ({least} or more) of "
            f"{len(crowd.names):,}; numbers said to be of all annotators, and the map, have all of them."
        )
    return lines
