"""Checking the command line of s3prl's ``run_downstream`` before it acts on any of it.

s3prl itself finds out about a misspelt upstream or a missing checkpoint halfway, in a traceback, with the experiment's
folder already made. Here the arguments are parsed by s3prl's own parser, resolved as s3prl will resolve them
(``-e`` and ``-a`` take most arguments from the checkpoint, ``-o`` overrides all), and each is looked at; nothing is
written, and no model is built. A damaged newest ``states-STEP.ckpt`` is passed over for the one before it; training
that goes on from that renames it.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from s3prl_metaperser import resuming, state_files
from s3prl_metaperser.checkpoint_form import training_fault
from s3prl_metaperser.checkpoints import DOWNSTREAM, read_checkpoint
from s3prl_metaperser.config_keys import RUNNER_KEYS, check_keys
from s3prl_metaperser.devices import works_here
from s3prl_metaperser.errors import MetaPerSERError, suggest
from s3prl_metaperser.given_arguments import check_trusted, check_types
from s3prl_metaperser.network import Network
from s3prl_metaperser.optimization import check_optimization
from s3prl_metaperser.preflight_arguments import apply_overrides, check_given_once, parse, without_auto_resume
from s3prl_metaperser.preflight_files import Config, config_path, load_checkpoint, load_config
from s3prl_metaperser.preflight_folder import check_experiment_folder, experiment_folder
from s3prl_metaperser.preflight_processes import check_as_many_processes, check_processes
from s3prl_metaperser.preflight_resumed import check_config_unheard, check_optimization_kept, check_unheard
from s3prl_metaperser.preflight_upstream import check_upstream
from s3prl_metaperser.settings import SECTION, check_tested_once, read_settings

KEPT_ON_RESUME = ("mode", "evaluate_split", "override", "backend", "local_rank", "past_exp", "device")
"""The arguments that s3prl does not replace by the checkpoint's when it resumes from one."""

UNKNOWN_DIM = 1
"""Stands for the upstream's feature dimension, which is known when s3prl has made it."""


