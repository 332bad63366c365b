"""The keys of a config that anyone reads: s3prl's runner passes over all others, and says nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from s3prl_metaperser.errors import MetaPerSERError, suggest
from s3prl_metaperser.settings import SECTION, Settings

RUNNER_KEYS = (
    "total_steps",
    "gradient_clipping",
    "gradient_accumulate_steps",
    "log_step",
    "eval_step",
    "save_step",
    "max_keep",
    "eval_dataloaders",
)
"""What s3prl's ``Runner.train`` reads from ``runner:`` without a default."""
OPTIONAL_RUNNER_KEYS = ("fp16", "evaluate_ratio", "train_dataloader")
"""What s3prl's runner reads from ``runner:`` beside them."""
CONFIG_ROOTS = ("runner", "optimizer", "scheduler", "specaug", SECTION)


def check_keys(config: Mapping[str, Any], earlier: Mapping[str, Any], source: str, by_hand: Collection[str]) -> None:
    """Refuse keys that no one reads, at the top of a config and in ``runner``; other sections are checked when read.

    Args:
        config: the whole of it, as ``-o`` has left it.
        earlier: the config of the checkpoint that is gone on from, whose keys were taken when it was made.
        source: of the config, in errors.
        by_hand: what ``-o`` sets, such as ``config.runner.fp16``.

    Raises:
        MetaPerSERError: naming the first such key, and the one that may have been meant.
    """
    for path, given, before, known in (
        ("", config, earlier, CONFIG_ROOTS),
        ("runner.", config.get("runner"), earlier.get("runner"), (*RUNNER_KEYS, *OPTIONAL_RUNNER_KEYS)),
    ):
        for key in given if isinstance(given, Mapping) else ():
            if key in known or (isinstance(before, Mapping) and key in before):
                continue
            name = f"{path}{key}"
            is_by_hand = any(one == f"config.{name}" or one.startswith(f"config.{name}.") for one in by_hand)
            where = "-o" if is_by_hand else source
            raise MetaPerSERError(f"{where}: config key {name!r:.80} is unknown; {_meant(key, known)}")


def _meant(key: object, known: Collection[str]) -> str:
    """Give the place where a key would be read, or those near it in the place where it is."""
    section: Any = Settings
    settings = [f"{SECTION}.{field.name}" for field in dataclasses.fields(section)]
    read = [*CONFIG_ROOTS, *(f"runner.{name}" for name in RUNNER_KEYS), *settings]
    places = [name for name in read if name.rpartition(".")[2] == key]
    return f"did you mean {places[0]!r}?" if places else suggest(str(key), known)
