"""Which share of the work a process has, where s3prl's runner is launched with several (DDP)."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import get_rank, get_world_size, is_initialized


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
