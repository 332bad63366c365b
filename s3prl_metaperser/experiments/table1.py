"""Table 1: the systems on the same episodes, scenario by scenario, fold by fold (paper section 4.1).

For each scenario and fold SSL-E and Multi-Few are trained, and Meta-PerSER is meta-trained from SSL-E at every inner
rate; the rate that scores best on the dev annotator is evaluated. No choice looks at the test annotator. In scope
``entire`` all three train the upstream too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from s3prl_metaperser.experiments.experiment import Experiment, Record, Row
from s3prl_metaperser.experiments.figures import systems_figure
from s3prl_metaperser.experiments.plan import BASELINES_RECIPE, Plan, Setup, Variant
from s3prl_metaperser.experiments.report import Section
from s3prl_metaperser.experiments.significance import compare, write_comparison
from s3prl_metaperser.experiments.tables import summarise, write_tables
from s3prl_metaperser.numerals import exact
from s3prl_metaperser.publishing.figures import write_figure
from s3prl_metaperser.settings import Recipe, Scope, SystemName
from s3prl_metaperser.systems import DISPLAY_NAMES, coinciding_systems

BASELINES: tuple[SystemName, ...] = (*("random", "linear_few", "entire_few", "entire_zero", "multi_few", "entire_sim"),)
"""In the paper's order; Meta-PerSER comes after them."""
OURS = DISPLAY_NAMES["meta_perser"]
FEW = DISPLAY_NAMES["entire_few"]
REFERENCE = DISPLAY_NAMES["reference"]
COMPARISON = "table1-comparison"
ABOUT_ENTIRE = (
    f"{DISPLAY_NAMES['linear_few']} trains and adapts weighted sum and linear layers on the upstream as it is; all "
    f"others train the upstream too, and {FEW} and {OURS} adapt it.",
    "The reference, which fine-tunes on all of a listener's labels, is left out: in each episode they would go through "
    "the upstream hundreds of times.",
)
"""Notes on scope ``entire``."""


def row_name(recipe: Recipe, recipes: Sequence[Recipe]) -> str:
    """Name Meta-PerSER's row: the first recipe's has no addition, another's is told by it.

    >>> row_name("paper", ["best", "paper"])
    'Meta-PerSER (paper)'
    """
    return OURS if recipe == recipes[0] else f"{OURS} ({recipe})"


def few_name(recipe: Recipe) -> str:
    """Name the row of the fine-tuned model of a recipe other than the paper's."""
    return f"{FEW} ({recipe})"


def has_reference(scope: Scope) -> bool:
    """Tell whether there is a reference: an upstream cannot be fine-tuned on all labels for every episode."""
    return scope != "entire"


def fine_tuned(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Give the recipes whose models are fine-tuned too, beside the paper's; else body and meta-training are one."""
    return [recipe for recipe in recipes if recipe != BASELINES_RECIPE]


def table1(setup: Setup, inner_lrs: Sequence[float], recipes: Sequence[Recipe]) -> Experiment:
    """Plan the experiment.

    Args:
        setup: of its runs.
        inner_lrs: inner rates of Meta-PerSER to choose from on dev.
        recipes: of Meta-PerSER, a row each; the first is the one that the other systems are compared with.
    """
    plan = Plan(setup)
    # First what takes long, of all cells: were the last of them begun after everything else, it would end alone.
    for scenario, fold in setup.cells:
        if has_reference(setup.scope):
            plan.evaluated("reference", scenario, fold, recipe=recipes[0])
        for recipe in recipes:
            plan.meta_perser(scenario, fold, Variant(recipe), inner_lrs)
        plan.evaluated("multi_few", scenario, fold)
    rows = []
    for scenario, fold in setup.cells:
        for system in BASELINES:
            rows.append(Row(DISPLAY_NAMES[system], scenario, fold, plan.evaluated(system, scenario, fold)))
        for recipe in fine_tuned(recipes):
            node = plan.evaluated("entire_few", scenario, fold, recipe=recipe)
            rows.append(Row(few_name(recipe), scenario, fold, node))
        for recipe in reversed(recipes):
            node = plan.meta_perser(scenario, fold, Variant(recipe), inner_lrs)
            rows.append(Row(row_name(recipe, recipes), scenario, fold, node))
        if has_reference(setup.scope):
            node = plan.evaluated("reference", scenario, fold, recipe=recipes[0])
            rows.append(Row(REFERENCE, scenario, fold, node))
    ours = f"{OURS} and the reference are" if has_reference(setup.scope) else f"{OURS} is"
    notes = (
        f"{ours} of recipe {recipes[0]}; systems without a name in brackets are the paper's.",
        *(
            f"{few_name(recipe)} fine-tunes the whole model of recipe {recipe}, without meta-training: what sets it "
            f"apart from {FEW} is the model, and from {OURS} the meta-training."
            for recipe in fine_tuned(recipes)
        ),
        *(
            f"{DISPLAY_NAMES[one]} coincides with {DISPLAY_NAMES[other]} here: the upstream is frozen."
            for one, other in coinciding_systems(setup.scope).items()
        ),
        *(ABOUT_ENTIRE if setup.scope == "entire" else ()),
    )
    arguments = [
        *("--shots", str(setup.shots), "--recipe", *recipes),
        *("--inner-lr", *(exact(lr) for lr in inner_lrs)),
    ]
    return Experiment("table1", setup, plan.nodes, rows, arguments, notes)


def present(out: Path, title: str, record: Record, results: pd.DataFrame) -> list[Section]:
    """Write the table, its figure and the comparison, and give them to the report.

    Args:
        out: folder.
        title: of the figure: what was measured on what.
        record: of the experiment.
        results: its rows, with their fold.
    """
    table = write_tables(results, out, "table1", notes=record.notes, reference=[REFERENCE])
    write_figure(systems_figure(summarise(results), title, reference=[REFERENCE]), out, "table1")
    sections = [
        Section(
            "Table 1: the systems",
            "Every system adapts to the same labelled clips of a listener that no training has seen.",
            table,
            out / "table1.svg",
            out / "results.csv",
            alt="Mean and spread of each system's scores, as in the table.",
        )
    ]
    others = [system for system in dict.fromkeys(results["system"]) if system not in (OURS, REFERENCE)]
    if others and OURS in set(results["system"]):
        frame = compare(results, OURS, others, common_only=True)
        sections.append(
            Section(
                f"{OURS} and each other system",
                "Are the differences of Table 1 more than chance?",
                write_comparison(frame, out, COMPARISON),
                csv=out / f"{COMPARISON}.csv",
            )
        )
    return sections
