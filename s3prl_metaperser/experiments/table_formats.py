"""A table as people read it, apart from where it is shown: Markdown and LaTeX here, HTML in the report's template."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from s3prl_metaperser.atomic import write_text

_MARKDOWN = str.maketrans({"\\": r"\\", "|": r"\|", "*": r"\*", "<": r"\<", "\n": " "})
# A star or bracket that begins a row would be read as an argument of the \\ that ends the row before.
_LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " "}
    | {character: rf"\{character}" for character in "{}$&#_%"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "*": "{*}"}
    | {
        "±": r"$\pm$",
        "−": "$-$",
        "×": r"$\times$",
        "✓": r"\checkmark{}",
        "†": r"$\dagger$",
        "‡": r"$\ddagger$",
        "–": "--",
    }
)


@dataclass(frozen=True)
class Cell:
    """What a cell says, and whether it is set in bold."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        cells: one for each leading column and each column of the groups, in that order.
        reference: stands for something the others are measured by, not one of them; shown apart.
    """

    cells: tuple[Cell, ...]
    reference: bool = False


@dataclass(frozen=True)
class Block:
    """Rows that belong together, under a title of their own (empty: none). Reference rows are the last."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: one sentence: what is shown.
        leading: names of the columns that say what a row is; the first names it.
        groups: of the other columns: the title over each group, and the names of its columns.
        blocks: the rows.
        lead: what the table says, in sentences above it.
        notes: how to read it, in lines below it.
    """

    caption: str
    leading: tuple[str, ...]
    groups: tuple[tuple[str, tuple[str, ...]], ...]
    blocks: tuple[Block, ...]
    lead: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())


def escape_latex(text: str) -> str:
    r"""Write a text such that LaTeX sets it as it stands.

    >>> print(escape_latex("50% of wavlm_base ± 2"))
    50\% of wavlm\_base $\pm$ 2
    """
    return text.translate(_LATEX)


def markdown(table: Table) -> str:
    """Give a table as GitHub's Markdown; bold where bold, reference rows in italics."""
    header = [*table.leading, *(f"{title} {column}".strip() for title, columns in table.groups for column in columns)]
    header = [name.translate(_MARKDOWN) for name in header]
    parts = ["\n".join(f"- {line}" for line in table.lead)] if table.lead else []
    for block in table.blocks:
        lines = [header, *([_markdown_cell(cell, row.reference) for cell in row.cells] for row in block.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        shown = [
            "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
        ]
        shown.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        parts += [f"**{block.title.translate(_MARKDOWN)}**"] if block.title else []
        parts.append("\n".join(shown))
    return "\n\n".join([*parts, *table.notes]) + "\n"


def _markdown_cell(cell: Cell, reference: bool) -> str:
    text = cell.text.translate(_MARKDOWN)
    if not text:
        return text
    return f"*{text}*" if reference else f"**{text}**" if cell.bold else text


def latex(table: Table, label: str) -> str:
    r"""Give a table as a LaTeX float for ``\input``.

    Args:
        table: what to show.
        label: for ``\ref``.

    Returns:
        A ``table`` environment that is never wider than the line.
    """
    width = len(table.leading) + sum(len(columns) for _, columns in table.groups)
    titles, rules, place = [""] * len(table.leading), "", len(table.leading)
    for title, columns in table.groups:
        titles.append(rf"\multicolumn{{{len(columns)}}}{{c}}{{{escape_latex(title)}}}")
        rules += rf"\cmidrule(lr){{{place + 1}-{place + len(columns)}}}"
        place += len(columns)
    body = []
    for block in table.blocks:
        body.append(r"\midrule")
        if block.title:
            body += [rf"\multicolumn{{{width}}}{{l}}{{\textit{{{escape_latex(block.title)}}}}} \\", r"\addlinespace"]
        for previous, row in zip((None, *block.rows), block.rows, strict=False):
            if row.reference and previous is not None and not previous.reference:
                body.append(r"\midrule")
            body.append(_latex_line(_latex_cell(cell, row.reference) for cell in row.cells))
    lines = [
        r"% In the preamble: \usepackage{booktabs,graphicx,amssymb}",
        *(f"% {' '.join(line.split())}" for line in table.lead),
        *(r"\begin{table}[t]", r"\centering", rf"\caption{{{escape_latex(table.caption)}}}", rf"\label{{{label}}}"),
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{'l' + 'c' * (len(table.leading) - 1) + 'r' * (width - len(table.leading))}}}",
        r"\toprule",
        *((_latex_line(titles), rules) if any(title for title, _ in table.groups) else ()),
        _latex_line(map(escape_latex, [*table.leading, *(name for _, columns in table.groups for name in columns)])),
        *(*body, r"\bottomrule", r"\end{tabular}}"),
        *(rf"\par\smallskip{{\footnotesize\raggedright {escape_latex(note)}\par}}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(cell: Cell, reference: bool) -> str:
    text = escape_latex(cell.text)
    if not text:
        return text
    return rf"\textit{{{text}}}" if reference else rf"\textbf{{{text}}}" if cell.bold else text


def write_formats(table: Table, out: Path, name: str) -> None:
    """Write ``NAME.md`` and ``NAME.tex``."""
    write_text(out / f"{name}.md", markdown(table))
    write_text(out / f"{name}.tex", latex(table, f"tab:{name}"))
