"""What must hold of the rows of a manifest, checked column by column so that a million rows take seconds.

Every check works on the distinct values of a column (its categories), and looks for a row only to name it in the error.
"""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from s3prl_metaperser.errors import MetaPerSERError, suggest

COLUMNS = ("utterance", "audio", "session", "speaker", "annotator", "kind", "emotions")
KINDS = ("external", "self")
SEPARATOR = ";"

Where = Callable[[int], str]
"""Row number, from 0, to the words that lead a reader there, such as ``annotations.csv:12``."""


def read_csv(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Read a csv of text cells with known columns.

    Args:
        path: the csv, UTF-8 with a header line.
        required: columns that must be there.
        optional: columns that may be there.

    Returns:
        The columns in the order ``required + optional`` (those that exist), each categorical over strings; an empty
        cell is ``""``.

    Raises:
        MetaPerSERError: the file is missing, unreadable, not a csv, or its columns aren't those.
    """
    if not path.is_file():
        raise MetaPerSERError(f"{path}: no such file; expected a csv with the columns {','.join(required)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
        _check_header(path, header, required, optional)
        # `names` with `header=0` keeps pandas from renaming columns, `index_col=False` from making the first an index.
        frame = pd.read_csv(
            path,
            dtype="category",
            keep_default_na=False,
            na_filter=False,
            encoding="utf-8-sig",
            header=0,
            names=header,
            index_col=False,
            on_bad_lines="error",
        )
    except UnicodeDecodeError as error:
        raise MetaPerSERError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except (pd.errors.ParserError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise MetaPerSERError(f"{path}: not a readable csv ({reason}); quote cells that hold a comma") from None
    except OSError as error:
        raise MetaPerSERError(f"{path}: cannot be read ({error.strerror})") from None
    for column in header:
        if frame[column].dtype != "category" or frame[column].isna().any():
            frame[column] = frame[column].astype(object).fillna("").astype(str).astype("category")
    return frame[[column for column in (*required, *optional) if column in header]]


def _check_header(path: Path, header: list[str], required: Sequence[str], optional: Sequence[str]) -> None:
    """Compare a csv's header line with the columns it should have."""
    expected = f"expected {','.join(required)}" + (f" and optionally {','.join(optional)}" if optional else "")
    known = (*required, *optional)
    if not header:
        raise MetaPerSERError(f"{path}:1: the file is empty; {expected}")
    for column in header:
        if column not in known:
            free = [name for name in known if name not in header] or list(known)
            raise MetaPerSERError(f"{path}:1: unknown column {column!r}; {suggest(column, free)} {expected}")
        if header.count(column) > 1:
            raise MetaPerSERError(f"{path}:1: column {column!r} stands twice; {expected}")
    missing = [column for column in required if column not in header]
    if missing:
        raise MetaPerSERError(f"{path}:1: missing column {', '.join(map(repr, missing))}; {expected}")


def line_of_row(path: Path) -> Where:
    """Lead to a row of a csv file by its line.

    Only an error asks for it, so the file is read again then: blank lines and quoted line breaks make line numbers
    differ from row numbers.
    """

    def where(row: int) -> str:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            next(reader, None)
            start = reader.line_num + 1
            for cells in reader:
                # pandas skips lines that are empty or blank, and so must the count.
                if any(cell.strip() for cell in cells) or len(cells) > 1:
                    if row == 0:
                        return f"{path}:{start}"
                    row -= 1
                start = reader.line_num + 1
        return str(path)

    return where


def categorical(column: pd.Series) -> pd.Categorical:
    """Give a column of strings as a categorical whose categories are sorted and all in use."""
    values = pd.Categorical(column).remove_unused_categories()
    return values.reorder_categories(sorted(values.categories))


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
        _check_cells(columns[name], name, where, _check_filled)
    _check_cells(columns["session"], "session", where, _check_session)
    _check_cells(columns["kind"], "kind", where, _check_kind)
    _check_cells(columns["audio"], "audio", where, check_inside_root)
    _check_cells(columns["emotions"], "emotions", where, lambda cell: _check_emotions(cell, emotions))
    for name in ("audio", "session", "speaker"):
        _check_one_each(columns, "utterance", name, where)
    _check_one_each(columns, "annotator", "kind", where)
    _check_unique(columns["utterance"], columns["annotator"], where)


def _check_filled(cell: str) -> str | None:
    return None if cell.strip() else "is empty; every cell of a manifest holds a value"


def _check_session(cell: str) -> str | None:
    # int() also takes "1_000", " 1" and other scripts' digits; a manifest doesn't.
    return None if cell.isascii() and cell.isdigit() else "is no session number; expected an integer such as 1"


def _check_kind(cell: str) -> str | None:
    return None if cell in KINDS else f"is no kind of annotator; {suggest(cell, KINDS)} expected {' or '.join(KINDS)}"


def check_inside_root(cell: str) -> str | None:
    """Say what is wrong with an audio path that isn't below the audio root, or None.

    >>> check_inside_root("a/../b.wav")
    >>> check_inside_root("../b.wav")
    'leads outside the audio root; expected a path below it'
    """
    if cell.startswith(("/", "\\")) or cell[1:2] == ":":
        return "is an absolute path; expected one relative to the audio root"
    if ".." in cell and posixpath.normpath(cell.replace("\\", "/")).split("/")[0] == "..":
        return "leads outside the audio root; expected a path below it"
    return None


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
