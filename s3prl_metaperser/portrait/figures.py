"""The figures of a portrait; each is drawn within :func:`~s3prl_metaperser.portrait.drawing.print_style`.

Annotators are in the order of the rows given.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from s3prl_metaperser.portrait.agreement import Agreement
from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.drawing import (
    DIVERGING,
    NOTHING,
    ROW,
    SEQUENTIAL,
    WIDTH,
    dots,
    heat,
    kind_legend,
    short_names,
    ticks,
)
from s3prl_metaperser.portrait.naming_habits import LEAST_ROW, Confusions, Habits, row_normalised
from s3prl_metaperser.portrait.spread import Estimates
from s3prl_metaperser.publishing.figures import REFERENCE_COLOUR

DOTS_UP_TO = 4
"""Adapted tensors up to which each has a panel of its own, with ranges."""
_COUNTS_UP_TO = 12
"""Annotators up to which the counts of shared clips fit into the matrix of pairs."""


def habits_figure(crowd: Crowd, shown: np.ndarray, found: Habits) -> Figure:
    """Show the share of each emotion in each annotator's labels, with labels and emotions ticked a clip."""
    shares = 100 * np.vstack([found.all_shares, found.shares.value])
    names = ["all labels", *short_names(crowd, shown)]
    figure = Figure(figsize=(WIDTH, 0.9 + ROW * len(names)))
    axes = figure.subplots()
    absent = found.all_shares == 0
    shares[:, absent] = np.nan
    image = heat(axes, shares, Normalize(0, np.nanmax(shares)), SEQUENTIAL, "{:.0f}")
    ticks(axes, crowd.emotions, names)
    _between_kinds(axes, crowd.kinds[shown], 1)
    axes.axhline(0.5, color="white", linewidth=3)
    counts = [len(crowd.annotator), *crowd.counts()[shown]]
    ticked = [found.all_ticked, *found.ticked.value]
    right = len(crowd.emotions) - 0.5
    for column, (title, values) in enumerate((("labels", counts), ("ticked", ticked))):
        at = right + 0.9 + 0.75 * column
        axes.text(at, -0.7, title, ha="right", va="bottom")
        for row, value in enumerate(values):
            axes.text(at, row, f"{value:,}" if column == 0 else f"{value:.2f}", ha="right", va="center")
    bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.02)
    bar.set_label("share of labels (%)")
    bar.outline.set_linewidth(0.4)
    return figure


def agreement_figure(crowd: Crowd, shown: np.ndarray, found: Agreement) -> Figure:
    """Show alpha of every two annotators, and each one's part in the overall alpha, with its interval."""
    names = short_names(crowd, shown)
    with_pairs = bool(np.isfinite(found.pairs.value).any())
    rows = len(names)
    height = 1.3 + ROW * rows
    figure = Figure(figsize=(WIDTH, height))
    if with_pairs:
        pairs, each = figure.subplots(1, 2, sharey=True, width_ratios=(2.1, 1))
        alphas = 100 * np.where(np.tri(rows, k=-1, dtype=bool), found.pairs.value, np.nan)
        known = alphas[np.isfinite(alphas)]
        norm = Normalize(min(0.0, float(known.min())), max(float(known.max()), 1.0))
        image = heat(pairs, alphas, norm, SEQUENTIAL, "{:.0f}", empty=None)
        for a, b in np.argwhere(np.tri(rows, k=-1, dtype=bool)):
            if not np.isfinite(alphas[a, b]):
                pairs.add_patch(mpl.patches.Rectangle((b - 0.5, a - 0.5), 1, 1, color=NOTHING, linewidth=0))
            if rows <= _COUNTS_UP_TO:
                pairs.text(a, b, f"{found.shared[a, b]}", ha="center", va="center", color="#555555")
        ticks(pairs, names, names)
        counts = " (below), shared clips (above)" if rows <= _COUNTS_UP_TO else ""
        pairs.set_title(f"(a) Pairs: α × 100{counts}", loc="left")
        bar = figure.colorbar(image, ax=pairs, location="bottom", fraction=0.04, pad=0.02, aspect=40)
        bar.outline.set_linewidth(0.4)
    else:
        each = figure.subplots()
        each.set_yticks(range(rows), names)
        each.set_ylim(rows - 0.5, -0.5)
    dots(each, found.each, crowd.kinds[shown])
    if np.isfinite(found.overall.low[0]):
        each.axvspan(found.overall.low[0], found.overall.high[0], color=REFERENCE_COLOUR, alpha=0.2, linewidth=0)
    each.axvline(found.overall.value[0], color=REFERENCE_COLOUR, linewidth=1, label="all annotators")
    each.axvline(0, color="black", linewidth=0.6, linestyle=":")
    each.set_xlabel("α with the others")
    each.set_title("(b) Each with all others" if with_pairs else "Each with all others", loc="left")
    kind_legend(figure, crowd.kinds[shown], reference="all annotators")
    return figure


