"""Which recordings exist, found out without opening them, and that they are where a corpus may have them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from s3prl_metaperser.errors import MetaPerSERError

_POINTER = b"version https://git-lfs"
_POINTER_SIZE = 200
"""Bytes; what git-lfs leaves in place of a file is smaller, and no recording is."""


class AudioRoot:
    """A folder below which recordings are found by relative paths, and out of which no link may lead.

    Args:
        folder: the root; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._real = os.path.realpath(folder)
        self._folders: dict[str, bool] = {}

    def path(self, relative: str) -> Path:
        """Give the path of a recording.

        Args:
            relative: to the root, as :func:`~s3prl_metaperser.corpus.checks.check_inside_root` has found it right.

        Raises:
            MetaPerSERError: when it is, or is in, a link to something outside the root.
        """
        place = os.path.join(self._real, relative)
        folder = os.path.dirname(place)
        if folder not in self._folders:
            self._folders[folder] = self._holds(folder)
        if not self._folders[folder] or (os.path.islink(place) and not self._holds(place)):
            raise MetaPerSERError(
                f"{self.folder / relative}: a link leads outside the audio root {self.folder}; copy what it leads to "
                "there, or name a folder as the root that holds both"
            )
        return self.folder / relative

    def _holds(self, place: str) -> bool:
        real = os.path.realpath(place)
        return real == self._real or real.startswith(os.path.join(self._real, ""))


def is_out_of_reach(path: Path) -> bool:
    """Tell a file in a folder that one has no right to look into from one that is not there."""
    try:
        path.stat()
    except PermissionError:
        return True
    except (OSError, ValueError):
        pass
    return False


def recordings_below(folder: Path, suffix: str) -> dict[str, int]:
    """List the recordings directly in a folder with their sizes, by one scan: thousands of single look-ups are slow.

    Args:
        folder: where to look; a folder that doesn't exist holds none.
        suffix: how the names end, such as ``".wav"``.

    Returns:
        File name to size in bytes, without the hidden files that macOS adds.
    """
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {
            entry.name: entry.stat().st_size
            for entry in entries
            if entry.name.endswith(suffix) and not entry.name.startswith(".") and entry.is_file()
        }


def git_lfs_pointer(folder: Path, sizes: dict[str, int]) -> str | None:
    """Name a file that is only a git-lfs pointer: text that stands for a recording not downloaded yet.

    Args:
        folder: where the files are.
        sizes: file name to size in bytes.

    Returns:
        The first such file's name, or None.
    """
    for name in sorted(name for name, size in sizes.items() if 0 < size < _POINTER_SIZE):
        with (folder / name).open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                return name
    return None


def missing_recordings(root: Path, paths: Iterable[str]) -> set[str]:
    """Find the paths below ``root`` at which there is no file, or an empty one.

    Raises:
        MetaPerSERError: when a link leads outside the root.
        PermissionError: when a folder may not be looked into, so that nothing is known of what it holds.
    """
    missing, inside = set(), AudioRoot(root)
    for path in paths:
        place = inside.path(path)
        try:
            found = place.stat().st_size > 0 and place.is_file()
        except PermissionError:
            raise
        except (OSError, ValueError):
            found = False
        if not found:
            missing.add(path)
    return missing
