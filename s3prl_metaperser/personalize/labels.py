"""One listener's labels: a csv with the columns ``audio`` and ``emotions``."""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s3prl_metaperser.atomic import write_text
from s3prl_metaperser.corpus.checks import SEPARATOR, check_inside_root
from s3prl_metaperser.corpus.csv_file import line_of_row, read_csv
from s3prl_metaperser.corpus.emotions import OTHER, UnknownEmotionError, parse_emotions
from s3prl_metaperser.corpus.recordings import AudioRoot, is_out_of_reach
from s3prl_metaperser.errors import MetaPerSERError, suggest

COLUMNS = ("audio", "emotions")


@dataclass(frozen=True)
class Labels:
    """What one listener heard in some clips.

    Attributes:
        root: folder that ``audio`` is relative to.
        audio: the clips' paths below the root, in the order of the file.
        emotions: what the listener ticked for each, without "other", in the classes' order.
        left_out: clips of which nothing but "other" was said.
        unlabelled: clips of which nothing was said, as ``metaperser suggest`` writes them.
    """

    root: Path
    audio: tuple[str, ...]
    emotions: tuple[tuple[str, ...], ...]
    left_out: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.audio)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The clips' files."""
        return tuple(self.root / audio for audio in self.audio)

    @property
    def named(self) -> tuple[Path, ...]:
        """All files that the csv names, those without a label too."""
        return (*self.paths, *(self.root / audio for audio in (*self.left_out, *self.unlabelled)))


def read_labels(
    path: Path,
    audio_root: Path | None = None,
    classes: Sequence[str] | None = None,
    cure: str = "name the folder that the column audio is relative to with --audio-root",
) -> Labels:
    """Read a listener's labels.

    Args:
        path: the csv; emotions in any spelling, several joined by ``;``.
        audio_root: what ``audio`` is relative to, and may not leave; by default the csv's own folder.
        classes: the emotions that the model knows; by default all nine.
        cure: what to do where a recording is not there, said in the error.

    Returns:
        The labels, without clips of which nothing, or nothing but "other", was said.

    Raises:
        MetaPerSERError: naming file, line, column and value: a missing column, an unknown emotion, a clip labelled
            twice, a recording that is not there or outside the root; or when no labelled clip is left.
    """
    root = path.parent if audio_root is None else audio_root
    if not root.is_dir():
        raise MetaPerSERError(f"{root}: no such folder; expected the one that column audio of {path} is relative to")
    frame = read_csv(path, COLUMNS, others=True)
    where, inside = line_of_row(path), AudioRoot(root)
    audio: list[str] = []
    emotions: list[tuple[str, ...]] = []
    left_out: list[str] = []
    unlabelled: list[str] = []
    first_at: dict[str, int] = {}
    for row, (recording, cell) in enumerate(zip(frame["audio"], frame["emotions"], strict=True)):
        fault = check_inside_root(recording) if recording.strip() else "is empty; expected the path of a recording"
        if fault is not None:
            raise MetaPerSERError(f"{where(row)}: audio {recording!r} {fault} (audio root {root})")
        try:
            ticked = parse_emotions(cell)
        except UnknownEmotionError as error:
            raise MetaPerSERError(f"{where(row)}: emotions {cell!r}: {error}") from None
        same = posixpath.normpath(recording)
        if same in first_at:
            raise MetaPerSERError(
                f"{where(row)}: {recording!r} is labelled a second time, first at {where(first_at[same])}; keep one "
                f"line for each clip, several emotions joined by '{SEPARATOR}'"
            )
        first_at[same] = row
        place = inside.path(recording)
        if not os.path.isfile(place):
            if is_out_of_reach(place):
                raise MetaPerSERError(
                    f"{where(row)}: {root / recording} cannot be read (Permission denied); get the right to read the "
                    "folders that it is in"
                )
            raise MetaPerSERError(f"{where(row)}: there is no recording {root / recording}; {cure}")
        if not ticked:
            unlabelled.append(same)
            continue
        named = tuple(emotion for emotion in ticked if emotion != OTHER)
        if not named:
            left_out.append(same)
            continue
        for emotion in named:
            if classes is not None and emotion not in classes:
                raise MetaPerSERError(
                    f"{where(row)}: emotions {cell!r}: the model does not know {emotion!r}; {suggest(emotion, classes)}"
                )
        audio.append(same)
        emotions.append(named)
    if not audio:
        missing = "every line that is filled in says only 'other'" if left_out else "no labelled clip"
        raise MetaPerSERError(f"{path}: {missing}; expected one line for each clip you heard, such as clip.wav,angry")
    return Labels(root, tuple(audio), tuple(emotions), tuple(left_out), tuple(unlabelled))


def write_labels(path: Path, labels: Mapping[str, Iterable[str]]) -> None:
    """Write labels as :func:`read_labels` reads them, whole or not at all.

    Args:
        path: the csv, made or replaced.
        labels: clip's path below the audio root → emotions.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((audio, SEPARATOR.join(emotions)) for audio, emotions in labels.items())
    write_text(path, text.getvalue())


def distributions(labels: Sequence[str | Sequence[str]], classes: Sequence[str]) -> np.ndarray:
    """Turn ticked emotions into label distributions: two ticks are 0.5 each.

    Args:
        labels: of each clip, ``"angry;sad"`` or ``["angry", "sad"]``, in any spelling; "other" is dropped.
        classes: the emotions, in order.

    Returns:
        (clips, classes) float32.

    Raises:
        MetaPerSERError: an unknown emotion, a clip without any, or what is no text.
    """
    targets = np.zeros((len(labels), len(classes)), dtype=np.float32)
    for row, given in enumerate(labels):
        try:
            ticked = parse_emotions(given if isinstance(given, str) else SEPARATOR.join(given))
        except UnknownEmotionError as error:
            raise MetaPerSERError(f"label {row} ({given!r}): {error}") from None
        except TypeError:
            raise MetaPerSERError(
                f"label {row} ({given!r}): expected text such as 'angry;sad', or a list such as ['angry', 'sad']"
            ) from None
        named = [emotion for emotion in ticked if emotion in classes]
        if not named:
            raise MetaPerSERError(f"label {row} ({given!r}) names no emotion of the model; {suggest('', classes)}")
        targets[row, [classes.index(emotion) for emotion in named]] = 1 / len(named)
    return targets