def confusions_figure(crowd: Crowd, shown: np.ndarray, found: Confusions) -> Figure:
    """Show each annotator's confusion with the majority of the others, a panel an annotator.

    Emotions that nobody ticked, and annotators who share no clip, are left out.
    """
    chosen = np.flatnonzero(found.clips > 0)
    names = short_names(crowd, shown[chosen])
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    heard = np.flatnonzero(crowd.named.any(axis=0))
    emotions = [crowd.emotions[one] for one in heard]
    classes = len(emotions)
    figure = Figure(figsize=(min(WIDTH, 1.2 + 1.65 * columns), 1.1 + 1.5 * rows))
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.05, wspace=0.04, hspace=0.03)
    panels = figure.subplots(rows, columns, squeeze=False)
    norm = Normalize(0, 100)
    blank = [""] * classes
    for place, axes in enumerate(panels.flat):
        if place >= len(chosen):
            axes.set_visible(False)
            continue
        mass = found.mass[chosen[place]][np.ix_(heard, heard)]
        rates = 100 * row_normalised(mass)
        counts = mass.sum(axis=1)
        few = counts < LEAST_ROW
        heat(axes, np.where(few[:, None], np.nan, rates), norm, SEQUENTIAL, None)
        lowest = place + columns >= len(chosen)
        ticks(axes, emotions if lowest else blank, emotions if place % columns == 0 else blank)
        for row, count in enumerate(counts):
            at = classes - 0.2
            axes.text(at, row, f"{count:.0f}", va="center", color="#767676" if few[row] else "black")
        share = found.agreeing.value[chosen[place]]
        axes.set_title(f"{names[place]}: {100 * share:.0f}%", loc="left", fontsize=7.5)
    figure.supylabel("majority of the other annotators", fontsize=7.5)
    figure.supxlabel("what the annotator says", fontsize=7.5)
    colours = mpl.cm.ScalarMappable(norm, SEQUENTIAL)
    bar = figure.colorbar(colours, ax=panels, location="top", fraction=0.02, pad=0.01, aspect=60, shrink=0.5)
    bar.set_label("share of the row's clips (%)")
    bar.outline.set_linewidth(0.4)
    return figure


def movement_figure(
    crowd: Crowd, shown: np.ndarray, divergence: Estimates, shift: Estimates, trained_on: np.ndarray
) -> Figure:
    """Show how far personal models are from the generic one, and which emotions they hear more or less.

    Args:
        crowd: the annotators.
        shown: (shown,) whose models.
        divergence: (shown,) in bits.
        shift: (shown, classes) in percentage points.
        trained_on: (shown,) whether the checkpoint knows the annotator's labels; others are hollow.
    """
    names = short_names(crowd, shown)
    figure = Figure(figsize=(WIDTH, 1.25 + ROW * len(names)))
    points, shifts = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.9))
    points.set_yticks(range(len(names)), names)
    dots(points, divergence, crowd.kinds[shown], hollow=~trained_on)
    points.set_xlim(left=0)
    points.set_xlabel("Jensen–Shannon divergence (bits)")
    points.set_title("(a) How far from generic", loc="left")
    largest = max(1.0, float(np.nanmax(np.abs(shift.value))))
    image = heat(shifts, shift.value, Normalize(-largest, largest), DIVERGING, "{:+.0f}")
    ticks(shifts, crowd.emotions, None)
    points.set_ylim(len(names) - 0.5, -0.5)
    shifts.set_title("(b) Heard more or less than generic", loc="left")
    bar = figure.colorbar(image, ax=shifts, fraction=0.04, pad=0.02)
    bar.set_label("mean probability (points)")
    bar.outline.set_linewidth(0.4)
    kind_legend(figure, crowd.kinds[shown], hollow=~trained_on)
    return figure


def tensors_figure(
    crowd: Crowd, shown: np.ndarray, tensors: Sequence[str], moved: Estimates, trained_on: np.ndarray
) -> Figure:
    """Show how much of itself each adapted tensor changes, in percent.

    Args:
        crowd: the annotators.
        shown: (shown,) whose models.
        tensors: names; few of them are shown with their ranges.
        moved: (shown, tensors) shares of the tensor's norm, and their ranges.
        trained_on: (shown,) whether the checkpoint knows the annotator's labels; others are hollow.
    """
    names = short_names(crowd, shown)
    percent = Estimates(100 * moved.value, 100 * moved.low, 100 * moved.high)
    figure = Figure(figsize=(WIDTH, 1.1 + ROW * len(names)))
    if len(tensors) <= DOTS_UP_TO:
        panels = figure.subplots(1, len(tensors), sharey=True, squeeze=False)[0]
        for column, (axes, tensor) in enumerate(zip(panels, tensors, strict=True)):
            dots(axes, percent[:, column], crowd.kinds[shown], hollow=~trained_on)
            axes.set_xlim(left=0)
            axes.set_xlabel(f"{tensor} (% of norm)")
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        kind_legend(figure, crowd.kinds[shown], hollow=~trained_on)
        return figure
    axes = figure.subplots()
    known = percent.value[np.isfinite(percent.value)]
    top = max(float(known.max()), 1e-9) if len(known) else 1.0
    image = heat(axes, percent.value, Normalize(0, top), SEQUENTIAL, "{:.0f}" if top >= 10 else "{:.1f}")
    ticks(axes, tensors, names)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("change (% of norm)")
    bar.outline.set_linewidth(0.4)
    return figure


def _between_kinds(axes: Axes, kinds: np.ndarray, first: int = 0) -> None:
    """Part annotators of different kinds, whose rows begin at ``first``."""
    for row in np.flatnonzero(kinds[1:] != kinds[:-1]):
        axes.axhline(first + row + 0.5, color="white", linewidth=3)
