"""The plot of where a listener hears something else than others."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from s3prl_metaperser.calibration.explain import Differences

INK = {"light": "#1b1f24", "dark": "#e4e8ec"}
PAPER = {"light": "#ffffff", "dark": "#14181d"}
EMPTY = {"light": "#f0f2f4", "dark": "#1d232a"}
# Blue and orange are told apart by the colour-blind; the middle is the page's own colour: no difference, no ink.
LESS, MORE = "#0b62b0", "#c2500a"
LEAST_RANGE = 0.1
"""Of the colours: a model that hardly differs should look so."""
DOTS_PER_INCH = 220


def heat_map(differences: Differences, theme: str) -> bytes:
    """Draw personal minus generic probability, a row an emotion that others hear.

    Args:
        differences: what to draw.
        theme: ``light`` or ``dark``.

    Returns:
        A PNG, about as wide as a telephone's screen at text size.
    """
    ink, paper = INK[theme], PAPER[theme]
    change = differences.change
    limit = max(LEAST_RANGE, float(np.abs(np.nan_to_num(change)).max()))
    colours = LinearSegmentedColormap.from_list("differences", [LESS, paper, MORE]).with_extremes(bad=EMPTY[theme])
    figure = Figure(figsize=(4.6, 4.3), layout="constrained", facecolor=paper)
    axes = figure.subplots()
    axes.set_facecolor(paper)
    axes.imshow(np.ma.masked_invalid(change), cmap=colours, vmin=-limit, vmax=limit)
    for (row, column), value in np.ndenumerate(change):
        if not np.isnan(value) and abs(round(100 * value)) >= 1:
            axes.text(
                column,
                row,
                f"{100 * value:+.0f}".replace("-", "−"),
                ha="center",
                va="center",
                fontsize=8,
                color=_readable_on(colours((value / limit + 1) / 2)),
            )
    names = differences.emotions
    axes.set_xticks(range(len(names)), names, rotation=45, ha="left", rotation_mode="anchor", fontsize=9)
    counted = [f"{name} ({count})" for name, count in zip(names, differences.clips, strict=True)]
    axes.set_yticks(range(len(names)), counted, fontsize=9)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("you hear", fontsize=9.5, color=ink)
    axes.set_ylabel("others hear (clips)", fontsize=9.5, color=ink)
    axes.set_xticks(np.arange(0.5, len(names) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(names) - 1), minor=True)
    axes.grid(which="minor", color=EMPTY[theme], linewidth=1)
    axes.tick_params(which="both", length=0, colors=ink)
    for spine in axes.spines.values():
        spine.set_edgecolor(EMPTY[theme])
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    return file.getvalue()


def _readable_on(colour: tuple[float, ...]) -> str:
    """Give black or white, whichever has the greater contrast (WCAG 2.2) with an sRGB colour."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "#ffffff" if luminance < 0.179 else "#000000"
