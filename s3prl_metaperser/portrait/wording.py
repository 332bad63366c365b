"""How a portrait says its numbers: in sentences and tables for people."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.spread import Estimates
from s3prl_metaperser.publishing.pages import MISSING

NOBODY_SHARES = (
    "No clip was labelled by two annotators, so nobody can be compared with anybody: there is no figure of this."
)


def number(value: float, places: int = 2, signed: bool = False) -> str:
    """Write a number with a real minus sign, and one that rounds to nothing without any.

    >>> number(-0.001), number(-1.5, 1), number(2, 0, signed=True)
    ('0.00', '−1.5', '+2')
    """
    if not np.isfinite(value):
        return MISSING
    text = f"{value:{'+' if signed else ''}.{places}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def interval(of: Estimates, places: int = 2, scale: float = 1, signed: bool = False) -> str:
    """Write a number with its interval in brackets, if it has one.

    >>> interval(Estimates(np.array(0.5), np.array(0.25), np.array(0.75)), 0, 100)
    '50 [25, 75]'
    """
    said = number(scale * float(of.value), places, signed)
    if not np.isfinite(of.low):
        return said
    low, high = (number(scale * float(end), places, signed) for end in (of.low, of.high))
    return f"{said} [{low}, {high}]"


def percent(of: Estimates) -> str:
    """Write a share in percent with its interval."""
    return f"{number(100 * float(of.value), 0)}%" + interval(of, 0, 100).removeprefix(number(100 * float(of.value), 0))


def counted(amount: int, one: str, several: str = "") -> str:
    """Write a number of things.

    >>> counted(1, "clip"), counted(2772, "clip")
    ('1 clip', '2,772 clips')
    """
    return f"{amount:,} {one if amount == 1 else several or f'{one}s'}"


def listed(words: Sequence[str]) -> str:
    """Join words as a sentence does.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def who(crowd: Crowd, shown: np.ndarray) -> dict[str, object]:
    """Begin a table of annotators: number, name, kind, labels."""
    return {
        "no.": shown + 1,
        "annotator": [crowd.names[one] for one in shown],
        "kind": crowd.kinds[shown],
        "labels": crowd.counts()[shown],
    }