def check(arguments: Sequence[str], sets_run_up: bool = True) -> list[str]:
    """Check a command line of ``run_downstream``.

    Args:
        arguments: the command line without the program's name.
        sets_run_up: whether to look at settings, corpus, split and episodes too, by setting the run up as the expert
            will; it says the same of them itself, when s3prl has made the experiment's folder.

    Returns:
        The command line to give to s3prl: the same, with the path of an installed config where it was given by name,
        and the path of the newest sound checkpoint where ``-e FOLDER`` or ``-a`` would take a damaged one.

    Raises:
        MetaPerSERError: s3prl would fail on it.
        SystemExit: s3prl's parser does not accept it, or was asked for ``--help``.
    """
    hub = _import_hub()
    parsed = parse(arguments)
    check_given_once(parsed)
    args = parsed.namespace
    passed_on = list(arguments)
    saved: dict[str, Any] = {}
    saved_config: Config = {}

    checkpoint_path, damaged = _past_experiment(args)
    if damaged:
        passed_on = [*without_auto_resume(passed_on, parsed.actions), "-e", str(checkpoint_path)]
    if checkpoint_path is not None:
        checkpoint = load_checkpoint(checkpoint_path, "-e")
        fault = training_fault(checkpoint) if args.mode == "train" else None
        if fault is not None:
            raise MetaPerSERError(f"-e {checkpoint_path}: cannot be trained on from: {fault}")
        if args.mode == "train":
            check_as_many_processes(checkpoint, args.local_rank, checkpoint_path)
        saved_config = checkpoint["Config"]
        config = copy.deepcopy(saved_config)
        saved = {key: value for key, value in vars(checkpoint["Args"]).items() if key not in KEPT_ON_RESUME}
        found = {"past_exp": str(checkpoint_path), "init_ckpt": str(checkpoint_path)}
        args = argparse.Namespace(**{**vars(args), **saved, **found})
    else:
        if args.expname is None and args.expdir is None:
            raise MetaPerSERError("no folder for the experiment: give it a name with -n, or a folder with -p")
        if args.downstream is None:
            raise MetaPerSERError("no downstream given: -d metaperser is this project's")
        path = config_path(args)
        if args.config is not None and path != Path(args.config):
            passed_on += ["-c", str(path)]
        config = load_config(path)

    given = apply_overrides(args, config)
    check_types(parsed.actions, args, f"-e {checkpoint_path}" if saved else "the command line")
    by_hand = [name.removeprefix("args.") for name, _ in given]
    if checkpoint_path is not None:
        flags = {name: getattr(parsed.namespace, name) for name in parsed.times}
        is_found_by_a = parsed.namespace.auto_resume and checkpoint_path.parent == experiment_folder(parsed.namespace)
        check_unheard(parsed.actions, flags, saved, by_hand, checkpoint_path, is_found_by_a)
        beside = config
        if "config" in flags:
            beside = load_config(config_path(parsed.namespace))
            apply_overrides(copy.copy(args), beside)
        if args.mode == "train":
            check_optimization_kept(beside, saved_config, checkpoint_path)
        if beside is not config:
            check_config_unheard(beside, config, flags["config"], checkpoint_path)
    check_trusted(saved, by_hand, f"-e {checkpoint_path}", config=saved_config)
    if any(literal != text for _, (text, literal) in given):
        # s3prl evaluates each value as Python. What it gets is a literal, of the value that is checked here.
        passed_on += ["-o", ",,".join(f"{name}={literal}" for name, (_, literal) in given)]
    _check_downstream(args.downstream)
    check_upstream(args, hub)
    if args.init_ckpt is not None and checkpoint_path is None:
        _check_initial_checkpoint(args)
    _check_device(args.device, args.local_rank)
    _check_config(args, config)
    if args.downstream == "metaperser":
        check_keys(config, saved_config, args.config or "the config", by_hand=[name for name, _ in given])
    folder = experiment_folder(args)
    check_experiment_folder(folder)
    if args.downstream == "metaperser" and args.mode == "train":
        resuming.refuse_used(folder, checkpoint_path, {**config, **vars(args)} if args.auto_resume else None)
    if args.downstream == "metaperser" and args.mode == "evaluate" and args.evaluate_split not in ("dev", "test"):
        raise MetaPerSERError(f"-t {args.evaluate_split}: evaluation is of dev or test")
    if args.downstream == "metaperser":
        loaded = None if args.init_ckpt is None else read_checkpoint(Path(args.init_ckpt))
        if sets_run_up:
            _check_run(args, config, loaded)
        if "downstream_variant" in by_hand:
            check_tested_once(read_settings(config.get(SECTION), args.downstream_variant), args.downstream_variant)
    if args.mode == "inference" and not Path(args.evaluate_split).is_file():
        raise MetaPerSERError(f"-t {args.evaluate_split}: no such file; -m inference needs an audio file there")
    if args.mode == "train":
        resuming.set_aside(damaged)
    return passed_on


def ways_on(arguments: Sequence[str]) -> list[str]:
    """Say how a training that is interrupted can be gone on with.

    Args:
        arguments: as :func:`check` has found nothing wrong with.

    Returns:
        One sentence, or none: where nothing is trained, no state is left, or the command would not find it there.
    """
    args = parse(arguments).namespace
    if args.mode != "train" or "args.expdir" in (args.override or ""):
        return []
    try:
        found = state_files.states(args.past_exp or experiment_folder(args))
    except MetaPerSERError:
        # What has come into the way since is said by the command that it is in the way of.
        return []
    return ["the same command and -a go on from the last checkpoint"] if found else []


def _import_hub() -> ModuleType:
    try:
        from s3prl import hub
    except ImportError as error:
        raise MetaPerSERError(
            f"s3prl cannot be imported ({error}): install it with this package, and where it is an editable clone, "
            "run `metaperser link-s3prl`"
        ) from None
    module: ModuleType = hub
    return module


