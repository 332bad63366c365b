"""Checking the command line of s3prl's ``run_downstream`` before it acts on any of it.

s3prl itself finds out about a misspelt upstream or a missing checkpoint halfway, in a traceback, with the experiment's
folder already made. Here the arguments are parsed by s3prl's own parser, resolved as s3prl will resolve them
(``-e`` and ``-a`` take most arguments from the checkpoint, ``-o`` overrides all), and each is looked at; nothing is
written, and no model is built. A damaged newest ``states-STEP.ckpt`` is passed over for the one before it; training
that goes on from that renames it.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import os
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from s3prl_metaperser import configs, resuming, torch_files
from s3prl_metaperser.checkpoint_form import command_fault, training_fault
from s3prl_metaperser.checkpoints import DOWNSTREAM, read_checkpoint
from s3prl_metaperser.devices import works_here
from s3prl_metaperser.errors import MetaPerSERError, suggest
from s3prl_metaperser.given_arguments import check_trusted, check_types
from s3prl_metaperser.network import Network
from s3prl_metaperser.optimization import check_optimization
from s3prl_metaperser.preflight_folder import check_experiment_folder, check_unheard, experiment_folder
from s3prl_metaperser.preflight_processes import check_processes
from s3prl_metaperser.preflight_upstream import check_upstream
from s3prl_metaperser.yaml_text import DEEPEST, LONGEST, read_yaml

LONGEST_OVERRIDE = 100_000
"""Characters of ``-o``: a system takes about as many in one argument."""

RUNNER_KEYS = (
    "total_steps",
    "gradient_clipping",
    "gradient_accumulate_steps",
    "log_step",
    "eval_step",
    "save_step",
    "max_keep",
    "eval_dataloaders",
)
"""What s3prl's ``Runner.train`` reads from ``runner:`` without a default."""

KEPT_ON_RESUME = ("mode", "evaluate_split", "override", "backend", "local_rank", "past_exp", "device")
"""The arguments that s3prl does not replace by the checkpoint's when it resumes from one."""

UNKNOWN_DIM = 1
"""Stands for the upstream's feature dimension, which is known when s3prl has made it."""

Config = dict[str, Any]


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
    parsed = _parse(arguments)
    args = parsed.namespace
    passed_on = list(arguments)
    saved: dict[str, Any] = {}
    saved_config: Config = {}

    checkpoint_path, damaged = _past_experiment(args)
    if damaged:
        passed_on = [*_without_auto_resume(passed_on, parsed.actions), "-e", str(checkpoint_path)]
    if checkpoint_path is not None:
        checkpoint = _load_checkpoint(checkpoint_path, "-e")
        fault = training_fault(checkpoint) if args.mode == "train" else None
        if fault is not None:
            raise MetaPerSERError(f"-e {checkpoint_path}: cannot be trained on from: {fault}")
        saved_config = checkpoint["Config"]
        config = copy.deepcopy(saved_config)
        saved = {key: value for key, value in vars(checkpoint["Args"]).items() if key not in KEPT_ON_RESUME}
        args = argparse.Namespace(**{**vars(args), **saved, "init_ckpt": str(checkpoint_path)})
    else:
        if args.expname is None and args.expdir is None:
            raise MetaPerSERError("no folder for the experiment: give it a name with -n, or a folder with -p")
        if args.downstream is None:
            raise MetaPerSERError("no downstream given: -d metaperser is this project's")
        path = _config_path(args)
        if args.config is not None and path != Path(args.config):
            passed_on += ["-c", str(path)]
        config = _load_config(path)

    given = _apply_overrides(args, config)
    check_types(parsed.actions, args, f"-e {checkpoint_path}" if saved else "the command line")
    by_hand = [name.removeprefix("args.") for name, _ in given]
    if checkpoint_path is not None:
        check_unheard(parsed.actions, parsed.namespace, saved, by_hand, checkpoint_path)
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
    folder = experiment_folder(args)
    check_experiment_folder(folder)
    if args.downstream == "metaperser" and args.mode == "train" and checkpoint_path is None and not args.auto_resume:
        resuming.refuse_used(folder)
    if args.downstream == "metaperser":
        loaded = None if args.init_ckpt is None else read_checkpoint(Path(args.init_ckpt))
        if sets_run_up:
            _check_run(args, config, loaded)
    if args.mode == "inference" and not Path(args.evaluate_split).is_file():
        raise MetaPerSERError(f"-t {args.evaluate_split}: no such file; -m inference needs an audio file there")
    if args.mode == "train":
        resuming.set_aside(damaged)
    return passed_on


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


