"""The inner loop alone: one meta-batch's loss and its backward pass, ours beside what other libraries make of it.

9 tasks, K = 32 support and 32 query clips of 13 × 768 pooled features, projector 256, 9 emotions, 5 inner steps of
second order with learned rates (LSLR). Each program gets the same tensors and gives the same gradients (checked first,
where its rates can be ours), written as its own examples write it: tasks one after the other.

- higher: ``innerloop_ctx`` a task, one parameter group a tensor, rates overridden by the learned ones;
- learn2learn: ``MAML(...).clone()`` a task, ``adapt`` a step; it has one rate for all;
- TorchOpt: ``MetaSGD`` a task, the network's state put back after it; it has one rate for all;
- torch.func: ``grad`` and ``functional_call`` in a loop over tasks and steps.

Beside them, without a target of their own: the same torch.func program under ``vmap`` over the tasks, and this
package's backend ``higher``, which does the same through higher's optimizer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import higher
import torch
from torch import Tensor, nn

from frozen.measuring import Line, Options, Ratio, side_by_side
from s3prl_metaperser.batches import TaskBatch
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.objective import example_losses
from s3prl_metaperser.settings import Scope, read_settings

TASKS, CLIPS, LAYERS, DIM, PROJECTOR, CLASSES, STEPS, RATE = 9, 32, 13, 768, 256, 9, 5, 0.05
TARGETS: dict[Scope, float] = {"head": 8, "linear": 3}
OURS = "ours"
ALIKE = 1e-4
"""Relative difference of two float32 gradients that are the same: that of the weighted sum is a small difference of
large sums. The tests compare in float64, to 1e-10."""

MetaStep = Callable[[], list[Tensor]]
"""Gives the gradients of weighted sum, projector and classifier."""


class Network(nn.Module):
    """The downstream model as other libraries adapt it: statistics of layers, or their weighted sum, to logits."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        if learner.scope == "linear":
            self.layer_weights = learner.layer_weights
        self.model = learner.model

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, layers, dim) statistics, or (n, dim) in scope ``head``, to (n, classes) logits."""
        if hasattr(self, "layer_weights"):
            inputs = self.layer_weights.softmax(dim=-1) @ inputs
        logits: Tensor = self.model(inputs)
        return logits


class Subject:
    """A learner with random weights and the tasks that all programs get.

    Args:
        scope: what adapts.
        backend: of the meta-gradient.
    """

    def __init__(self, scope: Scope, backend: str) -> None:
        torch.manual_seed(0)
        section = {
            "corpus": "none",
            "scope": scope,
            "model": {"projector_dim": PROJECTOR},
            "meta": {"inner_steps": STEPS, "annealing": None, "inner_lr": RATE, "backend": backend},
        }
        self.learner = Learner(read_settings(section), DIM, torch.rand(CLASSES) + 0.5)
        self.learner.bind_layer_weights(nn.Parameter(torch.randn(LAYERS)), LAYERS)
        self.network = Network(self.learner)
        self.support, self.query = self._batch(), self._batch()
        self._clip_by_clip = [batch.statistics.contiguous() for batch in (self.support, self.query)]
        layer_weights = self.learner.layer_weights
        assert layer_weights is not None
        self.shared = [layer_weights, *self.learner.model.parameters()]
        self.learned = [*self.shared, *self.learner.rates.parameters()] if self.learner.rates else self.shared

    def _batch(self) -> TaskBatch:
        targets = torch.rand(TASKS, CLIPS, CLASSES) ** 4
        targets /= targets.sum(-1, keepdim=True)
        # In memory layer by layer, as the feature table gives them; the others get them clip by clip.
        statistics = torch.randn(LAYERS, TASKS, CLIPS, DIM).movedim(0, 2)
        return TaskBatch(statistics, targets, torch.full((TASKS, CLIPS), 1 / CLIPS))

    def own(self) -> list[Tensor]:
        """Take this package's meta-step."""
        return list(torch.autograd.grad(self.learner.meta_loss(self.support, self.query, 0.0).loss, self.learned))

    def inputs(self) -> tuple[Tensor, ...]:
        """Give the other programs' input, support and query; what does not adapt in scope ``head`` is pooled once."""
        if self.learner.scope == "linear":
            return tuple(self._clip_by_clip)
        return tuple(self.shared[0].softmax(dim=-1) @ statistics for statistics in self._clip_by_clip)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Give one task's loss."""
        return example_losses(logits, targets, self.learner.class_weights).mean()

    def gradients(self, loss: Tensor, learned: list[Tensor]) -> list[Tensor]:
        """Differentiate the outer loss."""
        return list(torch.autograd.grad(loss, learned))

    def tasks(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Give each task's support inputs, support targets, query inputs and query targets."""
        support, query = self.inputs()
        yield from zip(support, self.support.targets, query, self.query.targets, strict=True)


def with_higher(subject: Subject) -> MetaStep:
    """As in higher's examples (``maml-omniglot.py``), with learned rates by ``override``."""
    network = subject.network
    rates = subject.learner.rates
    names = [name.removeprefix("model.") for name, _ in network.named_parameters()]

    def step() -> list[Tensor]:
        total = torch.zeros(())
        for inputs, targets, queried, query_targets in subject.tasks():
            optimizer = torch.optim.SGD([{"params": [tensor], "lr": RATE} for tensor in network.parameters()], lr=RATE)
            with higher.innerloop_ctx(network, optimizer, copy_initial_weights=False) as (functional, differentiable):
                for number in range(STEPS):
                    loss = subject.loss(functional(inputs), targets)
                    differentiable.step(loss, override={"lr": rates.at(number, names)})
                total = total + subject.loss(functional(queried), query_targets)
        return subject.gradients(total / TASKS, subject.learned)

    return step


def with_learn2learn(subject: Subject) -> MetaStep:
    """As in learn2learn's examples (``maml_omniglot.py``)."""
    from learn2learn.algorithms import MAML  # type: ignore[import-not-found]

    maml = MAML(subject.network, lr=RATE)

    def step() -> list[Tensor]:
        total = torch.zeros(())
        for inputs, targets, queried, query_targets in subject.tasks():
            learner = maml.clone()
            for _ in range(STEPS):
                learner.adapt(subject.loss(learner(inputs), targets))
            total = total + subject.loss(learner(queried), query_targets)
        return subject.gradients(total / TASKS, subject.shared)

    return step


def with_torchopt(subject: Subject) -> MetaStep:
    """As in TorchOpt's examples (``few-shot/maml_omniglot.py``)."""
    import torchopt  # type: ignore[import-not-found]

    network = subject.network

    def step() -> list[Tensor]:
        total = torch.zeros(())
        optimizer = torchopt.MetaSGD(network, lr=RATE)
        initial = torchopt.extract_state_dict(network, by="reference")
        initial_optimizer = torchopt.extract_state_dict(optimizer, by="reference")
        for inputs, targets, queried, query_targets in subject.tasks():
            for _ in range(STEPS):
                optimizer.step(subject.loss(network(inputs), targets))
            total = total + subject.loss(network(queried), query_targets)
            torchopt.recover_state_dict(network, initial)
            torchopt.recover_state_dict(optimizer, initial_optimizer)
        return subject.gradients(total / TASKS, subject.shared)

    return step


def with_torch_func(subject: Subject, vectorised: bool) -> MetaStep:
    """``grad`` of ``functional_call``; over tasks in a loop, or by ``vmap``."""
    network, rates = subject.network, subject.learner.rates
    initial = dict(network.named_parameters())
    names = [name.removeprefix("model.") for name in initial]

    def support_loss(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return subject.loss(torch.func.functional_call(network, params, inputs), targets)

    def query_loss(inputs: Tensor, targets: Tensor, queried: Tensor, query_targets: Tensor) -> Tensor:
        params = initial
        for number in range(STEPS):
            slopes = torch.func.grad(support_loss)(params, inputs, targets)
            step_rates = zip(params.items(), rates.at(number, names), strict=True)
            params = {name: tensor - rate * slopes[name] for (name, tensor), rate in step_rates}
        return support_loss(params, queried, query_targets)

    def step() -> list[Tensor]:
        if vectorised:
            support, query = subject.inputs()
            given = (support, subject.support.targets, query, subject.query.targets)
            return subject.gradients(torch.func.vmap(query_loss)(*given).mean(), subject.learned)
        total = torch.stack([query_loss(*task) for task in subject.tasks()]).mean()
        return subject.gradients(total, subject.learned)

    return step


def peers(subject: Subject) -> tuple[dict[str, MetaStep], list[str]]:
    """Give the programs that the target names, and the names of those that are not installed."""
    programs: dict[str, MetaStep] = {"higher": with_higher(subject), "torch.func": with_torch_func(subject, False)}
    optional: dict[str, tuple[str, Callable[[Subject], MetaStep]]] = {
        "learn2learn": ("learn2learn", with_learn2learn),
        "TorchOpt": ("torchopt", with_torchopt),
    }
    missing = []
    for name, (module, make) in optional.items():
        if importlib.util.find_spec(module) is None:
            missing.append(name)
        else:
            programs[name] = make(subject)
    return programs, missing


def largest_difference(programs: dict[str, MetaStep]) -> float:
    """Compare gradients, tensor by tensor; all programs start from the same rate for every tensor.

    Raises:
        AssertionError: where one computes something else.
    """
    expected: Any = programs[OURS]()
    largest = 0.0
    for name, program in programs.items():
        given = program()
        # Those with one rate for all give no gradients of rates.
        for own, other in zip(expected[: len(given)], given, strict=True):
            difference = float((own - other).norm() / own.norm())
            if difference > ALIKE:
                raise AssertionError(f"{name}'s gradient differs from ours by {difference:.1e}")
            largest = max(largest, difference)
    return largest


def measure(options: Options) -> Iterator[Line]:
    """Measure both scopes."""
    for scope, target in TARGETS.items():
        fast, reference = Subject(scope, "analytic"), Subject(scope, "higher")
        named, missing = peers(fast)
        programs = {OURS: fast.own, **named}
        programs |= {"torch.func under vmap": with_torch_func(fast, True), "our backend higher": reference.own}
        difference = largest_difference(programs)
        seconds = side_by_side(programs, options.rounds, settling=2)
        ratios = {name: Ratio.of(taken, seconds[OURS]) for name, taken in seconds.items() if name != OURS}
        fastest = min(named, key=lambda name: ratios[name].median)
        own = sorted(seconds[OURS])[len(seconds[OURS]) // 2]
        others = "; ".join(f"{name} {ratio}" for name, ratio in ratios.items() if name != fastest)
        note = f"ours {own * 1e3:.0f} ms; {others}; gradients differ by {difference:.0e} at most"
        if missing:
            note += f"; not installed: {', '.join(missing)}"
        yield Line(
            f"inner loop, scope {scope}: fastest of the four ({fastest}) / ours",
            f"≥ {target:g}",
            str(ratios[fastest]),
            ratios[fastest].median >= target if not missing else None,
            note,
        )
