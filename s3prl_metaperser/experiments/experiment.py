"""An experiment: its runs, the rows that its table is made of, and the record that it leaves in its folder."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from s3prl_metaperser import results_file
from s3prl_metaperser.checksums import CheckedFolder
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments.grid import Node, Outcome
from s3prl_metaperser.experiments.plan import RUNS, Setup
from s3prl_metaperser.experiments.report import NAME as REPORT
from s3prl_metaperser.experiments.runs import FAILURES, RESULTS, fingerprint_of, sources_of
from s3prl_metaperser.numerals import exact
from s3prl_metaperser.results_file import DIVERGED_AT, FAILURE_COLUMNS, RESULT_COLUMNS
from s3prl_metaperser.settings import Scenario

Kind = Literal["table1", "table2", "figure2"]

SHARED = "experiment.json"
"""The file that holds what all experiments of a folder share."""
ENDINGS = ("csv", "md", "tex", "json", "png", "svg")
"""Of the files that show an experiment."""
EPISODE_COLUMNS = [*RESULT_COLUMNS, DIVERGED_AT]
TUNING = "tuning.csv"
"""What a run chose on dev, where it chose anything."""


@dataclass(frozen=True)
class Row:
    """Where a row of the table comes from, in one cell of the grid.

    Attributes:
        system: as it is called in the table and in the column ``system``.
        scenario: of the run.
        fold: of the run.
        node: the evaluation.
        shots: K to be shown, where it differs from the run's since the system makes no use of the K clips.
    """

    system: str
    scenario: Scenario
    fold: int
    node: str
    shots: int | None = None


@dataclass(frozen=True)
class Experiment:
    """What is run and what comes of it.

    Attributes:
        kind: of the paper's experiments.
        setup: of its runs.
        nodes: its runs.
        rows: in the order of the table.
        arguments: the experiment's own part of its command line.
        notes: to be told beside the results.
    """

    kind: Kind
    setup: Setup
    nodes: Sequence[Node]
    rows: Sequence[Row]
    arguments: Sequence[str]
    notes: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command line, as a shell takes it."""
        return shlex.join(["metaperser", "experiment", self.kind, *self.setup.arguments(), *self.arguments])

    def results(self, outcome: Outcome) -> pd.DataFrame:
        """Collect the results of the rows whose runs are done.

        Returns:
            Episodes as :func:`~s3prl_metaperser.results_file.read_episodes` gives them, ordered by scenario, system
            and fold; empty when no run is done.
        """
        frames = []
        order = {scenario: place for place, scenario in enumerate(self.setup.scenarios)}
        systems = {system: place for place, system in enumerate(dict.fromkeys(row.system for row in self.rows))}
        for row in sorted(self.rows, key=lambda row: (order[row.scenario], systems[row.system], row.fold)):
            if outcome.is_done(row.node):
                folder = outcome.runs[row.node].folder
                frame = results_file.read_episodes(folder / RESULTS, folder / FAILURES)
                frame["system"] = row.system
                if row.shots is not None:
                    frame["shots"] = row.shots
                frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=EPISODE_COLUMNS)

    def chosen(self, outcome: Outcome) -> list[dict[str, Any]]:
        """Say what was chosen on the dev annotator: columns scenario, fold, system, setting."""
        found = []
        for row in {row.node: row for row in self.rows}.values():
            settings = []
            training = outcome.chosen.get(row.node)
            if training is not None:
                inner_lr = outcome.runs[training].config["downstream_expert"]["meta"]["inner_lr"]
                settings.append(f"inner_lr {exact(inner_lr)}")
            if outcome.is_done(row.node):
                settings += _tuned(outcome.runs[row.node].folder)
            if settings:
                k = outcome.runs[row.node].config["downstream_expert"]["episodes"]["shots"]
                found.append(
                    {
                        "scenario": row.scenario,
                        "fold": row.fold,
                        "system": row.system if k == self.setup.shots else f"{row.system}, K = {k}",
                        "setting": ", ".join(settings),
                    }
                )
        return found


