"""Checking the command line of s3prl's ``run_downstream`` before it acts on any of it.

s3prl itself finds out about a misspelt upstream or a missing checkpoint halfway, in a traceback, with the experiment's
folder already made. Here the arguments are parsed by s3prl's own parser, resolved as s3prl will resolve them
(``-e`` and ``-a`` take most arguments from the checkpoint, ``-o`` overrides all), and each is looked at; nothing is
written, and no model is built.
"""

from __future__ import annotations

import argparse
import ast
import copy
import glob
import importlib.util
import os
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

from s3prl_metaperser import configs
from s3prl_metaperser.errors import MetaPerSERError, suggest
from s3prl_metaperser.preflight_upstream import check_upstream

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

Config = dict[str, Any]


def check(arguments: Sequence[str], sets_run_up: bool = True) -> list[str]:
    """Check a command line of ``run_downstream``.

    Args:
        arguments: the command line without the program's name.
        sets_run_up: whether to look at settings, corpus, split and episodes too, by setting the run up as the expert
            will; it says the same of them itself, when s3prl has made the experiment's folder.

    Returns:
        The command line to give to s3prl: the same, with the path of an installed config where it was given by name.

    Raises:
        MetaPerSERError: s3prl would fail on it.
        SystemExit: s3prl's parser does not accept it, or was asked for ``--help``.
    """
    hub = _import_hub()
    args = _parse(arguments)
    passed_on = list(arguments)

    checkpoint_path = _past_experiment(args)
    if checkpoint_path is not None:
        checkpoint = _load_checkpoint(checkpoint_path, "-e")
        config = copy.deepcopy(checkpoint["Config"])
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

    _apply_overrides(args, config)
    _check_downstream(args.downstream)
    check_upstream(args, hub)
    if args.init_ckpt is not None and checkpoint_path is None:
        _check_initial_checkpoint(args)
    _check_device(args.device)
    _check_config(args, config)
    _check_experiment_folder(args)
    if args.downstream == "metaperser" and sets_run_up:
        _check_run(args, config)
    if args.mode == "inference" and not Path(args.evaluate_split).is_file():
        raise MetaPerSERError(f"-t {args.evaluate_split}: no such file; -m inference needs an audio file there")
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


class _Parsed(BaseException):
    """Carries the parsed arguments out of s3prl's function."""

    def __init__(self, namespace: argparse.Namespace) -> None:
        super().__init__()
        self.namespace = namespace


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse with s3prl's own parser, whatever its version.

    s3prl builds its parser and acts upon the result in one function, so that function is stopped between the two.
    """
    from s3prl.run_downstream import get_downstream_args

    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Parsed(parse_args(parser, list(arguments)))

    argparse.ArgumentParser.parse_args = parse_and_stop  # type: ignore[method-assign, assignment]
    try:
        get_downstream_args()
    except _Parsed as parsed:
        return parsed.namespace
    finally:
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    raise MetaPerSERError("this version of s3prl reads its command line in an unknown way: use s3prl 0.4")


def _past_experiment(args: argparse.Namespace) -> Path | None:
    """Find the checkpoint that s3prl will resume from, by ``-e`` or ``-a``."""
    expdir = args.expdir or f"result/downstream/{args.expname}"
    past = args.past_exp
    if args.auto_resume and _states(expdir):
        past = expdir
    if past is None:
        return None
    if not os.path.isdir(past):
        return Path(past)
    states = _states(past)
    if not states:
        raise MetaPerSERError(
            f"-e {past}: no checkpoint in this folder; expected states-STEP.ckpt, or name a .ckpt file"
        )
    try:
        return Path(max(states, key=lambda path: int(path.split("-")[-1].split(".")[0])))
    except ValueError:
        raise MetaPerSERError(f"-e {past}: holds a states-*.ckpt without a step number; name the .ckpt file") from None


def _states(folder: str) -> list[str]:
    return glob.glob(f"{glob.escape(folder)}/states-*.ckpt")


def _load_checkpoint(path: Path, flag: str) -> Config:
    """Load a checkpoint of s3prl's runner, by the same loader that s3prl will use."""
    if not path.is_file():
        raise MetaPerSERError(
            f"{flag} {path}: no such file; expected a checkpoint, such as states-STEP.ckpt or dev-best.ckpt"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu")
    except Exception:  # whatever: torch's unpickler fails in any way on bytes that are not its own
        raise MetaPerSERError(
            f"{flag} {path}: not readable as a checkpoint ({path.stat().st_size} bytes); it may be cut off, or be "
            "something else"
        ) from None
    if not isinstance(checkpoint, dict) or not hasattr(checkpoint.get("Args"), "upstream"):
        raise MetaPerSERError(f"{flag} {path}: not a checkpoint of s3prl's runner, which holds Args and Config")
    if not isinstance(checkpoint.get("Config"), dict):
        raise MetaPerSERError(f"{flag} {path}: its Config is missing; expected a checkpoint of s3prl's runner")
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
        with path.open(encoding="utf-8") as file:
            config = yaml.load(file, Loader=yaml.FullLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise MetaPerSERError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MetaPerSERError(f"{path}: not valid YAML: {error}") from None
    except OSError as error:
        raise MetaPerSERError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(config, dict):
        raise MetaPerSERError(
            f"{path}: expected keys such as runner, optimizer and downstream_expert, found {config!r:.40}"
        )
    return config


def _apply_overrides(args: argparse.Namespace, config: Config) -> None:
    """Do to ``args`` and ``config`` what s3prl's ``override`` will do, without evaluating anything but literals."""
    if args.override is None or args.override.lower() == "none":
        return
    known = sorted(vars(args))
    for option in args.override.split(",,"):
        where = f"-o {option.strip()!r}"
        key, *values = option.split("=")
        root, *names = key.strip().split(".")
        if len(values) != 1 or root not in ("args", "config") or not all(names) or not names:
            raise MetaPerSERError(
                f"{where}: expected args.NAME=VALUE or config.KEY.KEY=VALUE, each with one '=', several joined by ',,'"
            )
        value = _literal(values[0].strip())
        if root == "args":
            if len(names) > 1 or names[0] not in known:
                raise MetaPerSERError(f"{where}: no such argument; {suggest('.'.join(names), known)}")
            setattr(args, names[0], value)
            continue
        place: Any = config
        for name in names[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise MetaPerSERError(f"{where}: {name!r} holds the value {place!r} in the config, not further keys")
        place[names[-1]] = value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


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


def _check_run(args: argparse.Namespace, config: Config) -> None:
    """Set the run up as the expert will, all but the upstream: settings, corpus, split, episodes, ``init_from``."""
    from s3prl_metaperser.inference import Inference
    from s3prl_metaperser.run import Run

    section, given = config.get("downstream_expert"), {**config, **vars(args)}
    if args.mode == "inference":
        Inference(section, 1, given).initial_checkpoint()
        return
    Run(section, 1, Path(args.expdir or f"result/downstream/{args.expname}"), given).initial_checkpoint()


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise MetaPerSERError(f"--device {device}: not a device of torch; expected cpu, cuda or cuda:NUMBER") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise MetaPerSERError(
            f"--device {device} (s3prl's default is cuda): torch finds no CUDA device here; add --device cpu"
        )


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


def _check_experiment_folder(args: argparse.Namespace) -> None:
    folder = Path(args.expdir or f"result/downstream/{args.expname}")
    if folder.exists() and not folder.is_dir():
        raise MetaPerSERError(f"-p {folder}: a file; expected a folder to write the experiment to")
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise MetaPerSERError(f"-p {folder}: cannot be made or written, because of {existing}")
