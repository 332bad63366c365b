"""Weight normalisation that can be differentiated twice.

wav2vec 2.0 and its kin have it in their positional convolution. In torch 2.8 the second derivative of
``torch._weight_norm`` is wrong (``torch.autograd.gradgradcheck`` fails on it), and with it every Hessian-vector product
of such an upstream, by some percent. Written out in elementary operations it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ExactWeightNorm(TorchFunctionMode):
    """Within this context, ``torch.nn.utils.weight_norm`` and its parametrization have right second derivatives."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Stand in for ``torch._weight_norm`` and pass everything else on."""
        if func is torch._weight_norm:
            return weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Give g · v / ‖v‖, the norm taken over all dimensions but ``dim`` (Salimans and Kingma 2016, equation 2).

    Args:
        v: the direction.
        g: the length, of size 1 in all dimensions but ``dim``.
        dim: as ``torch._weight_norm`` takes it; -1 norms over all dimensions.
    """
    others = [other for other in range(v.dim()) if other != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))
