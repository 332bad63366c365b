"""The one exception type that stands for bad input.

Everything a user can get wrong (a path, a label file, a key, a checkpoint) raises :class:`MetaPerSERError`. Whoever
holds the process (the command line, the launcher, the expert inside s3prl's runner) prints it as one line on stderr
and exits with code 2; from Python it is an exception like any other. What the file system refuses, wherever it does so,
ends in such a line as well: :func:`refusal`.
"""

from __future__ import annotations

import difflib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

EXIT_CODE = 2
INTERRUPTED = 130
"""The exit code shells give to a program that was stopped by Ctrl-C."""

_MAY_NOT = "cannot be read or written", "get the right to it and to the folders above it, or name another path"
_NO_ROOM = "cannot be written", "make room, or name a place on another disk"
REFUSED = {
    errno.EACCES: _MAY_NOT,
    errno.EPERM: _MAY_NOT,
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EFBIG: ("cannot be written", "allow larger files (ulimit -f), or name a place on another disk"),
    errno.EROFS: ("cannot be written", "name a place that can be"),
    errno.EIO: ("cannot be read or written", "have the disk checked, or name a place on another"),
    errno.ENAMETOOLONG: ("cannot be a path", "expected a path"),
}
"""What the file system says of files and folders that may not be used, of a full disk, and of no path at all: what that
means, and how to mend it."""
LONGEST_NAME = 200
"""Characters of a path in an error."""

P = ParamSpec("P")
T = TypeVar("T")


class MetaPerSERError(Exception):
    """Bad input. The message is one line: what was wrong, where, what was expected, how to mend it."""


class RefusedFileError(MetaPerSERError, OSError):
    """A file that the file system does not let be used: bad input to us, an ``OSError`` to whom that says more."""

    def __init__(self, path: object, error: OSError) -> None:
        super().__init__(error.errno, error.strerror, str(path))

    def __reduce__(self) -> tuple[type[RefusedFileError], tuple[str, OSError]]:
        # Errors come back from processes pickled; an OSError's own way would be to give __init__ three arguments.
        return type(self), (self.filename, OSError(self.errno, self.strerror))


class UnreadableError(RefusedFileError):
    """A file that is there and cannot be read: nothing is known of what it holds, such as whether it is damaged."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be read ({self.strerror}); get the right to read it, or name another"


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
    choices = sorted(map(str, known)) if isinstance(known, Set) else [str(choice) for choice in known]
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


def refusal(error: OSError) -> MetaPerSERError | None:
    """Say in a line what the file system has refused.

    Args:
        error: as caught around a command.

    Returns:
        Our error; None where it is another error of the operating system, whose traceback is of use.
    """
    if error.errno not in REFUSED:
        return None
    fault, cure = REFUSED[error.errno]
    place = str(error.filename if error.filename is not None else _without_name())
    shown = place if len(place) <= LONGEST_NAME else f"{place[:LONGEST_NAME]}…"
    return MetaPerSERError(f"{shown} {fault}: {error.strerror}; {cure}")


def _without_name() -> str:
    """Tell standard output, which keeps what it could not write, from files, whose errors have a name as a rule."""
    try:
        print(end="", flush=True)
    except OSError:
        discard_output()
        return "standard output"
    return "a file of this command"


def write_any_text() -> None:
    """Have standard output and error escape what their encoding lacks: no command fails once its work is done."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Send standard output nowhere: Python would try once more at exit to write what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def told_in_a_line(program: str = "metaperser") -> Iterator[None]:
    """Turn bad input, and what the file system refuses, into one line on stderr and exit code 2.

    Args:
        program: the name the line begins with.

    Raises:
        SystemExit: with code 2.
    """
    try:
        yield
    except MetaPerSERError as error:
        raise exit_with(error, program) from None
    except OSError as error:
        refused = refusal(error)
        if refused is None:
            raise
        raise exit_with(refused, program) from None


def run_as_command(command: Callable[[], int]) -> int:
    """Run a whole command: whatever ends it that is not its own fault ends it without a traceback.

    Args:
        command: reads its command line, does what it says, and gives an exit code.

    Returns:
        That code, or the one for Ctrl-C, or 1 where the reader of its output has gone (``metaperser config | head``).

    Raises:
        SystemExit: with code 2 after bad input, whose one line is then on stderr.
    """
    write_any_text()
    try:
        with told_in_a_line():
            code = command()
            print(end="", flush=True)
    except KeyboardInterrupt:
        print("metaperser: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        discard_output()
        return 1
    return code


def exits_on_bad_input(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap an entry point that someone else's program calls: bad input becomes one line and exit code 2.

    s3prl's runner lets exceptions through as tracebacks; this decorator is how the expert keeps them from its users.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with told_in_a_line():
            return function(*args, **kwargs)

    return wrapped
