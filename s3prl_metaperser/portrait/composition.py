"""What a portrait says of a corpus: its parts, with sentences, captions and tables, from the numbers."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from s3prl_metaperser import __version__
from s3prl_metaperser.corpus.manifest import Corpus
from s3prl_metaperser.portrait import figures
from s3prl_metaperser.portrait.agreement import LEAST_SHARED, Agreement, agreement
from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.likeness import LEAST_MAPPED, PRIOR, Map, annotator_map
from s3prl_metaperser.portrait.movement import Comparison
from s3prl_metaperser.portrait.movement_part import movement_part
from s3prl_metaperser.portrait.naming_habits import (
    LEAST_ROW,
    Confusions,
    Habits,
    confusions,
    habits,
    majority_of_others,
    row_normalised,
)
from s3prl_metaperser.portrait.page import Part, Portrait, Shown
from s3prl_metaperser.portrait.spread import RESAMPLES
from s3prl_metaperser.portrait.wording import counted, interval, listed, number, percent, who

NOBODY_SHARES = (
    "No clip was labelled by two annotators, so nobody can be compared with anybody: there is no figure of this."
)
TOLD_DEPARTURES = 3


def compose(corpus: Corpus, most: int, seed: int, comparison: Comparison | None = None) -> Portrait:
    """Measure a corpus and put it into words.

    Args:
        corpus: whose listeners.
        most: annotators in the figures, those with most labels.
        seed: of the bootstrap and of all draws.
        comparison: of personal models with the generic one; None: without a model.

    Raises:
        MetaPerSERError: when the model does not fit the corpus, or what it says of a recording.
    """
    crowd = Crowd.of(corpus)
    shown = crowd.most_labels(most)
    majority, others = majority_of_others(crowd)
    options = "" if comparison is None else f", {comparison.options}"
    return Portrait(
        corpus=corpus.name,
        lead=_lead(crowd, shown),
        parts=(
            _habits_part(crowd, shown, habits(crowd, shown, seed)),
            _agreement_part(crowd, shown, agreement(crowd, shown, seed)),
            _confusions_part(crowd, shown, confusions(crowd, shown, majority, others, seed)),
            _map_part(crowd, annotator_map(crowd, shown, majority, others, seed)),
            *(() if comparison is None else (movement_part(corpus, crowd, shown, comparison, seed),)),
        ),
        made=(
            f"metaperser portrait, version {__version__}, with --seed {seed} and --most {most}{options}. Intervals in "
            "brackets are "
            f"95% percentile bootstrap intervals over clips ({RESAMPLES:,} resamples) unless something else is said; "
            "those of a share of 0% or 100% are exact binomial ones. They hold for one number at a time.",
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
        f"{per_clip.mean():.1f} in the mean; {100 * several / len(crowd.annotator):.1f}% of the labels name more "
        "than one "
        "emotion."
    ]
    if len(shown) < len(crowd.names):
        least = crowd.counts()[shown].min()
        lines.append(
            f"Figures of single annotators show the {len(shown)} with most labels ({least} or more) of "
            f"{len(crowd.names):,}; numbers said to be of all annotators, and the map, have all of them."
        )
    return lines


_KINDS = {"external": "external annotator", "self": "self-reporting annotator"}


def _habits_part(crowd: Crowd, shown: np.ndarray, found: Habits) -> Part:
    found_said = []
    order = np.argsort(-found.all_shares, kind="stable")
    named = [f"{crowd.emotions[e]} ({100 * found.all_shares[e]:.0f}%)" for e in order if found.all_shares[e] > 0]
    found_said.append(f"Most often named over all labels: {listed(named[:3])}.")
    spread = np.ptp(found.shares.value, axis=0)
    if len(shown) > 1 and spread.max() > 0:
        widest = int(np.argmax(spread))
        low, high = int(np.argmin(found.shares.value[:, widest])), int(np.argmax(found.shares.value[:, widest]))
        found_said.append(
            f"Annotators differ most in “{crowd.emotions[widest]}”: {percent(found.shares[low, widest])} of the "
            "labels of "
            f"{crowd.names[shown[low]]}, {percent(found.shares[high, widest])} of those of {crowd.names[shown[high]]}."
        )
    nobody = [emotion for emotion, share in zip(crowd.emotions, found.all_shares, strict=True) if share == 0]
    if nobody:
        found_said.append(f"Nobody named {listed(nobody)}.")
    table = pd.DataFrame(
        who(crowd, shown)
        | {"emotions ticked": [interval(one) for one in found.ticked]}
        | {
            f"{emotion} (%)": [interval(one, 0, 100) for one in found.shares[:, column]]
            for column, emotion in enumerate(crowd.emotions)
        }
    )
    annotators, classes = found.shares.value.shape
    numbers = pd.DataFrame(
        {
            **{"annotator": np.repeat([crowd.names[one] for one in shown], classes)},
            **{"kind": np.repeat(crowd.kinds[shown], classes), "labels": np.repeat(crowd.counts()[shown], classes)},
            **{"ticked": np.repeat(found.ticked.value, classes)},
            **{"emotion": np.tile(crowd.emotions, annotators), "share": found.shares.value.ravel()},
            **{"low": found.shares.low.ravel(), "high": found.shares.high.ravel()},
        }
    )
    caption = (
        "How often each annotator names each emotion, in percent of its labels; where several emotions are ticked, a "
        "label "
        f"is shared among them, so rows sum to 100. From {counted(int(crowd.counts()[shown].sum()), 'label')}; at "
        "the top, "
        f"all {len(crowd.annotator):,}. Right: number of labels, and mean number of emotions ticked a clip. "
        "Annotators who labelled other clips met other emotions, so rows differ by clips as well as by habit."
        + (" – : named by nobody." if nobody else "")
    )
    return Part(
        name="habits",
        title="Who labels how",
        found=found_said,
        figures=[
            Shown(
                "habits",
                partial(figures.habits_figure, crowd, shown, found),
                caption,
                "Heat map: a row an annotator, a column an emotion, the share of that emotion in the annotator's "
                "labels.",
            )
        ],
        tables=[("Share of each emotion, with 95% intervals", table)],
        numbers=[("habits", numbers)],
    )


def _agreement_part(crowd: Crowd, shown: np.ndarray, found: Agreement) -> Part:
    if found.clips[0] == 0:
        return Part("agreement", "Agreement between annotators", [NOBODY_SHARES])
    lines = [
        f"Krippendorff's α of {name} is {interval(found.overall[place])}, over "
        f"{counted(found.labels[place], 'label')} of "
        f"the {counted(found.clips[place], 'clip')} that two of them or more labelled."
        if np.isfinite(found.overall.value[place])
        else f"Krippendorff's α of {name} is not defined: all labels of shared clips are the same."
        for place, name in enumerate(found.of)
    ]
    known = np.flatnonzero(np.isfinite(found.each.value))
    if len(known) > 1:
        low, high = known[np.argmin(found.each.value[known])], known[np.argmax(found.each.value[known])]
        lines.append(
            f"With all others, {crowd.names[shown[high]]} agrees most (α {interval(found.each[high])}), "
            f"{crowd.names[shown[low]]} least ({interval(found.each[low])})."
        )
    pairs = np.argwhere(np.triu(np.isfinite(found.pairs.value), k=1))
    if len(shown) > 1 and not len(pairs):
        lines.append(
            f"No two of the annotators shown share {LEAST_SHARED} clips or more, so pairs are not compared; each "
            "annotator "
            "is with all others together."
        )
    if not len(known):
        return Part("agreement", "Agreement between annotators", lines)
    each = pd.DataFrame(who(crowd, shown) | {"α with all others": [interval(one) for one in found.each]})
    pair_table = pd.DataFrame(
        {
            "annotators": [f"{crowd.names[shown[a]]} and {crowd.names[shown[b]]}" for a, b in pairs],
            "shared clips": [found.shared[a, b] for a, b in pairs],
            "α": [interval(found.pairs[a, b]) for a, b in pairs],
        }
    )
    numbers = pd.DataFrame(
        {
            **{"of": [*found.of, *(crowd.names[one] for one in shown)]},
            **{"is": ["overall"] * len(found.of) + ["annotator"] * len(shown)},
            **{
                column: [*getattr(found.overall, part), *getattr(found.each, part)]
                for column, part in (("alpha", "value"), ("low", "low"), ("high", "high"))
            },
        }
    )
    pair_numbers = pd.DataFrame(
        {
            "first": [crowd.names[shown[a]] for a, _ in pairs],
            "second": [crowd.names[shown[b]] for _, b in pairs],
            "shared": [found.shared[a, b] for a, b in pairs],
            "alpha": [found.pairs.value[a, b] for a, b in pairs],
            "low": [found.pairs.low[a, b] for a, b in pairs],
            "high": [found.pairs.high[a, b] for a, b in pairs],
        }
    )
    measure = (
        "Agreement beyond chance by Krippendorff's α (1: agreement, 0: chance) with the MASI distance between sets of "
        "emotions (Passonneau, 2006): 0 for equal sets, 1 for sets with nothing in common, between them where they "
        "overlap."
    )
    of_pairs = (
        f" (a) Every two annotators on the clips both labelled, in hundredths; grey: fewer than {LEAST_SHARED} "
        "shared clips."
        if len(pairs)
        else ""
    )
    caption = (
        f"{measure}{of_pairs} {'(b) ' if len(pairs) else ''}Each annotator with all others of the same clips, with 95% "
        "bootstrap intervals over clips; weighed by labels, the mean over all annotators is the overall α (grey "
        "line, band: "
        f"95% interval), from {counted(found.labels[0], 'label')} of {counted(found.clips[0], 'clip')}."
    )
    tables = [("Each annotator's agreement with all others", each)]
    if len(pairs):
        tables.append((f"Every two annotators with {LEAST_SHARED} shared clips or more", pair_table))
    return Part(
        name="agreement",
        title="Agreement between annotators",
        found=lines,
        figures=[
            Shown(
                "agreement",
                partial(figures.agreement_figure, crowd, shown, found),
                caption,
                "Matrix of the agreement of every two annotators, and each one's agreement with all others as a "
                "point with "
                "its interval."
                if len(pairs)
                else "Each annotator's agreement with all others as a point with its interval.",
            )
        ],
        tables=tables,
        numbers=[("agreement", numbers), *([("pairs", pair_numbers)] if len(pairs) else [])],
    )


def _confusions_part(crowd: Crowd, shown: np.ndarray, found: Confusions) -> Part:
    title = "Each against the majority of the others"
    alone = [crowd.names[one] for one, clips in zip(shown, found.clips, strict=True) if clips == 0]
    if not found.clips.any():
        reason = "None of the annotators shown shares a clip with anyone: there is no figure of this."
        return Part("confusions", title, [reason if (np.bincount(crowd.clip) > 1).any() else NOBODY_SHARES])
    lines = []
    known = np.flatnonzero(found.clips > 0)
    if len(known) > 1:
        low, high = (known[pick(found.agreeing.value[known])] for pick in (np.argmin, np.argmax))
        lines.append(
            f"{crowd.names[shown[high]]} says what the majority of the others says in "
            f"{percent(found.agreeing[high])} of "
            f"{counted(int(found.clips[high]), 'clip')}, {crowd.names[shown[low]]} in {percent(found.agreeing[low])} "
            "of "
            f"{found.clips[low]:,}."
        )
    departures = [(place, one) for place, one in enumerate(found.departures) if one is not None]
    departures.sort(key=lambda entry: -float(entry[1].share.value) * entry[1].clips)
    said = [
        f"{crowd.names[shown[place]]} says “{crowd.emotions[one.said]}” for {crowd.emotions[one.majority]} "
        f"({percent(one.share)} of {one.clips:.0f} clips)"
        for place, one in departures[:TOLD_DEPARTURES]
    ]
    if said:
        lines.append(f"The habits that most clips show: {listed(said)}.")
    if alone:
        shares = "shares" if len(alone) == 1 else "share"
        lines.append(f"{listed(alone)} {shares} no clip with anyone and {'is' if len(alone) == 1 else 'are'} left out.")
    summary = pd.DataFrame(
        who(crowd, shown)
        | {
            "clips shared": found.clips,
            "others a clip": [number(one, 1) for one in found.others],
            "as the majority (%)": [interval(one, 0, 100) for one in found.agreeing],
            "departs most in": [
                "–" if one is None else f"“{crowd.emotions[one.said]}” for {crowd.emotions[one.majority]}"
                for one in found.departures
            ],
            "of the majority's clips": ["–" if one is None else percent(one.share) for one in found.departures],
        }
    )
    numbers = _confusion_frame(crowd, shown, found)
    rates = numbers[numbers["clips"] > 0].drop(columns="kind")
    rows = pd.DataFrame(
        {"annotator": rates["annotator"], "majority": rates["majority"], "clips": rates["clips"].map("{:.1f}".format)}
        | {f"{emotion} (%)": (100 * rates[emotion]).map("{:.0f}".format) for emotion in crowd.emotions}
    )
    caption = (
        "What each annotator says (columns) where the majority of the other annotators of the same clip says something "
        "(rows), in percent of the row's clips, whose number is at its right. The annotator's own label is left out "
        "of the "
        "majority; emotions with equally many votes, and several ticks, share the clip. After the name: the share of "
        f"clips in which both are the same. Grey: fewer than {LEAST_ROW} clips. A clip has "
        f"{np.nanmean(found.others):.1f} others in the mean; with few of them a majority is often a tie."
    )
    if not crowd.named.any(axis=0).all():
        caption += " Emotions that nobody named are left out."
    return Part(
        name="confusions",
        title=title,
        found=lines,
        figures=[
            Shown(
                "confusions",
                partial(figures.confusions_figure, crowd, shown, found),
                caption,
                "A confusion matrix an annotator: the majority of the others against what the annotator says.",
            )
        ],
        tables=[("Each annotator against the majority", summary), ("Every row of the matrices", rows)],
        numbers=[("confusions", numbers)],
    )


def _confusion_frame(crowd: Crowd, shown: np.ndarray, found: Confusions) -> pd.DataFrame:
    classes = len(crowd.emotions)
    frame = {
        "annotator": np.repeat([crowd.names[one] for one in shown], classes),
        "kind": np.repeat(crowd.kinds[shown], classes),
        "majority": np.tile(crowd.emotions, len(shown)),
        "clips": found.mass.sum(axis=-1).ravel(),
    }
    rates = row_normalised(found.mass).reshape(-1, classes)
    return pd.DataFrame(frame | {emotion: rates[:, column] for column, emotion in enumerate(crowd.emotions)})


def _map_part(crowd: Crowd, found: Map | None) -> Part:
    title = "A map of annotators"
    if found is None:
        return Part(
            "map",
            title,
            [
                f"A map needs {LEAST_MAPPED} annotators or more who can be compared and are not all alike: there is no "
                "figure of this."
            ],
        )
    total = 100 * float(found.variance.sum())
    lines = [
        f"The two axes hold {total:.0f}% of the variance between {counted(len(found.annotators), 'profile')}; near "
        "neighbours may still differ in the rest."
    ]
    missing = len(crowd.names) - len(found.annotators)
    if missing:
        lines.append(f"{counted(missing, 'annotator')} who shared no clip with anyone cannot be placed.")
    profile = (
        "a profile is what an annotator says where the majority of the others says something, weighed to the same "
        "clips "
        "for all"
        if found.by == "confusion"
        else "no clips are shared, so a profile is how often an annotator names each emotion, whatever the clips"
    )
    caption = (
        f"Annotators by likeness: {profile}. Principal components of Hellinger distances between profiles (classical "
        f"multidimensional scaling), each smoothed by {PRIOR:.0f} clips a row of the average annotator, so those "
        "with few "
        "labels stand near the middle. Axes are marked by the pairs of majority and label that tell their ends apart. "
        "Larger: more labels. Bars: 95% intervals (1.96 bootstrap standard errors over the annotator's clips, axes "
        "held)"
    )
    caption += "." if found.shown.all() else ", of the annotators in the other figures; names where there is room."
    frame = pd.DataFrame(
        who(crowd, found.annotators)
        | {"component 1": [interval(one) for one in found.spread[:, 0]]}
        | {"component 2": [interval(one) for one in found.spread[:, 1]]}
    )
    numbers = pd.DataFrame(
        {
            **{"annotator": [crowd.names[one] for one in found.annotators], "kind": crowd.kinds[found.annotators]},
            **{"labels": crowd.counts()[found.annotators]},
            **{
                f"{axis}_{part}": getattr(found.spread, part)[:, column]
                for column, axis in enumerate(("component_1", "component_2"))
                for part in ("value", "low", "high")
            },
        }
    )
    return Part(
        name="map",
        title=title,
        found=lines,
        figures=[
            Shown(
                "map",
                partial(figures.map_figure, crowd, found),
                caption,
                "Scatter of annotators in two dimensions; those near each other name emotions alike.",
            )
        ],
        tables=[("Where each annotator is", frame)],
        numbers=[("map", numbers)],
    )
