"""The annotation manifest: who named which emotions in which utterance, as two files that anyone can read.

``DIR/annotations.csv`` holds one row per annotator and utterance, ``DIR/corpus.json`` its name, audio root, emotion
order and counts. Loading validates both entirely, so that nothing downstream has to. ``corpus.json`` also holds, under
the key ``sha256``, a checksum of both files: of files that were written by hand it may be left out, and of files that
were edited it must be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from s3prl_metaperser import checksums
from s3prl_metaperser.atomic import replacing
from s3prl_metaperser.corpus.checks import COLUMNS, SEPARATOR, check_annotations, check_text
from s3prl_metaperser.corpus.csv_file import categorical, line_of_row, read_csv
from s3prl_metaperser.corpus.emotions import EMOTIONS
from s3prl_metaperser.corpus.recordings import AudioRoot
from s3prl_metaperser.errors import MetaPerSERError, suggest

__all__ = ["COLUMNS", "Corpus", "build_corpus", "load_corpus", "write_corpus"]

ANNOTATIONS_FILE = "annotations.csv"
CORPUS_FILE = "corpus.json"
_KEYS = ("name", "source", "root", "emotions", "counts")
_COUNTS = ("utterances", "annotators", "annotations")


@dataclass(frozen=True)
class Corpus:
    """Utterances and what annotators heard in them.

    Attributes:
        name: what the corpus is called in tables.
        root: absolute folder that the column ``audio`` is relative to.
        emotions: the classes, in the order of every vector.
        annotations: one row per annotator and utterance, columns :data:`COLUMNS`, sorted by utterance and annotator.
            ``session`` is an integer, the others are categorical over strings: compare them with strings as usual; a
            filtered frame keeps the categories of the whole.
        source: the reader that made it.
    """

    name: str
    root: Path
    emotions: tuple[str, ...]
    annotations: pd.DataFrame
    source: str = "table"

    def targets(self) -> np.ndarray:
        """Give each annotation as a distribution over the emotions.

        Returns:
            ``(rows, classes)`` float32 in the order of ``annotations``. Each row sums to 1: one ticked emotion gets 1,
            each of two 0.5.
        """
        cells = pd.Categorical(self.annotations["emotions"])
        index = {emotion: column for column, emotion in enumerate(self.emotions)}
        distributions = np.zeros((len(cells.categories), len(self.emotions)), dtype=np.float32)
        for row, cell in enumerate(cells.categories):
            ticked = [index[emotion] for emotion in cell.split(SEPARATOR)]
            distributions[row, ticked] = 1 / len(ticked)
        return distributions[cells.codes]

    def audio_paths(self) -> Mapping[str, Path]:
        """Map every utterance to the absolute path of its recording, in the order of the utterances' names.

        A path that a link leads out of the root is refused when it is asked for.
        """
        utterances, audio = (categorical(self.annotations[column]) for column in ("utterance", "audio"))
        _, first = np.unique(utterances.codes, return_index=True)
        recordings = audio.categories[audio.codes[first]]
        return _AudioPaths(self.root, dict(zip(utterances.categories, recordings, strict=True)))

    def counts(self) -> dict[str, int]:
        """Count utterances, annotators and annotations."""
        return {
            "utterances": int(self.annotations["utterance"].nunique()),
            "annotators": int(self.annotations["annotator"].nunique()),
            "annotations": len(self.annotations),
        }


class _AudioPaths(Mapping[str, Path]):
    """Utterance → path, made when asked for: a million paths take seconds, and more memory than the manifest."""

    def __init__(self, root: Path, recordings: dict[str, str]) -> None:
        self._root = AudioRoot(root)
        self._recordings = recordings

    def __getitem__(self, utterance: str) -> Path:
        return self._root.path(self._recordings[utterance])

    def __iter__(self) -> Iterator[str]:
        return iter(self._recordings)

    def __len__(self) -> int:
        return len(self._recordings)


def build_corpus(
    name: str,
    root: Path,
    annotations: pd.DataFrame,
    emotions: tuple[str, ...] = EMOTIONS,
    source: str = "table",
) -> Corpus:
    """Put valid rows into the form that :class:`Corpus` promises.

    Args:
        name: what the corpus is called.
        root: folder that the column ``audio`` is relative to.
        annotations: rows with the columns :data:`COLUMNS` in any order of rows, obeying
            :func:`~s3prl_metaperser.corpus.checks.check_annotations`.
        emotions: the classes, in order.
        source: the reader that made it.

    Returns:
        The corpus, its rows sorted and its text columns categorical.
    """
    columns = {column: categorical(annotations[column]) for column in COLUMNS if column != "session"}
    order = np.lexsort((columns["annotator"].codes, columns["utterance"].codes))
    session = annotations["session"].astype("int64").to_numpy()
    frame = pd.DataFrame({column: (session if column == "session" else columns[column])[order] for column in COLUMNS})
    return Corpus(name, Path(root).absolute(), tuple(emotions), frame, source)


def load_corpus(directory: Path | str) -> Corpus:
    """Read and validate the manifest in a folder.

    Whether the recordings exist isn't looked at: ``metaperser prepare`` did, and a feature cache may stand in for them.

    Args:
        directory: folder with ``annotations.csv`` and ``corpus.json``.

    Returns:
        The corpus.

    Raises:
        MetaPerSERError: anything is missing, misspelt or contradictory; the message names file, line, column, value.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise MetaPerSERError(f"{directory}: no such corpus folder; write one with `metaperser prepare`")
    for name in (CORPUS_FILE, ANNOTATIONS_FILE):
        if not (directory / name).is_file():
            raise MetaPerSERError(
                f"{directory}: holds no {name}, so it is no prepared corpus; write one with `metaperser prepare`"
            )
    path = directory / CORPUS_FILE
    about = _read_about(path)
    csv_path = directory / ANNOTATIONS_FILE
    rows = read_csv(csv_path, COLUMNS)
    check_annotations(rows, about["emotions"], line_of_row(csv_path))
    root = directory.absolute() / about["root"]
    corpus = build_corpus(about["name"], root.resolve(), rows, tuple(about["emotions"]), about["source"])
    for unit, count in corpus.counts().items():
        if about["counts"][unit] != count:
            raise MetaPerSERError(
                f"{path}: counts.{unit} is {about['counts'][unit]!r:.40} but {csv_path.name} holds {count}; the two "
                "files don't belong together: run `metaperser prepare` again with --overwrite"
            )
    if not checksums.is_intact(about, *([checksums.of_file(csv_path)] if checksums.KEY in about else [])):
        raise MetaPerSERError(
            f"{path}: its sha256 does not match: it or {csv_path.name} is not what was written (edited, or damaged?); "
            "run `metaperser prepare` again with --overwrite or, where the change is meant, remove the key sha256"
        )
    return corpus


