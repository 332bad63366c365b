"""Text tables with known columns, read so that a million rows stay small and an error can name its line."""

from __future__ import annotations

import csv
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd

from s3prl_metaperser.errors import MetaPerSERError, suggest

Where = Callable[[int], str]
"""Row number, from 0, to the words that lead a reader there, such as ``annotations.csv:12``."""

LONGEST_LINE = 100_000
LONGEST_CELL = 4_096
"""Characters; a path has no more, and labels have less."""

_CHUNK = 128
"""Rows that are numbered at once. Few, so that cells are looked up while the processor's cache still holds them, and
the garbage collector has little to walk through: 1.7 to 3 times as fast as 50,000."""


def read_csv(
    path: Path, required: Sequence[str], optional: Sequence[str] = (), others: bool = False, encoding: str = "utf-8-sig"
) -> pd.DataFrame:
    """Read a csv of text cells.

    Every distinct text of a column is kept once and rows hold its number. Unlike pandas' reader this one guesses no
    types and no missing values, and names the line of a ragged row.

    Args:
        path: the csv, with a header line. Blank lines are skipped, and rows and unnamed columns of empty cells, which
            spreadsheets leave.
        required: columns that must be there.
        optional: columns that may be there.
        others: allow further columns, which are left out.
        encoding: how the text is stored.

    Returns:
        The columns in the order ``required + optional`` (those that exist), each categorical over strings; an empty
        cell is ``""``.

    Raises:
        MetaPerSERError: the file is missing, unreadable, not a csv, its columns aren't those, or a cell is no label's.
    """
    if not path.is_file():
        fault = "is a folder" if path.is_dir() else "no such file"
        raise MetaPerSERError(f"{path}: {fault}; expected a csv with the columns {','.join(required)}")
    try:
        with path.open(encoding=encoding, newline="") as file:
            lines = _lines(path, file)
            first = next(lines, "")
            _check_commas(path, first, required)
            reader = csv.reader(chain([first], lines), strict=True)
            header = next(reader, [])
            _check_header(path, header, required, optional, others)
            places = {name: header.index(name) for name in (*required, *optional) if name in header}
            unnamed = [] if others else [place for place, name in enumerate(header) if not name]
            columns = _read_columns(_whole_rows(path, reader, len(header), unnamed), list(places.values()))
    except UnicodeDecodeError:
        raise MetaPerSERError(f"{path}: is not UTF-8 text; save it with the encoding UTF-8") from None
    except csv.Error as error:
        raise MetaPerSERError(f"{path}:{reader.line_num}: not a readable csv ({error})") from None
    except OSError as error:
        raise MetaPerSERError(f"{path}: cannot be read ({error.strerror})") from None
    for name, (codes, texts) in zip(places, columns, strict=True):
        longest = max(texts, key=len, default="")
        if len(longest) > LONGEST_CELL:
            row = int((codes == texts.index(longest)).argmax())
            raise MetaPerSERError(
                f"{line_of_row(path, encoding)(row)}: {name} has {len(longest):,} characters; expected at most "
                f"{LONGEST_CELL:,}: is a quote not closed?"
            )
    return pd.DataFrame({name: _sorted(*column) for name, column in zip(places, columns, strict=True)}, copy=False)


def _lines(path: Path, file: Iterable[str]) -> Iterator[str]:
    """Give a file's lines, which are short in any table: the cells of one take up to 20 times its memory."""
    for number, line in enumerate(file, start=1):
        if len(line) > LONGEST_LINE:
            raise MetaPerSERError(
                f"{path}:{number}: a line of {len(line):,} characters; expected {LONGEST_LINE:,} at most"
            )
        yield line


def _check_commas(path: Path, first: str, required: Sequence[str]) -> None:
    """Look for what spreadsheets part columns by in languages in which a comma is part of a number."""
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if mark in first and "," not in first:
            raise MetaPerSERError(
                f"{path}:1: its columns are parted by {name}; part them by commas; expected {','.join(required)}"
            )


