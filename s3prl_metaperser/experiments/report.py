"""One HTML file that shows an experiment to people: what came out, how to read it, how to get it again.

The file loads nothing: style, figures and the CSV files it offers are inside it.
"""

from __future__ import annotations

import base64
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from pandas.api.types import is_float_dtype, is_numeric_dtype

from s3prl_metaperser.atomic import write_text
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments.table_formats import MISSING, Table

NAME = "report.html"
PACKAGES = (
    *("s3prl-metaperser", "s3prl", "torch", "torchaudio", "higher", "transformers", "numpy", "scipy", "scikit-learn"),
    *("pandas", "matplotlib"),
)
_MEDIA = {".svg": "image/svg+xml", ".png": "image/png", ".csv": "text/csv"}


@dataclass(frozen=True)
class Section:
    """A result.

    Attributes:
        title: its heading.
        text: what is shown, in plain words; each line is a paragraph.
        table: as :mod:`s3prl_metaperser.experiments.tables` and ``significance`` give it, or any frame.
        figure: an SVG or PNG file, taken into the report.
        csv: a file to offer for download, taken into the report.
        alt: what the figure shows, for those who don't see it; the title by default.
    """

    title: str
    text: str = ""
    table: Table | pd.DataFrame | None = None
    figure: Path | None = None
    csv: Path | None = None
    alt: str = ""


@dataclass(frozen=True)
class Report:
    """An experiment.

    Attributes:
        title: such as "Table 1".
        corpus: its name.
        sections: the results, in order.
        commands: what to type to get them again, a line each.
        versions: by name, as :func:`versions` gives them.
        settings: of the runs; nested ones are shown with dotted keys.
        seeds: by name.
        chosen: what was chosen on dev: columns ``scenario``, ``fold``, ``system``, ``setting``.
        failures: a line for each run that failed.
        runs: columns run name, seconds, state.
    """

    title: str
    corpus: str
    sections: list[Section]
    commands: list[str]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    seeds: Mapping[str, int]
    chosen: pd.DataFrame | None = None
    failures: list[str] = field(default_factory=list)
    runs: pd.DataFrame | None = None


def versions() -> dict[str, str]:
    """Give the versions of what results depend on, as installed."""
    found = {"Python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_report(out: Path, report: Report) -> Path:
    """Write ``report.html``.

    Args:
        out: folder.
        report: what to show; all of it is escaped.

    Returns:
        The path of the file.

    Raises:
        MetaPerSERError: when a figure or CSV file is missing or of another kind.
    """
    environment = Environment(
        loader=PackageLoader("s3prl_metaperser.experiments", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": _data_uri, "shown": _shown, "is_number": is_numeric_dtype, "flat": _flat}
    environment.tests["table"] = lambda table: isinstance(table, Table)
    path = out / NAME
    write_text(path, environment.get_template("report.html.jinja").render(report=report))
    return path


def _data_uri(path: Path) -> str:
    media = _MEDIA.get(path.suffix)
    if media is None:
        raise MetaPerSERError(f"{path} cannot be shown in a report; expected one of {', '.join(_MEDIA)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MetaPerSERError(f"{path}, to be shown in a report, cannot be read: {error.strerror}") from None
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def _shown(frame: pd.DataFrame) -> pd.DataFrame:
    """Give a frame as text: fractions to two places, or to four digits where a column stays below 1."""
    return pd.DataFrame({name: _shown_column(frame[name]) for name in frame.columns})


def _shown_column(column: pd.Series) -> list[str]:
    if not is_float_dtype(column):
        return [MISSING if pd.isna(value) else str(value) for value in column]
    spec = ".2f" if column.abs().max() >= 1 else ".4g"
    return [MISSING if pd.isna(value) else format(value, spec) for value in column]


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
