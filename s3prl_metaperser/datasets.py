"""What the runner's dataloaders yield: one item is one runner batch, ``(wavs, batch)``.

The runner sends ``wavs`` through upstream and featurizer before it calls the expert. With a frozen upstream that
forward is not needed: ``wavs`` is one short silent clip, and ``batch`` names the utterances that the expert looks up.
Every training item depends on (seed, its index) only; a resumed run starts at the next index and goes on as if it had
never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from s3prl_metaperser.distributed import ALONE, Share
from s3prl_metaperser.episodes import (
    Annotations,
    Episode,
    Examples,
    Split,
    draw_training_episode,
    generator,
    tasks_of_step,
)
from s3prl_metaperser.settings import Settings

Batch: TypeAlias = "Examples | Annotations | list[Episode]"
Item: TypeAlias = "tuple[list[Tensor], Batch]"
Labelled = TypeVar("Labelled", Examples, Annotations)

SILENT_SAMPLES = 8000
"""Half a second: longer than any upstream's receptive field, and cheap."""
MOST_TASKS_PER_BATCH = 16
EPISODES_PER_BATCH = 64
"""Evaluation episodes that adapt side by side."""


def silent_clip() -> list[Tensor]:
    """Give the clip that the runner sees: (samples,) zeros."""
    return [torch.zeros(SILENT_SAMPLES)]


class Minibatches(Dataset[Item], Generic[Labelled]):
    """Minibatches in an order of each epoch's own; an incomplete last batch is left out.

    Args:
        labelled: what is dealt into batches.
        size: of a batch.
        key: names the order, beside the seed.
        seed: of the order.
        first: index of the first batch, for a resumed run.
        last: index after the last one.
        share: of this process.
    """

    def __init__(
        self, labelled: Labelled, size: int, key: str, seed: int, first: int, last: int, share: Share = ALONE
    ) -> None:
        self.labelled: Labelled = labelled
        self.size = min(size, len(labelled))
        self.per_epoch = len(labelled) // self.size
        self.key, self.seed, self.first, self.last, self.share = key, seed, first, last, share
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __getitem__(self, index: int) -> Item:
        epoch, place = divmod(self.share.position(self.first + index), self.per_epoch)
        rows = self._order_of(epoch)[place * self.size : (place + 1) * self.size]
        return silent_clip(), self.labelled.take(rows)

    def _order_of(self, epoch: int) -> np.ndarray:
        """Give an epoch's order; the last one is kept, since a million labels take longer to shuffle than a step."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = generator(self.seed, self.key, epoch).permutation(len(self.labelled))
        return self._order


class AggregatedBatches(Minibatches[Examples]):
    """SSL-E's minibatches: utterances with aggregated labels.

    Args:
        split: gives the labels.
        settings: gives the batch size.
        seed: of the order.
        first: index of the first batch, for a resumed run.
        last: index after the last one.
        share: of this process.
    """

    def __init__(
        self, split: Split, settings: Settings, seed: int, first: int, last: int, share: Share = ALONE
    ) -> None:
        super().__init__(split.aggregated, settings.ssl.batch_size, "aggregated", seed, first, last, share)


class AnnotationBatches(Minibatches[Annotations]):
    """Multi-Few's minibatches: single annotations, each of the annotator who made it.

    Args: as for :class:`AggregatedBatches`.
    """

    def __init__(
        self, split: Split, settings: Settings, seed: int, first: int, last: int, share: Share = ALONE
    ) -> None:
        super().__init__(split.annotations(), settings.multi_task.batch_size, "annotations", seed, first, last, share)


class TrainingEpisodes(Dataset[Item]):
    """Meta-training's batches: one episode of each of some training annotators.

    Args: as for :class:`AggregatedBatches`.
    """

    def __init__(
        self, split: Split, settings: Settings, seed: int, first: int, last: int, share: Share = ALONE
    ) -> None:
        self.tasks = split.train
        self.shots = settings.episodes.shots
        self.meta = settings.meta
        self.per_batch = settings.meta.tasks_per_batch or (1 if settings.scope == "entire" else MOST_TASKS_PER_BATCH)
        self.seed, self.first, self.last, self.share = seed, first, last, share

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __getitem__(self, index: int) -> Item:
        step = self.share.position(self.first + index)
        queries = self.meta.queries or self.shots
        episodes = [
            draw_training_episode(task, self.shots, queries, self.meta.query, self.seed, step)
            for task in tasks_of_step(self.tasks, self.per_batch, self.seed, step)
        ]
        return silent_clip(), episodes


def side_by_side(episodes: Sequence[Episode]) -> list[list[Episode]]:
    """Deal meta-test episodes into the batches that adapt side by side, in order."""
    return [list(episodes[begin : begin + EPISODES_PER_BATCH]) for begin in range(0, len(episodes), EPISODES_PER_BATCH)]


class EvaluationEpisodes(Dataset[Item]):
    """Meta-test episodes, some to a batch so that they adapt side by side."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self.batches = side_by_side(episodes)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Item:
        return silent_clip(), self.batches[index]


def _as_it_is(item: Any) -> Any:
    return item


def loader(dataset: Dataset[Item]) -> DataLoader[Any]:
    """Wrap a dataset whose items are whole batches, in order; no workers, since an item is index arithmetic."""
    return DataLoader(dataset, batch_size=None, shuffle=False, num_workers=0, collate_fn=_as_it_is)
