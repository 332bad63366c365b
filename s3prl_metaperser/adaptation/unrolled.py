"""The inner loop as one graph, on ``higher``: the reference. Memory grows by a step's activations with every step."""

from __future__ import annotations

from collections.abc import Callable

import higher
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from s3prl_metaperser.adaptation.problem import Adapted, Objective, Params
from s3prl_metaperser.adaptation.rates import Rates
from s3prl_metaperser.adaptation.sgd import DifferentiablePerTensorSGD, PerTensorSGD


def unroll(
    objective: Objective, params: Params, rates: Rates, steps: int, second_order: Callable[[int], bool]
) -> Adapted:
    """Take differentiable steps; see :func:`inner_loop.adapt`."""
    names = list(params)
    # The optimizer copies what it is built on; one-element stand-ins keep that copy from being the model's size.
    stand_ins = [torch.zeros(1, device=tensor.device, requires_grad=True) for tensor in params.values()]
    optimizer = PerTensorSGD(stand_ins, rates=[0.0] * len(names))
    differentiable = higher.optim.get_diff_optim(optimizer, stand_ins, track_higher_grads=True)
    if not isinstance(differentiable, DifferentiablePerTensorSGD):
        raise TypeError(f"higher made a {type(differentiable).__name__} for {PerTensorSGD.__name__}")

    current = list(params.values())
    losses: list[Tensor] = []
    # Attention kernels have no double backward; the mathematical form has.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for step in range(steps):
            loss = objective(dict(zip(names, current, strict=True)))
            losses.append(loss.detach())
            step_rates = rates.at(step, names)
            if second_order(step):
                current = differentiable.step(loss, params=current, override={"lr": step_rates})
            else:
                current = differentiable.first_order_step(loss, current, step_rates)
    return Adapted(dict(zip(names, current, strict=True)), torch.stack(losses))
