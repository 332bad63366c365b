"""Figure 2: what the systems make of more labelled clips (paper section 4.2).

Meta-PerSER is meta-trained at one K and evaluated at each; Entire-Few is tuned on dev at each. The query clips are the
same at every K, so what differs between points of a line is the support set alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments.experiment import Experiment, Record, Row
from s3prl_metaperser.experiments.figures import shots_figure
from s3prl_metaperser.experiments.plan import BASELINES_RECIPE, Plan, Setup, Variant
from s3prl_metaperser.experiments.report import Section
from s3prl_metaperser.experiments.table1 import few_name, fine_tuned, has_reference, row_name
from s3prl_metaperser.experiments.tables import write_tables
from s3prl_metaperser.numerals import exact
from s3prl_metaperser.publishing.figures import write_figure
from s3prl_metaperser.settings import Recipe, SystemName
from s3prl_metaperser.systems import DISPLAY_NAMES

SHOTS = (2, 4, 8, 16, 32, 64)
FLAT: tuple[SystemName, ...] = ("entire_zero", "reference")
"""Systems that make no use of the K clips: what they score at one K they score at each."""
REFERENCE = DISPLAY_NAMES["reference"]


def figure2(setup: Setup, inner_lrs: Sequence[float], recipes: Sequence[Recipe], shots: Sequence[int]) -> Experiment:
    """Plan the experiment.

    Args:
        setup: of its runs; its K is the one that Meta-PerSER is meta-trained at.
        inner_lrs: inner rates of Meta-PerSER to choose from on dev, at the K it is trained at.
        recipes: of Meta-PerSER, a line each.
        shots: every K of the figure.

    Raises:
        MetaPerSERError: when the corpus has too few labels for any of them.
    """
    able = {scenario: [k for k in shots if setup.has_enough(scenario, k)] for scenario in setup.scenarios}
    if not any(able.values()):
        raise MetaPerSERError(
            f"--shots {' '.join(map(str, shots))}: with {setup.queries} queries the test or dev annotators have too "
            "few labels for any of them; lower --queries"
        )
    plan = Plan(setup)
    rows = []
    for scenario, fold in setup.cells:
        for k in able[scenario]:
            few = plan.evaluated("entire_few", scenario, fold, k)
            rows.append(Row(DISPLAY_NAMES["entire_few"], scenario, fold, few, k))
            for recipe in fine_tuned(recipes):
                node = plan.evaluated("entire_few", scenario, fold, k, recipe)
                rows.append(Row(few_name(recipe), scenario, fold, node, k))
            for recipe in reversed(recipes):
                node = plan.meta_perser(scenario, fold, Variant(recipe), inner_lrs, k)
                rows.append(Row(row_name(recipe, recipes), scenario, fold, node, k))
            for system in (one for one in FLAT if one != "reference" or has_reference(setup.scope)):
                recipe = recipes[0] if DISPLAY_NAMES[system] == REFERENCE else BASELINES_RECIPE
                node = plan.evaluated(system, scenario, fold, recipe=recipe)
                rows.append(Row(DISPLAY_NAMES[system], scenario, fold, node, k))
    notes = tuple(
        f"{scenario}: K = {', '.join(str(k) for k in shots if k not in able[scenario])} is left out, since a dev or "
        f"test annotator has too few labels for it and {setup.queries} queries."
        for scenario in setup.scenarios
        if len(able[scenario]) < len(shots)
    )
    arguments = [
        *("--recipe", *recipes),
        *("--shots", *map(str, shots), "--train-shots", str(setup.shots)),
        *("--inner-lr", *(exact(lr) for lr in inner_lrs)),
    ]
    return Experiment("figure2", setup, plan.nodes, rows, arguments, notes)


def present(out: Path, title: str, record: Record, results: pd.DataFrame) -> list[Section]:
    """Write the figure and its numbers, and give them to the report; arguments as for Table 1."""
    flat = {DISPLAY_NAMES[system] for system in FLAT}.intersection(results["system"])
    notes = [
        *record.notes,
        f"{', '.join(sorted(flat))}: one evaluation, shown at every K, since the K clips make no difference to it.",
    ]
    table = write_tables(results, out, "figure2", notes=notes, reference=[REFERENCE])
    write_figure(shots_figure(results, title, reference=[REFERENCE]), out, "figure2")
    return [
        Section(
            "Figure 2: the number of labelled clips",
            "Each system at every K, on the same query clips.",
            table,
            out / "figure2.svg",
            out / "results-figure2.csv",
            alt="Scores of each system against the number of labelled clips, as in the table.",
        )
    ]
