"""What a portrait says of agreement."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from s3prl_metaperser.portrait import figures
from s3prl_metaperser.portrait.agreement import LEAST_SHARED, Agreement
from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.page import Part, Shown
from s3prl_metaperser.portrait.wording import NOBODY_SHARES, counted, interval, who

TITLE = "Agreement between annotators"


def agreement_part(crowd: Crowd, shown: np.ndarray, found: Agreement) -> Part:
    """Say how far annotators agree, in all, each with the others, and every two."""
    if found.clips[0] == 0:
        return Part("agreement", TITLE, [NOBODY_SHARES])
    lines = [
        f"Krippendorff's α of {name} is {interval(found.overall[place])}, over {counted(found.labels[place], 'label')} "
        f"of the {counted(found.clips[place], 'clip')} that two of them or more labelled."
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
            "annotator is with all others together."
        )
    if not len(known):
        return Part("agreement", TITLE, lines)
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
        f" (a) Every two annotators on the clips both labelled, in hundredths; grey: fewer than {LEAST_SHARED} shared "
        "clips."
        if len(pairs)
        else ""
    )
    caption = (
        f"{measure}{of_pairs} {'(b) ' if len(pairs) else ''}Each annotator with all others of the same clips, with 95% "
        "bootstrap intervals over clips; weighed by labels, the mean over all annotators is the overall α (grey line, "
        f"band: 95% interval), from {counted(found.labels[0], 'label')} of {counted(found.clips[0], 'clip')}."
    )
    tables = [("Each annotator's agreement with all others", each)]
    if len(pairs):
        tables.append((f"Every two annotators with {LEAST_SHARED} shared clips or more", pair_table))
    return Part(
        name="agreement",
        title=TITLE,
        found=lines,
        figures=[
            Shown(
                "agreement",
                partial(figures.agreement_figure, crowd, shown, found),
                caption,
                "Matrix of the agreement of every two annotators, and each one's agreement with all others as a point "
                "with its interval."
                if len(pairs)
                else "Each annotator's agreement with all others as a point with its interval.",
            )
        ],
        tables=tables,
        numbers=[("agreement", numbers), *([("pairs", pair_numbers)] if len(pairs) else [])],
    )
