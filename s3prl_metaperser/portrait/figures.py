"""The figures of a portrait, at the size of a paper's page (7 inches wide), no letter below 7 points.

Each function gives a figure that is drawn within :func:`print_style`. Annotators are in the order of the rows given;
colours are read by the colour-blind and in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import product
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from s3prl_metaperser.portrait.agreement import Agreement
from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.likeness import Map
from s3prl_metaperser.portrait.naming_habits import LEAST_ROW, Confusions, Habits, row_normalised
from s3prl_metaperser.portrait.spread import Estimates
from s3prl_metaperser.publishing.figures import COLOURS, GRID, REFERENCE_COLOUR

WIDTH = 7.0
SMALL = 7.0
LONGEST_NAME = 14
SEQUENTIAL, DIVERGING = "cividis", "PuOr"
NOTHING = "#e4e4e4"
PALE = "#b8b8b8"
KIND_COLOURS = {"external": COLOURS[0], "self": COLOURS[1]}
KIND_MARKERS = {"external": "o", "self": "^"}
_ROW = 0.2
"""Inches a row of a heat map."""
_GAPS = (1, 3, 9, 16, 24, 34)
"""Points between a name and what it names, in the order they are tried."""
_ANGLES = np.pi / 8 * np.array([2, 6, 14, 10, 0, 8, 4, 12, 1, 7, 15, 9, 3, 5, 13, 11])
"""Where a name may stand, the corners first."""
_HALO = withStroke(linewidth=1.5, foreground="white")
DOTS_UP_TO = 4
"""Adapted tensors up to which each has a panel of its own, with ranges."""
_COUNTS_UP_TO = 12
"""Annotators up to which the counts of shared clips fit into the matrix of pairs."""


def print_style() -> AbstractContextManager[None]:
    """Set fonts and lines as a paper needs them, for drawing and for writing."""
    sizes = {
        **dict.fromkeys(("font.size", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), SMALL),
        **{"axes.labelsize": 7.5, "axes.titlesize": 8.0},
        **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
        **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2.5),
    }
    style: dict[Any, Any] = {"font.family": "DejaVu Sans", "figure.constrained_layout.use": True, **sizes}
    return mpl.rc_context(style)


def short_names(crowd: Crowd, chosen: Sequence[int] | np.ndarray, with_kinds: bool = True) -> list[str]:
    """Give names that fit into a figure and that its font has letters for.

    A long name keeps its beginning and end. One that cannot be told from another, or that the font cannot set, becomes
    the annotator's number in the tables.

    Args:
        crowd: the annotators.
        chosen: who is named.
        with_kinds: whether to mark those who report on themselves, where there are others.
    """
    font = get_font(findfont(FontProperties(family="DejaVu Sans")))
    shortened = []
    for name in (crowd.names[one] for one in chosen):
        cut = name if len(name) <= LONGEST_NAME else f"{name[:6]}…{name[-7:]}"
        shortened.append(cut if all(font.get_char_index(ord(letter)) for letter in cut) else "")
    mixed = with_kinds and len(set(crowd.kinds)) > 1
    labels = []
    for one, short in zip(chosen, shortened, strict=True):
        label = short if short and shortened.count(short) == 1 else f"no. {one + 1}"
        # A dollar sign would begin a formula.
        labels.append(label.replace("$", r"\$") + (" (self)" if mixed and crowd.kinds[one] == "self" else ""))
    return labels


def habits_figure(crowd: Crowd, shown: np.ndarray, found: Habits) -> Figure:
    """Show the share of each emotion in each annotator's labels, with labels and emotions ticked a clip."""
    shares = 100 * np.vstack([found.all_shares, found.shares.value])
    names = ["all labels", *short_names(crowd, shown)]
    figure = Figure(figsize=(WIDTH, 0.9 + _ROW * len(names)))
    axes = figure.subplots()
    absent = found.all_shares == 0
    shares[:, absent] = np.nan
    image = _heat(axes, shares, Normalize(0, np.nanmax(shares)), SEQUENTIAL, "{:.0f}")
    _ticks(axes, crowd.emotions, names)
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
    height = 1.3 + _ROW * rows
    figure = Figure(figsize=(WIDTH, height))
    if with_pairs:
        pairs, each = figure.subplots(1, 2, sharey=True, width_ratios=(2.1, 1))
        alphas = 100 * np.where(np.tri(rows, k=-1, dtype=bool), found.pairs.value, np.nan)
        known = alphas[np.isfinite(alphas)]
        norm = Normalize(min(0.0, float(known.min())), max(float(known.max()), 1.0))
        image = _heat(pairs, alphas, norm, SEQUENTIAL, "{:.0f}", empty=None)
        for a, b in np.argwhere(np.tri(rows, k=-1, dtype=bool)):
            if not np.isfinite(alphas[a, b]):
                pairs.add_patch(mpl.patches.Rectangle((b - 0.5, a - 0.5), 1, 1, color=NOTHING, linewidth=0))
            if rows <= _COUNTS_UP_TO:
                pairs.text(a, b, f"{found.shared[a, b]}", ha="center", va="center", color="#555555")
        _ticks(pairs, names, names)
        counts = " (below), shared clips (above)" if rows <= _COUNTS_UP_TO else ""
        pairs.set_title(f"(a) Pairs: α × 100{counts}", loc="left")
        bar = figure.colorbar(image, ax=pairs, location="bottom", fraction=0.04, pad=0.02, aspect=40)
        bar.outline.set_linewidth(0.4)
    else:
        each = figure.subplots()
        each.set_yticks(range(rows), names)
        each.set_ylim(rows - 0.5, -0.5)
    _dots(each, found.each, crowd.kinds[shown])
    if np.isfinite(found.overall.low[0]):
        each.axvspan(found.overall.low[0], found.overall.high[0], color=REFERENCE_COLOUR, alpha=0.2, linewidth=0)
    each.axvline(found.overall.value[0], color=REFERENCE_COLOUR, linewidth=1, label="all annotators")
    each.axvline(0, color="black", linewidth=0.6, linestyle=":")
    each.set_xlabel("α with the others")
    each.set_title("(b) Each with all others" if with_pairs else "Each with all others", loc="left")
    _kind_legend(figure, crowd.kinds[shown], reference="all annotators")
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
        _heat(axes, np.where(few[:, None], np.nan, rates), norm, SEQUENTIAL, None)
        lowest = place + columns >= len(chosen)
        _ticks(axes, emotions if lowest else blank, emotions if place % columns == 0 else blank)
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


