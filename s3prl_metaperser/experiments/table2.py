"""Table 2: what each part of the method gives, in the paper's six combinations (paper section 4.3).

Without INI meta-training starts from random weights; without CSMT the outer loss is on clips outside the support;
without DA every step is of second order; without LSLR all tensors and steps have one rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments.experiment import Experiment, Record, Row
from s3prl_metaperser.experiments.plan import Plan, Setup, Variant
from s3prl_metaperser.experiments.report import Section
from s3prl_metaperser.experiments.significance import compare, write_comparison
from s3prl_metaperser.experiments.tables import write_tables
from s3prl_metaperser.numerals import exact
from s3prl_metaperser.settings import SECTION

PARTS = ("INI", "CSMT", "DA", "LSLR")
COMBINATIONS: tuple[tuple[str, ...], ...] = ((), ("INI",), ("INI", "CSMT"), ("INI", "DA"), ("INI", "LSLR"), PARTS)
COMPARISON = "table2-comparison"


def row_name(parts: Sequence[str]) -> str:
    """Name a combination, as in the column ``system`` of results.

    >>> row_name(["INI", "DA"])
    'MAML+INI+DA'
    """
    return "+".join(["MAML", *parts])


OURS = row_name(PARTS)
MARKS: Mapping[str, Mapping[str, str]] = {
    row_name(parts): {part: "✓" if part in parts else "" for part in PARTS} for parts in COMBINATIONS
}


def variant(parts: Sequence[str]) -> Variant:
    """Give the settings of a combination; what is part of it is as the paper's recipe has it."""
    if tuple(parts) == PARTS:
        return Variant("paper")
    change: list[tuple[str, Any]] = []
    if "CSMT" not in parts:
        change.append(("meta.query", "disjoint"))
    if "DA" not in parts:
        change.append(("meta.annealing", None))
    if "LSLR" not in parts:
        change.append(("meta.lslr", False))
    return Variant("paper", row_name(parts).lower(), tuple(change), from_ssl="INI" in parts)


def table2(setup: Setup, inner_lrs: Sequence[float]) -> Experiment:
    """Plan the experiment.

    Args:
        setup: of its runs.
        inner_lrs: inner rates to choose from on dev, for each row alike.

    Raises:
        MetaPerSERError: for an override of what the rows differ in, which would be in all of them, or in none.
    """
    differing = {f"{SECTION}.{key}" for key, _ in variant(()).change}
    for override in setup.overrides:
        if override.key in differing:
            raise MetaPerSERError(
                f"--set {override}: {override.key} is what rows of Table 2 differ in; leave it out, or make the other "
                "experiments one by one"
            )
    plan = Plan(setup)
    rows = [
        Row(row_name(parts), scenario, fold, plan.meta_perser(scenario, fold, variant(parts), inner_lrs))
        for scenario, fold in setup.cells
        for parts in COMBINATIONS
    ]
    arguments = ["--shots", str(setup.shots), "--inner-lr", *(exact(lr) for lr in inner_lrs)]
    return Experiment("table2", setup, plan.nodes, rows, arguments)


def present(out: Path, title: str, record: Record, results: pd.DataFrame) -> list[Section]:
    """Write the table and the comparison, and give them to the report; arguments as for Table 1."""
    table = write_tables(results, out, "table2", notes=record.notes, rows=MARKS)
    sections = [
        Section(
            "Table 2: the parts of the method",
            "INI: from SSL-E, not from random weights. CSMT: the outer loss is on the support set itself, not on other "
            "clips. DA: the first inner steps are of first order. LSLR: a rate for each tensor and step is learned.",
            table,
            csv=out / "results-table2.csv",
        )
    ]
    others = [system for system in dict.fromkeys(results["system"]) if system != OURS]
    if others and OURS in set(results["system"]):
        frame = compare(results, OURS, others, common_only=True)
        sections.append(
            Section(
                "All parts and each other row",
                "Are the differences of Table 2 more than chance?",
                write_comparison(frame, out, COMPARISON),
                csv=out / f"{COMPARISON}.csv",
            )
        )
    return sections
