"""A run's tables, as they are read again: by a run that adds to them, by an experiment and by tests.

``results.csv`` has a row an episode, ``predictions.csv`` a row a query clip, ``failures.csv`` the episodes whose
adaptation diverged, ``tuning.csv`` what was tried on dev, ``checkpoints.csv`` which weights results are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from s3prl_metaperser.corpus.csv_file import categorical, line_of_row, read_csv
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.metrics import METRICS

TEXT_COLUMNS = ("system", "scenario", "upstream", "scope", "test_annotator")
COUNT_COLUMNS = ("episode", "shots", "queries")
RUN_COLUMNS = [*TEXT_COLUMNS, *COUNT_COLUMNS]
RESULT_COLUMNS = [*RUN_COLUMNS, *METRICS]
DIVERGED_AT = "diverged_at_step"
FAILURE_COLUMNS = [*RUN_COLUMNS, DIVERGED_AT]
SAME_RUN = ("system", "scenario", "upstream", "scope", "test_annotator", "shots", "queries")
"""Columns whose cells are those of one evaluation: given again, it takes its earlier rows' place."""
_COUNTS = (*COUNT_COLUMNS, DIVERGED_AT)
PREDICTION_COLUMNS = [*RUN_COLUMNS, "utterance", "labels", "predicted"]
"""Followed by ``p_EMOTION`` for each emotion: its probability."""
CHECKPOINT_COLUMNS = [*SAME_RUN, "checkpoint", "weights"]
"""Of the rows of one evaluation: whose they are, as a path from the folder of the table, and its fingerprint."""
TUNED_FOR = ("system", "scenario", "upstream", "scope", "fold", "shots", "queries")
"""Columns whose cells are those of one choice on dev; older files have the first of them only."""
TUNING_COLUMNS = ("system", "lr", "steps", "chosen")


def read_results(path: Path) -> pd.DataFrame:
    """Read results, all of which must be what a run has written.

    Args:
        path: of a ``results.csv``.

    Returns:
        The columns :data:`RESULT_COLUMNS`: text, integers, and percentages as floats.

    Raises:
        MetaPerSERError: naming file, line, column and value.
    """
    return _read(path, RESULT_COLUMNS)


def read_episodes(results: Path, failures: Path) -> pd.DataFrame:
    """Read results together with which of their episodes have failed.

    Args:
        results: path of a ``results.csv``.
        failures: path of the ``failures.csv`` beside it; none is there where none has failed.

    Returns:
        As :func:`read_results`, and the column :data:`DIVERGED_AT`, a nullable integer: missing where nothing failed.

    Raises:
        MetaPerSERError: when a file is damaged, or a failure is of no episode of the results.
    """
    episodes = read_results(results)
    if not failures.exists():
        return episodes.assign(**{DIVERGED_AT: pd.array([pd.NA] * len(episodes), dtype="Int64")})
    failed = read_failures(failures).astype({DIVERGED_AT: "Int64"})
    if failed.duplicated(RUN_COLUMNS).any() or len(failed.merge(episodes[RUN_COLUMNS])) != len(failed):
        raise MetaPerSERError(
            f"{failures}: its episodes are not those of {results.name}; delete both, and run again what wrote them"
        )
    return episodes.merge(failed, how="left", on=RUN_COLUMNS)


def read_failures(path: Path) -> pd.DataFrame:
    """Read which episodes have failed, as they are.

    Returns:
        The columns :data:`FAILURE_COLUMNS`: text and integers.

    Raises:
        MetaPerSERError: naming file, line, column and value.
    """
    return _read(path, FAILURE_COLUMNS)


def read_predictions(path: Path, emotions: Sequence[str]) -> pd.DataFrame:
    """Read predictions, as categoricals over text.

    Args:
        path: of a ``predictions.csv``.
        emotions: the classes, in order.

    Returns:
        The columns :data:`PREDICTION_COLUMNS` and each emotion's.

    Raises:
        MetaPerSERError: when it is no such table.
    """
    return read_csv(path, [*PREDICTION_COLUMNS, *(probability_of(emotion) for emotion in emotions)])


def probability_of(emotion: str) -> str:
    """Name the column of an emotion's probability."""
    return f"p_{emotion}"


def read_tuning(path: Path) -> pd.DataFrame:
    """Read what was tried on dev, as text: :data:`TUNING_COLUMNS`, :data:`TUNED_FOR` and the metrics there are.

    What an older file does not say is empty.

    Raises:
        MetaPerSERError: when it is no such table.
    """
    rows = read_csv(path, TUNING_COLUMNS, optional=(*TUNED_FOR[1:], *METRICS)).astype(str)
    return rows.assign(**{name: "" for name in TUNED_FOR if name not in rows})


def read_checkpoints(path: Path) -> pd.DataFrame:
    """Read which weights results are of, as text: :data:`CHECKPOINT_COLUMNS`.

    Raises:
        MetaPerSERError: when it is no such table.
    """
    return read_csv(path, CHECKPOINT_COLUMNS).astype(str)


def merged(path: Path, rows: pd.DataFrame, evaluated: pd.DataFrame) -> pd.DataFrame:
    """Give a table's rows with others added, in place of those of the same evaluations.

    Args:
        path: of the table; it may not be there yet.
        rows: to be added, with all of the table's columns, :data:`SAME_RUN` among them.
        evaluated: rows with the columns :data:`SAME_RUN` of all that was evaluated, be anything added of it or not.

    Returns:
        Rows of text, as they are to be written; what is not a number is empty.

    Raises:
        MetaPerSERError: when the table has other columns or is no csv.
    """
    added = rows.astype(object).where(rows.notna(), "").astype(str)
    if not path.exists():
        return added
    earlier = read_csv(path, list(rows.columns)).astype(str)
    again = set(runs_of(evaluated))
    return pd.concat([earlier[[run not in again for run in runs_of(earlier)]], added], ignore_index=True)


def runs_of(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """Give each row's cells of :data:`SAME_RUN`, as text."""
    return list(rows[list(SAME_RUN)].astype(str).itertuples(index=False, name=None))


def _read(path: Path, names: Sequence[str]) -> pd.DataFrame:
    cells = read_csv(path, names)
    if cells.empty:
        raise MetaPerSERError(f"{path}: holds no result; delete it, and run again what wrote it")
    columns: dict[str, pd.Series] = {}
    for name in names:
        texts = categorical(cells[name])
        values = [_value(name, text) for text in texts.categories]
        faulty = [code for code, value in enumerate(values) if value is None]
        if faulty:
            row = int(np.isin(texts.codes, faulty).argmax())
            expected = "a name" if name in TEXT_COLUMNS else "a count" if name in _COUNTS else "a percentage"
            raise MetaPerSERError(
                f"{line_of_row(path)(row)}: {name} is {texts[row]!r:.80}; expected {expected}; is the file damaged?"
            )
        columns[name] = pd.Series(values)[texts.codes].reset_index(drop=True)
    return pd.DataFrame(columns)


def _value(column: str, text: str) -> str | int | float | None:
    if column in TEXT_COLUMNS:
        return text if text.strip() else None
    if column in _COUNTS:
        return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if text.isascii() and 0 <= value <= 100 else None
