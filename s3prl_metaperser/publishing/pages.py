"""Pages of HTML that load nothing: style, figures and files are inside them."""

from __future__ import annotations

import base64
from pathlib import Path

import pandas as pd
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from pandas.api.types import is_float_dtype, is_numeric_dtype

from s3prl_metaperser.errors import MetaPerSERError

MISSING = "–"
"""Stands in a cell that has no value."""

_MEDIA = {".svg": "image/svg+xml", ".png": "image/png", ".csv": "text/csv"}


def page_environment(package: str) -> Environment:
    """Make a jinja environment for the templates in a package, which may import and include the shared ones.

    Beside jinja's own filters there are ``data_uri`` (of a file), ``shown`` (a frame as text) and ``is_number`` (of a
    column's type). All that is shown is escaped.

    Args:
        package: whose folder holds the templates.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader("s3prl_metaperser.publishing", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "shown": shown, "is_number": is_numeric_dtype}
    return environment


def data_uri(path: Path) -> str:
    """Give a file as a ``data:`` URI.

    Raises:
        MetaPerSERError: when it is missing or neither SVG, PNG nor CSV.
    """
    media = _MEDIA.get(path.suffix)
    if media is None:
        raise MetaPerSERError(f"{path} cannot be shown in a report; expected one of {', '.join(_MEDIA)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MetaPerSERError(f"{path}, to be shown in a report, cannot be read: {error.strerror}") from None
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """Give a frame as text: fractions to two places, or to four digits where a column stays below 1."""
    return pd.DataFrame({name: _shown_column(frame[name]) for name in frame.columns})


def _shown_column(column: pd.Series) -> list[str]:
    if not is_float_dtype(column):
        return [MISSING if pd.isna(value) else str(value) for value in column]
    spec = ".2f" if column.abs().max() >= 1 else ".4g"
    return [MISSING if pd.isna(value) else format(value, spec) for value in column]
