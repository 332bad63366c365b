"""The command ``metaperser``: everything around a run of s3prl, from corpora to result tables.

Nothing heavy is imported before the arguments are understood, so that ``metaperser --help`` answers at once; a
subcommand's own module imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from s3prl_metaperser import __version__
from s3prl_metaperser.argument_types import given_path
from s3prl_metaperser.errors import run_as_command


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all subcommands; each sets ``run``, a function of the parsed arguments to an exit code."""
    # Imported here and not above, so that a library user of this module does not load every room's command line.
    from s3prl_metaperser.calibration import commands as calibration
    from s3prl_metaperser.corpus import commands as corpus
    from s3prl_metaperser.experiments import commands as experiments
    from s3prl_metaperser.personalize import commands as personalize
    from s3prl_metaperser.portrait import commands as portrait
    from s3prl_metaperser.s3prl_export import commands as s3prl_export

    parser = argparse.ArgumentParser(
        prog="metaperser",
        description="Few-shot, listener-personalised speech emotion recognition by meta-learning, on s3prl.",
        epilog="Training itself is s3prl's: python -m s3prl_metaperser.run_downstream -m train -d metaperser ...",
    )
    parser.add_argument("--version", action="version", version=f"metaperser {__version__}")
    subparsers = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True)
    corpus.register(subparsers)
    experiments.register(subparsers)
    personalize.register(subparsers)
    calibration.register(subparsers)
    portrait.register(subparsers)
    _register_config(subparsers)
    _register_links(subparsers)
    s3prl_export.register(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        arguments: the command line without the program's name; by default the process's own.

    Returns:
        The exit code of the subcommand.

    Raises:
        SystemExit: with code 2 after bad input, whose one line is then on stderr.
    """

    def command() -> int:
        parsed = build_parser().parse_args(arguments)
        code: int = parsed.run(parsed)
        return code

    return run_as_command(command)


def _register_config(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "config",
        help="list the example configs, or print one",
        description="List the example configs with what each is for, or print one, commented, to start your own from.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the config to print; without it, all are listed")
    parser.set_defaults(run=_run_config)


def _run_config(args: argparse.Namespace) -> int:
    from s3prl_metaperser import configs

    if args.name is not None:
        print(configs.find(args.name).read_text(encoding="utf-8"), end="")
        return 0
    found = configs.available()
    width = max(map(len, found), default=0)
    for name, path in found.items():
        print(f"{name:{width}}  {configs.describe(path)}".rstrip())
    print(
        "\nmetaperser config NAME > my.yaml   writes one to a file of your own"
        f"\nThe files themselves are in {configs.folder()}"
    )
    return 0


def _register_links(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, run, summary in (
        ("link-s3prl", _run_link, "place the downstream into an s3prl that is an editable clone"),
        ("unlink-s3prl", _run_unlink, "remove exactly what link-s3prl placed"),
    ):
        parser = subparsers.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        parser.add_argument(
            "--s3prl",
            type=given_path,
            metavar="PATH",
            help="the clone, or the package folder s3prl/ in it; by default the s3prl that is installed here",
        )
        parser.set_defaults(run=run)


def _run_link(args: argparse.Namespace) -> int:
    from s3prl_metaperser import s3prl_link

    for line in s3prl_link.link(s3prl_link.find_s3prl(args.s3prl)):
        print(line)
    return 0


def _run_unlink(args: argparse.Namespace) -> int:
    from s3prl_metaperser import s3prl_link

    for line in s3prl_link.unlink(s3prl_link.find_s3prl(args.s3prl)):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
