"""Checking what is said beside a checkpoint to go on from, which s3prl replaces by what the checkpoint holds."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from s3prl_metaperser.errors import MetaPerSERError

GIVEN_ANEW = ("config", "init_ckpt", "auto_resume")
"""Arguments of a command that ``-a`` repeats as it was, and that the checkpoint may hold otherwise."""
NOT_SET = object()
"""Stands for the value of a key that is not there."""
SHOWN = 80
"""Characters of a value that are shown."""


def check_unheard(
    actions: Iterable[argparse.Action],
    given: Mapping[str, Any],
    saved: Mapping[str, Any],
    by_hand: Collection[str],
    checkpoint: Path,
) -> None:
    """Refuse flags beside ``-e`` that s3prl replaces by what the checkpoint holds, without a word.

    Args:
        actions: of s3prl's parser.
        given: the arguments that stand on the command line, without defaults.
        saved: the checkpoint's arguments, as far as they replace those given.
        by_hand: names of arguments that ``-o`` sets after that.
        checkpoint: that is resumed from.

    Raises:
        MetaPerSERError: naming the first flag whose value is another than the checkpoint's.
    """
    for action in actions:
        heard = action.dest not in given or action.dest not in saved or action.dest in (*GIVEN_ANEW, *by_hand)
        if heard or given[action.dest] == saved[action.dest]:
            continue
        flag, value = min(action.option_strings, key=len), given[action.dest]
        raise MetaPerSERError(
            f"{flag} {value} beside a checkpoint to go on from: {checkpoint} was made with {saved[action.dest]!r}, and "
            f's3prl keeps to that; leave {flag} out, or give -o "args.{action.dest}={value!r}"'
        )


def check_config_unheard(given: Mapping[str, Any], config: Mapping[str, Any], name: str, checkpoint: Path) -> None:
    """Refuse a config beside ``-e`` or ``-a`` that says something else than the checkpoint's, to which s3prl keeps.

    Args:
        given: what the file of ``-c`` holds, and what ``-o`` changes in it.
        config: what the checkpoint holds, and what ``-o`` changes in that.
        name: of the file, as it was given.
        checkpoint: that is resumed from.

    Raises:
        MetaPerSERError: naming the first key whose values differ.
    """
    found = _first_difference(given, config)
    if found is None:
        return
    key, wanted, kept = found
    by_hand = "" if wanted is NOT_SET or len(repr(wanted)) > SHOWN else f', or give -o "config.{key}={wanted!r}"'
    raise MetaPerSERError(
        f"-c {name} beside a checkpoint to go on from: its key {key!r} {_shown(wanted)}, but {checkpoint} was made "
        f"where it {_shown(kept)}, and s3prl keeps to that; leave -c out{by_hand}; to train anew by it, give another "
        "folder"
    )


def check_optimization_kept(given: Mapping[str, Any], saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to train on with other settings of optimizer or schedule, which their states in the checkpoint replace.

    Args:
        given: the config, with what ``-o`` changes in it.
        saved: what the checkpoint holds.
        checkpoint: that is resumed from.

    Raises:
        MetaPerSERError: naming the first key whose values differ.
    """
    for section in ("optimizer", "scheduler"):
        found = _first_difference(given.get(section) or NOT_SET, saved.get(section) or NOT_SET, (section,))
        if found is not None:
            key, wanted, kept = found
            raise MetaPerSERError(
                f"config key {key!r} {_shown(wanted)}, but {checkpoint} was trained where it {_shown(kept)}, and s3prl "
                f"brings that back with the {section}'s state; leave it so, or train anew in another folder, for which "
                "downstream_expert.init_from takes the weights"
            )


def _first_difference(first: Any, second: Any, names: tuple[str, ...] = ()) -> tuple[str, Any, Any] | None:
    """Give the dotted key and both values, in the order of the first; None where all are equal."""
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return None if first == second else (".".join(names), first, second)
    pairs = ((name, first.get(name, NOT_SET), second.get(name, NOT_SET)) for name in {**first, **second})
    found = (_first_difference(one, other, (*names, str(name))) for name, one, other in pairs)
    return next((difference for difference in found if difference is not None), None)


def _shown(value: Any) -> str:
    return "is not set" if value is NOT_SET else f"is {value!r:.{SHOWN}}"
