"""Whether torch can work on a device of this machine."""

from __future__ import annotations

import torch


def works_here(device: str | torch.device) -> bool:
    """Make a number on a device and fetch it: the only answer that all of torch's backends give alike.

    Args:
        device: a device, or its name, such as ``cuda:1``.
    """
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, NotImplementedError, ImportError, AttributeError, AssertionError):
        return False
    return True
