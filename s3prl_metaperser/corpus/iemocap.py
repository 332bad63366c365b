r"""IEMOCAP as it is distributed, read label by label.

Source: Busso et al., "IEMOCAP: interactive emotional dyadic motion capture database", 2008. Each annotator's own
labels stand in ``SessionN/dialog/EmoEvaluation/<dialog>.txt``, in blocks of one utterance::

    [6.2901 - 8.2357]   Ses01F_impro01_F000  neu  [2.5000, 2.5000, 2.5000]
    C-E2:  Neutral;              ()              an external listener
    C-F1:  Neutral; Frustration; (calm at first) the actor on herself
    A-E3:  val 3; act 2; dom 2;  ()              dimensions, not used here

Rules where the release leaves a choice:

* ``Other`` is dropped; an annotation with nothing else left is dropped and counted.
* Where an annotator labels an utterance twice, the last label that names an emotion stands: it is what the annotator
  corrected the earlier one to. The earlier ones are counted.
* Utterances without a recording are dropped and counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from s3prl_metaperser.corpus.checks import COLUMNS, SEPARATOR
from s3prl_metaperser.corpus.emotions import OTHER, UnknownEmotionError, parse_emotions
from s3prl_metaperser.corpus.manifest import Corpus, build_corpus
from s3prl_metaperser.corpus.recordings import recordings_below
from s3prl_metaperser.corpus.report import PreparationReport
from s3prl_metaperser.errors import MetaPerSERError

SESSIONS = (1, 2, 3, 4, 5)

LARGEST = 1_000_000
"""Bytes of a label file; IEMOCAP's have at most some ten thousand. Lines take 50 times their size in memory."""

ONLY_OTHER = "annotations: only 'Other'"
EMPTY = "annotations: no emotion named"
REPEATED = "annotations: replaced by a later one of the same annotator"
NO_AUDIO = "utterances: no audio file, or an empty one"
UNLABELLED = "utterances: no label left"

_HEADER = re.compile(r"\[[^\]]*\]\s+(?P<utterance>\S+)\s+\S+\s+\[[^\[\]]*\]")
_UTTERANCE = re.compile(r"(?P<dialog>Ses(?P<session>\d\d)\S*)_(?P<gender>[FM])[A-Z]*\d+")
_LABEL = re.compile(r"C-(?P<annotator>[EFM]\d+):(?P<emotions>[^(]*)(\(.*)?", re.DOTALL)


@dataclass
class _Label:
    annotator: str
    emotions: list[str]
    where: str


@dataclass
class _Block:
    """One utterance's lines in a label file."""

    utterance: str
    session: int
    dialog: str
    gender: str
    where: str
    labels: list[_Label] = field(default_factory=list)
    annotated: bool = False


def prepare_iemocap(
    source: Path, sessions: Sequence[int] = SESSIONS, name: str = "IEMOCAP"
) -> tuple[Corpus, PreparationReport]:
    """Read the labels of every annotator of IEMOCAP; of the audio only which files exist.

    Args:
        source: the folder ``IEMOCAP_full_release``, or the one that holds it.
        sessions: the sessions to read, all of which must be there.
        name: what to call the corpus; other corpora come in IEMOCAP's layout, too.

    Returns:
        The corpus, and what was left out and why. Annotators are ``E1``… (external), ``F1``…, ``M1``… (the actors on
        themselves); a speaker is session and gender, such as ``Ses01F``.

    Raises:
        MetaPerSERError: a folder is missing, a label file is cut off or malformed, or an emotion is unknown.
    """
    root = _find_release(Path(source))
    for session in sessions:
        _require_folder(root / f"Session{session}", f"expected Session1 to Session5 of IEMOCAP in {root}")
    report = PreparationReport()
    blocks: dict[str, _Block] = {}
    recorded: set[str] = set()
    for session in sessions:
        for path in _label_files(root, session):
            for block in _read_label_file(path, session):
                blocks.setdefault(block.utterance, block)
                if blocks[block.utterance] is not block:
                    blocks[block.utterance].labels.extend(block.labels)
        recorded.update(_recordings(root, session))
    rows = [row for block in blocks.values() for row in _rows(block, recorded, report)]
    if report.count(NO_AUDIO) == len(blocks):
        example = next(iter(blocks.values()))
        raise MetaPerSERError(
            f"{root}: none of the {len(blocks):,} labelled utterances has audio; expected files such as "
            f"{_audio(example)}"
        )
    if not rows:
        raise MetaPerSERError(f"{root}: the label files name no emotion at all; expected lines such as C-E2: Neutral;")
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return build_corpus(name, root, frame, source="iemocap"), report


