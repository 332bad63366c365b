"""One listener's model as a checkpoint that s3prl's runner takes: whole, or as the difference from its parent.

Of the listener it holds the tensors that adaptation moved, and nothing else: no labels, no clips, no names of files. In
its small form the rest is the parent's, the checkpoint that was adapted, which is found again by its path and known by
its fingerprint. Its arguments are kept in a type that torch's safe loader takes as it is, so that the stock
``python -m s3prl.run_downstream -e`` reads it too.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from s3prl_metaperser import torch_files
from s3prl_metaperser.checkpoints import (
    CHANGED_UPSTREAM,
    DOWNSTREAM,
    EXTRA_STATE,
    FEATURIZER,
    LEARNER_PREFIX,
    LISTENER,
    PARENT,
    RATES_PREFIX,
    TRAINING,
    UPSTREAM,
    extra_state,
    read_checkpoint,
)
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.fingerprint import fingerprint
from s3prl_metaperser.settings import SECTION

PARTS = (DOWNSTREAM, FEATURIZER, UPSTREAM)
EXPERIMENT = "personal"
"""Begins what s3prl calls a run of it; the file's own name may be a person's."""


def checkpoint_fingerprint(checkpoint: Mapping[str, Any]) -> str:
    """Hash all that a checkpoint's model is: downstream, featurizer and, where it is in it, upstream."""
    parts = {part: checkpoint.get(part) or {} for part in PARTS}
    return fingerprint({f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()})


def model_fingerprint(checkpoint: Mapping[str, Any]) -> str:
    """Hash what :func:`checkpoint_fingerprint` does, but for how far training was and its best score on dev."""
    downstream = checkpoint[DOWNSTREAM]
    learned = {name: tensor for name, tensor in downstream.items() if name.startswith(LEARNER_PREFIX)}
    return checkpoint_fingerprint({**checkpoint, DOWNSTREAM: learned})


def is_personal(checkpoint: Mapping[str, Any]) -> bool:
    """Say whether a checkpoint is one listener's."""
    return bool(checkpoint[DOWNSTREAM][EXTRA_STATE][TRAINING] == LISTENER)


def write_personal(
    path: Path, parent: Path, expected: str, changes: Mapping[str, Mapping[str, Tensor]], standalone: bool
) -> None:
    """Write one listener's checkpoint.

    Args:
        path: of the file to be made or replaced.
        parent: the checkpoint that was adapted.
        expected: the parent's fingerprint when it was.
        changes: part of the checkpoint → state name → adapted tensor.
        standalone: whether to copy all the rest from the parent.

    Raises:
        MetaPerSERError: when the parent is gone or has changed meanwhile, or the file cannot be written.
    """
    given = read_checkpoint(parent)
    if checkpoint_fingerprint(given) != expected:
        raise MetaPerSERError(
            f"checkpoint {parent} has changed since it was adapted; adapt it again, or copy it before you train on"
        )
    moved = {part: {name: tensor.detach().cpu() for name, tensor in own.items()} for part, own in changes.items()}
    extra = {**given[DOWNSTREAM][EXTRA_STATE], TRAINING: LISTENER}
    whole = {part: _changed(given[part], moved.get(part, {})) for part in PARTS if given.get(part)}
    if standalone:
        parts = whole
    else:
        extra[PARENT] = {
            "fingerprint": expected,
            # Not where it is on this machine, which would name its owner's home.
            "places": [os.path.relpath(parent.resolve(), path.resolve().parent), parent.name],
        }
        # The featurizer is a handful of numbers, and s3prl loads it without asking us.
        parts = {DOWNSTREAM: moved.get(DOWNSTREAM, {}), FEATURIZER: whole.get(FEATURIZER, {})}
        if UPSTREAM in moved:
            parts[CHANGED_UPSTREAM] = moved[UPSTREAM]
    downstream = {name: value for name, value in parts[DOWNSTREAM].items() if not name.startswith(RATES_PREFIX)}
    content = {
        **parts,
        DOWNSTREAM: {**downstream, EXTRA_STATE: extra},
        "Args": _arguments(given, moved),
        "Config": _config(given),
    }
    try:
        torch_files.save(content, path)
    except OSError as error:
        raise MetaPerSERError(f"{path}: cannot be written ({error.strerror})") from None


