r"""The inner loop: gradient descent on a listener's support set, at meta-test or to be differentiated through.

Adaptation takes T steps θ_{t+1} = θ_t − α_t ∇L_support(θ_t) from the shared initialisation θ_0 (MAML, Finn et al.
2017; with α_t per tensor and step, LSLR of MAML++). For meta-training the steps stay differentiable with respect to θ_0
and α; steps that derivative annealing keeps to first order treat ∇L as a constant.

Several tasks adapt at once when every parameter has a leading task dimension and the objective is the sum of the tasks'
losses: the gradient of the sum with respect to one task's slice is that task's own gradient.

>>> from s3prl_metaperser.adaptation.rates import FixedRate
>>> theta = torch.tensor([1.0], requires_grad=True)
>>> adapted = adapt(lambda p: (p["theta"] ** 2).sum(), {"theta": theta}, FixedRate(0.25), steps=2)
>>> adapted.params["theta"].item()   # each step halves it
0.25
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Literal

import torch
from torch import Tensor

from s3prl_metaperser.adaptation.checkpointed import checkpoint_steps
from s3prl_metaperser.adaptation.problem import Adapted, Objective, Params, Part, as_objective, check_kept
from s3prl_metaperser.adaptation.rates import Rates
from s3prl_metaperser.adaptation.unrolled import unroll

Backend = Literal["higher", "checkpointed"]
"""How a meta-gradient is made of any objective: by one graph of all steps, or by rebuilding one step's at a time."""


def adapt(
    objective: Objective | Part,
    params: Params,
    rates: Rates,
    steps: int,
    second_order: Callable[[int], bool] | None = None,
    keep: Collection[int] = (),
    backend: Backend = "higher",
) -> Adapted:
    """Adapt parameters by gradient descent on an objective.

    Args:
        objective: the support loss as a function of the parameters.
        params: the initialisation; for meta-training with a graph back to what is meta-learned.
        rates: gives each tensor's rate at each step.
        steps: how many steps to take.
        second_order: for meta-training, tells for each step whether the gradient's own graph is kept. None is
            adaptation at test time: nothing stays differentiable, and memory does not grow with the steps.
        keep: at test time, after how many steps, each from 1 to ``steps``, the parameters are given too.
        backend: for meta-training; both give the same gradient.

    Returns:
        The adapted parameters and the losses on the way. A loss that is not finite is the caller's to judge.

    Raises:
        ValueError: when parameters are to be kept that no step gives.
    """
    check_kept(keep, steps)
    objective = as_objective(objective)
    if second_order is not None:
        differentiable = unroll if backend == "higher" else checkpoint_steps
        return differentiable(objective, params, rates, steps, second_order)
    losses: list[Tensor] = []
    kept: dict[int, Params] = {}
    for number, (loss, current) in enumerate(descend(objective, params, rates, steps), start=1):
        losses.append(loss)
        if number in keep:
            kept[number] = current
    return Adapted(current, torch.stack(losses), kept)


@torch.no_grad()
def descend(objective: Objective | Part, params: Params, rates: Rates, steps: int) -> Iterator[tuple[Tensor, Params]]:
    """Take the steps of adaptation at test time, one as it is asked for.

    Args: as for :func:`adapt`.

    Yields:
        After each step, the loss before it and the parameters after it; nothing stays differentiable, and nothing of
        earlier steps stays in memory.
    """
    objective = as_objective(objective)
    names = list(params)
    current = dict(params)
    for step in range(steps):
        loss, gradient = objective.gradient(current)
        step_rates = rates.at(step, names)
        stepped = zip(current.items(), step_rates, gradient, strict=True)
        current = {name: tensor - rate * slope for (name, tensor), rate, slope in stepped}
        yield loss, current
