"""Making a checkpoint's upstream outside a run, by the very code of s3prl's runner that makes it inside one."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

from torch import nn

from s3prl_metaperser.devices import works_here
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.given_arguments import check_trusted, check_types
from s3prl_metaperser.preflight_arguments import known_arguments
from s3prl_metaperser.preflight_upstream import check_upstream
from s3prl_metaperser.run_downstream import make_ready
from s3prl_metaperser.upstream.pooling import undisturbed


def command_line(
    checkpoint: dict[str, Any], path: Path, device: str, upstream_ckpt: str | None = None
) -> argparse.Namespace:
    """Give the command line of ``-m inference -e PATH``.

    Args:
        checkpoint: what is in the file.
        path: of the file.
        device: of torch.
        upstream_ckpt: where the upstream's own checkpoint is now, if it is not where training read it.

    Raises:
        MetaPerSERError: when s3prl could not make this upstream here.
    """
    make_ready()
    parser = known_arguments()
    try:
        given = {**vars(parser.namespace), **vars(checkpoint["Args"])}
    except (KeyError, TypeError):
        raise MetaPerSERError(f"checkpoint {path} holds no command line; expected one of s3prl's runner") from None
    if not works_here(device):
        raise MetaPerSERError(
            f"device {device!r}: torch cannot use it here; expected cpu, or a GPU that torch finds, such as cuda:0"
        )
    own = {"mode": "inference", "init_ckpt": str(path), "device": device, "local_rank": None, "upstream_refresh": False}
    args = argparse.Namespace(**{**given, **own})
    by_hand = [] if upstream_ckpt is None else ["upstream_ckpt"]
    check_trusted(given, by_hand, f"checkpoint {path}", "give the upstream's file with --upstream-ckpt")
    if upstream_ckpt is not None:
        args.upstream_ckpt = upstream_ckpt
    check_types(parser.actions, args, f"checkpoint {path}")
    from s3prl import hub

    check_upstream(args, hub)
    return args


def make_upstream(args: argparse.Namespace, config: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Make upstream and featurizer as s3prl's runner does, without any weights of a run.

    Args:
        args: as :func:`command_line` gives it.
        config: of the run.

    Returns:
        (upstream, featurizer), in ``eval()``, on the device. What is random in making them leaves random states alone.
    """
    from s3prl.downstream.runner import Runner

    class UpstreamOnly(Runner):
        """Makes no downstream, which would read what only a run has."""

        def _get_featurizer(self) -> Any:
            with contextlib.redirect_stderr(nowhere):
                return super()._get_featurizer()

        def _get_downstream(self) -> None:
            return None

    # Both tell of each model that they make, among what a command prints.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), undisturbed():
        runner = UpstreamOnly(argparse.Namespace(**{**vars(args), "init_ckpt": None}), config)
    return runner.upstream.model.eval(), runner.featurizer.model.eval()
