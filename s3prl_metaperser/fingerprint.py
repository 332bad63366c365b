"""Knowing weights again: one hash of all that tensors are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(state: Mapping[str, Any]) -> str:
    """Hash a state's tensors: names, types, shapes and bytes, whatever their order; what is no tensor is passed over.

    Args:
        state: as ``state_dict()`` gives it, on any device.

    Returns:
        A SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((name, value) for name, value in state.items() if isinstance(value, Tensor)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