def _past_experiment(args: argparse.Namespace) -> tuple[Path | None, list[Path]]:
    """Find the checkpoint that s3prl is to resume from, by ``-e`` or ``-a``, and damaged ones that are newer."""
    expdir = experiment_folder(args)
    past = args.past_exp
    if args.auto_resume and (states := state_files.states(expdir, "-p")):
        return resuming.newest_sound(states)
    if past is None:
        return None, []
    if not os.path.isdir(past):
        return Path(past), []
    states = state_files.states(past, "-e")
    if not states:
        raise MetaPerSERError(
            f"-e {past}: no checkpoint in this folder; expected states-STEP.ckpt, or name a .ckpt file"
        )
    return resuming.newest_sound(states)


def _check_downstream(name: str) -> None:
    import s3prl.downstream

    known = [module.name for module in pkgutil.iter_modules(s3prl.downstream.__path__) if module.ispkg]
    try:
        found = importlib.util.find_spec(f"s3prl.downstream.{name}.expert") is not None
    except (ImportError, ValueError):
        found = False
    if found:
        return
    if name == "metaperser":
        raise MetaPerSERError(
            f"-d metaperser: not in this s3prl ({s3prl.downstream.__path__[0]}): run `metaperser link-s3prl`"
        )
    raise MetaPerSERError(f"-d {name}: s3prl has no such downstream: {suggest(name, {*known, 'metaperser'})}")


def _check_initial_checkpoint(args: argparse.Namespace) -> None:
    path = Path(args.init_ckpt)
    made_with = load_checkpoint(path, "-i")["Args"].upstream
    if made_with != args.upstream:
        raise MetaPerSERError(f"-i {path}: made with -u {made_with}, but this run has -u {args.upstream}; use the same")


def _check_run(args: argparse.Namespace, config: Config, loaded: Config | None) -> None:
    """Set the run up as the expert will, all but the upstream: settings, corpus, split, episodes, checkpoint.

    Args:
        args: the command line.
        config: the config.
        loaded: the checkpoint of ``-e`` or ``-i``; else it is that of ``init_from`` that must be one for this run.
    """
    from s3prl_metaperser.inference import Inference
    from s3prl_metaperser.run import Run

    section, given = config.get("downstream_expert"), {**config, **vars(args)}
    network: Network
    if args.mode == "inference":
        network = Inference(section, UNKNOWN_DIM, given)
    else:
        network = Run(section, UNKNOWN_DIM, experiment_folder(args), given)
    initial = network.initial_checkpoint()
    if loaded is not None:
        network.check_weights(loaded[DOWNSTREAM], with_upstream=False)
    elif initial is not None:
        network.check_initial_weights(initial[DOWNSTREAM], with_upstream=False)


def _check_device(device: str, local_rank: int | None = None) -> None:
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise MetaPerSERError(f"--device {device}: not a device of torch; expected cpu, cuda or cuda:NUMBER") from None
    if chosen.type == "meta":
        raise MetaPerSERError(f"--device {device}: computes nothing; expected cpu, cuda or cuda:NUMBER")
    if chosen.type != "cuda" and not works_here(chosen):
        raise MetaPerSERError(f"--device {device}: torch has no such device here; try --device cpu")
    if local_rank is not None:
        check_processes(chosen, local_rank)
    if chosen.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise MetaPerSERError(
            f"--device {device} (s3prl's default is cuda): torch finds no CUDA device here; add --device cpu"
        )
    gpus = torch.cuda.device_count()
    if chosen.index is not None and chosen.index >= gpus:
        found = "cuda:0" if gpus == 1 else f"cuda:0 to cuda:{gpus - 1}"
        raise MetaPerSERError(f"--device {device}: torch finds no such CUDA device here, only {found}")


def _check_config(args: argparse.Namespace, config: Config) -> None:
    where = args.config or "the config"
    runner = config.get("runner")
    if not isinstance(runner, dict):
        raise MetaPerSERError(f"{where}: the key 'runner' is missing; `metaperser config` lists complete configs")
    if args.mode != "train":
        return
    missing = [f"runner.{key}" for key in RUNNER_KEYS if runner.get(key) is None]
    missing += [] if isinstance(config.get("optimizer"), dict) else ["optimizer"]
    if missing:
        raise MetaPerSERError(f"{where}: missing {', '.join(missing)}, which s3prl's runner needs to train")
    check_optimization(config)
