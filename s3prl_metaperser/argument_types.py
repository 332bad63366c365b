"""Types of command lines' arguments, and what becomes of them, as argparse calls them; all rooms share these."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def given_text(text: str) -> str:
    """Take an argument that is not empty, as a shell makes it of a variable that is not set.

    Raises:
        ArgumentTypeError: when it is.
    """
    if not text:
        raise argparse.ArgumentTypeError("is given as empty text; is a variable of the shell not set?")
    return text


def given_path(text: str) -> Path:
    """Take a path, of which empty text would be the working folder; see :func:`given_text`."""
    return Path(given_text(text))


class Gather(argparse.Action):
    """Adds a flag's values to those that it was given before, in place of its default, which argparse would add to."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Take one more occurrence of the flag."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if before is self.default else before), *(values or [])])
