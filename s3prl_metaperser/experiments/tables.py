"""From episodes' rows to tables that people read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from s3prl_metaperser.atomic import replacing, write_text
from s3prl_metaperser.metrics import METRICS

HOW_TO_READ = (
    "Percentages, mean ± standard deviation over all episodes of all folds; higher is better. Each episode adapts to a "
    "test listener's K labelled clips and scores Q others; all systems see the same episodes."
)


def read_results(folders: Sequence[Path]) -> pd.DataFrame:
    """Read the ``results.csv`` of evaluation runs into one frame, in the order given."""
    frames = [pd.read_csv(folder / "results.csv", dtype={"test_annotator": str}) for folder in folders]
    return pd.concat(frames, ignore_index=True)


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Give mean and standard deviation over episodes.

    Args:
        results: rows of ``results.csv``.

    Returns:
        One row a (scenario, system), in order of appearance: columns ``episodes`` and, for each metric, ``METRIC`` and
        ``METRIC_std``.
    """
    groups = results.groupby(["scenario", "system"], sort=False)
    columns: dict[str, pd.Series] = {"episodes": groups.size()}
    for metric in METRICS:
        columns[metric] = groups[metric].mean()
        columns[f"{metric}_std"] = groups[metric].std(ddof=0)
    return pd.DataFrame(columns).reset_index()


def markdown_table(summary: pd.DataFrame) -> str:
    """Lay a summary out as Table 1 does: a row a system, three metrics a scenario, the best in bold."""
    scenarios = list(dict.fromkeys(summary["scenario"]))
    systems = list(dict.fromkeys(summary["system"]))
    cells = summary.set_index(["scenario", "system"])
    header = ["System", *(f"{scenario} {metric}" for scenario in scenarios for metric in METRICS)]
    rows = []
    for system in systems:
        row = [system]
        for scenario in scenarios:
            for metric in METRICS:
                if (scenario, system) not in cells.index:
                    row.append("–")
                    continue
                value, spread = cells.loc[(scenario, system), [metric, f"{metric}_std"]]
                shown = f"{value:.1f} ± {spread:.1f}"
                best = value == cells.loc[scenario][metric].max()
                row.append(f"**{shown}**" if best else shown)
        rows.append(row)
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines) + "\n"


def write_table(results: pd.DataFrame, out: Path, results_name: str, table_name: str) -> None:
    """Write rows as ``RESULTS_NAME.csv``, their summary as ``TABLE_NAME.csv`` and as ``TABLE_NAME.md``."""
    summary = summarise(results)
    for name, frame in ((results_name, results), (table_name, summary.round(4))):
        with replacing(out / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False, lineterminator="\n")
    write_text(out / f"{table_name}.md", markdown_table(summary) + "\n" + HOW_TO_READ + "\n")
