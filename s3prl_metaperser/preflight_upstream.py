"""Checking which upstream a command line asks for, and whether s3prl can make it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from s3prl_metaperser.downloads import not_downloaded
from s3prl_metaperser.errors import MetaPerSERError, suggest

NO_FRAMES = ("mos_prediction",)
"""Families that give one score a clip."""
NOT_CALLABLE = ("ast", "byol_a", "passt")
"""Families whose constructors do not take what s3prl 0.4's own runner passes."""
PACKAGES = {"espnet_hubert": "espnet2", "pase": "pase", "ssast": "timm", "vggish": "resampy"}
"""What a family imports beyond s3prl's own requirements."""

MODEL_CONFIG = "config.json"
OWN_FOLDER = "a folder of your own: -k FOLDER"


def upstream_names(hub: ModuleType) -> dict[str, Callable[..., Any]]:
    """List the entries of ``s3prl.hub`` that make an upstream, leaving out the modules and helpers beside them."""
    return {
        name: entry
        for name, entry in vars(hub).items()
        if not name.startswith("_") and inspect.isfunction(entry) and entry.__module__.endswith(".hubconf")
    }


def local_variant(name: str, hub: ModuleType) -> str | None:
    """Name the upstream of the same family that takes its weights from a file or folder of one's own.

    Args:
        name: of an upstream of s3prl, such as ``wavlm_base``.
        hub: ``s3prl.hub``.

    Returns:
        Such as ``wavlm_local``; None where the family has none.
    """
    known = upstream_names(hub)
    family = getattr(known.get(name), "__module__", None)
    names = [one for one, entry in known.items() if entry.__module__ == family]
    return next((one for suffix in ("_local", "_custom") for one in names if one.endswith(suffix)), None)


def check_upstream(args: argparse.Namespace, hub: ModuleType) -> None:
    """Refuse an upstream that s3prl's runner could not make, or that gives no frames.

    Args:
        args: the command line.
        hub: ``s3prl.hub``.

    Raises:
        MetaPerSERError: naming the flag.
    """
    _check_hugging_face(args)
    if args.hub == "huggingface":
        return
    known = upstream_names(hub)
    if args.upstream is None:
        raise MetaPerSERError("no upstream given: name one with -u, such as -u fbank_no_cmvn or -u wavlm_base")
    if args.upstream not in known:
        raise MetaPerSERError(
            f"-u {args.upstream}: s3prl has no such upstream: {_nearest_upstreams(args.upstream, known)}"
        )
    entry = known[args.upstream]
    _check_family(args.upstream, entry.__module__.split(".")[-2])
    checkpoint = args.upstream_ckpt
    if checkpoint is None:
        if _is_required(entry, "ckpt"):
            raise MetaPerSERError(
                f"-u {args.upstream} needs the upstream's checkpoint: give its path or address with -k"
            )
    elif args.upstream.startswith("hf_"):
        if _is_path(checkpoint):
            _check_folder(checkpoint)
        else:
            _check_repository(args)
    elif args.upstream.endswith("_local") or (args.upstream.endswith("_custom") and "://" not in checkpoint):
        _check_file(checkpoint, resumed=bool(args.past_exp or args.auto_resume))
    model_config = args.upstream_model_config
    if model_config is None and _is_required(entry, "model_config"):
        raise MetaPerSERError(f"-u {args.upstream} needs the upstream's own config: give its path with -g")
    if model_config is not None and not Path(model_config).is_file():
        raise MetaPerSERError(f"-g {model_config}: no such file; expected the upstream's own config")


def _check_hugging_face(args: argparse.Namespace) -> None:
    """Refuse what s3prl does on the Hugging Face Hub by functions that have changed since: it would fail halfway."""
    import huggingface_hub

    version = huggingface_hub.__version__
    if args.push_to_hf_hub and not hasattr(huggingface_hub.HfApi, "login"):
        raise MetaPerSERError(
            f"--push_to_hf_hub: s3prl logs in by a function that huggingface_hub {version} no longer has; train "
            "without, and upload the folder with Hugging Face's own command"
        )
    if args.hub != "huggingface":
        return
    if args.upstream is None:
        raise MetaPerSERError("no upstream given: with --hub huggingface, -u is the name of a repository")
    try:
        inspect.signature(huggingface_hub.snapshot_download).bind(args.upstream, None, use_auth_token=True)
    except TypeError:
        raise MetaPerSERError(
            f"--hub huggingface: s3prl asks huggingface_hub {version} for the repository in a way it no longer takes; "
            f"download it, and give its checkpoint with -u and -k, or transformers' models with -u hf_wav2vec2_custom "
            "and the like"
        ) from None


def _nearest_upstreams(name: str, known: dict[str, Callable[..., Any]]) -> str:
    hint = suggest(name, known)
    if hint.startswith("did you mean"):
        return hint
    # Nothing is near, and all 190 names are no help in one line: those that need no file of the user's will do.
    ready = [entry for entry in ("fbank_no_cmvn", "wav2vec2", "hubert", "wavlm", "data2vec") if entry in known]
    return f"try one of {', '.join(ready)}; python -m s3prl_metaperser.run_downstream --help lists all {len(known)}"


def _is_required(entry: Callable[..., Any], name: str) -> bool:
    parameter = inspect.signature(entry).parameters.get(name)
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _check_family(name: str, family: str) -> None:
    if family in NO_FRAMES:
        raise MetaPerSERError(f"-u {name} gives one score a clip, no frames to learn from; use another upstream")
    if family in NOT_CALLABLE:
        raise MetaPerSERError(
            f"-u {name} cannot be made by s3prl's own runner, which passes arguments that it does not take; use another"
        )
    package = PACKAGES.get(family)
    if package is not None and importlib.util.find_spec(package) is None:
        raise MetaPerSERError(f"-u {name} needs the Python package {package!r}, which is not installed")


def _is_path(name: str) -> bool:
    """Tell a folder from a repository such as ``facebook/wav2vec2-base``, as ``-k`` of an hf_* upstream."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or Path(name).exists()


def _check_folder(name: str) -> None:
    if not (Path(name) / MODEL_CONFIG).is_file():
        raise MetaPerSERError(f"-k {name}: no folder with a {MODEL_CONFIG}, as Hugging Face's models are saved in")


def _check_repository(args: argparse.Namespace) -> None:
    """Fetch a model's config unless it is here, before transformers tries four files for half a minute each."""
    from transformers.utils import cached_file

    with contextlib.suppress(OSError):
        cached_file(args.upstream_ckpt, MODEL_CONFIG, local_files_only=True)
        return
    try:
        cached_file(args.upstream_ckpt, MODEL_CONFIG)
    except OSError as error:
        failed = not_downloaded(args, error, OWN_FOLDER)
        if failed is not None:
            raise failed from None


def _check_file(name: str, resumed: bool) -> None:
    path = Path(name)
    if not path.is_file():
        cure = "where the resumed run read it; give its new place by -o args.upstream_ckpt=PATH" if resumed else ""
        raise MetaPerSERError(f"-k {name}: no such file; expected the upstream's checkpoint {cure}")
    with path.open("rb") as file:
        start = file.read(2)
    # torch writes zip archives, whose directory is at the end: one that starts like a zip and is none was cut off.
    if not start or (start == b"PK" and not zipfile.is_zipfile(path)):
        raise MetaPerSERError(f"-k {name}: cut off ({path.stat().st_size} bytes); copy or download it again")