class Parsed(BaseException):
    """Carries the parsed arguments, and what the parser knows, out of s3prl's function."""

    def __init__(self, namespace: argparse.Namespace, actions: list[argparse.Action]) -> None:
        super().__init__()
        self.namespace = namespace
        self.actions = actions


def _parse(arguments: Sequence[str]) -> Parsed:
    """Parse with s3prl's own parser, whatever its version.

    s3prl builds its parser and acts upon the result in one function, so that function is stopped between the two.
    """
    from s3prl.run_downstream import get_downstream_args

    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Parsed(parse_args(parser, list(arguments)), parser._actions)

    argparse.ArgumentParser.parse_args = parse_and_stop  # type: ignore[method-assign, assignment]
    try:
        get_downstream_args()
    except Parsed as parsed:
        return parsed
    finally:
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    raise MetaPerSERError("this version of s3prl reads its command line in an unknown way: use s3prl 0.4")


def known_arguments() -> Parsed:
    """Give s3prl's parser's defaults, and what it knows of each argument."""
    return _parse(["-m", "inference"])


def _past_experiment(args: argparse.Namespace) -> tuple[Path | None, list[Path]]:
    """Find the checkpoint that s3prl is to resume from, by ``-e`` or ``-a``, and damaged ones that are newer."""
    expdir = experiment_folder(args)
    past = args.past_exp
    if args.auto_resume and resuming.states(expdir):
        past = expdir
    if past is None:
        return None, []
    if not os.path.isdir(past):
        return Path(past), []
    states = resuming.states(past)
    if not states:
        raise MetaPerSERError(
            f"-e {past}: no checkpoint in this folder; expected states-STEP.ckpt, or name a .ckpt file"
        )
    return resuming.newest_sound(states)


def _without_auto_resume(arguments: Sequence[str], actions: Sequence[argparse.Action]) -> list[str]:
    """Leave out ``-a``, also of flags in one (``-fa``), for which s3prl would look into the folder once more."""
    switches = {option[1] for action in actions if action.nargs == 0 for option in action.option_strings}
    kept = []
    for one in arguments:
        if one.startswith("-") and not one.startswith("--") and len(one) > 1 and set(one[1:]) <= switches:
            one = one.replace("a", "")
            if one == "-":
                continue
        elif len(one) > 2 and "--auto_resume".startswith(one):
            continue
        kept.append(one)
    return kept


def _load_checkpoint(path: Path, flag: str) -> Config:
    """Load a checkpoint of s3prl's runner with torch's safe loader."""
    if not path.is_file():
        raise MetaPerSERError(
            f"{flag} {path}: no such file; expected a checkpoint, such as states-STEP.ckpt or dev-best.ckpt"
        )
    damage = torch_files.damage(path)
    if damage is not None:
        raise MetaPerSERError(f"{flag} {path}: not readable as a checkpoint ({damage})")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever: torch's unpickler fails in any way on bytes that are not its own
        raise MetaPerSERError(
            f"{flag} {path}: not readable as a checkpoint ({path.stat().st_size} bytes); it may be cut off, or be "
            "something else"
        ) from None
    if not isinstance(checkpoint, dict) or not hasattr(checkpoint.get("Args"), "upstream"):
        raise MetaPerSERError(f"{flag} {path}: not a checkpoint of s3prl's runner, which holds Args and Config")
    if not isinstance(checkpoint.get("Config"), dict):
        raise MetaPerSERError(f"{flag} {path}: its Config is missing; expected a checkpoint of s3prl's runner")
    fault = command_fault(checkpoint["Args"], checkpoint["Config"])
    if fault is not None:
        raise MetaPerSERError(f"{flag} {path}: not written by s3prl's runner: {fault}")
    return checkpoint


