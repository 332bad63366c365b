"""What a reader found and what it left out, for the person who runs it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from s3prl_metaperser.corpus.manifest import Corpus

_LISTED_ANNOTATORS = 30
_NAME_WIDTH = 16


@dataclass
class _Drop:
    count: int = 0
    example: str = ""


@dataclass
class PreparationReport:
    """Counts what a reader left out, by reason.

    Attributes:
        dropped: reason, as a noun phrase with its unit in front (``annotations: only 'Other'``), to count and example.
    """

    dropped: dict[str, _Drop] = field(default_factory=dict)

    def drop(self, reason: str, example: str = "", count: int = 1) -> None:
        """Count something left out.

        Args:
            reason: unit and reason, such as ``"utterances: no audio file"``.
            example: one of them, shown to help finding it; the first is kept.
            count: how many.
        """
        entry = self.dropped.setdefault(reason, _Drop(example=example))
        entry.count += count

    def count(self, reason: str) -> int:
        """Tell how many were left out for a reason."""
        return self.dropped[reason].count if reason in self.dropped else 0

    def lines(self) -> list[str]:
        """Give one line a reason, the most frequent first, such as ``53 annotations: only 'Other'``."""
        ordered = sorted(self.dropped.items(), key=lambda item: -item[1].count)
        return [
            f"{entry.count:,} {reason}" + (f", e.g. {entry.example}" if entry.example else "")
            for reason, entry in ordered
            if entry.count
        ]


def summary(corpus: Corpus, report: PreparationReport) -> str:
    """Describe a prepared corpus: its size, its annotators and how each names emotions, and what was left out.

    Args:
        corpus: the result of a reader.
        report: what that reader left out.

    Returns:
        Lines of at most 120 columns for corpora of nine emotions. A few annotators are listed one a row, many are
        summarised. An annotation that ticks two emotions counts for both.
    """
    counts = corpus.counts()
    sessions = corpus.annotations["session"].nunique()
    head = (
        f"{corpus.name}: {counts['utterances']:,} utterances in {sessions} session{'s' * (sessions != 1)}, "
        f"{counts['annotators']:,} annotators, {counts['annotations']:,} annotations"
    )
    table = _ticks(corpus)
    few = len(table) <= _LISTED_ANNOTATORS
    body = _annotator_table(corpus, table) if few else _distribution_table(corpus, table)
    dropped = report.lines()
    tail = ["left out:", *(f"  {line}" for line in dropped)] if dropped else ["left out: nothing"]
    return "\n".join([head, "", *body, "", *tail])


def _ticks(corpus: Corpus) -> pd.DataFrame:
    """Count ticks: one row per annotator, one column per emotion, plus ``annotations`` and ``kind``."""
    rows = corpus.annotations
    ticked = corpus.targets() > 0
    annotators = pd.Categorical(rows["annotator"]).remove_unused_categories()
    counts = np.zeros((len(annotators.categories), len(corpus.emotions)), dtype=np.int64)
    for column in range(len(corpus.emotions)):
        counts[:, column] = np.bincount(annotators.codes[ticked[:, column]], minlength=len(counts))
    table = pd.DataFrame(counts, index=annotators.categories, columns=list(corpus.emotions))
    table.insert(0, "annotations", np.bincount(annotators.codes, minlength=len(counts)))
    kinds = rows.drop_duplicates("annotator").set_index("annotator")["kind"].astype(str)
    kinds.index = kinds.index.astype(str)
    table.insert(0, "kind", kinds.reindex(table.index))
    return table


def _annotator_table(corpus: Corpus, table: pd.DataFrame) -> list[str]:
    header = ["annotator", "kind", "labels", *corpus.emotions]
    rows = [
        [_short(str(name)), row["kind"], f"{row['annotations']:,}", *(f"{row[word]:,}" for word in corpus.emotions)]
        for name, row in table.sort_values("kind", kind="stable").iterrows()
    ]
    total = table.sum(numeric_only=True)
    rows.append(["all", "", f"{total['annotations']:,}", *(f"{total[word]:,}" for word in corpus.emotions)])
    return _align(header, rows)


def _distribution_table(corpus: Corpus, table: pd.DataFrame) -> list[str]:
    columns = ["annotations", *corpus.emotions]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in table["kind"].value_counts().items())
    rows = [
        [name, "", *(f"{int(value):,}" for value in getattr(table[columns], name)())]
        for name in ("min", "median", "max")
    ]
    rows.append(["all", "", *(f"{int(value):,}" for value in table[columns].sum())])
    return [f"annotators: {kinds}", *_align(["per annotator", "", "labels", *corpus.emotions], rows)]


def _align(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lay out a table: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def _short(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 1] + "…"
