"""Conducting an experiment from its check to the report of its folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd

from s3prl_metaperser.atomic import locked, remove_leftovers
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments import figure2, table1, table2
from s3prl_metaperser.experiments.experiment import (
    Experiment,
    Kind,
    Record,
    claim_folder,
    read_results,
    refuse_others,
    remove_unmade,
    results_name,
    write_results,
)
from s3prl_metaperser.experiments.grid import Grid, Outcome
from s3prl_metaperser.experiments.launchers import Launcher, environment
from s3prl_metaperser.experiments.plan import Setup
from s3prl_metaperser.experiments.report import NAME as REPORT
from s3prl_metaperser.experiments.report import Report, Section, versions, write_report
from s3prl_metaperser.upstream.extraction import PROCESSES

Present = Callable[[Path, str, Record, pd.DataFrame], list[Section]]

PRESENTERS: dict[Kind, Present] = {"table1": table1.present, "table2": table2.present, "figure2": figure2.present}


def conduct(experiment: Experiment, launcher: Launcher, jobs: int) -> Outcome:
    """Run what is not done yet, and write results, tables and the report of the folder.

    Args:
        experiment: what to run.
        launcher: starts the runs.
        jobs: runs that are under way at once.

    Returns:
        What became of the runs; where some failed, tables are made of the others.

    Raises:
        MetaPerSERError: when the corpus or a setting is wrong, before anything is run or written.
    """
    setup = experiment.setup
    setup.check(launcher.check, launcher.is_elsewhere)
    refuse_others(setup.out)
    try:
        setup.out.mkdir(parents=True, exist_ok=True)
        lock = (setup.out / ".lock").open("a")
    except OSError as error:
        raise MetaPerSERError(f"--out {setup.out} cannot be written: {error.strerror}") from None
    with lock, locked(lock, f"another experiment writes into {setup.out}; waiting for it"):
        remove_leftovers(setup.out, "*")
        claim_folder(setup)
        tell_replaced(experiment)
        launcher.held = [lock]
        # The first run extracts what all others wait for: on the cores of all.
        is_said = launcher.is_elsewhere or PROCESSES in os.environ
        cores = {} if is_said else {PROCESSES: str(jobs * setup.threads)}
        with environment(cores):
            outcome = Grid(experiment.nodes).run(launcher, jobs)
        write_results(experiment.results(outcome), setup.out, experiment.kind)
        Record.of(experiment, outcome).write(setup.out, experiment.kind)
        report(setup, experiment.kind)
    return outcome


def tell_replaced(experiment: Experiment) -> None:
    """Say on stderr that an experiment replaces the table of one of its kind that was made of other runs."""
    out, kind = experiment.setup.out, experiment.kind
    try:
        earlier = Record.read(out, kind)
    except MetaPerSERError:
        return  # What is damaged is made anew.
    if earlier is None or {row["run"] for row in earlier.runs} == {node.name for node in experiment.nodes}:
        return
    _warn(
        f"{out} holds a {kind} of other scenarios, folds, recipes, K or inner rates, which this one replaces; its runs "
        f"are kept, and this brings it back: {earlier.command}"
    )


def report(setup: Setup, newest: Kind) -> Path:
    """Write tables, figures and the report of all experiments made in a folder so far.

    One whose rows are gone is left out. One whose runs have been replaced, or have read other recordings, weights or
    code than those of the newest, is marked. stderr names them.

    Args:
        setup: of the folder.
        newest: the experiment that has just been conducted.
    """
    out = setup.out
    last = Record.read(out, newest)
    records: dict[Kind, Record] = {}
    sections: list[Section] = []
    for kind, present in PRESENTERS.items():
        if (record := Record.read(out, kind)) is None:
            continue
        results = read_results(out, kind, record.folds)
        if results is None:
            gone = out / f"{results_name(kind)}.csv"
            _warn(f"{gone} is gone, and {REPORT} is without {kind}; this brings them back: {record.command}")
            continue
        records[kind] = record
        own = [Section(kind, "No run of this experiment has ended well.")]
        if not results.empty:
            own = present(out, _title(setup, kind), record, results)
        made = {section.csv.stem for section in own if section.csv is not None}
        remove_unmade(out, kind, made if results.empty else {kind, *made})
        others = record.other_sources(last) if last is not None else []
        if others or not record.is_of_the_runs_in(out):
            made_of = f"other {' and '.join(others)} than {newest}" if others else "runs that are no longer there"
            stale = f"made of {made_of}; this brings it up to date: {record.command}"
            _warn(f"{out}: its {kind} is {stale}")
            own = [replace(own[0], text=f"This {kind} is {stale}\n{own[0].text}"), *own[1:]]
        sections += own
    chosen = [row for record in records.values() for row in record.chosen]
    runs = {row["run"]: row for record in records.values() for row in record.runs}
    return write_report(
        out,
        Report(
            title=f"Listener-personalised emotion recognition on {setup.listeners.name}",
            corpus=setup.listeners.name,
            sections=sections,
            commands=[record.command for record in records.values()],
            versions=versions(),
            settings=setup.shared(),
            seeds={"--seed": setup.seed},
            chosen=pd.DataFrame(chosen).drop_duplicates() if chosen else None,
            failures=list(dict.fromkeys(line for record in records.values() for line in record.failures)),
            runs=pd.DataFrame(list(runs.values())) if runs else None,
        ),
    )


def _title(setup: Setup, kind: Kind) -> str:
    # K is Figure 2's own axis: there the title says the one that was meta-trained at.
    trained_at = "meta-trained at " if kind == "figure2" else ""
    return f"{setup.listeners.name}, {setup.upstream.name}, {trained_at}K={setup.shots}, Q={setup.queries}"


def _warn(line: str) -> None:
    print(f"metaperser: {line}", file=sys.stderr)


def tell(experiment: Experiment, outcome: Outcome) -> int:
    """Print the table and where everything is, and list failures on stderr.

    Returns:
        The exit code: 1 where a run failed.
    """
    out = experiment.setup.out
    table = out / f"{experiment.kind}.md"
    if any(outcome.is_done(row.node) for row in experiment.rows):
        print(table.read_text(encoding="utf-8"))
    print(f"Report, to be opened in a browser: {out / REPORT}")
    print(
        f"Rows per episode: {out / results_name(experiment.kind)}.csv   Runs, checkpoints, predictions: {out / 'runs'}"
    )
    if not outcome.failures:
        return 0
    skipped = sum(state == "not run" for state in outcome.states.values())
    print(
        f"metaperser: {len(outcome.failures)} of {len(outcome.states)} runs failed, {skipped} more need them; the "
        "others are kept and not repeated:",
        file=sys.stderr,
    )
    for failure in outcome.failures:
        print(f"  {failure}", file=sys.stderr)
    return 1
