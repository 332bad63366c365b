"""Checking what is said beside a checkpoint to go on from, which s3prl replaces by what the checkpoint holds."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from s3prl_metaperser.differences import FOLDER, NOT_SET, SHOWN, first_difference, is_same_argument, shown
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.preflight_folder import named_folder

NAME = "expname"
OF_THE_FOLDER = (FOLDER, NAME)
"""Arguments that say where ``-a`` looks for a state."""
GIVEN_ANEW = ("config", "init_ckpt", "auto_resume")
"""Arguments of a command that ``-a`` repeats as it was, and that the checkpoint may hold otherwise."""


def check_unheard(
    actions: Iterable[argparse.Action],
    given: Mapping[str, Any],
    saved: Mapping[str, Any],
    by_hand: Collection[str],
    checkpoint: Path,
    is_found_by_a: bool,
) -> None:
    """Refuse flags beside ``-e`` that s3prl replaces by what the checkpoint holds, without a word.

    Args:
        actions: of s3prl's parser.
        given: the arguments that stand on the command line, without defaults.
        saved: the checkpoint's arguments, as far as they replace those given.
        by_hand: names of arguments that ``-o`` sets after that.
        checkpoint: that is resumed from.
        is_found_by_a: whether it is ``-a`` that has found the checkpoint, in the folder that the flags name.

    Raises:
        MetaPerSERError: naming the first flag whose value is another than the checkpoint's.
    """
    for action in actions:
        heard = action.dest not in given or action.dest not in saved or action.dest in (*GIVEN_ANEW, *by_hand)
        if heard or is_same_argument(action.dest, given[action.dest], saved[action.dest]):
            continue
        if action.dest == NAME and is_same_argument(FOLDER, named_folder(given[NAME]), saved.get(FOLDER)):
            continue  # it names the very folder that the checkpoint's command named by -p
        flag, value = min(action.option_strings, key=len), given[action.dest]
        cure = "" if is_found_by_a and action.dest in OF_THE_FOLDER else f"leave {flag} out, or "
        raise MetaPerSERError(
            f"{flag} {value} beside a checkpoint to go on from: {checkpoint} was made with {saved[action.dest]!r}, and "
            f's3prl keeps to that; {cure}give -o "args.{action.dest}={value!r}"'
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
    found = first_difference(given, config)
    if found is None:
        return
    key, wanted, kept = found
    by_hand = "" if wanted is NOT_SET or len(repr(wanted)) > SHOWN else f', or give -o "config.{key}={wanted!r}"'
    raise MetaPerSERError(
        f"-c {name} beside a checkpoint to go on from: its key {key!r} {shown(wanted)}, but {checkpoint} was made "
        f"where it {shown(kept)}, and s3prl keeps to that; leave -c out{by_hand}; to train anew by it, give another "
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
        found = first_difference(given.get(section) or NOT_SET, saved.get(section) or NOT_SET, (section,))
        if found is not None:
            key, wanted, kept = found
            raise MetaPerSERError(
                f"config key {key!r} {shown(wanted)}, but {checkpoint} was trained where it {shown(kept)}, and s3prl "
                f"brings that back with the {section}'s state; leave it so, or train anew in another folder, for which "
                "downstream_expert.init_from takes the weights"
            )
