"""What a training may go on from, or replace, of what it finds in its folder.

Of its states s3prl would take the newest, which a kill or a full disk may have damaged.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s3prl_metaperser import torch_files
from s3prl_metaperser.checkpoints import read_checkpoint
from s3prl_metaperser.differences import first_difference, is_same_argument, shown
from s3prl_metaperser.errors import MetaPerSERError, UnreadableError
from s3prl_metaperser.state_files import states

SET_ASIDE = "damaged-"
"""What the name of a damaged state begins with, once s3prl is not to find it any more."""

OF_A_COMMAND = (
    *("auto_resume", "backend", "cache_dir", "config", "evaluate_split", "expdir", "expname"),
    *("local_rank", "override", "past_exp", "verbose"),
)
"""Arguments that may differ between commands for the same training; what ``-c`` and ``-o`` say is compared itself."""


def newest_sound(found: Sequence[Path]) -> tuple[Path, list[Path]]:
    """Choose the newest of some states whose checksums match, and warn of those that it is chosen before.

    Args:
        found: as :func:`~s3prl_metaperser.state_files.states` gives them; at least one.

    Returns:
        The state, and the damaged ones that are newer.

    Raises:
        UnreadableError: for one that cannot be read, before a sound one was found: it may be sound.
        MetaPerSERError: when all are damaged.
    """
    damaged: list[Path] = []
    reasons: list[str] = []
    for path in found:
        try:
            reason = torch_files.damage(path)
        except UnreadableError as error:
            if error.errno != errno.ENOENT:
                raise
            continue  # another rank of the same training has just set it aside
        if reason is None:
            if damaged:
                print(
                    f"run_downstream: warning: {'; '.join(reasons)}; going on from the one before, {path}",
                    file=sys.stderr,
                )
            return path, damaged
        damaged.append(path)
        reasons.append(f"checkpoint {path} is damaged ({reason})")
    raise MetaPerSERError(
        f"{'; '.join(reasons) or found[0].parent}: no sound checkpoint is left there; train again in another folder"
    )


def set_aside(damaged: Sequence[Path]) -> None:
    """Rename damaged states: s3prl would count them, and delete the last sound one, before it saves the next.

    Raises:
        MetaPerSERError: when the folder cannot be written.
    """
    for path in damaged:
        try:
            path.rename(path.with_name(f"{SET_ASIDE}{path.name}"))
        except FileNotFoundError:
            continue  # another rank of the same training has just done so
        except OSError as error:
            raise MetaPerSERError(f"checkpoint {path} is damaged and cannot be renamed: {error.strerror}") from None


def refuse_used(
    folder: Path | str, resumed_from: Path | str | None = None, begun_anew_by: Mapping[str, Any] | None = None
) -> None:
    """Keep a training from replacing what another has left, file by file.

    Args:
        folder: s3prl's expdir; it need not be there.
        resumed_from: the checkpoint that the training goes on from; None where it begins anew.
        begun_anew_by: with ``-a``, config and arguments in one, as s3prl gives them to the expert: where it has found
            no state, the same command may have been stopped before its first. None without ``-a``.

    Raises:
        MetaPerSERError: when another training has left a checkpoint in it.
    """
    place = Path(folder)
    # A state may be a link to where there is more room, and is then the link's folder's all the same.
    if resumed_from is not None and place.resolve() in (
        Path(resumed_from).parent.resolve(),
        Path(resumed_from).resolve().parent,
    ):
        return
    found = states(place, "-p")
    best = place / "dev-best.ckpt"
    if best.exists() and not found and resumed_from is None and begun_anew_by is not None:
        _refuse_another(best, begun_anew_by)
        return
    if best.exists():
        found.append(best)
    if found:
        by = "-a" if resumed_from is None else f"-e {folder}"
        raise MetaPerSERError(
            f"-p {folder}: holds an earlier training ({found[0].name}); go on with it by {by}, give another "
            "folder, or delete this one"
        )


def _refuse_another(best: Path, command: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another command than this; one that cannot be used any more is nobody's loss."""
    if torch_files.damage(best) is not None:
        return
    checkpoint = read_checkpoint(best)
    saved = {**(checkpoint.get("Config") or {}), **getattr(checkpoint.get("Args"), "__dict__", {})}
    for name in {**saved, **command}:
        wanted, kept = command.get(name), saved.get(name)
        if name in OF_A_COMMAND or is_same_argument(name, wanted, kept):
            continue
        difference = first_difference(wanted, kept, (name,))
        if difference is not None:
            key, wanted, kept = difference
            raise MetaPerSERError(
                f"-p {best.parent}: holds an earlier training ({best.name}) of another command: {key} {shown(kept)} "
                f"there and {shown(wanted)} here; no state is left for -a to go on from, so give another folder, or "
                "delete this one"
            )
