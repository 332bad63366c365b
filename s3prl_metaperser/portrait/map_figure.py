"""The map of annotators, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.drawing import KIND_COLOURS, KIND_MARKERS, WIDTH, kind_legend, short_names
from s3prl_metaperser.portrait.likeness import Map
from s3prl_metaperser.publishing.figures import GRID

PALE = "#b8b8b8"
_GAPS = (1, 3, 9, 16, 24, 34)
"""Points between a name and what it names, in the order they are tried."""
_ANGLES = np.pi / 8 * np.array([2, 6, 14, 10, 0, 8, 4, 12, 1, 7, 15, 9, 3, 5, 13, 11])
"""Where a name may stand, the corners first."""
_HALO = withStroke(linewidth=1.5, foreground="white")


def map_figure(crowd: Crowd, found: Map) -> Figure:
    """Show annotators on the map, by kind, larger with more labels; those in other figures with names and intervals."""
    figure = Figure(figsize=(WIDTH, 4.6))
    # Room for the numbers at an axis' ends: equal units move them after the page is laid out.
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.1)
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
    kind_legend(figure, kinds)
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