def map_figure(crowd: Crowd, found: Map) -> Figure:
    """Show annotators on the map, by kind, larger with more labels; those in other figures with names and intervals."""
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    kinds, counts = crowd.kinds[found.annotators], crowd.counts()[found.annotators]
    named = np.flatnonzero(found.shown)
    smallest, largest = (8, 90) if len(named) == len(counts) else (4, 24)
    sizes = smallest + largest * counts / counts.max()
    for kind in dict.fromkeys(kinds):
        for shown, alpha in ((False, 0.35), (True, 0.9)):
            chosen = (kinds == kind) & (found.shown == shown)
            axes.scatter(
                found.places[chosen, 0],
                found.places[chosen, 1],
                s=sizes[chosen],
                color=KIND_COLOURS[kind],
                marker=KIND_MARKERS[kind],
                alpha=alpha,
                edgecolors="white",
                linewidths=0.5,
                zorder=3 if shown else 2,
            )
    bars = [np.tile(found.places[one], (2, 1)) for one in named for _ in "xy"]
    for place, one in enumerate(named):
        for axis in (0, 1):
            bars[2 * place + axis][:, axis] = found.spread.low[one, axis], found.spread.high[one, axis]
    for bar in bars:
        axes.plot(*bar.T, color=PALE, linewidth=0.7, zorder=1)
    axes.set_xlabel(_axis(found, 0))
    axes.set_ylabel(_axis(found, 1))
    axes.margins(0.08)
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(**GRID)
    axes.set_axisbelow(True)
    _kind_legend(figure, kinds)
    names = short_names(crowd, found.annotators[named], with_kinds=False)
    _name(figure, axes, found.places[named], sizes[named], names, bars)
    return figure


