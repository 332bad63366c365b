r"""The inner loop, on ``higher`` (the reference backend).

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

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import higher
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from s3prl_metaperser.adaptation.rates import Rates
from s3prl_metaperser.adaptation.sgd import DifferentiablePerTensorSGD, PerTensorSGD

Params = dict[str, Tensor]
"""Name → tensor, flat; tensors may carry a leading task dimension."""
Objective = Callable[[Params], Tensor]
"""Parameters → scalar loss on the support set(s)."""


@dataclass(frozen=True)
class Adapted:
    """What adaptation gives.

    Attributes:
        params: the adapted tensors.
        losses: (steps,) the objective before each step, detached.
        kept: the tensors after some earlier number of steps, by that number.
    """

    params: Params
    losses: Tensor
    kept: dict[int, Params] = field(default_factory=dict)


def adapt(
    objective: Objective,
    params: Params,
    rates: Rates,
    steps: int,
    second_order: Callable[[int], bool] | None = None,
    keep: Collection[int] = (),
) -> Adapted:
    """Adapt parameters by gradient descent on an objective.

    Args:
        objective: the support loss as a function of the parameters.
        params: the initialisation; for meta-training with a graph back to what is meta-learned.
        rates: gives each tensor's rate at each step.
        steps: how many steps to take.
        second_order: for meta-training, tells for each step whether the gradient's own graph is kept. None is
            adaptation at test time: nothing stays differentiable, and memory does not grow with the steps.
        keep: after how many steps, each from 1 to ``steps``, the parameters are given too.

    Returns:
        The adapted parameters and the losses on the way. A loss that is not finite is the caller's to judge.

    Raises:
        ValueError: when parameters are to be kept that no step gives.
    """
    if not all(1 <= kept_step <= steps for kept_step in keep):
        raise ValueError(f"keep {sorted(keep)} is not within 1 to {steps} steps")
    meta_training = second_order is not None
    names = list(params)
    # The optimizer copies what it is built on; one-element stands-in keep that copy from being the model's size.
    stand_ins = [torch.zeros(1, device=tensor.device, requires_grad=True) for tensor in params.values()]
    optimizer = PerTensorSGD(stand_ins, rates=[0.0] * len(names))
    differentiable = higher.optim.get_diff_optim(optimizer, stand_ins, track_higher_grads=meta_training)
    if not isinstance(differentiable, DifferentiablePerTensorSGD):
        raise TypeError(f"higher made a {type(differentiable).__name__} for {PerTensorSGD.__name__}")

    current = list(params.values())
    if not meta_training:
        current = [tensor.detach().requires_grad_() for tensor in current]
    losses: list[Tensor] = []
    kept: dict[int, Params] = {}

    def named(tensors: list[Tensor]) -> Params:
        given = tensors if meta_training else [tensor.detach() for tensor in tensors]
        return dict(zip(names, given, strict=True))

    # Attention kernels have no double backward; the mathematical form has.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for step in range(steps):
            loss = objective(dict(zip(names, current, strict=True)))
            losses.append(loss.detach())
            step_rates = rates.at(step, names)
            if second_order is None or second_order(step):
                current = differentiable.step(loss, params=current, override={"lr": step_rates})
            else:
                current = differentiable.first_order_step(loss, current, step_rates)
            if step + 1 in keep:
                kept[step + 1] = named(current)
    return Adapted(named(current), torch.stack(losses), kept)
