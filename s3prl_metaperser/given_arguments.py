"""Arguments of s3prl's runner that did not come through its parser: given by ``-o``, or found in a checkpoint.

s3prl takes both as they are. What ``-o`` says is the user's own; a checkpoint is a file that anyone may have written,
so it may not ask for what reaches beyond this machine, nor for what runs its texts as code.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from s3prl_metaperser.errors import MetaPerSERError

OWN_DOWNSTREAM = "metaperser"
ASKED_ONLY_BY_HAND: Mapping[str, str] = {
    "hub": "runs Python code that it downloads from a repository",
    "from_hf_hub": "runs Python code that it downloads from a repository",
    "upstream_ckpt": "unpickles what it opens as an address",
    "push_to_hf_hub": "uploads the experiment's folder",
    "downstream": "evaluates the checkpoint's config, which has brackets in a text, as Python code",
}
"""What s3prl does for an argument that a checkpoint may not give it, where :func:`_is_unasked`."""
ADDRESS = re.compile(r"\W*[A-Za-z][A-Za-z0-9+.-]*:")
"""How anything that ``urllib.request.urlopen`` takes begins: ``https:``, and ``data:`` and ``file:`` too."""
CHECKED_TO_BE_LOCAL = ("_local", "_custom")
"""Ends of upstreams' names whose ``-k`` must be a file that is there: see ``preflight_upstream.check_upstream``."""
BRACKETS = re.compile(r"[(\[{]")
"""Without any of them an expression names something, and does nothing."""


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
    config: object = None,
) -> None:
    """Refuse a checkpoint whose arguments would make s3prl fetch and run, or send, what its user has not asked for.

    Args:
        saved: the checkpoint's arguments.
        given: names of the arguments that the user has given over them.
        source: names the checkpoint in the error.
        cure: says how to ask for it oneself.
        config: the checkpoint's, where s3prl makes the downstream that the arguments name.

    Raises:
        MetaPerSERError: naming the argument.
    """
    for name, does in ASKED_ONLY_BY_HAND.items():
        if name not in given and _is_unasked(name, saved, config):
            raise MetaPerSERError(
                f"{source} asks for {name} {saved.get(name)!r:.80}, for which s3prl {does}; no checkpoint may: if you "
                f"trust that, {cure}"
            )


def _is_unasked(name: str, saved: Mapping[str, Any], config: object) -> bool:
    value = saved.get(name)
    match name:
        case "hub":
            return value not in (None, "torch")
        case "downstream":
            # Many of s3prl's own evaluate what their config says is the model or the metric.
            return value != OWN_DOWNSTREAM and any(BRACKETS.search(text) for text in _texts(config))
        case "upstream_ckpt":
            return isinstance(value, str) and not _is_of_this_machine(value, str(saved.get("upstream")))
    return bool(value)


def _is_of_this_machine(checkpoint: str, upstream: str) -> bool:
    """Say whether s3prl can only open an upstream's checkpoint as a file, or as a Hugging Face model's repository.

    transformers reads the latter without pickle, or by torch's safe loader.
    """
    if upstream.endswith("_url") or ADDRESS.match(checkpoint):
        return False
    return os.path.exists(checkpoint) or upstream.startswith("hf_") or upstream.endswith(CHECKED_TO_BE_LOCAL)


def _texts(given: object) -> Iterator[str]:
    """Go through a config's values."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, (Mapping, list, tuple)):
        for below in given.values() if isinstance(given, Mapping) else given:
            yield from _texts(below)
