"""What a portrait says of naming: how often each emotion, and what where the others say something else."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from s3prl_metaperser.portrait import figures
from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.naming_habits import LEAST_ROW, Confusions, Habits, row_normalised
from s3prl_metaperser.portrait.page import Part, Shown
from s3prl_metaperser.portrait.wording import NOBODY_SHARES, counted, interval, listed, number, percent, who

TOLD_DEPARTURES = 3


def habits_part(crowd: Crowd, shown: np.ndarray, found: Habits) -> Part:
    """Say how often each annotator names each emotion."""
    found_said = []
    order = np.argsort(-found.all_shares, kind="stable")
    named = [f"{crowd.emotions[e]} ({100 * found.all_shares[e]:.0f}%)" for e in order if found.all_shares[e] > 0]
    found_said.append(f"Most often named over all labels: {listed(named[:3])}.")
    spread = np.ptp(found.shares.value, axis=0)
    if len(shown) > 1 and spread.max() > 0:
        widest = int(np.argmax(spread))
        low, high = int(np.argmin(found.shares.value[:, widest])), int(np.argmax(found.shares.value[:, widest]))
        found_said.append(
            f"Annotators differ most in “{crowd.emotions[widest]}”: {percent(found.shares[low, widest])} of the labels "
            f"of {crowd.names[shown[low]]}, {percent(found.shares[high, widest])} of those of "
            f"{crowd.names[shown[high]]}."
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
        f"label is shared among them, so rows sum to 100. From {counted(int(crowd.counts()[shown].sum()), 'label')}; "
        f"at the top, all {len(crowd.annotator):,}. Right: number of labels, and mean number of emotions ticked a "
        "clip. Annotators who labelled other clips met other emotions, so rows differ by clips as well as by habit."
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


def confusions_part(crowd: Crowd, shown: np.ndarray, found: Confusions) -> Part:
    """Say what each annotator says where the majority of the others says something."""
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
            f"{crowd.names[shown[high]]} says what the majority of the others says in {percent(found.agreeing[high])} "
            f"of {counted(int(found.clips[high]), 'clip')}, {crowd.names[shown[low]]} in "
            f"{percent(found.agreeing[low])} of {found.clips[low]:,}."
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
        "What each annotator says (columns) where the majority of the other annotators of the same clip says "
        "something (rows), in percent of the row's clips, whose number is at its right. The annotator's own label is "
        "left out of the majority; emotions with equally many votes, and several ticks, share the clip. After the "
        f"name: the share of clips in which both are the same. Grey: fewer than {LEAST_ROW} clips. A clip has "
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
