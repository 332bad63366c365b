"""``results.csv``, a row an episode, as it is read again: by a run that adds to it, by tables and by tests."""

from __future__ import annotations

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


def read_results(path: Path) -> pd.DataFrame:
    """Read results, all of which must be what a run has written.

    Args:
        path: of a ``results.csv``.

    Returns:
        The columns :data:`RESULT_COLUMNS`: text, integers, and percentages as floats.

    Raises:
        MetaPerSERError: naming file, line, column and value.
    """
    cells = read_csv(path, RESULT_COLUMNS)
    if cells.empty:
        raise MetaPerSERError(f"{path}: holds no result; delete it, and run again what wrote it")
    columns: dict[str, pd.Series] = {}
    for name in RESULT_COLUMNS:
        texts = categorical(cells[name])
        values = [_value(name, text) for text in texts.categories]
        faulty = [code for code, value in enumerate(values) if value is None]
        if faulty:
            row = int(np.isin(texts.codes, faulty).argmax())
            expected = "a name" if name in TEXT_COLUMNS else "a count" if name in COUNT_COLUMNS else "a percentage"
            raise MetaPerSERError(
                f"{line_of_row(path)(row)}: {name} is {texts[row]!r:.80}; expected {expected}; is the file damaged?"
            )
        columns[name] = pd.Series(values)[texts.codes].reset_index(drop=True)
    return pd.DataFrame(columns)


def _value(column: str, text: str) -> str | int | float | None:
    if column in TEXT_COLUMNS:
        return text if text.strip() else None
    if column in COUNT_COLUMNS:
        return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if text.isascii() and 0 <= value <= 100 else None