def _read_about(path: Path) -> dict:
    """Read ``corpus.json`` and check its keys and types."""
    cure = "run `metaperser prepare` again with --overwrite"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MetaPerSERError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise MetaPerSERError(f"{path}: not UTF-8 text; {cure}") from None
    except json.JSONDecodeError as error:
        raise MetaPerSERError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); {cure}") from None
    except (RecursionError, ValueError) as error:
        # Thousands of brackets in each other, or of digits in a row.
        raise MetaPerSERError(f"{path}: not the JSON of a corpus ({error}); {cure}") from None
    if not isinstance(about, dict):
        raise MetaPerSERError(f"{path}: expected an object with the keys {', '.join(_KEYS)}; {cure}")
    for key in about:
        if key not in (*_KEYS, checksums.KEY):
            raise MetaPerSERError(f"{path}: unknown key {key!r}; {suggest(key, (*_KEYS, checksums.KEY))}")
    for key in _KEYS:
        if key not in about:
            raise MetaPerSERError(f"{path}: missing key {key!r}; expected {', '.join(_KEYS)}; {cure}")
    for key in ("name", "source", "root"):
        fault = check_text(about[key]) if isinstance(about[key], str) else "is no text"
        if fault is not None:
            raise MetaPerSERError(f"{path}: {key} is {about[key]!r:.80}, which {fault}; expected text")
    emotions = about["emotions"]
    if not isinstance(emotions, list) or not all(isinstance(word, str) and _is_class(word) for word in emotions):
        raise MetaPerSERError(
            f"{path}: emotions is {emotions!r:.200}; expected a list of words such as {list(EMOTIONS)}"
        )
    twice = [word for word in emotions if emotions.count(word) > 1]
    if twice or len(emotions) < 2:
        fault = f"names {twice[0]!r} twice" if twice else f"is {emotions!r}"
        raise MetaPerSERError(f"{path}: emotions {fault}; expected two or more different words")
    counts = about["counts"]
    if not isinstance(counts, dict) or set(counts) != set(_COUNTS):
        raise MetaPerSERError(f"{path}: counts is {counts!r:.200}; expected the keys {', '.join(_COUNTS)}; {cure}")
    return about


