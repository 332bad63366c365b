r"""The inner loop with one step's graph in memory at a time: a checkpointed meta-gradient.

Forwards, only what a step cannot be gone back through without is kept. Backwards, with v = ∂L_query/∂θ_{t+1} and
g_t = ∇L_support(θ_t),

- ∂/∂α_t = −⟨v, g_t⟩ for each tensor's rate,
- ∂/∂φ −= ∂⟨α_t v, g_t⟩/∂φ for what the inner loop holds still but the outer loop learns,
- v ← v − H_t (α_t v), the Hessian-vector product as the gradient of ⟨α_t v, g_t⟩; v as it is for a first-order step.

Kept is θ_t for a second-order step, g_t for a first-order step with learned rates, and nothing for one with fixed
rates: at most the size of the adapted parameters a step. Gradient and Hessian-vector product are sums over the
objective's parts, of which one is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from s3prl_metaperser.adaptation.problem import Adapted, Objective, Params, Sums
from s3prl_metaperser.adaptation.rates import Rates


@dataclass
class _Sweep:
    """The steps there and back.

    Attributes:
        objective: the support loss.
        names: of the adapted tensors.
        orders: of each step, whether it is differentiated to second order.
        rates: of each step, each tensor's; detached.
        learns_rates: of each step, whether a rate needs its gradient.
        kept: of each step, θ_t or g_t or nothing. θ_0 is the outer loop's own and kept by autograd.
        losses: of each step, before it.
    """

    objective: Objective
    names: list[str]
    orders: list[bool]
    rates: list[list[Tensor]]
    learns_rates: list[bool]
    kept: list[list[Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def forwards(self, start: Sequence[Tensor]) -> list[Tensor]:
        """Take the steps."""
        current = [tensor.detach() for tensor in start]
        for step, second_order in enumerate(self.orders):
            with _differentiable_twice(second_order):
                loss, gradient = self.objective.gradient(dict(zip(self.names, current, strict=True)))
            self.losses.append(loss)
            if second_order:
                self.kept.append(current if step > 0 else [])
            else:
                self.kept.append(gradient if self.learns_rates[step] else [])
            stepped = zip(current, self.rates[step], gradient, strict=True)
            current = [tensor - rate * slope for tensor, rate, slope in stepped]
        return current

    def backwards(
        self, start: Sequence[Tensor], vector: list[Tensor]
    ) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor | None]]:
        """Bring the outer gradient from the adapted tensors back to what they came from.

        Args:
            start: θ_0.
            vector: gradient of the outer loss at the adapted tensors, one each; the list becomes θ_0's.

        Returns:
            The gradients of θ_0, of each step's rates and of the held tensors.
        """
        held = Sums(len(self.objective.held))
        rate_gradients: list[list[Tensor]] = [[] for _ in self.orders]
        for step in reversed(range(len(self.orders))):
            kept = self.kept.pop()
            if not self.orders[step]:
                if self.learns_rates[step]:
                    rate_gradients[step] = [
                        -torch.dot(v.flatten(), slope.flatten()) for v, slope in zip(vector, kept, strict=True)
                    ]
                continue
            theta = dict(zip(self.names, kept or start, strict=True))
            products, held_products, rate_gradients[step] = self._second_order(theta, vector, self.rates[step])
            # Products enter with a minus, as the step does.
            for place, product in enumerate(products):
                if product is not None:
                    vector[place] = vector[place] - product
                    products[place] = None
            held.add(None if product is None else -product for product in held_products)
        return vector, rate_gradients, held.totals

    def _second_order(
        self, theta: Params, vector: Sequence[Tensor], rates: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor]]:
        """Give H (α v), the same for the held tensors, and −⟨v, g⟩ for each tensor, summed over the parts."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
        inputs = [*leaves.values(), *self.objective.held]
        scaled = [rate * v for rate, v in zip(rates, vector, strict=True)]
        products = Sums(len(inputs))
        along = [v.new_zeros(()) for v in vector]
        for part in self.objective.parts:
            with torch.enable_grad(), _differentiable_twice(True):
                slopes = torch.autograd.grad(part(leaves), list(leaves.values()), create_graph=True, allow_unused=True)
                for place, (slope, v) in enumerate(zip(slopes, vector, strict=True)):
                    if slope is not None:
                        along[place] = along[place] - torch.dot(v.flatten(), slope.detach().flatten())
                curved = [slope for slope in slopes if slope is not None and slope.requires_grad]
                cotangents = [
                    v for slope, v in zip(slopes, scaled, strict=True) if slope is not None and slope.requires_grad
                ]
                if curved:
                    products.add(torch.autograd.grad(curved, inputs, cotangents, allow_unused=True))
            # What is of this part must be gone before the next part's graph is built.
            del slope, slopes, curved
        return products.totals[: len(leaves)], products.totals[len(leaves) :], along


def _differentiable_twice(second_order: bool) -> Any:
    """Attention kernels have no double backward; the mathematical form has, and must then be used there and back."""
    every = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(SDPBackend.MATH if second_order else every)


class _CheckpointedSteps(torch.autograd.Function):
    """θ_0, rates and held tensors → θ_T."""

    @staticmethod
    def forward(ctx: FunctionCtx, sweep: _Sweep, *tensors: Tensor) -> tuple[Tensor, ...]:
        start = tensors[: len(sweep.names)]
        adapted = sweep.forwards(start)
        ctx.sweep = sweep  # type: ignore[attr-defined]
        ctx.save_for_backward(*start)
        return tuple(adapted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *vector: Tensor) -> tuple[Tensor | None, ...]:
        sweep: _Sweep = ctx.sweep
        if len(sweep.kept) != len(sweep.orders):
            raise RuntimeError("the steps have been gone back through already; adapt again for another backward pass")
        theta, rates, held = sweep.backwards(ctx.saved_tensors, list(vector))
        missing: list[Tensor | None] = [None] * len(sweep.names)
        by_step = [gradient for own in rates for gradient in own or missing]
        return (None, *theta, *by_step, *held)


def checkpoint_steps(
    objective: Objective, params: Params, rates: Rates, steps: int, second_order: Callable[[int], bool]
) -> Adapted:
    """Take differentiable steps of which one is rebuilt at a time; see :func:`inner_loop.adapt`."""
    names = list(params)
    by_step = [rates.at(step, names) for step in range(steps)]
    sweep = _Sweep(
        objective,
        names,
        [second_order(step) for step in range(steps)],
        [[rate.detach() for rate in own] for own in by_step],
        [any(rate.requires_grad for rate in own) for own in by_step],
    )
    flat = [rate for own in by_step for rate in own]
    adapted = _CheckpointedSteps.apply(sweep, *params.values(), *flat, *objective.held)
    return Adapted(dict(zip(names, adapted, strict=True)), torch.stack(sweep.losses))
