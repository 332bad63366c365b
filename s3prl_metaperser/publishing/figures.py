"""How figures look, and how they are written: the same figure gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from s3prl_metaperser.atomic import replacing

# Okabe and Ito's colours, told apart by the colour-blind; without their yellow, too pale for lines on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
REFERENCE_COLOUR = "#777777"
GRID: Mapping[str, Any] = {"color": "#dddddd", "linewidth": 0.7}

_UNDATED: Mapping[str, Mapping[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def write_figure(figure: Figure, out: Path, name: str, formats: Sequence[str] = ("png", "svg"), dpi: int = 200) -> None:
    """Write a figure as ``OUT/NAME.FORMAT`` for each format.

    Args:
        figure: what to draw.
        out: folder.
        name: of the files, without an ending.
        formats: of ``png``, ``svg`` and ``pdf``.
        dpi: pixels an inch, where there are pixels.
    """
    # Fonts go into a PDF as outlines of type 42, which publishers ask for.
    with mpl.rc_context({"svg.hashsalt": name, "pdf.fonttype": 42}):
        for ending in formats:
            with replacing(out / f"{name}.{ending}") as temporary:
                figure.savefig(temporary, format=ending, dpi=dpi, metadata=dict(_UNDATED[ending]))