def _name(
    figure: Figure, axes: Axes, places: np.ndarray, sizes: np.ndarray, names: Sequence[str], bars: Sequence[np.ndarray]
) -> None:
    """Name points, beside them or, with a line to them, where there is room; a name without room is left out.

    Args:
        figure: laid out here for good, since what overlaps is known on the finished page only.
        axes: that the points are in.
        places: (points, 2).
        sizes: (points,) areas in square points, as ``scatter`` takes them.
        names: of the points; earlier ones go first.
        bars: ends (2, 2) of each level or upright line that no name may cross.
    """
    for _ in range(2):  # the first drawing widens the axes to equal units, the second lays them out
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    pixel = figure.dpi / 72
    centres, radii = axes.transData.transform(places), np.sqrt(sizes) / 2 * pixel
    taken = [Bbox([centre - radius, centre + radius]) for centre, radius in zip(centres, radii, strict=True)]
    widths = np.array([[-1, -1], [1, 1]])
    taken += [Bbox(np.sort(axes.transData.transform(bar), axis=0) + widths) for bar in bars]
    inside = axes.get_window_extent()
    for centre, radius, name in zip(centres, radii, names, strict=True):
        text = axes.text(0, 0, name, zorder=4, ha="center", va="center", path_effects=[_HALO])
        box = text.get_window_extent()
        half = np.array([box.width, box.height]) / 2
        for gap, angle in product(_GAPS, _ANGLES):
            towards = np.array([np.cos(angle), np.sin(angle)])
            at = centre + towards * (radius + gap * pixel) + towards / np.abs(towards).max() * half
            box = Bbox([at - half, at + half])
            within = inside.contains(*box.min) and inside.contains(*box.max)
            if within and not any(box.overlaps(other) for other in taken):
                break
        else:
            text.remove()
            continue
        taken.append(box)
        x, y = axes.transData.inverted().transform(at)
        text.set_position((x, y))
        if gap > _GAPS[1]:
            ends = axes.transData.inverted().transform([centre, np.clip(centre, box.min, box.max)])
            axes.plot(*ends.T, color="#555555", linewidth=0.5, zorder=2.5)


def _axis(found: Map, axis: int) -> str:
    (low, high), share = found.meaning[axis], found.variance[axis]
    return f"component {axis + 1}, {100 * share:.0f}% of variance\n← {_pair(low)}   |   {_pair(high)} →"


def _pair(pair: tuple[str, str]) -> str:
    majority, said = pair
    return f"“{said}” for {majority}" if majority else f"“{said}”"


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
    figure = Figure(figsize=(WIDTH, 1.25 + _ROW * len(names)))
    dots, heat = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.9))
    dots.set_yticks(range(len(names)), names)
    _dots(dots, divergence, crowd.kinds[shown], hollow=~trained_on)
    dots.set_xlim(left=0)
    dots.set_xlabel("Jensen–Shannon divergence (bits)")
    dots.set_title("(a) How far from generic", loc="left")
    largest = max(1.0, float(np.nanmax(np.abs(shift.value))))
    image = _heat(heat, shift.value, Normalize(-largest, largest), DIVERGING, "{:+.0f}")
    _ticks(heat, crowd.emotions, None)
    dots.set_ylim(len(names) - 0.5, -0.5)
    heat.set_title("(b) Heard more or less than generic", loc="left")
    bar = figure.colorbar(image, ax=heat, fraction=0.04, pad=0.02)
    bar.set_label("mean probability (points)")
    bar.outline.set_linewidth(0.4)
    _kind_legend(figure, crowd.kinds[shown], hollow=~trained_on)
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
    figure = Figure(figsize=(WIDTH, 1.1 + _ROW * len(names)))
    if len(tensors) <= DOTS_UP_TO:
        panels = figure.subplots(1, len(tensors), sharey=True, squeeze=False)[0]
        for column, (axes, tensor) in enumerate(zip(panels, tensors, strict=True)):
            _dots(axes, percent[:, column], crowd.kinds[shown], hollow=~trained_on)
            axes.set_xlim(left=0)
            axes.set_xlabel(f"{tensor} (% of norm)")
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        _kind_legend(figure, crowd.kinds[shown], hollow=~trained_on)
        return figure
    axes = figure.subplots()
    known = percent.value[np.isfinite(percent.value)]
    top = max(float(known.max()), 1e-9) if len(known) else 1.0
    image = _heat(axes, percent.value, Normalize(0, top), SEQUENTIAL, "{:.0f}" if top >= 10 else "{:.1f}")
    _ticks(axes, tensors, names)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("change (% of norm)")
    bar.outline.set_linewidth(0.4)
    return figure


