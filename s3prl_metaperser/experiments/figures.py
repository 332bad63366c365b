"""Figures of results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from s3prl_metaperser.experiments.significance import clustered_interval
from s3prl_metaperser.metrics import METRICS
from s3prl_metaperser.publishing.figures import COLOURS, GRID, MARKERS, REFERENCE_COLOUR


def systems_figure(summary: pd.DataFrame, title: str, reference: Sequence[str] = ()) -> Figure:
    """Show each system's metrics with their spread (standard deviation) over episodes, a panel a metric.

    Args:
        summary: as :func:`s3prl_metaperser.experiments.tables.summarise` gives it, a row a (scenario, system).
        title: above the panels.
        reference: systems set apart as what the others are measured by: last, hollow, below a line.
    """
    systems = sorted(dict.fromkeys(summary["system"]), key=lambda system: system in reference)
    contenders = [system for system in systems if system not in reference]
    scenarios = list(dict.fromkeys(summary["scenario"]))
    figure = Figure(figsize=(8, 1.5 + 0.36 * len(systems)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, len(METRICS), sharey=True)
    for axes, metric in zip(panels, METRICS, strict=True):
        for shift, (scenario, colour, marker) in enumerate(zip(scenarios, COLOURS, MARKERS, strict=False)):
            offset = 0.24 * (shift - (len(scenarios) - 1) / 2)
            rows = summary[summary["scenario"] == scenario].set_index("system").reindex(systems)
            for place, system in enumerate(systems):
                axes.errorbar(
                    rows.loc[system, metric],
                    place + offset,
                    xerr=rows.loc[system, f"{metric}_std"],
                    fmt=marker,
                    color=colour,
                    markerfacecolor="white" if system in reference else colour,
                    capsize=2.5,
                    markersize=5,
                    label=scenario if place == 0 else None,
                )
        if 0 < len(contenders) < len(systems):
            axes.axhline(len(contenders) - 0.5, color=REFERENCE_COLOUR, linewidth=0.8)
        axes.set_xlabel(f"{metric} (%)")
        axes.set_yticks(range(len(systems)), systems)
        axes.grid(axis="x", **GRID)
        axes.set_axisbelow(True)
    panels[0].set_ylim(len(systems) - 0.5, -0.5)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def shots_figure(results: pd.DataFrame, title: str, reference: Sequence[str] = ()) -> Figure:
    """Show what each system makes of more labelled clips (Figure 2): a row a scenario, a panel a metric.

    Lines are means over episodes; bands their 95% bootstrap intervals, whole folds being drawn with replacement
    (:func:`s3prl_metaperser.experiments.significance.clustered_interval`), left out where there is one fold.

    Args:
        results: rows of ``results.csv`` with a column ``fold``.
        title: above the panels.
        reference: systems set apart as what the others are measured by: dashed and grey.
    """
    systems = sorted(dict.fromkeys(results["system"]), key=lambda system: system in reference)
    scenarios = list(dict.fromkeys(results["scenario"]))
    shots = sorted(set(results["shots"]))
    legend_rows = -(-len(systems) // 3)
    figure = Figure(figsize=(6.4, 0.7 + 2.0 * len(scenarios) + 0.22 * legend_rows), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(len(scenarios), len(METRICS), sharex=True, squeeze=False)
    for scenario, of_scenario in zip(scenarios, panels, strict=True):
        for place, system in enumerate(systems):
            chosen = results[(results["scenario"] == scenario) & (results["system"] == system)]
            colour = REFERENCE_COLOUR if system in reference else COLOURS[place % len(COLOURS)]
            _draw_system(of_scenario, chosen, system, colour, MARKERS[place % len(MARKERS)], system in reference)
        for axes, metric in zip(of_scenario, METRICS, strict=True):
            axes.set_title(scenario, loc="left", fontsize=10)
            axes.set_ylabel(f"{metric} (%)")
            axes.set_xscale("log", base=2)
            axes.set_xticks(shots, [str(one) for one in shots])
            axes.minorticks_off()
            axes.grid(**GRID)
            axes.set_axisbelow(True)
    for axes in panels[-1]:
        axes.set_xlabel("labelled clips (K)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_system(
    panels: Sequence[Axes], rows: pd.DataFrame, system: str, colour: str, marker: str, reference: bool
) -> None:
    """Draw one system's line and band into each metric's panel."""
    by_shots = [(shots, of_shots) for shots, of_shots in rows.groupby("shots")]
    x = [shots for shots, _ in by_shots]
    means = np.array([of_shots[list(METRICS)].mean() for _, of_shots in by_shots]).reshape(-1, len(METRICS))
    intervals = [clustered_interval(one[list(METRICS)].to_numpy(), one["fold"].to_numpy()) for _, one in by_shots]
    low, high = np.array(intervals).reshape(-1, 2, len(METRICS)).swapaxes(0, 1)
    for column, axes in enumerate(panels):
        axes.fill_between(x, low[:, column], high[:, column], color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            x,
            means[:, column],
            color=colour,
            marker=marker,
            markersize=4.5,
            linewidth=1.4,
            linestyle="--" if reference else "-",
            label=system,
        )
