"""Checking what several processes, as ``torchrun`` starts them, ask of s3prl's runner: a GPU for each, or nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed import is_torchelastic_launched

from s3prl_metaperser.errors import EXIT_CODE, MetaPerSERError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed takes from the environment to let processes find each other."""
PATIENCE_SECONDS = 60.0
"""How far the first process may be behind; a process that alone has something to say does so after that."""


def check_processes(device: torch.device, local_rank: int) -> None:
    """Refuse processes that s3prl's runner could not give a GPU each.

    All processes of a machine come to the same answer, so that none of them waits for one that has ended.

    Args:
        device: of ``--device``.
        local_rank: this process's number among those of its machine, which is its GPU's too.

    Raises:
        MetaPerSERError: naming the flag, and how to start instead.
    """
    missing = [name for name in NEEDED if name not in os.environ]
    if missing or local_rank < 0:
        raise MetaPerSERError(
            f"--local_rank {local_rank}: only for processes that torchrun has started, which sets "
            f"{', '.join(missing or NEEDED)}; leave it out"
        )
    processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local_rank + 1)
    gpus = torch.cuda.device_count()
    asked = f"torchrun has started {processes} process{'es' if processes > 1 else ''} here"
    if gpus == 0:
        raise MetaPerSERError(
            f"{asked}, for each of which s3prl's runner needs a GPU, and torch finds no CUDA device; start it without "
            "torchrun, with --device cpu"
        )
    if device.type != "cuda":
        raise MetaPerSERError(
            f"--device {device}: {asked}, and s3prl's runner puts each on a GPU of its own; leave --device out, or "
            "start it without torchrun"
        )
    if processes > gpus:
        raise MetaPerSERError(
            f"{asked}, for each of which s3prl's runner needs a GPU, and torch finds {gpus}; start --nproc_per_node "
            f"{gpus} at most"
        )
    if device.index is not None and (processes > 1 or device.index != local_rank):
        raise MetaPerSERError(
            f"--device {device}: {asked}, and s3prl's runner puts each on a GPU of its own; give --device cuda"
        )


def check_as_many_processes(checkpoint: Mapping[str, Any], local_rank: int | None, path: Path) -> None:
    """Refuse to train on with another number of processes than before, which s3prl's runner asserts.

    Args:
        checkpoint: of s3prl's runner.
        local_rank: None: this process is the only one, and not torchrun's.
        path: of the checkpoint.

    Raises:
        MetaPerSERError: naming both numbers.
    """
    before = checkpoint.get("WorldSize", 1) if getattr(checkpoint["Args"], "local_rank", None) is not None else None
    now = int(os.environ.get("WORLD_SIZE", 1)) if local_rank is not None else None
    if now != before:
        raise MetaPerSERError(
            f"-e {path}: was trained {_in_words(before)}, not {_in_words(now)}; s3prl's runner goes on with as many "
            "as before only"
        )


def _in_words(processes: object) -> str:
    if processes is None:
        return "without torchrun"
    return f"by {processes} process{'' if processes == 1 else 'es'} of torchrun"


@contextmanager
def said_once() -> Iterator[None]:
    """Let the first process of this machine say what is wrong with the command line that all of them check.

    Their launcher ends the others with SIGTERM once one has ended; it would end the first just so, unheard, should
    another be quicker. So the others wait for that, and end as the first does.
    """
    try:
        yield
    except MetaPerSERError:
        if is_torchelastic_launched() and os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_CODE))
            time.sleep(PATIENCE_SECONDS)
        raise