def _heat(
    axes: Axes, values: np.ndarray, norm: Normalize, colours: str, form: str | None, empty: str | None = NOTHING
) -> mpl.image.AxesImage:
    """Draw a heat map with numbers in its cells; ``empty`` colours those that are NaN."""
    map_: Colormap = mpl.colormaps[colours].with_extremes(bad=empty or "white")
    image = axes.imshow(np.ma.masked_invalid(values), norm=norm, cmap=map_, aspect="auto", interpolation="nearest")
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if form is None:
        return image
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = "0" if float(form.format(value)) == 0 else form.format(value).replace("-", "−")
            colour = "white" if _is_dark(map_(norm(value))) else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour)
        elif empty is not None:
            axes.text(column, row, "–", ha="center", va="center", color="#555555")
    return image


def _is_dark(colour: tuple[float, ...]) -> bool:
    """Tell by relative luminance (WCAG 2) whether white text is easier to read on a colour than black."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.179


def _ticks(axes: Axes, columns: Sequence[str], rows: Sequence[str] | None) -> None:
    axes.set_xticks(range(len(columns)), columns, rotation=90 if max(map(len, columns)) > 3 else 0)
    if rows is not None:
        axes.set_yticks(range(len(rows)), rows)


def _between_kinds(axes: Axes, kinds: np.ndarray, first: int = 0) -> None:
    """Part annotators of different kinds, whose rows begin at ``first``."""
    for row in np.flatnonzero(kinds[1:] != kinds[:-1]):
        axes.axhline(first + row + 0.5, color="white", linewidth=3)


def _dots(axes: Axes, values: Estimates, kinds: np.ndarray, hollow: np.ndarray | None = None) -> None:
    """Draw a number with its interval a row; NaN leaves the row empty."""
    for row in np.flatnonzero(np.isfinite(values.value)):
        colour = KIND_COLOURS[kinds[row]]
        axes.plot([values.low[row], values.high[row]], [row, row], color=colour, linewidth=1.1)
        face = "white" if hollow is not None and hollow[row] else colour
        axes.plot(
            *(values.value[row], row),
            marker=KIND_MARKERS[kinds[row]],
            color=colour,
            markerfacecolor=face,
            markersize=4,
            markeredgewidth=0.9,
        )
    axes.tick_params(axis="y", which="minor", length=0)
    axes.grid(axis="x", **GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _kind_legend(figure: Figure, kinds: np.ndarray, reference: str = "", hollow: np.ndarray | None = None) -> None:
    """Say below the figure what markers mean, where they differ."""
    handles = []
    for kind in dict.fromkeys(kinds):
        for is_hollow in (False, True) if hollow is not None else (False,):
            if hollow is not None and not (hollow[kinds == kind] == is_hollow).any():
                continue
            said = {"external": "external annotator", "self": "self-report"}[kind]
            known = "" if hollow is None else ", not trained on" if is_hollow else ", trained on"
            colour = KIND_COLOURS[kind]
            handles.append(
                mpl.lines.Line2D(
                    *([], []),
                    linestyle="",
                    marker=KIND_MARKERS[kind],
                    color=colour,
                    markerfacecolor="white" if is_hollow else colour,
                    markersize=4.5,
                    label=said + known,
                )
            )
    if reference:
        handles.append(mpl.lines.Line2D([], [], color=REFERENCE_COLOUR, linewidth=1, label=reference))
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(handles) < 4 else 2, frameon=False)