def _tuned(folder: Path) -> list[str]:
    if not (folder / TUNING).exists():
        return []
    rows = results_file.read_tuning(folder / TUNING)
    best = rows[rows["chosen"] == "True"]
    return [text for row in best.itertuples() for text in ([f"lr {row.lr}"] if row.lr else []) + [f"{row.steps} steps"]]


@dataclass(frozen=True)
class Record:
    """What an experiment leaves in ``KIND.json``, for the report that shows all experiments of a folder.

    Attributes:
        command: that gives it again.
        folds: test annotator → fold.
        notes: to be told beside the results.
        chosen: rows of what dev chose.
        failures: a line each.
        runs: rows of name, seconds and state.
        made_of: folder of a run that was done, in that of all runs → the run's fingerprint.
        sources: what its runs read and no setting tells, such as ``recordings`` → hash.
    """

    command: str
    folds: dict[str, int]
    notes: list[str] = field(default_factory=list)
    chosen: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    made_of: dict[str, str | None] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, experiment: Experiment, outcome: Outcome) -> Record:
        """Describe an experiment that has ended."""
        skipped = [name for name, state in outcome.states.items() if state == "not run"]
        failures = [str(failure) for failure in outcome.failures]
        failures += [f"not run, since what it needs failed: {', '.join(skipped)}"] if skipped else []
        runs = [
            {"run": name, "seconds": outcome.seconds.get(name), "state": outcome.states[name]}
            for name in (node.name for node in experiment.nodes)
        ]
        done = [run.folder for name, run in outcome.runs.items() if outcome.is_done(name)]
        return cls(
            experiment.command,
            experiment.setup.folds_of(),
            [*experiment.notes, *_missing(experiment, outcome)],
            experiment.chosen(outcome),
            failures,
            runs,
            {folder.relative_to(experiment.setup.folder("")).as_posix(): fingerprint_of(folder) for folder in done},
            # They are the same for all: a run of other sources would not be done.
            next((found for folder in done if (found := sources_of(folder))), {}),
        )

    def is_of_the_runs_in(self, out: Path) -> bool:
        """Tell whether the runs that it was made of are still those of the folder."""
        return all(fingerprint_of(out / RUNS / folder) == fingerprint for folder, fingerprint in self.made_of.items())

    def other_sources(self, newest: Record) -> list[str]:
        """Name the sources that are not what the newest experiment of the folder has read."""
        return [name for name, digest in self.sources.items() if newest.sources.get(name, digest) != digest]

    def write(self, out: Path, kind: Kind) -> None:
        """Write ``KIND.json``."""
        CheckedFolder(out).replace({f"{kind}.json": json.dumps(asdict(self), indent=1) + "\n"})

    @classmethod
    def read(cls, out: Path, kind: Kind) -> Record | None:
        """Read ``KIND.json``; None where that experiment has not been made.

        Raises:
            MetaPerSERError: when the file is damaged.
        """
        path = out / f"{kind}.json"
        content = _read_json(path)
        try:
            return None if content is None else cls(**content)
        except TypeError:
            raise _damaged(path) from None


def results_name(kind: Kind) -> str:
    """Give the name of the file with a row per episode: ``results`` of Table 1, ``results-KIND`` of the others."""
    return f"results{_suffix(kind)}"


def _suffix(kind: Kind) -> str:
    return "" if kind == "table1" else f"-{kind}"


def write_results(results: pd.DataFrame, out: Path, kind: Kind) -> None:
    """Write the rows, a file of fixed columns, and beside it those of episodes that failed, if any did.

    Args:
        results: as :meth:`Experiment.results` gives them.
        out: folder.
        kind: of the experiment.
    """
    failed = results[results[DIVERGED_AT].notna()][FAILURE_COLUMNS]
    CheckedFolder(out).replace(
        {
            f"{results_name(kind)}.csv": results[RESULT_COLUMNS].to_csv(index=False, lineterminator="\n"),
            f"failures{_suffix(kind)}.csv": None if failed.empty else failed.to_csv(index=False, lineterminator="\n"),
        }
    )


