"""What s3prl raises while it makes upstream and featurizer, of input that only then turns out to be wrong."""

from __future__ import annotations

from traceback import walk_tb
from typing import Any

from s3prl_metaperser.errors import MetaPerSERError


def explained(error: Exception) -> MetaPerSERError | None:
    """Say in a line what an error of s3prl's own code means to whoever gave the command.

    How many layers an upstream has, and which weights fit it, is known when s3prl has made it; s3prl then indexes and
    loads without a look.

    Args:
        error: as caught around s3prl's ``main``.

    Returns:
        Our error; None where it is another, whose traceback is of use.
    """
    frames = [(frame.f_code.co_name, frame.f_locals) for frame, _ in walk_tb(error.__traceback__)]
    for name, local in reversed(frames):
        if name == "_select_feature" and isinstance(error, IndexError):
            return _no_such_layer(local)
        if name == "_load_weight" and isinstance(error, (RuntimeError, ValueError)):
            return _unfitting_weights(local, error)
    return None


def _no_such_layer(local: dict[str, Any]) -> MetaPerSERError:
    layers = len(local["feature"])
    return MetaPerSERError(
        f"-l {local['self'].layer_selection}: this upstream has {layers} layers in {local['self'].feature_selection}; "
        f"expected 0 to {layers - 1}"
    )


def _unfitting_weights(local: dict[str, Any], error: Exception) -> MetaPerSERError:
    runner, part = local["self"], local["name"]
    return MetaPerSERError(
        f"{runner.args.init_ckpt}: its {part} does not fit -u {runner.args.upstream}"
        f"{f' -k {runner.args.upstream_ckpt}' if runner.args.upstream_ckpt else ''}: "
        f"{' '.join(str(error).split()):.300}"
    )
