"""From episodes' rows to the tables that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from s3prl_metaperser.atomic import replacing
from s3prl_metaperser.experiments.table_formats import Block, Cell, Row, Table, write_formats
from s3prl_metaperser.metrics import METRICS
from s3prl_metaperser.publishing.pages import MISSING
from s3prl_metaperser.results_file import DIVERGED_AT

CAPTION = "Adaptation to test listeners, in percent; the best of each column is bold."
HOW_TO_READ = (
    "Percentages, mean ± standard deviation over all episodes of all folds; higher is better. Each episode adapts to a "
    "test listener's K labelled clips and scores Q others; all systems see the same episodes."
)
ABOUT_REFERENCE = "Rows in italics are a reference, not one of the systems compared; they take no part in the bold."
ABOUT_FAILED = "Episodes in which adaptation diverged, which score 0: "
CONDITION = ["upstream", "scope", "shots", "queries"]
"""Columns of results across which no mean is taken: each combination is a block of its own."""
_CONDITION_TITLES = {"upstream": "{}", "scope": "scope {}", "shots": "K = {}", "queries": "Q = {}"}


def summarise(results: pd.DataFrame, by: Sequence[str] = ("scenario", "system")) -> pd.DataFrame:
    """Give mean and standard deviation over episodes.

    Args:
        results: episodes as :func:`~s3prl_metaperser.results_file.read_episodes` gives them.
        by: columns whose every combination is a row of its own.

    Returns:
        The combinations in order of appearance: the columns ``by``, ``episodes``, ``failed`` (how many of them
        diverged) and, for each metric, ``METRIC`` and ``METRIC_std`` in percent (of the population, as all episodes are
        at hand).
    """
    groups = results.groupby(list(by), sort=False)
    columns: dict[str, pd.Series] = {"episodes": groups.size(), "failed": groups[DIVERGED_AT].count()}
    for metric in METRICS:
        columns[metric] = groups[metric].mean()
        columns[f"{metric}_std"] = groups[metric].std(ddof=0)
    return pd.DataFrame(columns).reset_index()


def write_tables(
    results: pd.DataFrame,
    out: Path,
    name: str,
    notes: Sequence[str] = (),
    reference: Sequence[str] = (),
    rows: Mapping[str, Mapping[str, str]] | None = None,
) -> Table:
    r"""Write the paper's kind of table: a row a system, three metrics a scenario.

    The best mean of each column is bold, as are those that look equal to it as shown. A system with fewer episodes than
    another is marked and never bold, as it was not measured on the same ones; one of which episodes have failed is
    marked, as these count. Upstreams, scopes, K and Q that differ get a block each.

    Args:
        results: episodes as :func:`~s3prl_metaperser.results_file.read_episodes` gives them.
        out: folder of ``NAME.md``, ``NAME.tex`` (for ``\input``) and ``NAME.csv`` (the numbers, to four digits).
        name: of the files.
        notes: lines below the table.
        reference: systems to set apart as what the others are measured by: last, in italics, never bold.
        rows: further leading columns by system, such as ``{"Meta-PerSER": {"INI": "✓"}}`` for Table 2, in the order of
            the rows. A system named here that has no results gets a row without numbers.

    Returns:
        The table, for the report.
    """
    summary = summarise(results, [*CONDITION, "scenario", "system"])
    marks = rows or {}
    systems = list(dict.fromkeys([*marks, *summary["system"]]))
    systems.sort(key=lambda system: system in reference)
    extra = tuple(dict.fromkeys(column for one in marks.values() for column in one))
    scenarios = list(dict.fromkeys(summary["scenario"]))
    blocks, incomplete, failed = [], [], []
    for key, block in summary.groupby(CONDITION, sort=False):
        expected = block.groupby("scenario")["episodes"].transform("max")
        whole = block["episodes"] == expected
        title = _condition(summary, key)
        incomplete += [
            f"{_named(row, title)}: {row.episodes} of {of}"
            for row, of in zip(block[~whole].itertuples(), expected[~whole], strict=True)
        ]
        failed += [
            f"{_named(row, title)}: {row.failed} of {row.episodes}" for row in block[block["failed"] > 0].itertuples()
        ]
        contenders = block[whole & ~block["system"].isin(reference)]
        best = contenders.groupby("scenario")[list(METRICS)].max()
        cells = block.assign(whole=whole).set_index(["system", "scenario"])
        shown = tuple(
            Row(
                (
                    Cell(system),
                    *(Cell(marks.get(system, {}).get(column, "")) for column in extra),
                    *(
                        _cell(cells, best, system, scenario, metric, system in reference)
                        for scenario in scenarios
                        for metric in METRICS
                    ),
                ),
                reference=system in reference,
            )
            for system in systems
            if system in marks or system in set(block["system"])
        )
        blocks.append(Block(title, shown))
    table = Table(
        caption=CAPTION,
        leading=("System", *extra),
        groups=tuple((scenario, METRICS) for scenario in scenarios),
        blocks=tuple(blocks),
        notes=(
            HOW_TO_READ,
            *([ABOUT_REFERENCE] if any(system in reference for system in systems) else []),
            *(["† From fewer episodes than other systems, never bold: " + "; ".join(incomplete)] if incomplete else []),
            *(["‡ " + ABOUT_FAILED + "; ".join(failed)] if failed else []),
            *notes,
        ),
    )
    numbers = summary.assign(reference=summary["system"].isin(reference)).round(4)
    for column in extra:
        numbers[column] = [marks.get(system, {}).get(column, "") for system in numbers["system"]]
    with replacing(out / f"{name}.csv") as temporary:
        numbers.to_csv(temporary, index=False, lineterminator="\n")
    write_formats(table, out, name)
    return table


def _cell(cells: pd.DataFrame, best: pd.DataFrame, system: str, scenario: str, metric: str, is_reference: bool) -> Cell:
    if (system, scenario) not in cells.index:
        return Cell(MISSING)
    row = cells.loc[(system, scenario)]
    mean, spread = f"{row[metric]:.1f}", f"{row[f'{metric}_std']:.1f}"
    marks = f"{'' if row['whole'] else '†'}{'‡' if row['failed'] else ''}"
    is_best = row["whole"] and not is_reference and mean == f"{best.loc[scenario, metric]:.1f}"
    return Cell(f"{marks} {mean} ± {spread}".strip(), bold=is_best)


def _named(row: Any, title: str) -> str:
    """Name a row of the summary as notes do: system, scenario, and the title of its block if it has one."""
    return ", ".join(filter(None, [row.system, row.scenario, title]))


def _condition(summary: pd.DataFrame, key: tuple[object, ...]) -> str:
    """Say in which of the columns :data:`CONDITION` a block differs from others; empty when there is one block."""
    named = zip(CONDITION, key, strict=True)
    return ", ".join(
        _CONDITION_TITLES[column].format(value) for column, value in named if summary[column].nunique() > 1
    )
