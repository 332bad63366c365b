"""Which recordings a user means: files, folders, patterns, and paths on standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from s3prl_metaperser.corpus.checks import check_inside_root
from s3prl_metaperser.errors import MetaPerSERError

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".sph"})
"""What libsndfile reads of what people keep speech in."""
STANDARD_INPUT = "-"
MOST_NAMED = 5
"""Unreadable recordings in one message."""


def find_recordings(root: Path) -> tuple[str, ...]:
    """List the recordings below a folder.

    Args:
        root: the folder. A link to a file in it counts, one that leads out of it does not; linked folders are left out.

    Returns:
        Their paths relative to the root, with forward slashes, sorted; without hidden files, which macOS adds. Folders
        that may not be read are named on stderr.

    Raises:
        MetaPerSERError: when there is no such folder, it may not be read, or there is no recording in it.
    """
    if not root.is_dir():
        raise MetaPerSERError(f"{root}: no such folder; expected one with recordings")
    inside = root.resolve()
    found = []
    refused: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=refused.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(folder, name)
            if path.suffix.lower() not in SUFFIXES or name.startswith("."):
                continue
            try:
                if path.resolve().is_relative_to(inside) and path.is_file():
                    found.append(path.relative_to(root).as_posix())
            except OSError as error:
                refused.append(error)
    if refused:
        fault = f"{refused[0].filename}: cannot be read ({refused[0].strerror})"
        if not found:
            raise MetaPerSERError(f"{fault}; get the right to read it, or name another folder")
        count = "a file or folder is" if len(refused) == 1 else f"{len(refused)} files or folders are"
        print(f"metaperser: {count} left out: {fault}", file=sys.stderr)
    if not found:
        endings = ", ".join(sorted(SUFFIXES))
        raise MetaPerSERError(f"{root}: holds no recording; expected files that end in {endings}")
    return tuple(sorted(found))


def readable(root: Path, recordings: Sequence[str]) -> tuple[str, ...]:
    """Leave out recordings whose files are no audio, empty, cut off or too short, and say so on stderr.

    Args:
        root: folder that the recordings are relative to.
        recordings: as :func:`find_recordings` gives them.

    Raises:
        MetaPerSERError: when none is left.
    """
    from s3prl_metaperser.audio import fault_of

    faults = {name: fault for name in recordings if (fault := fault_of(root / name)) is not None}
    if len(faults) == len(recordings):
        raise MetaPerSERError(f"none of the {len(recordings)} recordings can be read: {next(iter(faults.values()))}")
    if faults:
        print(
            f"metaperser: {len(faults)} of {len(recordings)} recordings are left out, such as "
            f"{next(iter(faults.values()))}",
            file=sys.stderr,
        )
    return tuple(name for name in recordings if name not in faults)


def nameable(recordings: Sequence[str]) -> tuple[str, ...]:
    """Leave out recordings whose names no file of labels can hold, and say so on stderr.

    Args:
        recordings: as :func:`find_recordings` gives them.

    Raises:
        MetaPerSERError: when none is left.
    """
    faults = {name: fault for name in recordings if (fault := check_inside_root(name)) is not None}
    if not faults:
        return tuple(recordings)
    name, fault = next(iter(faults.items()))
    if len(faults) == len(recordings):
        raise MetaPerSERError(f"no recording has a name that can be labelled: {name!r} {fault}; rename them")
    print(
        f"metaperser: {len(faults)} of {len(recordings)} recordings are left out, such as {name!r}, which {fault}",
        file=sys.stderr,
    )
    return tuple(name for name in recordings if name not in faults)


def check_readable(paths: Sequence[Path]) -> None:
    """Name all recordings at once that cannot be read.

    Raises:
        MetaPerSERError: with what is wrong with each; of many, with the first.
    """
    from s3prl_metaperser.audio import fault_of

    faults = [fault for path in paths if (fault := fault_of(path)) is not None]
    if faults:
        more = f"; and {len(faults) - MOST_NAMED} more" if len(faults) > MOST_NAMED else ""
        raise MetaPerSERError("; ".join(faults[:MOST_NAMED]) + more)


def named_recordings(given: Iterable[str], standard_input: Iterable[str]) -> list[Path]:
    """Find the recordings that a command line names, each once, in its order.

    Args:
        given: files, folders (all recordings below), patterns such as ``'clips/*.wav'``, and ``-``.
        standard_input: lines with a path each, read for ``-``.

    Raises:
        MetaPerSERError: for a name that is none of these, and when nothing is named at all.
    """
    paths = list(dict.fromkeys(path for name in given for path in _named(name, standard_input)))
    if not paths:
        raise MetaPerSERError("no recording is named; give files, folders, patterns, or - to read paths from a pipe")
    return paths


def _named(name: str, standard_input: Iterable[str]) -> Iterator[Path]:
    path = Path(name)
    if name == STANDARD_INPUT:
        for line in standard_input:
            if line.strip():
                yield from _named_file(Path(line.strip()), "standard input")
    elif path.is_dir():
        yield from (path / below for below in find_recordings(path))
    elif not path.exists() and glob.has_magic(name):
        matching = [Path(found) for found in sorted(glob.glob(name, recursive=True)) if Path(found).is_file()]
        if not matching:
            raise MetaPerSERError(f"{name}: no file fits the pattern")
        yield from matching
    else:
        yield from _named_file(path, "the command line")


def _named_file(path: Path, source: str) -> Iterator[Path]:
    if not path.is_file():
        raise MetaPerSERError(f"{path}: no such recording, named on {source}; expected a file, a folder or a pattern")
    yield path
