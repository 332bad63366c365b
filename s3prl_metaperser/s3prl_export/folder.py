"""The exported folder: what it holds, where it goes, and how it gets there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from s3prl_metaperser import __version__, configs
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.s3prl_export.modules import WORDING, needed, rewritten
from s3prl_metaperser.s3prl_export.requirements import requirements
from s3prl_metaperser.s3prl_link import find_s3prl

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
        if os.path.lexists(target):
            _refuse_unless_replaceable(target, files, overwrite)
        _move_in(target, files)
    except OSError as error:
        raise MetaPerSERError(f"{target} cannot be written: {error.strerror or error}") from None


def _refuse_unless_replaceable(target: Path, files: Mapping[str, str], overwrite: bool) -> None:
    if target.is_symlink() or not target.is_dir():
        raise MetaPerSERError(f"{target} is in the way: it is no folder; move it away, or name another DIR")
    held = {
        path.relative_to(target).as_posix()
        for path in target.rglob("*")
        if "__pycache__" not in path.parts and (path.is_symlink() or not path.is_dir())
    }
    if not held:
        return
    others = sorted(held - files.keys())
    if others or "bind.patch" not in held:
        reason = f"holds {others[0]}, which no export writes" if others else "is no export of this command"
        raise MetaPerSERError(f"{target} is left alone: it {reason}; move it away, or name another DIR")
    if not overwrite:
        raise MetaPerSERError(f"{target} exists already; give --overwrite to replace it")


def _move_in(target: Path, files: Mapping[str, str]) -> None:
    """Build the folder beside its place, with the folders above it that are missing, and rename."""
    base = target.parent
    while not base.exists():
        base = base.parent
    staging = Path(tempfile.mkdtemp(prefix=".metaperser-", dir=base))
    try:
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)
        new = staging / "new" / target.relative_to(base)
        for name, text in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        if target.exists():
            old = staging / "old"
            target.rename(old)
            try:
                new.rename(target)
            except OSError:
                old.rename(target)
                raise
        else:
            top = target.relative_to(base).parts[0]
            (staging / "new" / top).rename(base / top)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _reworded(text: str) -> str:
    for ours, theirs in WORDING_OF_CONFIGS:
        text = text.replace(ours, theirs)
    return text
