"""Placing the downstream into an s3prl that is an editable clone, and taking it out again.

``pip install`` puts ``s3prl/downstream/metaperser`` beside the installed s3prl. Where s3prl is a clone installed with
``pip install -e``, its modules are read from the clone, which pip does not write to. Worse, the folder ``s3prl`` that
then stands alone in site-packages can hide the clone: Python prefers it, as a namespace package, to the import hook by
which newer versions of setuptools point to a clone. So linking does two things, and unlinking undoes just these:

- it copies the downstream's two small files into the clone, with a marker that tells them from anybody else's;
- where the clone is hidden, it adds the clone's folder to the import path (a ``.pth`` file, which is what
  ``pip install -e CLONE --config-settings editable_mode=compat`` does as well).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from s3prl_metaperser.atomic import LEFTOVER_SECONDS, write_text
from s3prl_metaperser.errors import MetaPerSERError

MARKER = ".placed-by-metaperser.json"
PATH_FILE = "s3prl_metaperser_link.pth"
STAGING = ".metaperser-link-"
"""What the name of the folder begins with in which the downstream is built, and taken apart."""
NEW, OLD = "new", "old"

_SOURCE = Path(__file__).resolve().parent / "s3prl_downstream"
_FILES = ("__init__.py", "expert.py")


def find_s3prl(path: Path | None = None) -> Path:
    """Find the package folder of an s3prl, without importing it.

    Args:
        path: a clone of s3prl, or the package folder in it; by default the installed s3prl is looked up.

    Returns:
        The folder that holds ``hub.py`` and ``downstream/``.

    Raises:
        MetaPerSERError: there is no s3prl in that place, or none installed.
    """
    if path is not None:
        for folder in (path, path / "s3prl"):
            if _is_s3prl(folder):
                return folder.resolve()
        raise MetaPerSERError(
            f"{path} is not an s3prl: expected a clone of it, or its package folder, with downstream/runner.py inside"
        )
    candidates = [*_importable_places(), *_editable_places()]
    for folder in candidates:
        if _is_s3prl(folder):
            return folder.resolve()
    raise MetaPerSERError("no s3prl is installed here: install one, or name a clone with --s3prl PATH")


def link(package: Path, site_packages: Path | None = None) -> list[str]:
    """Place the downstream into an s3prl; doing it twice changes nothing.

    Args:
        package: the package folder of s3prl, as :func:`find_s3prl` gives it.
        site_packages: where a hidden clone is added to the import path; by default this interpreter's own folder.

    Returns:
        What was done, in lines for the user.

    Raises:
        MetaPerSERError: something that is not ours stands in the place, or the place cannot be written.
    """
    target = _target(package)
    try:
        lines = [_place(target)]
        if _hidden(package):
            path_file = (site_packages or _site_packages()) / PATH_FILE
            write_text(path_file, f"{package.parent}\n")
            lines.append(
                f"added {package.parent} to the import path, by {path_file}: it was hidden by site-packages/s3prl"
            )
    except OSError as error:
        raise MetaPerSERError(f"{target} cannot be written: {error.strerror or error}") from None
    return lines


def unlink(package: Path, site_packages: Path | None = None) -> list[str]:
    """Remove what :func:`link` placed, and nothing else.

    Args:
        package: the package folder of s3prl, as :func:`find_s3prl` gives it.
        site_packages: where :func:`link` may have added the clone to the import path.

    Returns:
        What was done, in lines for the user.

    Raises:
        MetaPerSERError: the folder was not placed by :func:`link`, or was changed since; nothing is removed.
    """
    target = _target(package)
    path_file = (site_packages or _site_packages()) / PATH_FILE
    lines = []
    try:
        if os.path.lexists(target):
            _refuse_unless_ours(target)
            with _staging(target) as staging:
                target.rename(staging / OLD)
            lines.append(f"removed {target}")
        if path_file.is_file() and path_file.read_text(encoding="utf-8").strip() == str(package.parent):
            path_file.unlink()
            lines.append(
                f"removed {path_file}; while this package is installed, site-packages/s3prl hides the clone again: "
                "pip uninstall s3prl-metaperser ends that"
            )
    except OSError as error:
        raise MetaPerSERError(f"{target} cannot be removed: {error.strerror or error}") from None
    return lines or [f"nothing to remove: there is no {target}"]


def _is_s3prl(folder: Path) -> bool:
    return (folder / "hub.py").is_file() and (folder / "downstream" / "runner.py").is_file()


def _importable_places() -> list[Path]:
    """List the folders ``import s3prl`` would read, first to last."""
    spec = importlib.util.find_spec("s3prl")
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def _editable_places() -> list[Path]:
    """List the clone pip remembers, which is where a clone hidden from ``import s3prl`` can still be found."""
    try:
        record = metadata.distribution("s3prl").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return []
    if record is None:
        return []
    return [Path(url2pathname(urlsplit(json.loads(record)["url"]).path)) / "s3prl"]


def _hidden(package: Path) -> bool:
    """Tell whether ``import s3prl`` gives a namespace package in place of this s3prl."""
    spec = importlib.util.find_spec("s3prl")
    return spec is not None and spec.origin is None and package not in _importable_places()


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _target(package: Path) -> Path:
    return package / "downstream" / "metaperser"


def _place(target: Path) -> str:
    wanted = {name: _digest(_SOURCE / name) for name in _FILES}
    if os.path.lexists(target):
        if not (target / MARKER).exists() and _digests(target) == wanted:
            return f"{target} is there already, installed by pip: nothing to link"
        _refuse_unless_ours(target)
        if _digests(target) == wanted:
            return f"{target} is linked already"
    with _staging(target) as staging:
        new = staging / NEW
        new.mkdir()
        new.chmod(target.parent.stat().st_mode & 0o777)
        for name in _FILES:
            shutil.copyfile(_SOURCE / name, new / name)
        write_text(new / MARKER, json.dumps({"placed by": "metaperser link-s3prl", "sha256": wanted}, indent=2) + "\n")
        if target.exists():
            target.rename(staging / OLD)
        new.rename(target)
    return f"placed the downstream at {target} (`metaperser unlink-s3prl` removes it)"


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Give a folder beside ``target``, to move in and out of whole: s3prl never sees half of it, nor does a later call.

    A killed one is left behind, out of Python's sight; the next that is made removes it.
    """
    for leftover in target.parent.glob(f"{STAGING}????????"):
        if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=target.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_unless_ours(target: Path) -> None:
    """Raise unless ``target`` holds exactly what was placed there, as the marker remembers it."""
    marker = target / MARKER
    if target.is_symlink() or not marker.is_file():
        raise MetaPerSERError(
            f"{target} was not placed by `metaperser link-s3prl`: it is left alone; move it away yourself, or, "
            "where pip installed it, use pip uninstall s3prl-metaperser"
        )
    try:
        placed = json.loads(marker.read_text(encoding="utf-8"))["sha256"]
    except (ValueError, KeyError, TypeError):
        placed = None
    if _digests(target) != placed:
        raise MetaPerSERError(
            f"{target} was changed since `metaperser link-s3prl` placed it: it is left alone; "
            "move your changes away first"
        )


def _digests(folder: Path) -> dict[str, str]:
    """Digest all that a folder holds, but for the marker and the byte code Python leaves."""
    if not folder.is_dir():
        return {}
    return {
        str(path.relative_to(folder)): _digest(path) if path.is_file() else "not a file"
        for path in folder.rglob("*")
        if path.name not in (MARKER, "__pycache__") and path.parent.name != "__pycache__"
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
