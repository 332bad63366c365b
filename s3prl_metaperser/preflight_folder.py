"""Checking the folder that s3prl's runner is to write into, and what a resumed run is told beside its checkpoint."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from s3prl_metaperser.errors import MetaPerSERError

GIVEN_ANEW = ("config", "init_ckpt", "auto_resume")
"""Arguments of a command that ``-a`` repeats as it was, and that the checkpoint may hold otherwise."""


def experiment_folder(args: argparse.Namespace) -> Path:
    """Give s3prl's expdir.

    Raises:
        MetaPerSERError: when it is named by empty text, such as a variable of the shell that is not set.
    """
    for flag, value in (("-p", args.expdir), ("-n", args.expname if args.expdir is None else None)):
        if value == "":
            raise MetaPerSERError(f"{flag} is empty; expected the name of a folder for the experiment")
    return Path(f"result/downstream/{args.expname}" if args.expdir is None else args.expdir)


def check_experiment_folder(folder: Path) -> None:
    """Refuse what is no folder and cannot become one that may be written.

    Raises:
        MetaPerSERError: naming what is in the way.
    """
    if folder.is_symlink() and not folder.exists():
        raise MetaPerSERError(f"-p {folder}: a link to {os.readlink(folder)}, which is not there")
    if folder.exists() and not folder.is_dir():
        raise MetaPerSERError(f"-p {folder}: a file; expected a folder to write the experiment to")
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise MetaPerSERError(f"-p {folder}: cannot be made or written, because of {existing}")


def check_unheard(
    actions: Iterable[argparse.Action],
    given: argparse.Namespace,
    saved: Mapping[str, Any],
    by_hand: Collection[str],
    checkpoint: Path,
) -> None:
    """Refuse flags beside ``-e`` that s3prl replaces by what the checkpoint holds, without a word.

    Args:
        actions: of s3prl's parser.
        given: the command line as it was parsed.
        saved: the checkpoint's arguments, as far as they replace those given.
        by_hand: names of arguments that ``-o`` sets after that.
        checkpoint: that is resumed from.

    Raises:
        MetaPerSERError: naming the first flag whose value is another than the checkpoint's.
    """
    for action in actions:
        value = getattr(given, action.dest, None)
        passed_over = action.dest not in saved or action.dest in (*GIVEN_ANEW, *by_hand)
        if passed_over or value == action.default or value == saved[action.dest]:
            continue
        flag = min(action.option_strings, key=len)
        raise MetaPerSERError(
            f"{flag} {value} beside a checkpoint to go on from: {checkpoint} was made with {saved[action.dest]!r}, and "
            f's3prl keeps to that; leave {flag} out, or give -o "args.{action.dest}={value!r}"'
        )