def _find_release(source: Path) -> Path:
    """Find the folder with ``Session1``… at ``source`` or one level below."""
    expected = "expected the folder IEMOCAP_full_release (with Session1 to Session5), or the one that holds it"
    if not source.exists():
        raise MetaPerSERError(f"{source}: no such folder; {expected}")
    if not source.is_dir():
        raise MetaPerSERError(f"{source}: is a file; {expected}; unpack the archive first")
    candidates = [source, *sorted(path for path in source.iterdir() if path.is_dir())]
    found = [path for path in candidates if any((path / f"Session{session}").is_dir() for session in SESSIONS)]
    if not found:
        raise MetaPerSERError(f"{source}: holds no folder Session1; {expected}")
    if found[0] != source and len(found) > 1:
        raise MetaPerSERError(f"{source}: holds several releases ({', '.join(path.name for path in found)}); name one")
    return found[0].absolute()


def _require_folder(path: Path, expected: str) -> None:
    if not path.is_dir():
        raise MetaPerSERError(f"{path}: no such folder; {expected}")


def _label_files(root: Path, session: int) -> list[Path]:
    folder = root / f"Session{session}" / "dialog" / "EmoEvaluation"
    expected = "expected label files such as Ses01F_impro01.txt there"
    _require_folder(folder, expected)
    # macOS leaves `._Ses01F_impro01.txt` (binary) and .DS_Store beside the real files.
    files = sorted(path for path in folder.glob("*.txt") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise MetaPerSERError(f"{folder}: holds no label file; {expected}")
    return files


def _read_label_file(path: Path, session: int) -> list[_Block]:
    """Read one dialog's blocks, in the order of the file."""
    blocks: list[_Block] = []
    for number, line in _lines(path):
        where = f"{path}:{number}"
        if line.startswith("["):
            blocks.append(_read_header(line, where, session))
        elif line.startswith(("C-", "A-")):
            if not blocks:
                raise MetaPerSERError(f"{where}: a label before any utterance: {line!r}; is the file's start missing?")
            blocks[-1].annotated = True
            if line.startswith("C-"):
                blocks[-1].labels.append(_read_label(line, where))
        elif not line.startswith("%"):
            raise MetaPerSERError(
                f"{where}: {line!r} is no line of a label file; expected '[start - end]', 'C-' or 'A-' in front; is "
                "the file damaged?"
            )
    if not blocks:
        raise MetaPerSERError(f"{path}: holds no utterance; expected lines such as '[0.0 - 1.0] Ses01F_impro01_F000 …'")
    if not blocks[-1].annotated:
        raise MetaPerSERError(
            f"{blocks[-1].where}: the file ends after utterance {blocks[-1].utterance!r} without any label; it is cut "
            "off: unpack the archive again"
        )
    return blocks


def _lines(path: Path) -> list[tuple[int, str]]:
    """Split a label file into numbered, stripped, non-empty lines, joining comments that run over several lines."""
    size = path.stat().st_size
    if size > LARGEST:
        raise MetaPerSERError(f"{path}: {size:,} bytes; expected a dialog's labels, of {LARGEST:,} at most")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        # Comments were typed on many machines. Latin-1 gives every byte a character, and labels are ASCII anyway.
        text = data.decode("latin-1")
    parts: list[tuple[int, list[str]]] = []
    brackets = 0
    # str.splitlines would also split at Latin-1's 0x85 and other characters inside comments.
    for number, line in enumerate(map(str.strip, re.split(r"\r\n|\r|\n", text)), start=1):
        if not line:
            continue
        if brackets > 0 and not line.startswith(("[", "C-", "A-")):
            parts[-1][1].append(line)
        else:
            parts.append((number, [line]))
            brackets = 0
        if parts[-1][1][0].startswith(("C-", "A-")):
            brackets += line.count("(") - line.count(")")
    lines = [(number, " ".join(own)) for number, own in parts]
    if lines and lines[-1][1].startswith(("C-", "A-")) and not lines[-1][1].endswith(")"):
        number, line = lines[-1]
        raise MetaPerSERError(
            f"{path}:{number}: the file ends in the middle of a label: {line!r}; expected a comment '()' at its end; "
            "the file is cut off: unpack the archive again"
        )
    return lines


def _read_header(line: str, where: str, session: int) -> _Block:
    header = _HEADER.fullmatch(line)
    if header is None:
        raise MetaPerSERError(
            f"{where}: {line!r} is no whole utterance line; expected '[start - end] utterance label [v, a, d]'; is the "
            "file cut off?"
        )
    utterance = _UTTERANCE.fullmatch(header["utterance"])
    if utterance is None:
        raise MetaPerSERError(
            f"{where}: {header['utterance']!r} is no utterance of IEMOCAP; expected a name such as Ses01F_impro01_F000"
        )
    if int(utterance["session"]) != session:
        raise MetaPerSERError(
            f"{where}: utterance {header['utterance']!r} belongs to Session{int(utterance['session'])}, but the file "
            f"is in Session{session}"
        )
    return _Block(header["utterance"], session, utterance["dialog"], utterance["gender"], where)


def _read_label(line: str, where: str) -> _Label:
    label = _LABEL.fullmatch(line)
    if label is None:
        raise MetaPerSERError(f"{where}: {line!r} is no label; expected a line such as 'C-E2: Neutral; ()'")
    try:
        return _Label(label["annotator"], parse_emotions(label["emotions"]), where)
    except UnknownEmotionError as error:
        raise MetaPerSERError(f"{where}: annotator C-{label['annotator']}: {error}") from None


def _recordings(root: Path, session: int) -> list[str]:
    """List the recordings of a session that aren't empty, relative to the root."""
    wav = root / f"Session{session}" / "sentences" / "wav"
    dialogs = sorted(path.name for path in wav.iterdir() if path.is_dir()) if wav.is_dir() else []
    return [
        f"Session{session}/sentences/wav/{dialog}/{name}"
        for dialog in dialogs
        for name, size in recordings_below(wav / dialog, ".wav").items()
        if size > 0
    ]


def _audio(block: _Block) -> str:
    return f"Session{block.session}/sentences/wav/{block.dialog}/{block.utterance}.wav"


def _rows(block: _Block, recorded: set[str], report: PreparationReport) -> list[tuple]:
    """Give the manifest's rows of an utterance, counting what is left out."""
    audio = _audio(block)
    if audio not in recorded:
        report.drop(NO_AUDIO, block.utterance)
        return []
    chosen: dict[str, list[str]] = {}
    for label in block.labels:
        emotions = [emotion for emotion in label.emotions if emotion != OTHER]
        if not emotions:
            report.drop(ONLY_OTHER if label.emotions else EMPTY, Path(label.where).name)
            continue
        if label.annotator in chosen:
            report.drop(REPEATED, f"{block.utterance} by {label.annotator}")
        chosen[label.annotator] = emotions
    if not chosen:
        report.drop(UNLABELLED, block.utterance)
    return [
        (
            block.utterance,
            audio,
            block.session,
            f"Ses{block.session:02d}{block.gender}",
            annotator,
            "external" if annotator.startswith("E") else "self",
            SEPARATOR.join(emotions),
        )
        for annotator, emotions in chosen.items()
    ]
