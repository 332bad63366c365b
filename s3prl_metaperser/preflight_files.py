"""The files that a command line of s3prl's ``run_downstream`` names: its config and the checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from s3prl_metaperser import configs, torch_files
from s3prl_metaperser.checkpoint_form import command_fault
from s3prl_metaperser.errors import MetaPerSERError, suggest
from s3prl_metaperser.yaml_text import read_yaml

Config = dict[str, Any]


def load_checkpoint(path: Path, flag: str) -> Config:
    """Load a checkpoint of s3prl's runner with torch's safe loader.

    Args:
        path: of the file.
        flag: of the command line, that names it.

    Raises:
        MetaPerSERError: it is missing, damaged, or no checkpoint that s3prl's runner can use.
    """
    if not path.is_file():
        raise MetaPerSERError(
            f"{flag} {path}: no such file; expected a checkpoint, such as states-STEP.ckpt or dev-best.ckpt"
        )
    damage = torch_files.damage(path)
    if damage is not None:
        raise MetaPerSERError(f"{flag} {path}: not readable as a checkpoint ({damage})")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever: torch's unpickler fails in any way on bytes that are not its own
        raise MetaPerSERError(
            f"{flag} {path}: not readable as a checkpoint ({path.stat().st_size} bytes); it may be cut off, or be "
            "something else"
        ) from None
    if not isinstance(checkpoint, dict) or not hasattr(checkpoint.get("Args"), "upstream"):
        raise MetaPerSERError(f"{flag} {path}: not a checkpoint of s3prl's runner, which holds Args and Config")
    if not isinstance(checkpoint.get("Config"), dict):
        raise MetaPerSERError(f"{flag} {path}: its Config is missing; expected a checkpoint of s3prl's runner")
    fault = command_fault(checkpoint["Args"], checkpoint["Config"])
    if fault is not None:
        raise MetaPerSERError(f"{flag} {path}: not written by s3prl's runner: {fault}")
    return checkpoint


def config_path(args: argparse.Namespace) -> Path:
    """Find the config: a file, the name of an installed one, or the one where s3prl looks without ``-c``.

    Raises:
        MetaPerSERError: there is none.
    """
    if args.config is None:
        path = Path(f"./downstream/{args.downstream}/config.yaml")
        if not path.is_file():
            raise MetaPerSERError("no config given: name one with -c, a file or a name of `metaperser config`")
        return path
    path = Path(args.config)
    if path.is_dir():
        raise MetaPerSERError(f"-c {path}: a folder; expected a YAML file")
    if path.is_file():
        return path
    installed = configs.available()
    if path.name != args.config:
        raise MetaPerSERError(f"-c {path}: no such file; `metaperser config` lists the configs that have names")
    named = installed.get(args.config.removesuffix(".yaml"))
    if named is None:
        raise MetaPerSERError(f"-c {path}: no such file, and no config of that name: {suggest(path.stem, installed)}")
    return named


def load_config(path: Path) -> Config:
    """Read a config file, with the safe loader of YAML.

    Raises:
        MetaPerSERError: it is not readable, no YAML, or no mapping.
    """
    try:
        config = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise MetaPerSERError(f"{path}: not valid YAML: {error}") from None
    except OSError as error:
        raise MetaPerSERError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(config, dict):
        raise MetaPerSERError(
            f"{path}: expected keys such as runner, optimizer and downstream_expert, found {config!r:.40}"
        )
    return config
