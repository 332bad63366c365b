"""The one exception type that stands for bad input.

Everything a user can get wrong (a path, a label file, a key, a checkpoint) raises :class:`MetaPerSERError`. Whoever
holds the process (the command line, the launcher, the expert inside s3prl's runner) prints it as one line on stderr
and exits with code 2; from Python it is an exception like any other.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

EXIT_CODE = 2

P = ParamSpec("P")
T = TypeVar("T")


class MetaPerSERError(Exception):
    """Bad input. The message is one line: what was wrong, where, what was expected, how to mend it."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Name the known words nearest to a misspelt one, or all of them when none is near.

    Args:
        word: what the user wrote.
        known: what could have been meant.

    Returns:
        The tail of an error message, such as ``did you mean 'scope'?`` or ``known: a, b, c``.

    >>> suggest("scpoe", ["scope", "system"])
    "did you mean 'scope'?"
    """
    choices = [str(choice) for choice in known]
    nearest = difflib.get_close_matches(str(word), choices, n=3)
    if nearest:
        return "did you mean " + " or ".join(repr(choice) for choice in nearest) + "?"
    return "known: " + ", ".join(choices)


def exit_with(error: MetaPerSERError, program: str = "metaperser") -> SystemExit:
    """Print an error as one line on stderr and return the exit (code 2) to raise.

    Args:
        error: what went wrong.
        program: the name the line begins with.

    Returns:
        The ``SystemExit`` for the caller to raise.
    """
    line = " ".join(str(error).split())
    print(f"{program}: error: {line}", file=sys.stderr, flush=True)
    return SystemExit(EXIT_CODE)


def exits_on_bad_input(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap an entry point that someone else's program calls: bad input becomes one line and exit code 2.

    s3prl's runner lets exceptions through as tracebacks; this decorator is how the expert keeps them from its users.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except MetaPerSERError as error:
            raise exit_with(error) from None

    return wrapped
