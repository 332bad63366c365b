"""What a portrait says of who is like whom."""

from __future__ import annotations

from functools import partial

import pandas as pd

from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.likeness import LEAST_MAPPED, PRIOR, Map
from s3prl_metaperser.portrait.map_figure import map_figure
from s3prl_metaperser.portrait.page import Part, Shown
from s3prl_metaperser.portrait.wording import counted, interval, who

TITLE = "A map of annotators"


def map_part(crowd: Crowd, found: Map | None) -> Part:
    """Say what the map shows, or why there is none."""
    if found is None:
        return Part(
            "map",
            TITLE,
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
        "clips for all"
        if found.by == "confusion"
        else "no clips are shared, so a profile is how often an annotator names each emotion, whatever the clips"
    )
    caption = (
        f"Annotators by likeness: {profile}. Principal components of Hellinger distances between profiles (classical "
        f"multidimensional scaling), each smoothed by {PRIOR:.0f} clips a row of the average annotator, so those with "
        "few labels stand near the middle. Axes are marked by the pairs of majority and label that tell their ends "
        "apart. Larger: more labels. Bars: 95% intervals (1.96 bootstrap standard errors over the annotator's clips, "
        "axes held)"
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
        title=TITLE,
        found=lines,
        figures=[
            Shown(
                "map",
                partial(map_figure, crowd, found),
                caption,
                "Scatter of annotators in two dimensions; those near each other name emotions alike.",
            )
        ],
        tables=[("Where each annotator is", frame)],
        numbers=[("map", numbers)],
    )
