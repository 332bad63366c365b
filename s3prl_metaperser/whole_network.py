"""Scope ``entire``: one listener's clips through upstream, weighted sum and linear layers, as they adapt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from s3prl_metaperser.adaptation.inner_loop import adapt, descend
from s3prl_metaperser.adaptation.problem import Objective, Params, Part
from s3prl_metaperser.adaptation.rates import Rates
from s3prl_metaperser.episodes import Episode, Examples
from s3prl_metaperser.learner import LAYER_WEIGHTS, Learner, MetaLoss, no_dropout
from s3prl_metaperser.model import combine_layers
from s3prl_metaperser.objective import example_losses, smooth_f1_loss
from s3prl_metaperser.prediction import Prediction
from s3prl_metaperser.upstream.features import TrainableFeatures
from s3prl_metaperser.upstream.trainable import PREFIX, Chunk


@dataclass(frozen=True)
class Clips:
    """One task's labelled clips.

    Attributes:
        chunks: the clips, as they go through the upstream.
        targets: (n, classes) label distributions, in the order of the chunks' clips.
    """

    chunks: Sequence[Chunk]
    targets: Tensor

    def of_chunks(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Give each chunk with its clips' targets."""
        return zip(self.chunks, self.targets.split([len(chunk.rows) for chunk in self.chunks]), strict=True)


class WholeNetwork:
    """Learner and upstream as one function of their parameters.

    Args:
        learner: the linear layers, the weighted sum and the inner loop's settings.
        features: the upstream and the clips.
    """

    def __init__(self, learner: Learner, features: TrainableFeatures) -> None:
        self.learner = learner
        self.features = features
        self.upstream = features.upstream

    def clips(self, examples: Examples) -> Clips:
        """Read a task's clips and plan how they go through the upstream."""
        chunks = self.features.chunks(examples.utterances)
        order = [row for chunk in chunks for row in chunk.rows]
        targets = torch.from_numpy(examples.targets[order]).to(self.learner.class_weights.device)
        return Clips(chunks, targets)

    def initialisation(self, names: Collection[str]) -> Params:
        """Give the tensors of these names, as the outer loop has them."""
        own = {**self.learner.initialisation(names), **self.upstream.adapted}
        return {name: own[name] for name in names if name in own}

    def logits(self, chunk: Chunk, params: Params) -> Tensor:
        """Classify a chunk's clips with these parameters in place of the shared ones: (clips, classes)."""
        statistics = self.features.standardised(self.upstream.statistics(chunk, params))
        layer_weights = params.get(LAYER_WEIGHTS, self.learner.layer_weights)
        pooled = combine_layers(statistics, layer_weights, self.learner.layers, self.learner.pooling)
        own = {name: t for name, t in params.items() if name != LAYER_WEIGHTS and not name.startswith(PREFIX)}
        with no_dropout(self.learner.model):
            return functional_call(self.learner.model, own, (pooled,))

    def objective(self, clips: Clips, adapting: Collection[str]) -> Objective:
        """Give the mean class-balanced loss on the clips, chunk by chunk, as a function of the adapting tensors."""
        total = len(clips.targets)

        def part_of(chunk: Chunk, targets: Tensor) -> Part:
            def part(params: Params) -> Tensor:
                return example_losses(self.logits(chunk, params), targets, self.learner.class_weights).sum() / total

            return part

        still = {name: t for name, t in self.learner.shared_tensors().items() if name not in adapting}
        held = [tensor for tensor in (*still.values(), *self.upstream.held) if tensor.requires_grad]
        return Objective([part_of(*own) for own in clips.of_chunks()], held)

    def meta_loss(self, support: Clips, query: Clips, progress: float) -> MetaLoss:
        """Adapt to one task's support and give the loss on its query (paper section 2.3.4).

        Args: as for :meth:`Learner.meta_loss`.
        """
        learner = self.learner
        if learner.rates is None:
            raise ValueError("this learner was made without inner-loop rates")
        names = learner.meta_names
        adapted = adapt(
            self.objective(support, names),
            self.initialisation(names),
            learner.rates,
            learner.inner_steps,
            lambda step: learner.annealing.second_order(step, learner.inner_steps, progress),
            backend="higher" if learner.backend == "higher" else "checkpointed",
        )
        logits = torch.cat([self._rebuilt_logits(chunk, adapted.params, query) for chunk in query.chunks])
        loss = example_losses(logits, query.targets, learner.class_weights).mean()
        if learner.outer_loss == "cross_entropy_f1":
            weights = logits.new_full((1, len(logits)), 1 / len(logits))
            sharpened = learner.sharpened(logits)
            loss = loss + smooth_f1_loss(sharpened.unsqueeze(0), query.targets.unsqueeze(0), weights)
        return MetaLoss(loss, adapted.losses)

    def _rebuilt_logits(self, chunk: Chunk, params: Params, query: Clips) -> Tensor:
        """Classify a chunk, keeping its graph only where it is the query's one chunk; else it is rebuilt going back."""
        if len(query.chunks) == 1:
            return self.logits(chunk, params)
        names = list(params)

        def run(*tensors: Tensor) -> Tensor:
            return self.logits(chunk, dict(zip(names, tensors, strict=True)))

        return checkpoint(run, *params.values(), use_reentrant=False, preserve_rng_state=False)

    def descend(
        self, support: Clips, rates: Rates, steps: int, names: Collection[str]
    ) -> Iterator[tuple[Tensor, Params]]:
        """Adapt to the support at meta-test, step by step; see :func:`inner_loop.descend`."""
        return descend(self.objective(support, names), self.initialisation(names), rates, steps)

    @torch.no_grad()
    def probabilities(self, clips: Clips, params: Params) -> Tensor:
        """Predict each clip's emotions: (n, classes), in the order of the clips that were asked for."""
        logits = torch.cat([self.logits(chunk, params) for chunk in clips.chunks])
        order = torch.tensor([row for chunk in clips.chunks for row in chunk.rows], device=logits.device)
        return self.learner.sharpened(logits).softmax(dim=-1)[order.argsort()]


def adapt_and_predict(
    network: WholeNetwork, episodes: Sequence[Episode], rates: Rates, steps: Sequence[int], names: Collection[str]
) -> dict[int, Prediction]:
    """Adapt to each episode's support in turn, and predict its query after each of some numbers of steps.

    Args:
        network: the shared initialisation.
        episodes: of meta-test.
        rates: of each tensor and step.
        steps: the numbers of steps; adaptation goes on to the largest.
        names: of the tensors that adapt.
    """
    probabilities: dict[int, list[Tensor]] = {number: [] for number in steps}
    curves: list[Tensor] = []
    longest = max(steps)
    with tqdm(total=len(episodes) * longest, desc="adapting", unit="step", leave=False, dynamic_ncols=True) as progress:
        for episode in episodes:
            support, query = network.clips(episode.support), network.clips(episode.query)
            losses: list[Tensor] = []
            for number, (loss, params) in enumerate(network.descend(support, rates, longest, names), start=1):
                losses.append(loss)
                if number in probabilities:
                    probabilities[number].append(network.probabilities(query, params))
                progress.update()
            curves.append(torch.stack(losses))
    mean_curve = torch.stack(curves).mean(dim=0).cpu().numpy()
    return {
        number: Prediction(torch.stack(own).cpu().numpy(), mean_curve[:number]) for number, own in probabilities.items()
    }
