"""What the runner's dataloaders yield: one item is one runner batch, ``(wavs, batch)``.

The runner sends ``wavs`` through upstream and featurizer before it calls the expert. With a frozen upstream that
forward is not needed: ``wavs`` is one short silent clip, and ``batch`` names the utterances that the expert looks up.
Every training item depends on (seed, its index) only; a resumed run starts at the next index and goes on as if it had
never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from s3prl_metaperser.episodes import Episode, Examples, Split, draw_training_episode, generator, tasks_of_step
from s3prl_metaperser.settings import Settings

Batch: TypeAlias = "Examples | list[Episode]"
Item: TypeAlias = "tuple[list[Tensor], Batch]"

SILENT_SAMPLES = 8000
"""Half a second: longer than any upstream's receptive field, and cheap."""
MOST_TASKS_PER_BATCH = 16
EPISODES_PER_BATCH = 64
"""Evaluation episodes that adapt side by side."""


def silent_clip() -> list[Tensor]:
    """Give the clip that the runner sees: (samples,) zeros."""
    return [torch.zeros(SILENT_SAMPLES)]


class AggregatedBatches(Dataset[Item]):
    """SSL-E's minibatches, in an order of each epoch's own; an incomplete last batch is left out.

    Args:
        split: gives the aggregated labels.
        settings: gives the batch size.
        seed: of the order.
        first: index of the first batch, for a resumed run.
        last: index after the last one.
    """

    def __init__(self, split: Split, settings: Settings, seed: int, first: int, last: int) -> None:
        self.examples = split.aggregated
        self.size = min(settings.ssl.batch_size, len(self.examples))
        self.per_epoch = len(self.examples) // self.size
        self.seed, self.first, self.last = seed, first, last

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __getitem__(self, index: int) -> Item:
        epoch, place = divmod(self.first + index, self.per_epoch)
        order = generator(self.seed, "aggregated", epoch).permutation(len(self.examples))
        return silent_clip(), self.examples.take(order[place * self.size : (place + 1) * self.size])


class TrainingEpisodes(Dataset[Item]):
    """Meta-training's batches: one episode of each of some training annotators.

    Args: as for :class:`AggregatedBatches`.
    """

    def __init__(self, split: Split, settings: Settings, seed: int, first: int, last: int) -> None:
        self.tasks = split.train
        self.shots = settings.episodes.shots
        self.meta = settings.meta
        self.seed, self.first, self.last = seed, first, last

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __getitem__(self, index: int) -> Item:
        step = self.first + index
        per_step = self.meta.tasks_per_batch or MOST_TASKS_PER_BATCH
        queries = self.meta.queries or self.shots
        episodes = [
            draw_training_episode(task, self.shots, queries, self.meta.query, self.seed, step)
            for task in tasks_of_step(self.tasks, per_step, self.seed, step)
        ]
        return silent_clip(), episodes


class EvaluationEpisodes(Dataset[Item]):
    """Meta-test episodes, some to a batch so that they adapt side by side."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self.batches = [
            list(episodes[begin : begin + EPISODES_PER_BATCH]) for begin in range(0, len(episodes), EPISODES_PER_BATCH)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Item:
        return silent_clip(), self.batches[index]


def _as_it_is(item: Any) -> Any:
    return item


def loader(dataset: Dataset[Item]) -> DataLoader[Any]:
    """Wrap a dataset whose items are whole batches, in order; no workers, since an item is index arithmetic."""
    return DataLoader(dataset, batch_size=None, shuffle=False, num_workers=0, collate_fn=_as_it_is)