def _is_class(word: str) -> bool:
    return check_text(word) is None and SEPARATOR not in word


def write_corpus(corpus: Corpus, out: Path, overwrite: bool = False) -> None:
    """Write ``annotations.csv`` and ``corpus.json``, both or neither.

    An audio root inside ``out`` is written relative to it, so that the folder can be moved as a whole.

    Args:
        corpus: what to write; it is validated first.
        out: the folder, made if need be.
        overwrite: replace a corpus that is already there.

    Raises:
        MetaPerSERError: the corpus breaks a rule, ``out`` already holds one, or it can't be written to.
    """
    out = Path(out)
    refuse_existing(out, overwrite)
    fault = check_text(corpus.name)
    if fault is not None:
        raise MetaPerSERError(f"the corpus's name {corpus.name!r:.80} {fault}; pass another with --name")
    check_annotations(corpus.annotations, corpus.emotions, lambda row: f"corpus {corpus.name!r}, row {row}")
    base = out.resolve()
    root = corpus.root.resolve()
    about = {
        "name": corpus.name,
        "source": corpus.source,
        "root": (root.relative_to(base) if root.is_relative_to(base) else root).as_posix(),
        "emotions": list(corpus.emotions),
        "counts": corpus.counts(),
    }
    try:
        # The csv takes its place first: a corpus without corpus.json is refused as incomplete, never read half.
        with replacing(out / CORPUS_FILE) as json_path, replacing(out / ANNOTATIONS_FILE) as csv_path:
            corpus.annotations.to_csv(csv_path, columns=list(COLUMNS), index=False, lineterminator="\n")
            sealed = checksums.sealed(about, checksums.of_file(csv_path))
            json_path.write_text(json.dumps(sealed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise MetaPerSERError(f"{out}: the corpus cannot be written there ({error.strerror})") from None


def files_of(directory: Path | str) -> tuple[Path, Path]:
    """Give the two files of the manifest in a folder."""
    return Path(directory) / ANNOTATIONS_FILE, Path(directory) / CORPUS_FILE


def refuse_existing(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """Stop before any work when ``out`` can't become, or already is, a corpus.

    Args:
        out: the folder.
        overwrite: whether a corpus that is there is to be replaced.
        source: what the corpus is made from, which it must never replace.

    Raises:
        MetaPerSERError: ``out`` is a file, holds the source, or holds a corpus and ``overwrite`` is not set.
    """
    if out.exists() and not out.is_dir():
        raise MetaPerSERError(f"{out}: is a file; expected a folder to write the corpus to")
    for path in files_of(out):
        if source is not None and source.exists() and path.exists() and path.samefile(source):
            raise MetaPerSERError(f"{out}: its {path.name} is what the corpus is made from; choose another --out")
        if path.exists() and not overwrite:
            raise MetaPerSERError(f"{out}: already holds {path.name}; pass --overwrite to replace the corpus there")
