"""Numbers as they are written into names, tables and command lines."""

from __future__ import annotations


def exact(value: float) -> str:
    """Write a number so that different ones are written differently, and the usual ones are short.

    >>> exact(0.1), exact(1e-06), exact(0.12345678)
    ('0.1', '1e-06', '0.12345678')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))
