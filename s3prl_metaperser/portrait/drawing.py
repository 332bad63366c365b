"""What the figures of a portrait have in common: style, names, heat maps, points with intervals, legends.

Figures are at the size of a paper's page (7 inches wide), no letter below 7 points; colours are told apart by the
colour-blind and in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.spread import Estimates
from s3prl_metaperser.publishing.figures import COLOURS, GRID, REFERENCE_COLOUR

WIDTH = 7.0
"""Inches of a page's text."""
SMALL = 7.0
"""Points of the smallest letters."""
LONGEST_NAME = 14
"""Letters beyond which a name is cut."""
SEQUENTIAL, DIVERGING = "cividis", "PuOr"
NOTHING = "#e4e4e4"
"""The colour of cells without a number."""
KIND_COLOURS = {"external": COLOURS[0], "self": COLOURS[1]}
KIND_MARKERS = {"external": "o", "self": "^"}
ROW = 0.2
"""Inches a row of a heat map."""


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


def heat(
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


def ticks(axes: Axes, columns: Sequence[str], rows: Sequence[str] | None) -> None:
    """Name a heat map's columns, and its rows where they have names of their own."""
    axes.set_xticks(range(len(columns)), columns, rotation=90 if max(map(len, columns)) > 3 else 0)
    if rows is not None:
        axes.set_yticks(range(len(rows)), rows)


def dots(axes: Axes, values: Estimates, kinds: np.ndarray, hollow: np.ndarray | None = None) -> None:
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


def kind_legend(figure: Figure, kinds: np.ndarray, reference: str = "", hollow: np.ndarray | None = None) -> None:
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
