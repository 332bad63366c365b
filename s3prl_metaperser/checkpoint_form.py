"""What a checkpoint must look like before anything of it is used: it is a file, and anyone may have written it.

torch's safe loader makes tensors and plain values only, but lets a few bytes stand for a tensor of any shape, and does
not mind a number where a name should be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from s3prl_metaperser import yaml_text

MOST_VALUES = 1_000_000
"""Names and numbers beside tensors; a checkpoint of ten thousand annotators has twice as many as it has annotators."""
DEEPEST = 2 * yaml_text.DEEPEST
"""A config file's own depth, and as much again by ``-o``."""
MOST_PLACES = 8
PLAIN = (str, int, float, bool, type(None))
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
DTYPES |= {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
"""Of which a module of s3prl's has tensors, and all of which can be computed with on a CPU."""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What would move a terminal's cursor, or cut a path, where it is shown."""
NOT_WEIGHTS = ("best_score",)
"""Of a downstream's tensors, those that no answer is computed from."""


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


def not_finite(state: Mapping[str, Any]) -> str | None:
    """Name the first of a state's weights that are not finite, whose model would answer with what is no number.

    Args:
        state: as :func:`state_fault` has found nothing wrong with.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor) or name in NOT_WEIGHTS or not value.numel():
            continue
        if not (value.is_floating_point() or value.is_complex()):
            continue
        # The extremes of what holds a NaN are NaN; found in a tenth of the time that isfinite takes for all.
        numbers = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        if not all(bool(extreme.isfinite()) for extreme in torch.aminmax(numbers)):
            return name
    return None


def command_fault(arguments: object, config: object) -> str | None:
    """Say what is wrong with the command line and the config that s3prl's runner keeps in a checkpoint, or None.

    What is not there at all is told by whoever needs it.

    Args:
        arguments: a namespace.
        config: a mapping; below its sections keys may be numbers, as in the YAML that it was read from.
    """
    for name, value in (("Args", getattr(arguments, "__dict__", {})), ("Config", config)):
        if not isinstance(value, Mapping):
            continue
        odd = next((key for key in value if not isinstance(key, str)), None)
        if odd is not None:
            return f"its {name} has the key {odd!r:.40}, which is no text"
        fault = _plain_fault(value, PLAIN)
        if fault is not None:
            return f"its {name} holds {fault}"
    return None


def training_fault(checkpoint: Mapping[str, Any]) -> str | None:
    """Say what is wrong with what only training goes on from, its steps and its optimizer's state, or None."""
    for name in ("Step", "Epoch", "WorldSize"):
        count = checkpoint.get(name, 0)
        if type(count) is not int or count < 0:
            return f"its {name} is {count!r:.40}; expected a whole number"
    for name in ("Optimizer", "Scheduler"):
        state = checkpoint.get(name)
        if state is not None and not isinstance(state, Mapping):
            return f"its {name} is a {type(state).__name__}, not an optimizer's state"
    groups = (checkpoint.get("Optimizer") or {}).get("param_groups", [])
    of_tensors = (checkpoint.get("Optimizer") or {}).get("state", {})
    if not _is_list(groups, dict) or not all(_is_list(group.get("params"), int) for group in groups):
        return "its Optimizer has param_groups that are no lists of parameters"
    if not isinstance(of_tensors, Mapping) or not all(isinstance(own, Mapping) for own in of_tensors.values()):
        return "its Optimizer has a state that is not of its parameters"
    return None


def _tensor_fault(tensor: Tensor) -> str | None:
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        return "holds no numbers of its own"
    if tensor.dtype not in DTYPES:
        return f"is of the type {tensor.dtype}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims the shape {tuple(tensor.shape)}, for which the file holds too few numbers"
    return None


def _plain_fault(value: object, keys: tuple[type, ...] = (str,)) -> str | None:
    """Look through lists and mappings, whose keys are of the given types, for what is neither those nor plain."""
    pending: list[tuple[object, int]] = [(value, 0)]
    seen = 0
    while pending:
        one, depth = pending.pop()
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            return "more than any run does"
        if isinstance(one, Mapping):
            if not all(isinstance(key, keys) for key in one):
                return f"something under a key that is no {'text' if keys == (str,) else 'plain value'}"
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
    lists: tuple[tuple[str, object, type], ...] = (
        ("contract.left_out", contract.get("left_out", []), str),
        ("contract.heads", contract.get("heads", []), str),
    )
    for name, value, kind in lists:
        if not _is_list(value, kind):
            return f"says {name} is {value!r:.80}; expected a list of {kind.__name__}"
    shown = (*emotions, *contract.get("left_out", []), *contract.get("heads", []))
    odd = next((word for word in shown if CONTROL.search(word)), None)
    if odd is not None:
        return f"says {odd!r:.80}, which holds a control character"
    for name, value in others.items():
        if not isinstance(value, str):
            return f"says {name} is {value!r:.80}; expected text"
    before = provenance.get("before", [])
    if not isinstance(before, list) or not all(isinstance(part, Mapping) for part in before):
        return f"says provenance.before is {before!r:.80}; expected a list of what earlier trainings have seen"
    faults = (_seen_fault(part, place) for part, place in ((provenance, ""), *((part, ".before") for part in before)))
    return next((fault for fault in faults if fault is not None), None)


def _seen_fault(part: Mapping[str, Any], place: str) -> str | None:
    """Say what is wrong with what one training says that it has seen, or None."""
    for name, kind in (("annotators", str), ("kept_sessions", int), ("recordings", int)):
        value = part.get(name, [] if name == "recordings" else None)
        if not _is_list(value, kind):
            return f"says provenance{place}.{name} is {value!r:.80}; expected a list of {kind.__name__}"
    for name in ("corpus", "labels"):
        value = part.get(name, "" if name == "labels" else None)
        if not isinstance(value, str):
            return f"says provenance{place}.{name} is {value!r:.80}; expected text"
    return None


def parent_fault(parent: object) -> str | None:
    """Say what is wrong with where a small personal checkpoint says that its parent is, or None."""
    if not isinstance(parent, Mapping) or not isinstance(parent.get("fingerprint"), str):
        return "names a parent without a fingerprint"
    places = parent.get("places")
    if not _is_list(places, str) or not 2 <= len(places) <= MOST_PLACES or any(map(CONTROL.search, places)):
        return f"says parent.places is {places!r:.80}; expected paths"
    return None


def _is_list(value: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and all(type(one) is kind for one in value)
