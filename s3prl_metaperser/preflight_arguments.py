"""The command line of s3prl's ``run_downstream`` as s3prl reads it: its own parser, and ``-o`` without evaluation."""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from s3prl_metaperser.errors import MetaPerSERError, suggest
from s3prl_metaperser.yaml_text import DEEPEST, LONGEST

LONGEST_OVERRIDE = 100_000
"""Characters of ``-o``: a system takes about as many in one argument."""
ONCE = {"override": ("-o", "join them by ,, in one"), "config": ("-c", "give one, and -o for what is to differ")}
"""Arguments that look as if they added up when they are given again, by their name in the namespace."""


class Parsed(BaseException):
    """Carries the parsed arguments, what the parser knows, and what was given, out of s3prl's function."""

    def __init__(self, namespace: argparse.Namespace, actions: list[argparse.Action], times: Mapping[str, int]) -> None:
        super().__init__()
        self.namespace = namespace
        self.actions = actions
        self.times = times
        """How often each argument was given that was."""


def parse(arguments: Sequence[str]) -> Parsed:
    """Parse with s3prl's own parser, whatever its version.

    s3prl builds its parser and acts upon the result in one function, so that function is stopped between the two.

    Args:
        arguments: the command line without the program's name.

    Raises:
        MetaPerSERError: when s3prl has no such function any more.
        SystemExit: s3prl's parser does not accept it, or was asked for ``--help``.
    """
    from s3prl.run_downstream import get_downstream_args

    parse_args = argparse.ArgumentParser.parse_args
    times: Counter[str] = Counter()

    class Counting(argparse.Namespace):
        def __setattr__(self, name: str, value: Any) -> None:
            times[name] += 1
            super().__setattr__(name, value)

    def parse_and_stop(parser: argparse.ArgumentParser, *_: object) -> None:
        # What is there already is not replaced by its default, which a value that was given may be equal to.
        told = Counting(**{action.dest: None for action in parser._actions})
        times.clear()
        parse_args(parser, list(arguments), told)
        raise Parsed(parse_args(parser, list(arguments)), parser._actions, times)

    argparse.ArgumentParser.parse_args = parse_and_stop  # type: ignore[method-assign, assignment]
    try:
        get_downstream_args()
    except Parsed as parsed:
        return parsed
    finally:
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    raise MetaPerSERError("this version of s3prl reads its command line in an unknown way: use s3prl 0.4")


def check_given_once(parsed: Parsed) -> None:
    """Refuse a second ``-o`` or ``-c``: the parser keeps the last, and says nothing of the others.

    Raises:
        MetaPerSERError: naming the flag.
    """
    for name, (flag, cure) in ONCE.items():
        if parsed.times[name] > 1:
            raise MetaPerSERError(f"{flag} is given {parsed.times[name]} times, of which s3prl takes the last; {cure}")


def known_arguments() -> Parsed:
    """Give s3prl's parser's defaults, and what it knows of each argument."""
    return parse(["-m", "inference"])


def without_auto_resume(arguments: Sequence[str], actions: Sequence[argparse.Action]) -> list[str]:
    """Leave out ``-a``, also of flags in one (``-fa``), for which s3prl would look into the folder once more.

    Args:
        arguments: the command line without the program's name.
        actions: what the parser knows.
    """
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


def apply_overrides(args: argparse.Namespace, config: dict[str, Any]) -> list[tuple[str, tuple[str, str]]]:
    """Do to ``args`` and ``config`` what s3prl's ``override`` will do, without evaluating anything but literals.

    Args:
        args: the command line, of which ``override`` is ``-o``.
        config: what the config file or the checkpoint holds.

    Returns:
        For each: what is set, such as ``args.seed``, the value's text as it was given, and as a Python literal.

    Raises:
        MetaPerSERError: for what s3prl would not take, or would take for something else.
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
