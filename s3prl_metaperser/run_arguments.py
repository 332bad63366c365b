"""What s3prl's command line and the config's other sections may ask of a run, given its own settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.optimization import check_optimization
from s3prl_metaperser.settings import Settings

RUNNER_COUNTS = ("total_steps", "gradient_accumulate_steps", "log_step", "eval_step", "save_step", "max_keep")
RUNNER_AMOUNTS = ("gradient_clipping", "evaluate_ratio")


def check_arguments(arguments: Mapping[str, Any], settings: Settings, training: str) -> None:
    """Refuse what cannot be, or would not do what it says.

    Args:
        arguments: s3prl's command line and the other sections of the config.
        settings: the ``downstream_expert`` section.
        training: what the system's initialisation is trained on.

    Raises:
        MetaPerSERError: naming the flag or key.
    """
    scope, trainable = settings.scope, bool(arguments.get("upstream_trainable"))
    if trainable and scope != "entire":
        raise MetaPerSERError(
            f"-f makes the upstream trainable, but scope {scope!r} keeps it frozen; leave -f out, or set "
            "downstream_expert.scope: entire"
        )
    if scope == "entire" and not trainable and arguments["mode"] == "train":
        raise MetaPerSERError(
            "scope 'entire' trains the upstream, which s3prl keeps frozen without -f; add -f, or set "
            "downstream_expert.scope: linear"
        )
    if arguments["mode"] == "train" and training == "nothing":
        raise MetaPerSERError("system 'random' has nothing to train; use -m evaluate")
    if arguments["mode"] == "train" and training == "listener":
        raise MetaPerSERError("system 'personal' is trained by `metaperser adapt`, not by -m train")
    if arguments["mode"] == "inference" and training == "annotators":
        raise MetaPerSERError("system 'multi_few' has no head for a listener without labels; use -m evaluate")
    runner = _section(arguments, "runner")
    if runner.get("fp16"):
        raise MetaPerSERError(
            f"config key 'runner.fp16' is {runner['fp16']!r:.40}; meta-gradients need float32, set it to false "
            "(after -o, to False)"
        )
    if arguments["mode"] == "train" and runner.get("train_dataloader", "train") != "train":
        raise MetaPerSERError(
            f"config key 'runner.train_dataloader' is {runner['train_dataloader']!r:.40}; expected train, since "
            "nothing is learned from dev or test; leave it out"
        )
    if arguments.get("specaug"):
        raise MetaPerSERError(
            "config section 'specaug' masks frames, but features are pooled once and cached without it; remove it"
        )
    for key in RUNNER_COUNTS:
        if not (type(runner.get(key)) is int and runner[key] >= 1):
            raise MetaPerSERError(f"config key 'runner.{key}' has the value {runner.get(key)!r}: a whole number > 0")
    evaluated = runner.get("eval_dataloaders", [])
    if not isinstance(evaluated, list):
        raise MetaPerSERError(
            f"config key 'runner.eval_dataloaders' is {evaluated!r:.80}; expected [dev] or [dev, test]"
        )
    unknown = [name for name in evaluated if name not in ("dev", "test")]
    if unknown:
        raise MetaPerSERError(f"config key 'runner.eval_dataloaders' names {unknown[0]!r}; expected dev or test")
    if evaluated == ["test", "dev"]:
        raise MetaPerSERError("config key 'runner.eval_dataloaders' must name dev before test, which it decides on")
    for key in RUNNER_AMOUNTS:
        amount = runner.get(key, 1)
        if isinstance(amount, bool) or not (isinstance(amount, (int, float)) and 0 < amount < math.inf):
            raise MetaPerSERError(f"config key 'runner.{key}' has the value {amount!r:.40}: a number above 0")
    if arguments["mode"] == "train":
        check_optimization(arguments)


def _section(arguments: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = arguments.get(name, {})
    if not isinstance(section, Mapping):
        raise MetaPerSERError(f"config section {name!r} should be a mapping of settings, found {section!r:.80}")
    return section
