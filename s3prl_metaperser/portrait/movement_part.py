"""What a portrait says of personal models: the part that needs a checkpoint."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from s3prl_metaperser.corpus.manifest import Corpus
from s3prl_metaperser.portrait import figures
from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.movement import Comparison, Movement, movement
from s3prl_metaperser.portrait.page import Part, Shown
from s3prl_metaperser.portrait.wording import counted, interval, listed, number, who

TITLE = "How far personal models move"


def movement_part(corpus: Corpus, crowd: Crowd, shown: np.ndarray, comparison: Comparison, seed: int) -> Part:
    """Adapt the model to each shown annotator and say what came of it."""
    found = movement(corpus, crowd, shown, comparison, seed)
    trained_on = np.array([crowd.names[one] in comparison.trained_on for one in shown])
    models = who(crowd, shown) | {
        "checkpoint": np.where(trained_on, "trained on", "not trained on"),
        "adapted on": found.shots,
    }
    table = pd.DataFrame(
        models
        | {"divergence (bits)": [interval(one, 3) for one in found.divergence]}
        | {
            f"{emotion} (points)": [interval(one, 1, signed=True) for one in found.shift[:, column]]
            for column, emotion in enumerate(crowd.emotions)
        }
    )
    moved = pd.DataFrame(
        who(crowd, shown)
        | {
            f"{name} (%)": [interval(one, 1, 100) for one in found.moved[:, column]]
            for column, name in enumerate(found.tensors)
        }
    )
    numbers = pd.DataFrame(
        {
            **{"annotator": [crowd.names[one] for one in shown], "kind": crowd.kinds[shown], "trained_on": trained_on},
            **{"shots": found.shots, "draws": found.draws, "clips": found.clips},
            **{f"divergence_{part}": getattr(found.divergence, part) for part in ("value", "low", "high")},
            **{
                f"shift_{emotion}_{part}": getattr(found.shift, part)[:, column]
                for column, emotion in enumerate(crowd.emotions)
                for part in ("value", "low", "high")
            },
        }
    )
    moved_numbers = pd.DataFrame(
        {
            **{"annotator": np.repeat([crowd.names[one] for one in shown], len(found.tensors))},
            **{"tensor": np.tile(found.tensors, len(shown)), "change": found.moved.value.ravel()},
            **{"lowest": found.moved.low.ravel(), "highest": found.moved.high.ravel()},
        }
    )
    adapted = f"{found.shots.max()} of an annotator's labels"
    fewer = [
        f"{crowd.names[one]} ({shots})"
        for one, shots in zip(shown, found.shots, strict=True)
        if shots < comparison.shots
    ]
    if fewer:
        adapted += f" ({listed(fewer)}: all there are)"
    times = f"{found.draws} times, each from another draw" if found.draws > 1 else "once"
    how = f"Each personal model is the checkpoint {comparison.name}, adapted on {adapted}; {times}."
    marks = (
        "Filled: annotators whose labels the checkpoint was trained or chosen on; hollow: others."
        if trained_on.any() and not trained_on.all()
        else "The checkpoint was not trained on labels of any of these annotators."
        if not trained_on.any()
        else "The checkpoint was trained or chosen on labels of all these annotators."
    )
    tensors = (
        f"the {len(found.tensors)} of {found.adapted:,} adapted tensors that move most"
        if len(found.tensors) < found.adapted
        else listed(found.tensors) + (", the only adapted tensor" if found.adapted == 1 else ", all that adapts")
    )
    ranges = " (lines: from the lowest to the highest)" if len(found.tensors) <= figures.DOTS_UP_TO else ""
    return Part(
        name="movement",
        title=TITLE,
        found=_sentences(crowd, shown, found, trained_on),
        figures=[
            Shown(
                "movement",
                partial(figures.movement_figure, crowd, shown, found.divergence, found.shift, trained_on),
                f"Personal models against the generic one on the same {counted(found.clips, 'clip')} for everyone. "
                "(a) Jensen–Shannon divergence of their probabilities, mean over clips and draws, in bits (0: the "
                "same, 1: nothing in common), with 95% bootstrap intervals over clips and draws. (b) Mean "
                f"probability of each emotion minus the generic model's, in percentage points. {how} {marks}",
                "Each annotator's divergence from the generic model as a point with its interval, and a heat map of "
                "the emotions its model hears more or less.",
            ),
            Shown(
                "tensors",
                partial(figures.tensors_figure, crowd, shown, found.tensors, found.moved, trained_on),
                f"How far adaptation moves {tensors}: the norm of the change, in percent of the tensor's norm before, "
                f"mean over {counted(found.draws, 'draw')}{ranges}.",
                "How much of itself each adapted tensor changes, a row an annotator.",
            ),
        ],
        tables=[
            ("Divergence and shift, with 95% intervals", table),
            ("Change of each tensor, with its lowest and highest over draws", moved),
        ],
        numbers=[("movement", numbers), ("tensors", moved_numbers)],
    )


def _sentences(crowd: Crowd, shown: np.ndarray, found: Movement, trained_on: np.ndarray) -> list[str]:
    low, high = int(np.argmin(found.divergence.value)), int(np.argmax(found.divergence.value))
    lines = [
        f"The model of {crowd.names[shown[high]]} is furthest from the generic one "
        f"({interval(found.divergence[high], 3)} bits)"
        + (
            f", that of {crowd.names[shown[low]]} nearest ({interval(found.divergence[low], 3)})."
            if low != high
            else "."
        )
    ]
    place, emotion = np.unravel_index(np.argmax(np.abs(found.shift.value)), found.shift.value.shape)
    direction = "more" if found.shift.value[place, emotion] > 0 else "less"
    lines.append(
        f"The largest shift: {crowd.names[shown[place]]} hears {direction} “{crowd.emotions[emotion]}” "
        f"({interval(found.shift[place, emotion], 1, signed=True)} points)."
    )
    if np.isfinite(found.same.value) and np.isfinite(found.other.value):
        lines.append(
            "Two models of one annotator, from different draws of its labels, are in the mean "
            f"{interval(found.same, 3)} bits apart, models of two annotators {interval(found.other, 3)}: "
            + (
                "what a model has learned is the annotator more than the draw."
                if found.other.low > found.same.high
                else "the draw of labels matters as much as whose they are."
            )
        )
    if trained_on.any() and not trained_on.all():
        told = []
        for chosen in (trained_on, ~trained_on):
            some = found.divergence.value[chosen]
            told.append(f"{number(some.mean(), 3)} bits ({number(some.min(), 3)} to {number(some.max(), 3)})")
        lines.append(
            f"Mean divergence of the {trained_on.sum()} annotators that the checkpoint was trained or chosen on, and "
            f"from the least to the most: {told[0]}; of the {(~trained_on).sum()} others: {told[1]}."
        )
    return lines
