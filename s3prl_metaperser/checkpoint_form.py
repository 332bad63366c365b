"""What a checkpoint must look like before anything of it is used: it is a file, and anyone may have written it.

torch's safe loader makes tensors and plain values only, but lets a few bytes stand for a tensor of any shape, and does
not mind a number where a name should be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

MOST_VALUES = 1_000_000
"""Names and numbers beside tensors; a checkpoint of ten thousand annotators has twice as many as it has annotators."""
DEEPEST = 20
MOST_PLACES = 8
PLAIN = (str, int, float, bool, type(None))


def state_fault(state: object, extra_key: str) -> str | None:
    """Say what is wrong with a module's state, or None.

    Args:
        state: name → tensor.
        extra_key: the name that holds plain values instead.
    """
    if not isinstance(state, Mapping):
        return f"is a {type(state).__name__}, not tensors by name"
    for name, value in state.items():
        if not isinstance(name, str):
            return f"has the name {name!r:.40}, which is no text"
        if isinstance(value, Tensor):
            fault = _tensor_fault(value)
            if fault is not None:
                return f"has a tensor {name!r:.80} that {fault}"
        elif name == extra_key:
            fault = _plain_fault(value)
            if fault is not None:
                return f"says of itself {fault}"
    return None


def _tensor_fault(tensor: Tensor) -> str | None:
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        return "holds no numbers of its own"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims the shape {tuple(tensor.shape)}, for which the file holds too few numbers"
    return None


def _plain_fault(value: object) -> str | None:
    """Look through lists and mappings for what is neither those nor a plain value."""
    pending: list[tuple[object, int]] = [(value, 0)]
    seen = 0
    while pending:
        one, depth = pending.pop()
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            return "more than any run does"
        if isinstance(one, Mapping):
            if not all(isinstance(key, str) for key in one):
                return "something under a key that is no text"
            pending += [(below, depth + 1) for below in one.values()]
        elif isinstance(one, (list, tuple)):
            pending += [(below, depth + 1) for below in one]
        elif not isinstance(one, PLAIN):
            return f"something with a {type(one).__name__} in it"
    return None


def about_fault(contract: object, provenance: object, others: Mapping[str, Any]) -> str | None:
    """Say what is wrong with what a downstream says of itself, or None.

    Args:
        contract: see ``checkpoints.Contract``; its values are compared with a run's, so only types that are used before
            that are looked at.
        provenance: see ``checkpoints.Provenance``.
        others: further entries that are text.
    """
    if not isinstance(contract, Mapping) or not isinstance(provenance, Mapping):
        return "says of itself no contract or provenance"
    emotions = contract.get("emotions")
    if not _is_list(emotions, str) or len(emotions) < 2 or len(set(emotions)) < len(emotions):
        return f"says contract.emotions is {emotions!r:.80}; expected two or more different words"
    for name, kind in (("annotators", str), ("kept_sessions", int)):
        if not _is_list(provenance.get(name), kind):
            return f"says provenance.{name} is {provenance.get(name)!r:.80}; expected a list of {kind.__name__}"
    for name, value in (("provenance.corpus", provenance.get("corpus")), *others.items()):
        if not isinstance(value, str):
            return f"says {name} is {value!r:.80}; expected text"
    return None


def parent_fault(parent: object) -> str | None:
    """Say what is wrong with where a small personal checkpoint says that its parent is, or None."""
    if not isinstance(parent, Mapping) or not isinstance(parent.get("fingerprint"), str):
        return "names a parent without a fingerprint"
    places = parent.get("places")
    if not _is_list(places, str) or not 2 <= len(places) <= MOST_PLACES:
        return f"says parent.places is {places!r:.80}; expected paths"
    return None


def _is_list(value: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and all(type(one) is kind for one in value)