def _check_header(
    path: Path, header: list[str], required: Sequence[str], optional: Sequence[str], others: bool
) -> None:
    """Compare a csv's header line with the columns it should have."""
    expected = f"expected {','.join(required)}" + (f" and optionally {','.join(optional)}" if optional else "")
    known = (*required, *optional)
    if not header:
        raise MetaPerSERError(f"{path}:1: has no header line; {expected}")
    for column in header:
        if column in known and header.count(column) > 1:
            raise MetaPerSERError(f"{path}:1: column {column!r} stands twice; {expected}")
        if column and column not in known and not others:
            free = [name for name in known if name not in header] or list(known)
            raise MetaPerSERError(f"{path}:1: unknown column {column!r:.100}; {suggest(column[:100], free)} {expected}")
    missing = [column for column in required if column not in header]
    if missing:
        found = f"found {', '.join(column[:100] for column in header[:10])}"
        raise MetaPerSERError(f"{path}:1: missing column {', '.join(map(repr, missing))}; {found}; {expected}")


def _whole_rows(path: Path, reader: Iterator[list[str]], width: int, unnamed: Sequence[int]) -> Iterator[list[str]]:
    """Give the rows that aren't blank, each of which must have a cell for every column, and none for an unnamed one."""
    for cells in reader:
        if not any(cells):
            continue
        if len(cells) != width:
            line = reader.line_num  # type: ignore[attr-defined]
            raise MetaPerSERError(
                f"{path}:{line}: {len(cells)} cells, expected {width} as in the header; quote a cell that holds a comma"
            )
        for place in unnamed:
            if cells[place]:
                line = reader.line_num  # type: ignore[attr-defined]
                raise MetaPerSERError(
                    f"{path}:{line}: {cells[place]!r:.100} stands in a column without a name; name it in line 1, or "
                    "leave it out"
                )
        yield cells


def _read_columns(rows: Iterator[list[str]], places: Sequence[int]) -> list[tuple[np.ndarray, list[str]]]:
    """Number the distinct texts of some columns in the order they appear: ``(rows,)`` numbers, and the texts."""
    texts: list[defaultdict[str, int]] = [defaultdict() for _ in places]
    numbers = [array("i") for _ in places]
    for seen in texts:
        seen.default_factory = seen.__len__
    while chunk := list(islice(rows, _CHUNK)):
        columns = list(zip(*chunk, strict=True))
        for column, seen, place in zip(numbers, texts, places, strict=True):
            column.extend(map(seen.__getitem__, columns[place]))
    return [(np.array(column, dtype=np.int32), list(seen)) for column, seen in zip(numbers, texts, strict=True)]


def _sorted(codes: np.ndarray, texts: list[str]) -> pd.Categorical:
    """Make a categorical with sorted categories, all of which are in use."""
    used = np.zeros(len(texts), dtype=bool)
    used[codes] = True
    order = sorted(np.flatnonzero(used).tolist(), key=texts.__getitem__)
    if order != list(range(len(texts))):
        renumbered = np.zeros(len(texts), dtype=np.int32)
        renumbered[order] = np.arange(len(order), dtype=np.int32)
        codes, texts = renumbered[codes], [texts[place] for place in order]
    # Of dtype object, since pandas' own strings are slow to walk through one by one, as every check does.
    return pd.Categorical.from_codes(codes, categories=pd.Index(texts, dtype=object), validate=False)


def categorical(column: pd.Series) -> pd.Categorical:
    """Give a column of strings as a categorical whose categories are sorted and all in use."""
    values = pd.Categorical(column)
    texts = values.categories
    in_use = np.bincount(values.codes, minlength=len(texts)).all()
    if in_use and texts.dtype == object and texts.is_monotonic_increasing:
        return values
    return _sorted(np.asarray(values.codes), texts.tolist())


def line_of_row(path: Path, encoding: str = "utf-8-sig") -> Where:
    """Lead to a row of a csv file by its line.

    Only an error asks for it, so the file is read again then: blank lines and quoted line breaks make line numbers
    differ from row numbers.
    """

    def where(row: int) -> str:
        with path.open(encoding=encoding, newline="") as file:
            starts = (line for line, _ in islice(_numbered_rows(file), row + 1, None))
            line = next(starts, None)
        return str(path) if line is None else f"{path}:{line}"

    return where


def _numbered_rows(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file)
    start = 1
    for cells in reader:
        if any(cells):
            yield start, cells
        start = reader.line_num + 1