def _changed(state: Mapping[str, Any], changes: Mapping[str, Tensor]) -> dict[str, Any]:
    unknown = changes.keys() - state.keys()
    if unknown:
        raise KeyError(f"the parent has no tensors {sorted(unknown)}")
    # Cloned: what torch mapped from the parent's file would otherwise be saved with all that shares its storage.
    return {
        name: changes.get(name, value.clone() if isinstance(value, Tensor) else value) for name, value in state.items()
    }


def _arguments(parent: Mapping[str, Any], moved: Mapping[str, Mapping[str, Tensor]]) -> OrderedDict[str, Any]:
    """Give the parent's command line for a run that listens or judges, in a folder of this listener's own."""
    arguments: OrderedDict[str, Any] = OrderedDict()
    name = f"{EXPERIMENT}-{checkpoint_fingerprint(moved)[:8]}"
    own = {"mode": "inference", "expname": name, "expdir": f"result/downstream/{name}", "init_ckpt": None}
    vars(arguments).update({**vars(parent["Args"]), **own})
    return arguments


def _config(parent: Mapping[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(dict(parent["Config"]))
    config[SECTION] = {**config[SECTION], "system": "personal", "init_from": None}
    return config


def completed(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """Fill in what a small personal checkpoint leaves to its parent; any other is given as it is.

    The checkpoint, which anyone may have written, says where its parent is: that may be anywhere. What is there is read
    with torch's safe loader, and used only if its weights have the fingerprint that the checkpoint names, which whoever
    wrote that must have known already.

    Args:
        checkpoint: as :func:`read_checkpoint` gives it.
        path: of its file, from which its parent is looked for.

    Returns:
        A checkpoint with its whole downstream and, where the parent has one, upstream.

    Raises:
        MetaPerSERError: when the parent is not found, or is not what it was.
    """
    about = extra_state(checkpoint[DOWNSTREAM], f"checkpoint {path}").get(PARENT)
    if about is None:
        return checkpoint
    parent = _parent(about["places"], about["fingerprint"], path)
    whole = {**parent[DOWNSTREAM], **checkpoint[DOWNSTREAM]}
    own = {name: value for name, value in whole.items() if not name.startswith(RATES_PREFIX)}
    filled = {**checkpoint, DOWNSTREAM: own}
    if parent.get(UPSTREAM):
        filled[UPSTREAM] = {**parent[UPSTREAM], **checkpoint.get(CHANGED_UPSTREAM, {})}
    return filled


def _parent(places: list[str], expected: str, path: Path) -> dict[str, Any]:
    """Look for the parent where it was, seen from the checkpoint's folder, and beside the checkpoint.

    What another training has put in one of these places is passed over where the parent is in the other.
    """
    candidates = list(dict.fromkeys(path.resolve().parent / place for place in places))
    faults = []
    for candidate in filter(Path.is_file, candidates):
        try:
            parent = read_checkpoint(candidate)
        except MetaPerSERError as error:
            faults.append(error)
            continue
        if checkpoint_fingerprint(parent) == expected:
            return parent
        faults.append(
            MetaPerSERError(
                f"checkpoint {path} is the difference from {candidate}, which has other weights by now; put the "
                "checkpoint that was adapted back there, or adapt again (--standalone needs no parent)"
            )
        )
    if faults:
        raise faults[0]
    raise MetaPerSERError(
        f"checkpoint {path} is the difference from its parent {candidates[0]}, which is not there; put a copy of it "
        f"beside {path} as {candidates[-1].name}, or make the checkpoint again with --standalone"
    )
