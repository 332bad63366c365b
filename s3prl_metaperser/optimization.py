"""Which optimizer and schedule the config asks s3prl's runner for.

s3prl finds both by evaluating ``get_`` and the config's text as Python, so a name that is none of its own would run as
code; and what it hands their settings to is called when everything else is loaded.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from s3prl_metaperser.errors import MetaPerSERError, suggest

_PREFIX = "get_"
_NO_OPTIMIZERS = {"optimizer", "grouped_parameters"}
_NO_SCHEDULERS = {"scheduler"}


def check_optimization(config: Mapping[str, Any]) -> None:
    """Refuse sections ``optimizer`` and ``scheduler`` that s3prl could make nothing of, by making both once.

    Args:
        config: the whole of it; ``scheduler`` may be missing or empty.

    Raises:
        MetaPerSERError: naming the key.
    """
    from s3prl import optimizers, schedulers

    optimizer = _named("optimizer", config.get("optimizer"), optimizers, _NO_OPTIMIZERS)
    lr = optimizer.get("lr", 1e-3)
    if not isinstance(lr, (int, float)) or isinstance(lr, bool) or not (math.isfinite(lr) and lr > 0):
        raise MetaPerSERError(
            f"config key 'optimizer.lr' has the value {lr!r:.40}: a number above 0, in YAML such as 1.0e-3"
        )
    steps = config["runner"]["total_steps"]
    # Of a module whose weights are no random numbers: a run's own are drawn after this.
    made = _made("optimizer", optimizer, lambda: optimizers.get_optimizer([nn.LayerNorm(1)], steps, optimizer))
    if config.get("scheduler"):
        scheduler = _named("scheduler", config["scheduler"], schedulers, _NO_SCHEDULERS)
        _made("scheduler", scheduler, lambda: schedulers.get_scheduler(made, steps, scheduler))


def _named(key: str, section: Any, module: ModuleType, others: set[str]) -> Mapping[str, Any]:
    """Give a section whose name is one of s3prl's."""
    if not isinstance(section, Mapping):
        raise MetaPerSERError(f"config section {key!r} should be a mapping of settings, found {section!r:.80}")
    functions = inspect.getmembers(module, inspect.isfunction)
    known = {name.removeprefix(_PREFIX) for name, _ in functions if name.startswith(_PREFIX)} - others
    name = section.get("name")
    if not isinstance(name, str) or name not in known:
        hint = suggest(name, known) if isinstance(name, str) else f"expected one of {', '.join(sorted(known))}"
        raise MetaPerSERError(f"config key '{key}.name' is {name!r:.80}, which s3prl does not have: {hint}")
    return section


def _made(key: str, section: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        # Whatever optimizers and schedules raise for settings that they do not know, or that are out of range.
        raise MetaPerSERError(
            f"config section {key!r} is not what {section['name']} takes: {' '.join(str(error).split()):.200}"
        ) from None
