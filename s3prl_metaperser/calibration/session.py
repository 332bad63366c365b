"""One person's answers, on disk as they are given: a calibration that is killed at any moment goes on where it was.

Two files lie beside the checkpoint that is to be made. ``MY.labels.csv`` holds the labels, in the form that
``metaperser adapt --labels`` reads; ``MY.calibration.json`` holds which clips were suggested and which were skipped,
and what the session belongs to. Each is replaced as a whole. Where both change, the labels decide: a clip that has a
label is not skipped, whatever the other file says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from s3prl_metaperser.atomic import write_text
from s3prl_metaperser.calibration.session_files import SessionFiles
from s3prl_metaperser.errors import MetaPerSERError, suggest
from s3prl_metaperser.personalize.labels import read_labels, write_labels

FORMAT = 1
"""Of ``MY.calibration.json``."""
_KEYS = {"format", "origin", "clips", "skipped"}


@dataclass(frozen=True)
class Origin:
    """What a session belongs to: answers to one model's suggestions among one folder's recordings.

    Attributes:
        checkpoint: fingerprint of the checkpoint that is personalised.
        audio_root: absolute folder of the recordings, symbolic links resolved.
    """

    checkpoint: str
    audio_root: str


class Session:
    """The answers to a list of suggested clips, numbered from 1 in the order in which they are asked.

    Every answer is on disk when the call that gives it returns, and none has changed when it raises. Calls may come
    from several threads.

    Args:
        files: where it is kept.
        origin: what it belongs to.
        emotions: that can be named, in order.
        clips: recordings in the order in which they are asked, relative to the audio root.
        skipped: those of them that have been skipped.
        labels: recording → emotions; recordings that were never suggested may be among them.
    """

    def __init__(
        self,
        files: SessionFiles,
        origin: Origin,
        emotions: Sequence[str],
        clips: Sequence[str],
        skipped: frozenset[str] = frozenset(),
        labels: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.files = files
        self.audio_root = Path(origin.audio_root)
        self.emotions = tuple(emotions)
        self.clips = tuple(clips)
        self._origin = origin
        self._labels = dict(labels or {})
        self._skipped = skipped - self._labels.keys()
        self._changing = RLock()

    @classmethod
    def read(cls, files: SessionFiles, origin: Origin, emotions: Sequence[str]) -> Session | None:
        """Read the session that lies beside ``files.out``.

        Args:
            files: where it is kept.
            origin: what it must belong to.
            emotions: that can be named.

        Returns:
            The session as it was left, or None where none was begun.

        Raises:
            MetaPerSERError: it belongs to another checkpoint or folder, a labelled recording is gone, or one of its
                files is not what we wrote.
        """
        if not files.state.exists():
            return None
        state = _read_state(files.state)
        found = Origin(**state["origin"])
        if found.checkpoint != origin.checkpoint:
            raise MetaPerSERError(
                f"{files.state} is a calibration of another checkpoint; choose another --out, or pass --overwrite to "
                "begin anew (its labels are lost)"
            )
        if found.audio_root != origin.audio_root:
            raise MetaPerSERError(
                f"{files.state} is a calibration on the recordings in {found.audio_root}, not {origin.audio_root}; "
                "choose another --out, or pass --overwrite to begin anew (its labels are lost)"
            )
        labels: dict[str, tuple[str, ...]] = {}
        if files.labels.exists():
            cure = "put it back there, or remove this line (the file, if there is no other label in it)"
            read = read_labels(files.labels, Path(origin.audio_root), tuple(emotions), cure)
            labels = dict(zip(read.audio, read.emotions, strict=True))
        return cls(files, origin, emotions, state["clips"], frozenset(state["skipped"]), labels)

    def ask(self, clips: Sequence[str]) -> None:
        """Add clips to the end of the list and write it.

        Raises:
            MetaPerSERError: when it cannot be written.
        """
        with self._changing:
            asked = (*self.clips, *clips)
            self._write_state(asked, self._skipped)
            self.clips = asked

    def recording(self, number: int) -> Path:
        """Give the file of a clip.

        Raises:
            MetaPerSERError: there is no such clip, or it has come to lie outside the audio root.
        """
        path = (self.audio_root / self._clip(number)).resolve()
        if not path.is_relative_to(self.audio_root.resolve()):
            raise MetaPerSERError(f"{self._clip(number)} leads outside {self.audio_root}; it is not played")
        return path

    def label(self, number: int, emotions: Sequence[str]) -> None:
        """Set what was heard in a clip, whatever was answered before.

        Raises:
            MetaPerSERError: no such clip, no or an unknown emotion, or it cannot be written.
        """
        clip = self._clip(number)
        for emotion in emotions:
            if emotion not in self.emotions:
                raise MetaPerSERError(f"{emotion!r} is no emotion; {suggest(emotion, self.emotions)}")
        if not emotions:
            raise MetaPerSERError("no emotion is ticked; tick what you hear, or skip the clip")
        with self._changing:
            labels = {**self._labels, clip: tuple(name for name in self.emotions if name in emotions)}
            self._write_labels(labels)
            self._labels = labels
            if clip in self._skipped:
                self._skipped -= {clip}
                self._write_state(self.clips, self._skipped)

    def skip(self, number: int) -> None:
        """Leave a clip without a label, whatever was answered before.

        Raises:
            MetaPerSERError: no such clip, or it cannot be written.
        """
        clip = self._clip(number)
        with self._changing:
            self._write_state(self.clips, self._skipped | {clip})
            if clip in self._labels:
                labels = {audio: heard for audio, heard in self._labels.items() if audio != clip}
                self._write_labels(labels)
                self._labels = labels
            self._skipped |= {clip}

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Recording (relative to the audio root) → the emotions heard in it."""
        return dict(self._labels)

    @property
    def labelled(self) -> int:
        """How many of the suggested clips have a label."""
        return sum(clip in self._labels for clip in self.clips)

    @property
    def skipped(self) -> int:
        """How many of the suggested clips were skipped."""
        return len(self._skipped.intersection(self.clips))

    @property
    def next(self) -> int | None:
        """The number of the first clip that has no answer yet; None when all have one."""
        return next((n for n in range(1, len(self.clips) + 1) if self.answer(n) is None), None)

    def answer(self, number: int) -> tuple[str, ...] | None:
        """Give what was answered to a clip: emotions, none of them when it was skipped, None when nothing was."""
        clip = self._clip(number)
        return self._labels.get(clip, () if clip in self._skipped else None)

    def _clip(self, number: int) -> str:
        if not 1 <= number <= len(self.clips):
            raise MetaPerSERError(f"there is no clip {number}; they are numbered from 1 to {len(self.clips)}")
        return self.clips[number - 1]

    def _write_labels(self, labels: Mapping[str, tuple[str, ...]]) -> None:
        try:
            if labels:
                write_labels(self.files.labels, labels)
            else:
                self.files.labels.unlink(missing_ok=True)
        except OSError as error:
            raise _unsaved(self.files.labels, error) from None

    def _write_state(self, clips: Sequence[str], skipped: frozenset[str]) -> None:
        state = {
            "format": FORMAT,
            "origin": asdict(self._origin),
            "clips": list(clips),
            "skipped": sorted(skipped),
        }
        try:
            write_text(self.files.state, json.dumps(state, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise _unsaved(self.files.state, error) from None


def _unsaved(path: Path, error: OSError) -> MetaPerSERError:
    return MetaPerSERError(f"{path}: cannot be written ({error.strerror}); the answer was not saved, give it again")


def _read_state(path: Path) -> dict[str, Any]:
    cure = "put it back as it was, or pass --overwrite to begin anew (its labels are lost)"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MetaPerSERError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise MetaPerSERError(f"{path}: is no calibration's file (not JSON); {cure}") from None
    if not isinstance(state, dict) or state.keys() != _KEYS or state["format"] != FORMAT:
        raise MetaPerSERError(f"{path}: is no calibration's file of this version; {cure}")
    names = {"checkpoint", "audio_root"}
    if not isinstance(state["origin"], dict) or state["origin"].keys() != names:
        raise MetaPerSERError(f"{path}: does not say what it belongs to; {cure}")
    for key in ("clips", "skipped"):
        if not isinstance(state[key], list) or not all(isinstance(clip, str) for clip in state[key]):
            raise MetaPerSERError(f"{path}: its {key} are no list of recordings; {cure}")
    return state
