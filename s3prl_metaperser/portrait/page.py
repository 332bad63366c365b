"""A portrait as people get it: one page of HTML that loads nothing, and its figures and numbers as files beside it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from s3prl_metaperser.atomic import write_text
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.portrait.drawing import print_style
from s3prl_metaperser.publishing.figures import write_figure
from s3prl_metaperser.publishing.pages import page_environment

FORMATS = ("png", "pdf")
DPI = 300


@dataclass(frozen=True)
class Shown:
    """A figure.

    Attributes:
        name: of its files.
        draw: makes it.
        caption: what it shows, from how many labels, and what its marks mean.
        alt: what it shows, for those who don't see it.
    """

    name: str
    draw: Callable[[], Figure]
    caption: str
    alt: str


@dataclass(frozen=True)
class Part:
    """A question and what the corpus says to it.

    Attributes:
        name: of its place on the page.
        title: its heading.
        found: in sentences; where there is no figure, why.
        figures: none, one or several.
        tables: title and numbers as text, for people.
        numbers: file name and all digits, for programs.
    """

    name: str
    title: str
    found: Sequence[str]
    figures: Sequence[Shown] = ()
    tables: Sequence[tuple[str, pd.DataFrame]] = ()
    numbers: Sequence[tuple[str, pd.DataFrame]] = ()


@dataclass(frozen=True)
class Portrait:
    """All of it.

    Attributes:
        corpus: its name.
        lead: what the corpus is, in sentences.
        parts: in order.
        made: with what it was made, in sentences.
    """

    corpus: str
    lead: Sequence[str]
    parts: Sequence[Part]
    made: Sequence[str] = field(default=())


def figures_folder(out: Path) -> Path:
    """Give the folder beside the page: ``portrait_figures`` for ``portrait.html``."""
    return out.with_name(f"{out.stem}_figures")


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Stop before any work where a portrait cannot go.

    Raises:
        MetaPerSERError: the page or its folder is there and ``overwrite`` is not set, or ``out`` can be no page.
    """
    folder = figures_folder(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise MetaPerSERError(f"--out {out} is no page; expected a name that ends in .html")
    if out.is_symlink() and not out.exists():
        raise MetaPerSERError(f"{out}: a link to {out.readlink()}, which is not there; expected a file to write")
    if out.is_dir():
        raise MetaPerSERError(f"{out}: is a folder; expected a file to write the page to")
    if folder.exists() and not folder.is_dir():
        raise MetaPerSERError(f"{folder}: is a file; expected a folder for the figures")
    for path in (out, folder):
        if path.exists() and not overwrite:
            raise MetaPerSERError(f"{path} is already there; pass --overwrite to replace the portrait")


def write_portrait(portrait: Portrait, out: Path, overwrite: bool = False) -> list[Path]:
    """Write the page, and the figures as PNG and PDF and the numbers as CSV beside it.

    All is made in a folder of its own first and put in place at the end. An older portrait's files that this one does
    not have are removed; what else lies there stays.

    Args:
        portrait: what to show; all of it is escaped.
        out: the page.
        overwrite: replace an older portrait.

    Returns:
        The files, the page first.

    Raises:
        MetaPerSERError: as :func:`refuse_existing`, or when it cannot be written.
    """
    refuse_existing(out, overwrite)
    folder = figures_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=out.parent) as temporary:
            made = Path(temporary)
            _write_files(portrait, made)
            template = page_environment("s3prl_metaperser.portrait").get_template("page.html.jinja")
            page = template.render(portrait=portrait, folder=made)
            folder.mkdir(exist_ok=True)
            written = [folder / path.name for path in sorted(made.iterdir())]
            for path in written:
                os.replace(made / path.name, path)
        for stale in _files_of_any_portrait(folder):
            if stale not in written:
                stale.unlink()
        write_text(out, page)
    except OSError as error:
        raise MetaPerSERError(f"{out}: the portrait cannot be written there ({error.strerror})") from None
    return [out, *written]


def _write_files(portrait: Portrait, folder: Path) -> None:
    figures = [shown for part in portrait.parts for shown in part.figures]
    with print_style():
        for shown in tqdm(figures, desc="figures", unit="figure", leave=False, delay=1):
            write_figure(shown.draw(), folder, shown.name, FORMATS, DPI)
    for part in portrait.parts:
        for name, numbers in part.numbers:
            text = numbers.to_csv(index=False, lineterminator="\n", float_format="%.6g")
            write_text(folder / f"{name}.csv", text)


FILES = ("habits", "agreement", "pairs", "confusions", "map", "movement", "tensors")
"""Names of all figures and numbers that a portrait may have."""


def _files_of_any_portrait(folder: Path) -> list[Path]:
    paths = [folder / f"{name}.{ending}" for name in FILES for ending in (*FORMATS, "csv")]
    return [path for path in paths if path.exists()]
