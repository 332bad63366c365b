"""Checking the folder that s3prl's runner is to write into."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from s3prl_metaperser.errors import MetaPerSERError


def named_folder(name: str) -> str:
    """Give the folder that s3prl writes to where ``-n`` is all that names one."""
    return f"result/downstream/{name}"


def experiment_folder(args: argparse.Namespace) -> Path:
    """Give s3prl's expdir.

    Raises:
        MetaPerSERError: when it is named by empty text, such as a variable of the shell that is not set.
    """
    for flag, value in (("-p", args.expdir), ("-n", args.expname if args.expdir is None else None)):
        if value == "":
            raise MetaPerSERError(f"{flag} is empty; expected the name of a folder for the experiment")
    return Path(named_folder(args.expname) if args.expdir is None else args.expdir)


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