def _config_path(args: argparse.Namespace) -> Path:
    if args.config is None:
        path = Path(f"./downstream/{args.downstream}/config.yaml")
        if not path.is_file():
            raise MetaPerSERError("no config given: name one with -c, a file or a name of `metaperser config`")
        return path
    path = Path(args.config)
    if path.is_dir():
        raise MetaPerSERError(f"-c {path}: a folder; expected a YAML file")
    if path.is_file():
        return path
    installed = configs.available()
    if path.name != args.config:
        raise MetaPerSERError(f"-c {path}: no such file; `metaperser config` lists the configs that have names")
    named = installed.get(args.config.removesuffix(".yaml"))
    if named is None:
        raise MetaPerSERError(f"-c {path}: no such file, and no config of that name: {suggest(path.stem, installed)}")
    return named


def _load_config(path: Path) -> Config:
    try:
        config = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise MetaPerSERError(f"{path}: not valid YAML: {error}") from None
    except OSError as error:
        raise MetaPerSERError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(config, dict):
        raise MetaPerSERError(
            f"{path}: expected keys such as runner, optimizer and downstream_expert, found {config!r:.40}"
        )
    return config


def _apply_overrides(args: argparse.Namespace, config: Config) -> list[tuple[str, tuple[str, str]]]:
    """Do to ``args`` and ``config`` what s3prl's ``override`` will do, without evaluating anything but literals.

    Returns:
        For each: what is set, such as ``args.seed``, the value's text as it was given, and as a Python literal.
    """
    given: list[tuple[str, tuple[str, str]]] = []
    if args.override is None or args.override.lower() == "none":
        return given
    if len(args.override) > LONGEST_OVERRIDE:
        raise MetaPerSERError(
            f"-o has {len(args.override):,} characters; expected {LONGEST_OVERRIDE:,} at most: use -c"
        )
    known = sorted(vars(args))
    for option in args.override.split(",,"):
        where = f"-o {option.strip()!r:.100}"
        key, *values = option.split("=")
        root, *names = key.strip().split(".")
        if len(values) != 1 or root not in ("args", "config") or not all(names) or not names:
            raise MetaPerSERError(
                f"{where}: expected args.NAME=VALUE or config.KEY.KEY=VALUE, each with one '=', several joined by ',,'"
            )
        if len(names) > DEEPEST:
            raise MetaPerSERError(f"{where}: {len(names)} keys in each other; expected {DEEPEST} at most")
        text = values[0].strip()
        if len(text) > LONGEST:
            raise MetaPerSERError(f"{where}: a value of {len(text):,} characters; expected {LONGEST:,} at most")
        value, literal = _literal(text)
        given.append((key.strip(), (text, literal)))
        if root == "args":
            if len(names) > 1 or names[0] not in known:
                raise MetaPerSERError(f"{where}: no such argument; {suggest('.'.join(names), known)}")
            setattr(args, names[0], value)
            continue
        place: Any = config
        for name in names[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise MetaPerSERError(
                    f"{where}: {name!r} holds the value {place!r:.80} in the config, not further keys"
                )
        place[names[-1]] = value
    return given


def _literal(text: str) -> tuple[Any, str]:
    """Read a value as a Python literal, or else as text; give it, and what s3prl is to evaluate for it."""
    try:
        return ast.literal_eval(text), text
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text, repr(text)


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
    made_with = _load_checkpoint(path, "-i")["Args"].upstream
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
