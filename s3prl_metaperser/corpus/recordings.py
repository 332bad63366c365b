"""Which recordings exist, found out without opening them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_POINTER = b"version https://git-lfs"
_POINTER_SIZE = 200
"""Bytes; what git-lfs leaves in place of a file is smaller, and no recording is."""


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
    """Find the paths below ``root`` at which there is no file, or an empty one."""
    missing = set()
    for path in paths:
        try:
            found = (root / path).stat().st_size > 0 and (root / path).is_file()
        except (OSError, ValueError):
            found = False
        if not found:
            missing.add(path)
    return missing
