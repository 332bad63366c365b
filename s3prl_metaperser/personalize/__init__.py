"""One listener's own model: from a meta-trained checkpoint and a few labelled clips, without a corpus or a runner.

``load``, ``Recogniser``, ``Heard`` and ``Judgement`` are imported when they are asked for: the command line reads this
package's own before it knows whether torch will be needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3prl_metaperser.personalize.judgement import Judgement
    from s3prl_metaperser.personalize.recogniser import Heard, Recogniser, load

STEPS = 50
"""Gradient steps of adaptation at meta-test (paper section 3.3)."""

__all__ = ["STEPS", "Heard", "Judgement", "Recogniser", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("s3prl_metaperser.personalize.recogniser"), name)
