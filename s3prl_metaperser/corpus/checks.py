"""What must hold of the rows of a manifest, checked column by column so that a million rows take seconds.

Every check works on the distinct values of a column (its categories), and looks for a row only to name it in the error.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd

from s3prl_metaperser.corpus.csv_file import Where, categorical
from s3prl_metaperser.errors import MetaPerSERError, suggest

COLUMNS = ("utterance", "audio", "session", "speaker", "annotator", "kind", "emotions")
KINDS = ("external", "self")
SEPARATOR = ";"
_UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
"""What a csv, UTF-8 or the name of a file cannot hold, or nobody can see; a line break can be quoted."""


def check_annotations(frame: pd.DataFrame, emotions: Sequence[str], where: Where) -> None:
    """Check every rule that the rows of a manifest obey.

    Args:
        frame: rows with the columns :data:`COLUMNS`, ``session`` as text or integers.
        emotions: the words that the column ``emotions`` may hold.
        where: leads the reader of an error to a row.

    Raises:
        MetaPerSERError: the first rule that is broken, with row, column, value and what was expected.
    """
    if frame.empty:
        raise MetaPerSERError(f"{where(0)}: no annotation at all; expected one row per annotator and utterance")
    columns = {name: categorical(frame[name].astype(str) if name == "session" else frame[name]) for name in COLUMNS}
    for name in COLUMNS:
        _check_cells(columns[name], name, where, check_text)
    _check_cells(columns["session"], "session", where, _check_session)
    _check_cells(columns["kind"], "kind", where, _check_kind)
    _check_cells(columns["audio"], "audio", where, check_inside_root)
    _check_cells(columns["emotions"], "emotions", where, lambda cell: _check_emotions(cell, emotions))
    for name in ("audio", "session", "speaker"):
        _check_one_each(columns, "utterance", name, where)
    # What is kept for the test is kept by utterance: a recording under a second name would be trained on.
    _check_one_each({**columns, "audio": one_spelling(columns["audio"])}, "audio", "utterance", where)
    _check_one_each(columns, "annotator", "kind", where)
    _check_unique(columns["utterance"], columns["annotator"], where)


def check_text(cell: str) -> str | None:
    r"""Say why something is no text that can be written and has anything in it, or None.

    >>> check_text("a.wav")
    >>> check_text("a\0.wav")
    'holds a control character'
    """
    if cell.isprintable() and cell.strip():
        return None
    if not cell.strip():
        return "is empty; every cell of a manifest holds a value"
    if _UNWRITABLE.search(cell):
        return "holds a control character"
    return None


def _check_session(cell: str) -> str | None:
    # int() also takes "1_000", " 1" and other scripts' digits; a manifest doesn't.
    is_number = cell.isascii() and cell.isdigit() and len(cell) <= 9
    return None if is_number else "is no session number; expected an integer such as 1"


def _check_kind(cell: str) -> str | None:
    return None if cell in KINDS else f"is no kind of annotator; {suggest(cell, KINDS)} expected {' or '.join(KINDS)}"


def check_inside_root(cell: str) -> str | None:
    """Say what is wrong with an audio path that isn't below the audio root, or None.

    >>> check_inside_root("a/../b.wav")
    >>> check_inside_root("../b.wav")
    'leads outside the audio root; expected a path below it'
    """
    if _UNWRITABLE.search(cell):
        return "holds a control character; expected the name of a file"
    if cell.startswith(("/", "\\")) or cell[1:2] == ":":
        return "is an absolute path; expected one relative to the audio root"
    if ".." in cell and posixpath.normpath(cell.replace("\\", "/")).split("/")[0] == "..":
        return "leads outside the audio root; expected a path below it"
    return None


def one_spelling(audio: pd.Categorical) -> pd.Categorical:
    """Give paths so that a recording has one only: ``a.wav`` for ``./a.wav`` and ``b/../a.wav``.

    Args:
        audio: paths, as :func:`~s3prl_metaperser.corpus.csv_file.categorical` gives them.
    """
    spelled = [posixpath.normpath(cell) if "./" in cell or "//" in cell else cell for cell in audio.categories]
    if spelled == audio.categories.tolist():
        return audio
    return categorical(pd.Series(pd.Index(spelled, dtype=object).take(audio.codes)))


def _check_emotions(cell: str, emotions: Sequence[str]) -> str | None:
    words = cell.split(SEPARATOR)
    for word in words:
        if word not in emotions:
            return f"holds the unknown emotion {word!r}; {suggest(word, emotions)} (several are joined by ';')"
    if len(set(words)) < len(words):
        return "names an emotion twice; name each once"
    return None


def _first_row(column: pd.Categorical, code: int) -> int:
    return int(np.flatnonzero(column.codes == code)[0])


def _check_cells(column: pd.Categorical, name: str, where: Where, fault: Callable[[str], str | None]) -> None:
    """Apply a check to each distinct value; name the first row that fails it."""
    faults = {code: found for code, cell in enumerate(column.categories) if (found := fault(cell)) is not None}
    if faults:
        row, code = min((_first_row(column, code), code) for code in _some(faults))
        raise MetaPerSERError(f"{where(row)}: {name} {column.categories[code]!r} {faults[code]}")


def _some(codes: Iterable[int], most: int = 100) -> list[int]:
    """Limit the search for the first faulty row, which would be slow if every value of a million were wrong."""
    return list(codes)[:most]


def _check_one_each(columns: dict[str, pd.Categorical], owner: str, name: str, where: Where) -> None:
    """Check that every ``owner`` has a single value of ``name`` over all its rows."""
    owners, values = columns[owner].codes.astype(np.int64), columns[name].codes.astype(np.int64)
    first = np.empty(len(columns[owner].categories), dtype=np.int64)
    first[owners[::-1]] = values[::-1]
    rows = np.flatnonzero(values != first[owners])
    if rows.size:
        row = int(rows[0])
        earlier = columns[name].categories[first[owners[row]]]
        raise MetaPerSERError(
            f"{where(row)}: {owner} {columns[owner][row]!r} has {name} {columns[name][row]!r} here and {earlier!r} at "
            f"{where(int(np.flatnonzero(owners == owners[row])[0]))}; expected one {name} for each {owner}"
        )


def _check_unique(utterance: pd.Categorical, annotator: pd.Categorical, where: Where) -> None:
    pairs = utterance.codes.astype(np.int64) * len(annotator.categories) + annotator.codes
    rows = np.flatnonzero(pd.Series(pairs).duplicated().to_numpy())
    if rows.size:
        row = int(rows[0])
        earlier = int(np.flatnonzero(pairs == pairs[row])[0])
        raise MetaPerSERError(
            f"{where(row)}: utterance {utterance[row]!r} is labelled by annotator {annotator[row]!r} a second time, "
            f"first at {where(earlier)}; expected one row for each, several emotions joined by ';'"
        )
