"""What two commands of s3prl's runner differ in: their configs, and their arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

NOT_SET = object()
"""Stands for the value of a key that is not there."""
SHOWN = 80
"""Characters of a value that are shown."""
FOLDER = "expdir"
PATHS = (FOLDER, "init_ckpt", "upstream_ckpt", "upstream_model_config")
"""Arguments that may name a file or folder, which has more than one name."""


def first_difference(first: Any, second: Any, names: tuple[str, ...] = ()) -> tuple[str, Any, Any] | None:
    """Give the dotted key and both values, in the order of the first; None where all are equal.

    Args:
        first: a config or a part of it.
        second: another.
        names: the keys above them.
    """
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return None if first == second else (".".join(names), first, second)
    pairs = ((name, first.get(name, NOT_SET), second.get(name, NOT_SET)) for name in {**first, **second})
    found = (first_difference(one, other, (*names, str(name))) for name, one, other in pairs)
    return next((difference for difference in found if difference is not None), None)


def is_same_argument(name: str, first: object, second: object) -> bool:
    """Tell whether two values of an argument are the same: of a path, however it is spelled.

    Args:
        name: of the argument, as in the namespace of s3prl's parser.
        first: a value.
        second: another.
    """
    if first == second:
        return True
    if name not in PATHS or not (isinstance(first, str) and isinstance(second, str)):
        return False
    if os.path.exists(first) and os.path.exists(second):
        return os.path.samefile(first, second)
    return name == FOLDER and os.path.abspath(first) == os.path.abspath(second)


def shown(value: object) -> str:
    """Say what a key's value is, in a few words."""
    return "is not set" if value is NOT_SET else f"is {value!r:.{SHOWN}}"
