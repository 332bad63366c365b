"""The exported folder: what it holds, where it goes, and how it gets there whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from s3prl_metaperser import __version__, configs
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.s3prl_export.modules import WORDING, needed, rewritten
from s3prl_metaperser.s3prl_export.requirements import requirements
from s3prl_metaperser.s3prl_link import find_s3prl

STAGING = ".metaperser-export-"
"""What the name of the folder begins with in which an export is built; a killed export leaves it."""
NEW, OLD = "new", "old"
"""In it: the folder to be moved in, with those above it that are missing, and the one that it takes the place of."""
DEFAULT_CONFIG = "ssl_e"
"""What the runner takes without ``-c``: it starts from nothing, and all else starts from it."""
PATCHES = ("bind.patch", "resume.patch")
WORDING_OF_CONFIGS = (
    *WORDING,
    (" `metaperser experiment` does so itself.", ""),
    ("result/ssl_e", "result/downstream/ssl_e"),
)
"""Without a command that is absent there; and ``-n ssl_e`` writes where s3prl's ``-n`` does."""

_TEMPLATES = Path(__file__).resolve().parent


def contents() -> dict[str, str]:
    """Give the files of the folder, by their place in it.

    The bytes depend on this package and the version of s3prl only.

    Raises:
        MetaPerSERError: something that they are made from is missing.
    """
    modules = {str(module.place): rewritten(module) for module in needed()}
    wanted = requirements(modules.values())
    chosen = {name: path for name, path in configs.available().items() if name != DEFAULT_CONFIG}
    places = {"config.yaml": configs.find(DEFAULT_CONFIG)} | {f"configs/{n}.yaml": p for n, p in chosen.items()}
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    readme = environment.get_template("README.md.jinja").render(
        requirements=wanted,
        configs=[(place, configs.describe(path)) for place, path in places.items()],
        version=__version__,
    )
    return {
        **modules,
        **{place: _reworded(path.read_text(encoding="utf-8")) for place, path in places.items()},
        **{name: (_TEMPLATES / name).read_text(encoding="utf-8") for name in PATCHES},
        "requirements.txt": "".join(f"{line}\n" for line in wanted),
        "README.md": readme,
    }


def destination(directory: Path) -> Path:
    """Find where the folder goes: ``downstream/metaperser`` of a clone of s3prl, or of any other directory.

    Args:
        directory: a clone, its package folder, a folder that ends in ``downstream/metaperser``, or any other.
    """
    directory = Path(os.path.abspath(directory))
    if directory.parts[-2:] == ("downstream", "metaperser"):
        return directory
    try:
        return find_s3prl(directory) / "downstream" / "metaperser"
    except MetaPerSERError:
        return directory / "downstream" / "metaperser"


def write(target: Path, files: Mapping[str, str], overwrite: bool = False) -> None:
    """Write the folder whole, or leave all as it was.

    Args:
        target: the folder; those above it are made.
        files: its files, by their place in it.
        overwrite: whether an earlier export in its place is replaced.

    Raises:
        MetaPerSERError: something is in its place, or it cannot be written.
    """
    try:
        base = _nearest_folder(target.parent)
        with _locked(base) as is_alone:
            if is_alone:
                _clear_up_after_killed_exports(target, base, files)
            if os.path.lexists(target):
                _refuse_unless_replaceable(target, files, overwrite)
            _move_in(target, base, files)
    except OSError as error:
        raise MetaPerSERError(f"{target} cannot be written: {error.strerror or error}") from None


def _nearest_folder(place: Path) -> Path:
    while not place.exists():
        place = place.parent
    return place


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Let one export at a time into a folder: what is found half built there is then a killed one's.

    Yields:
        Whether it is so; some network file systems lock no folders.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            is_alone = True
        except OSError:
            is_alone = False
        yield is_alone
    finally:
        os.close(handle)


def _clear_up_after_killed_exports(target: Path, base: Path, files: Mapping[str, str]) -> None:
    """Put back the export that a killed one had moved away and not replaced, and remove what it was building.

    Only what is this user's, and holds nothing but files of an export, each in its place, is taken for such.
    """
    place = target.relative_to(base)
    ours = {Path(OLD) / name for name in files} | {Path(NEW) / place / name for name in files}
    for staging in list(base.glob(f"{STAGING}????????")):
        is_own_folder = staging.is_dir() and not staging.is_symlink() and staging.stat().st_uid == os.geteuid()
        if not is_own_folder or not {Path(name) for name in _held(staging)} <= ours:
            continue
        # Without the new one beside it, the old one was being removed.
        if (staging / OLD).is_dir() and (staging / NEW / place).is_dir() and not os.path.lexists(target):
            (staging / OLD).rename(target)
        shutil.rmtree(staging, ignore_errors=True)


def _held(folder: Path) -> set[str]:
    """List the files in a folder, and those in its folders, but for Python's byte code."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts and (path.is_symlink() or not path.is_dir())
    }


def _refuse_unless_replaceable(target: Path, files: Mapping[str, str], overwrite: bool) -> None:
    if target.is_symlink() or not target.is_dir():
        raise MetaPerSERError(f"{target} is in the way: it is no folder; move it away, or name another DIR")
    held = _held(target)
    if not held:
        return
    others = sorted(held - files.keys())
    if others or "bind.patch" not in held:
        reason = f"holds {others[0]}, which no export writes" if others else "is no export of this command"
        raise MetaPerSERError(f"{target} is left alone: it {reason}; move it away, or name another DIR")
    if not overwrite:
        raise MetaPerSERError(f"{target} exists already; give --overwrite to replace it")


def _move_in(target: Path, base: Path, files: Mapping[str, str]) -> None:
    """Build the folder in one above it, with those between them that are missing, and rename."""
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=base))
    try:
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)
        new = staging / NEW / target.relative_to(base)
        for name, text in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        if target.exists():
            old = staging / OLD
            target.rename(old)
            try:
                new.rename(target)
            except OSError:
                old.rename(target)
                raise
        else:
            top = target.relative_to(base).parts[0]
            (staging / NEW / top).rename(base / top)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _reworded(text: str) -> str:
    for ours, theirs in WORDING_OF_CONFIGS:
        text = text.replace(ours, theirs)
    return text
