"""One HTML file that shows an experiment to people: what came out, how to read it, how to get it again.

The file loads nothing: style, figures and the CSV files it offers are inside it.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from s3prl_metaperser.atomic import write_text
from s3prl_metaperser.experiments.table_formats import Table
from s3prl_metaperser.publishing.pages import page_environment

NAME = "report.html"
PACKAGES = (
    *("s3prl-metaperser", "s3prl", "torch", "torchaudio", "higher", "transformers", "numpy", "scipy", "scikit-learn"),
    *("pandas", "matplotlib"),
)


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
    environment = page_environment("s3prl_metaperser.experiments")
    environment.filters["flat"] = _flat
    environment.tests["table"] = lambda table: isinstance(table, Table)
    path = out / NAME
    write_text(path, environment.get_template("report.html.jinja").render(report=report))
    return path


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
