"""Meta-test: 10 episodes of K = 32 adapt 50 steps side by side, and one after the other.

13 × 768 pooled features, projector 256, 9 emotions, learned rates. One after the other is, for the target, the way a
training script has it: a copy of the model a listener, ``torch.optim.SGD`` with a rate a tensor, 50 times loss,
backward pass and step. Beside it, without a target: this package's own formulas with one episode at a time, and the
reference (torch's differentiation of the objective) side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from frozen.inner_loop import CLASSES, CLIPS, DIM, LAYERS, PROJECTOR, RATE, STEPS, Network
from frozen.measuring import Line, Options, Ratio, side_by_side
from s3prl_metaperser.adaptation.rates import Rates
from s3prl_metaperser.batches import TaskBatch
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.objective import example_losses
from s3prl_metaperser.settings import Scope, read_settings

EPISODES, ADAPTATION_STEPS, TARGET = 10, 50, 5
BATCH, PLAIN, OWN, REFERENCE = "side by side", "one after the other", "ours, one after the other", "reference"
ALIKE = 1e-3
"""Largest difference of two float32 probabilities after 50 steps."""


class Subject:
    """A learner with random weights and episodes.

    Args:
        scope: what adapts.
        backend: ``higher`` for the reference.
    """

    def __init__(self, scope: Scope, backend: str | None) -> None:
        torch.manual_seed(0)
        meta = {"inner_steps": STEPS, "inner_lr": RATE, "backend": backend}
        section = {"corpus": "none", "scope": scope, "model": {"projector_dim": PROJECTOR}, "meta": meta}
        self.learner = Learner(read_settings(section), DIM, torch.rand(CLASSES) + 0.5)
        self.learner.bind_layer_weights(nn.Parameter(torch.randn(LAYERS)), LAYERS)
        targets = torch.rand(EPISODES, CLIPS, CLASSES) ** 4
        targets /= targets.sum(-1, keepdim=True)
        weights = torch.full((EPISODES, CLIPS), 1 / CLIPS)
        statistics = torch.randn(LAYERS, EPISODES, CLIPS, DIM).movedim(0, 2)
        self.support = TaskBatch(statistics, targets, weights)
        self.clip_by_clip = statistics.contiguous()
        self.queries = torch.randn(LAYERS, EPISODES, CLIPS, DIM).movedim(0, 2)

    @property
    def rates(self) -> Rates:
        """The learned rates."""
        assert self.learner.rates is not None
        return self.learner.rates

    def together(self) -> Tensor:
        """Adapt all episodes side by side, and predict."""
        adapted = self.learner.adapt_to(self.support, self.rates, ADAPTATION_STEPS)
        return self.learner.probabilities(self.queries, adapted.params)

    def one_by_one(self) -> Tensor:
        """Adapt one episode after the other, and predict."""
        given = self.support.statistics, self.support.targets, self.support.weights
        predictions = []
        for episode in range(EPISODES):
            own = TaskBatch(*(tensor[episode : episode + 1] for tensor in given))
            adapted = self.learner.adapt_to(own, self.rates, ADAPTATION_STEPS)
            predictions.append(self.learner.probabilities(self.queries[episode : episode + 1], adapted.params))
        return torch.cat(predictions)

    def plainly(self) -> Tensor:
        """Fine-tune a copy of the model on each episode with torch's own optimizer, and predict."""
        predictions = []
        for episode in range(EPISODES):
            network = copy.deepcopy(Network(self.learner))
            inputs, queried = self.clip_by_clip[episode], self.queries[episode]
            if self.learner.scope == "head":
                with torch.no_grad():
                    weights = self.learner.layer_weights.softmax(dim=-1)
                    inputs, queried = weights @ inputs, weights @ queried
            names = [name.removeprefix("model.") for name, _ in network.named_parameters()]
            optimizer = torch.optim.SGD([{"params": [tensor]} for tensor in network.parameters()], lr=RATE)
            targets = self.support.targets[episode]
            for step in range(ADAPTATION_STEPS):
                for group, rate in zip(optimizer.param_groups, self.rates.at(step, names), strict=True):
                    group["lr"] = rate.item()
                optimizer.zero_grad()
                example_losses(network(inputs), targets, self.learner.class_weights).mean().backward()
                optimizer.step()
            with torch.no_grad():
                predictions.append(network(queried).softmax(dim=-1))
        return torch.stack(predictions)


def measure(options: Options) -> Iterator[Line]:
    """Measure both scopes."""
    for scope in ("head", "linear"):
        ours, reference = Subject(scope, None), Subject(scope, "higher")
        programs: dict[str, Callable[[], Tensor]] = {
            BATCH: ours.together,
            PLAIN: ours.plainly,
            OWN: ours.one_by_one,
            REFERENCE: reference.together,
        }
        expected = ours.together()
        for name, program in programs.items():
            difference = float((program() - expected).abs().max())
            if difference > ALIKE:
                raise AssertionError(f"{name} predicts otherwise, by {difference:.1e}")
        seconds = side_by_side(programs, options.rounds, settling=1)
        ratios = {name: Ratio.of(taken, seconds[BATCH]) for name, taken in seconds.items() if name != BATCH}
        own = sorted(seconds[BATCH])[len(seconds[BATCH]) // 2]
        yield Line(
            f"meta-test of {EPISODES} episodes × {ADAPTATION_STEPS} steps, scope {scope}: {PLAIN} / {BATCH}",
            f"≥ {TARGET}",
            str(ratios[PLAIN]),
            ratios[PLAIN].median >= TARGET,
            f"{BATCH} {own * 1e3:.0f} ms; {OWN} {ratios[OWN]}; {REFERENCE}, {BATCH}, {ratios[REFERENCE]}",
        )