def read_results(out: Path, kind: Kind, folds: Mapping[str, int]) -> pd.DataFrame | None:
    """Read the rows again, with their ``fold`` as a further column; None where their file is gone.

    Raises:
        MetaPerSERError: when a file is damaged, or names a test annotator of no fold.
    """
    path, failures = out / f"{results_name(kind)}.csv", out / f"failures{_suffix(kind)}.csv"
    for one in (path, failures):
        CheckedFolder(out).check(one.name)
    if not path.exists():
        return None
    if path.read_bytes().strip() == ",".join(RESULT_COLUMNS).encode():
        return pd.DataFrame(columns=[*EPISODE_COLUMNS, "fold"])  # every run has failed
    results = results_file.read_episodes(path, failures)
    fold = results["test_annotator"].map(folds)
    if fold.isna().any():
        raise _damaged(path)
    return results.assign(fold=fold)


def own_names() -> list[str]:
    """Name what experiments of any kind write into their folder, and replace there."""
    names = [RUNS, REPORT]
    for kind in get_args(Kind):
        names += [f"{results_name(kind)}.csv", f"failures{_suffix(kind)}.csv"]
        names += [f"{table}.{ending}" for table in (kind, f"{kind}-comparison") for ending in ENDINGS]
    return names


def remove_unmade(out: Path, kind: Kind, made: Collection[str]) -> None:
    """Remove what an earlier command of a kind has made of its runs, and the last one has not: all but its rows.

    Args:
        out: the experiment's folder.
        kind: of the experiment.
        made: names, without ending, of the tables that were made now.
    """
    for table in {kind, f"{kind}-comparison"}.difference(made):
        for ending in ENDINGS:
            if ending != "json":  # the record of the last command
                (out / f"{table}.{ending}").unlink(missing_ok=True)


def refuse_others(out: Path) -> None:
    """Refuse a folder with files of names that experiments replace, where no experiment has ever been.

    Raises:
        MetaPerSERError: naming one of them.
    """
    # First of all: a folder that another process claims meanwhile has nothing else in it before it is claimed.
    there = [name for name in own_names() if os.path.lexists(out / name)]
    if there and not (out / SHARED).exists() and not CheckedFolder(out).has_known(SHARED):
        raise MetaPerSERError(
            f"--out {out} holds {there[0]}, which no experiment there has written, and which this one would replace; "
            "move it away, or give another --out"
        )


def claim_folder(setup: Setup) -> None:
    """Record what all experiments of a folder share, or find that this one does not.

    Raises:
        MetaPerSERError: when the folder holds runs of other settings, or files of others, which would be overwritten.
    """
    refuse_others(setup.out)
    path = setup.out / SHARED
    shared, found = setup.shared(), _read_json(path)
    if found is None:
        CheckedFolder(setup.out).replace({SHARED: json.dumps(shared, indent=1) + "\n"})
        return
    for key, value in shared.items():
        if found.get(key) != value:
            raise MetaPerSERError(
                f"--out {setup.out} holds experiments with {key} {found.get(key)!r}, this one has {value!r}; "
                "give the same, or another --out"
            )


def _read_json(path: Path) -> dict[str, Any] | None:
    CheckedFolder(path.parent).check(path.name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise _damaged(path) from None
    if not isinstance(content, dict):
        raise _damaged(path)
    return content


def _damaged(path: Path) -> MetaPerSERError:
    return MetaPerSERError(f"{path} is damaged; delete it and give the command again (runs are kept)")


def _missing(experiment: Experiment, outcome: Outcome) -> list[str]:
    """Name what a failure has taken from the rows: system, scenario and folds."""
    lost: dict[tuple[str, str], list[int]] = {}
    for row in experiment.rows:
        if not outcome.is_done(row.node):
            lost.setdefault((row.system, row.scenario), []).append(row.fold)
    return [
        f"{system}, {scenario}: fold {', '.join(map(str, sorted(set(folds))))} is missing, since a run failed."
        for (system, scenario), folds in lost.items()
    ]
