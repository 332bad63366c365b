"""Types of command lines' arguments, as argparse calls them, that all rooms share."""

from __future__ import annotations

import argparse
from pathlib import Path


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
