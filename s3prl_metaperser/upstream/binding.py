"""Reaching the runner's upstream and featurizer.

s3prl's runner hands the downstream expert only ``featurizer(wavs, upstream(wavs))``. The expert needs the modules
themselves, to pool every layer and to adapt the weighted sum. A global forward pre-hook catches the first upstream and
the first Featurizer that run after the expert was made, which are the runner's, and removes itself. A runner that calls
``expert.bind(upstream, featurizer)`` makes the hook unnecessary.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any, Protocol

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel


class Bindable(Protocol):
    """An expert that can take the runner's modules."""

    is_bound: bool

    def bind(self, upstream: nn.Module, featurizer: nn.Module) -> None:
        """Take (upstream, featurizer), both unwrapped from DDP."""
        ...


def unwrap(module: nn.Module) -> nn.Module:
    """Give the module inside a DDP wrapper, or the module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def is_upstream(module: nn.Module) -> bool:
    """Know an upstream by ``get_downsample_rates``, which the runner asks of every one.

    Not by ``UpstreamBase``: the ``hf_*`` upstreams are plain modules.
    """
    return hasattr(module, "get_downsample_rates")


def modules_of_the_calling_runner() -> tuple[nn.Module, nn.Module] | None:
    """Find upstream and featurizer of the runner that is making its downstream just now, further up the stack.

    The runner makes its optimizer before its first batch arrives, and so before :func:`catch_upstream_and_featurizer`
    can know of the upstream; but learned rates of the upstream's tensors must be there for the optimizer. s3prl's
    runner does not pass its modules on, yet by then it has both.

    Returns:
        (upstream, featurizer), unwrapped from DDP; None outside a runner.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        modules = [getattr(getattr(caller, name, None), "model", None) for name in ("upstream", "featurizer")]
        if all(isinstance(module, nn.Module) for module in modules):
            upstream, featurizer = (unwrap(module) for module in modules if module is not None)
            if is_upstream(upstream):
                return upstream, featurizer
        frame = frame.f_back
    return None


def catch_upstream_and_featurizer(expert: Bindable) -> None:
    """Call ``expert.bind(upstream, featurizer)`` just before the runner's first featurizer forward.

    Args:
        expert: is referenced weakly; when it is gone or bound, the hook goes too.
    """
    from s3prl.upstream.interfaces import Featurizer

    reference = weakref.ref(expert)
    caught: dict[str, nn.Module] = {}

    def before_forward(module: nn.Module, _: Any) -> None:
        owner = reference()
        if owner is None or owner.is_bound:
            handle.remove()
            return
        inner = unwrap(module)
        if isinstance(inner, Featurizer):
            # Some upstreams hold a featurizer of their own, which runs first.
            if "upstream" in caught and inner not in set(caught["upstream"].modules()):
                handle.remove()
                owner.bind(caught["upstream"], inner)
        elif "upstream" not in caught and is_upstream(inner):
            caught["upstream"] = inner

    handle = register_module_forward_pre_hook(before_forward)
