"""The example configs, where they are kept: beside the package in a clone, inside it once installed."""

from __future__ import annotations

from pathlib import Path

from s3prl_metaperser.errors import MetaPerSERError, suggest

_PACKAGE = Path(__file__).resolve().parent


def folder() -> Path:
    """Find the folder ``downstream_configs`` of this installation.

    Returns:
        The folder inside the package (``pip install .``), or else the one beside it (a clone, ``pip install -e .``).

    Raises:
        MetaPerSERError: neither is there.
    """
    places = [_PACKAGE / "downstream_configs", _PACKAGE.parent / "downstream_configs"]
    for place in places:
        if place.is_dir():
            return place
    raise MetaPerSERError(
        f"the configs are missing: expected them in {' or '.join(map(str, places))}; install s3prl-metaperser anew"
    )


def available() -> dict[str, Path]:
    """Map the name of each config, without its ending, to its file."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def describe(path: Path) -> str:
    """Read what a config is for: its first comment line, or nothing where it has none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").rstrip()
    return ""


def find(name: str) -> Path:
    """Find a config by name.

    Args:
        name: with or without ``.yaml``.

    Raises:
        MetaPerSERError: there is none of that name; the message names the nearest.
    """
    configs = available()
    try:
        return configs[name.removesuffix(".yaml")]
    except KeyError:
        raise MetaPerSERError(
            f"no config is called {name!r}: {suggest(name, configs)} (`metaperser config` lists them)"
        ) from None
