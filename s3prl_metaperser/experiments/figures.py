"""Figures of results, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from s3prl_metaperser.atomic import replacing
from s3prl_metaperser.metrics import METRICS

COLOURS = {"seen": "#0072b2", "unseen": "#d55e00"}
MARKERS = {"seen": "o", "unseen": "s"}


def systems_figure(summary: pd.DataFrame, title: str) -> Figure:
    """Show each system's metrics with their spread over episodes, a panel a metric.

    Args:
        summary: as :func:`s3prl_metaperser.experiments.tables.summarise` gives it.
        title: above the panels.
    """
    systems = list(dict.fromkeys(summary["system"]))
    scenarios = list(dict.fromkeys(summary["scenario"]))
    figure = Figure(figsize=(10, 1.4 + 0.45 * len(systems)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for panel, (axes, metric) in enumerate(zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True)):
        for shift, scenario in enumerate(scenarios):
            rows = summary[summary["scenario"] == scenario].set_index("system").reindex(systems)
            offset = 0.22 * (shift - (len(scenarios) - 1) / 2)
            axes.errorbar(
                rows[metric],
                [place + offset for place in range(len(systems))],
                xerr=rows[f"{metric}_std"],
                fmt=MARKERS[scenario],
                color=COLOURS[scenario],
                capsize=3,
                label=scenario,
            )
        axes.set_xlabel(f"{metric} (%)")
        axes.set_yticks(range(len(systems)), systems)
        axes.grid(axis="x", color="#dddddd")
        axes.set_axisbelow(True)
        if panel == 0:
            axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def write_figure(figure: Figure, out: Path, name: str) -> None:
    """Write ``NAME.png`` and ``NAME.svg``."""
    for ending, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
        with replacing(out / f"{name}.{ending}") as temporary:
            figure.savefig(temporary, format=ending, **options)
