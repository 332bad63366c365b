"""Training with several processes (DDP), as s3prl launches it: who does what, and who waits for whom.

s3prl averages the gradients of all processes, and evaluates, logs and saves on rank 0 alone. Gradients are all that
is exchanged here, and before them how many batches have none: no process waits for one that is doing something else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import (
    ProcessGroup,
    all_reduce,
    get_rank,
    get_world_size,
    is_initialized,
    is_torchelastic_launched,
    new_group,
)
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

LONGEST_WAIT = timedelta(days=1)


@dataclass(frozen=True)
class Share:
    """This process among those that train together.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def position(self, batch: int) -> int:
        """Give the place, among all processes' batches, of this one's batch number ``batch``: dealt out in turn.

        >>> [Share(1, 2).position(batch) for batch in range(3)]
        [1, 3, 5]
        """
        return batch * self.world + self.rank


def own_share() -> Share:
    """Tell this process's share: all of it, unless torch.distributed is initialised."""
    return Share(get_rank(), get_world_size()) if is_initialized() else Share()


ALONE = Share()
"""One process that does it all."""


class Appointment:
    """Where all processes wait for the last of them, which may be hours behind: evaluating, or extracting features.

    Otherwise they would wait for its gradients, and on GPUs whoever waits for more than ten minutes ends the job.
    """

    def __init__(self) -> None:
        self._group: ProcessGroup | None = None

    def total(self, count: int) -> int:
        """Wait until every process has come here as often as this one, and add up their counts; alone, give the own."""
        if not is_initialized():
            return count
        if self._group is None:
            self._group = new_group(backend="gloo", timeout=LONGEST_WAIT)
        counts = torch.tensor(count)
        all_reduce(counts, group=self._group)
        return int(counts)


def keep_buffers_apart(expert: nn.Module) -> None:
    """Let DDP exchange gradients and nothing else, for this expert and the runner's modules before it.

    DDP broadcasts buffers before a pass, and s3prl's evaluation of the last step, on rank 0 alone, would wait for ever
    for others to receive them. Nothing is lost: what buffers hold is the same in every process, or rank 0's own.

    Args:
        expert: the last module of the runner's pass.
    """
    if not is_initialized():
        return

    def before_forward(module: nn.Module, _: Any) -> None:
        if isinstance(module, DistributedDataParallel):
            module.broadcast_buffers = False
            if module.module is expert:
                handle.remove()

    handle = register_module_forward_pre_hook(before_forward)


def nothing_of(features: Sequence[Tensor]) -> Tensor:
    """Give zero, with its graph through the runner's own pass of the silent clip, to be added to a loss.

    DDP waits for a gradient of each tensor that took part in a pass of its modules, and the loss comes from passes that
    DDP does not know of.

    Args:
        features: what the runner's featurizer gave, (frames, dim) of each clip.
    """
    return torch.stack([0.0 * one.sum() for one in features]).sum()


def with_local_rank(arguments: Sequence[str]) -> list[str]:
    """Give a command line its ``--local_rank``, as s3prl's parser knows it, where torch has launched the process.

    s3prl's documentation launches with ``python -m torch.distributed.launch``, which since torch 2.0 writes
    ``--local-rank``, unknown to s3prl (its issue 479); ``torchrun`` leaves the rank to the environment.

    Args:
        arguments: the command line without the program's name.

    >>> with_local_rank(["--local-rank=1", "-m", "train"])
    ['--local_rank=1', '-m', 'train']
    """
    option = "--local_rank"
    known = [one.replace("--local-rank", option, 1) if one.startswith("--local-rank") else one for one in arguments]
    if is_torchelastic_launched() and not any(one.startswith(option) for one in known):
        known.append(f"{option}={os.environ['LOCAL_RANK']}")
    return known
