"""Reading s3prl's checkpoints safely, and knowing whether one fits the run at hand."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from s3prl_metaperser.errors import MetaPerSERError

DOWNSTREAM = "Downstream"
FEATURIZER = "Featurizer"


@dataclass(frozen=True)
class Contract:
    """What a checkpoint's weights only make sense with.

    Attributes:
        emotions: the classes, in order.
        upstream: s3prl's name (``-u``).
        upstream_dim: its feature dimension.
        pooling: ``mean`` or ``mean_std``.
        projector_dim: width between the two linear layers.
        standardize: whether features are standardised.
    """

    emotions: list[str]
    upstream: str
    upstream_dim: int
    pooling: str
    projector_dim: int
    standardize: bool

    def check(self, found: dict[str, Any], source: str) -> None:
        """Compare with the contract found in a checkpoint.

        Raises:
            MetaPerSERError: naming the first thing that differs.
        """
        own = asdict(self)
        for name, value in own.items():
            if found.get(name) != value:
                raise MetaPerSERError(
                    f"{source} was made with {name} {_shown(found.get(name))}, this run has {_shown(value)}; "
                    f"use a checkpoint of the same {name}, or set up the run like the checkpoint's"
                )


def _shown(value: object) -> str:
    return ", ".join(value) if isinstance(value, Sequence) and not isinstance(value, str) else repr(value)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load an s3prl checkpoint onto the CPU with torch's safe loader.

    Raises:
        MetaPerSERError: when there is no such file, or it is not a whole s3prl checkpoint of this downstream.
    """
    if not path.is_file():
        raise MetaPerSERError(f"checkpoint {path} does not exist; expected a file such as RUN/dev-best.ckpt")
    # s3prl keeps its command line in the checkpoint as a Namespace.
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError):
        raise MetaPerSERError(
            f"checkpoint {path} is not a readable torch file (truncated?); train it again or use an older one"
        ) from None
    state = checkpoint.get(DOWNSTREAM) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or "_extra_state" not in state:
        raise MetaPerSERError(f"checkpoint {path} was not made by -d metaperser: it has no listener model in it")
    return checkpoint
