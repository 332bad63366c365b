"""What s3prl raises while it makes upstream and featurizer, of input that only then turns out to be wrong."""

from __future__ import annotations

from typing import Any

from s3prl_metaperser.downloads import frames_of, not_downloaded
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.preflight_upstream import OWN_FOLDER, local_variant


def explained(error: Exception) -> MetaPerSERError | None:
    """Say in a line what an error of s3prl's own code means to whoever gave the command.

    How many layers an upstream has, which weights fit it, and whether its files can be had, is known when s3prl has
    made it; s3prl then indexes, loads and downloads without a look.

    Args:
        error: as caught around s3prl's ``main``.

    Returns:
        Our error; None where it is another, whose traceback is of use.
    """
    for frame in reversed(frames_of(error)):
        name, local = frame.f_code.co_name, frame.f_locals
        if name == "_select_feature" and isinstance(error, IndexError):
            return _no_such_layer(local)
        if name == "_load_weight" and isinstance(error, (RuntimeError, ValueError)):
            return _unfitting_weights(local, error)
        if name == "_get_upstream":
            args = local["self"].args
            return not_downloaded(args, error, _own_copy(args.upstream))
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


def _own_copy(upstream: str) -> str:
    from s3prl import hub

    variant = local_variant(upstream, hub)
    if variant is None:
        return "another upstream"
    return OWN_FOLDER if variant.startswith("hf_") else f"a file of your own: -u {variant} -k FILE"
