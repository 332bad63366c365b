"""Arguments of s3prl's runner that did not come through its parser: given by ``-o``, or found in a checkpoint.

s3prl takes both as they are. What ``-o`` says is the user's own; a checkpoint is a file that anyone may have written,
so it may not ask for what reaches beyond this machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from s3prl_metaperser.errors import MetaPerSERError

ASKED_ONLY_BY_HAND: Mapping[str, str] = {
    "hub": "runs Python code that it downloads from a repository",
    "from_hf_hub": "runs Python code that it downloads from a repository",
    "upstream_ckpt": "downloads a file and unpickles it",
    "push_to_hf_hub": "uploads the experiment's folder",
}
"""What s3prl does for an argument, where its value is :func:`_reaches_out`."""


def check_types(actions: Iterable[argparse.Action], args: argparse.Namespace, source: str) -> None:
    """Check that arguments are what the parser would have made of text.

    Args:
        actions: of s3prl's parser.
        args: the arguments.
        source: names where they came from in the error.

    Raises:
        MetaPerSERError: naming the first that is of another type, or none of the known choices.
    """
    for action in actions:
        value = getattr(args, action.dest, None)
        if action.dest == "help" or (value is None and action.default is None and action.choices is None):
            continue
        fault = _fault(action, value)
        if fault is not None:
            raise MetaPerSERError(f"{source}: args.{action.dest} is {value!r:.60}; expected {fault}")


def _fault(action: argparse.Action, value: Any) -> str | None:
    """Say what an argument should have been instead."""
    if action.choices is not None and value not in action.choices:
        return " or ".join(map(str, action.choices))
    if action.dest == "seed" and not (isinstance(value, int) and 0 <= value < 2**32):
        return "a whole number from 0 to 4294967295"
    if action.type is int:
        return None if type(value) is int else "a whole number"
    if action.nargs == 0:
        return None if isinstance(value, bool) else "True or False"
    if isinstance(value, bool) and isinstance(action.default, bool):
        return None
    is_text = isinstance(value, str) and not any(ord(character) < 32 for character in value)
    return None if is_text else "text of one line"


def check_trusted(
    saved: Mapping[str, Any],
    given: Collection[str],
    source: str,
    cure: str = 'ask for it yourself, with -o "args.NAME=VALUE"',
) -> None:
    """Refuse a checkpoint whose arguments would make s3prl fetch and run, or send, what its user has not asked for.

    Args:
        saved: the checkpoint's arguments.
        given: names of the arguments that the user has given over them.
        source: names the checkpoint in the error.
        cure: says how to ask for it oneself.

    Raises:
        MetaPerSERError: naming the argument.
    """
    for name, does in ASKED_ONLY_BY_HAND.items():
        value = saved.get(name)
        if name not in given and _reaches_out(name, value):
            raise MetaPerSERError(
                f"{source} asks for {name} {value!r:.80}, for which s3prl {does}; no checkpoint may: if you "
                f"trust that, {cure}"
            )


def _reaches_out(name: str, value: Any) -> bool:
    match name:
        case "hub":
            return value not in (None, "torch")
        case "upstream_ckpt":
            return isinstance(value, str) and "://" in value
    return bool(value)
