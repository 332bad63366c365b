"""The paper's whole experiment from the recordings to the tables: ``python -m s3prl_metaperser.experiments.reproduce``.

Prepares IEMOCAP, or a corpus in its layout, and makes Table 1, Table 2 and Figure 2 of it in one folder, by the same
code as ``metaperser experiment``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from s3prl_metaperser.argument_types import given_path
from s3prl_metaperser.errors import run_as_command
from s3prl_metaperser.experiments.commands import (
    HelpFormatter,
    add_figure_shots,
    add_recipes,
    add_run_arguments,
    add_shots,
    make_launcher,
    make_setup,
    recipes_of,
    run_all,
    unique,
)
from s3prl_metaperser.experiments.preparation import prepare

if TYPE_CHECKING:
    from s3prl_metaperser.experiments.experiment import Experiment


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="run_downstream.sh reproduce",
        description="Prepare IEMOCAP, train SSL-E, Multi-Few and Meta-PerSER in every fold and scenario, and make "
        "Table 1, Table 2, Figure 2 and a report. Given again, the command goes on where it was stopped.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("root", type=given_path, metavar="IEMOCAP_ROOT", help="IEMOCAP_full_release, or any corpus in its layout")
    add("-u", "--upstream", default="wavlm_base", help="s3prl upstream")
    add("--out", type=given_path, default=Path("result/reproduce"), metavar="DIR", help="where everything goes")
    add("--name", default="IEMOCAP", help="what to call the corpus")
    add_shots(parser, "table1")
    add_figure_shots(parser, "--figure-shots")
    add_recipes(parser)
    add_run_arguments(parser)
    return parser


def reproduce(args: argparse.Namespace) -> int:
    """Prepare the corpus and make everything of it.

    Returns:
        The exit code: 1 where a run failed.

    Raises:
        MetaPerSERError: when something that was given is wrong.
    """
    recipes_of(args)  # refuses some, which reading the recordings need not come before
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder) / "corpus"
            prepare(args.root, corpus, args.name)
            return run_all(args, _experiments(args, corpus))
    corpus = args.out / "corpus"
    prepare(args.root, corpus, args.name, lambda draft: _check(args, draft))
    return run_all(args, _experiments(args, corpus))


def _experiments(args: argparse.Namespace, corpus: Path) -> list[Callable[[], Experiment]]:
    from s3prl_metaperser.experiments.figure2 import figure2
    from s3prl_metaperser.experiments.table1 import table1
    from s3prl_metaperser.experiments.table2 import table2

    recipes = recipes_of(args)
    setup = make_setup(args, corpus, args.out, args.shots)
    return [
        lambda: table1(setup, args.inner_lr, recipes),
        lambda: table2(setup, args.inner_lr),
        lambda: figure2(setup, args.inner_lr, recipes, unique(args.figure_shots)),
    ]


def _check(args: argparse.Namespace, corpus: Path) -> None:
    """Find what is wrong with the experiments before their folder is made; :func:`run_all` looks again."""
    from s3prl_metaperser.experiments.experiment import refuse_others

    launcher = make_launcher(args)
    planned = [make() for make in _experiments(args, corpus)]
    refuse_others(args.out)
    planned[0].setup.check(launcher.check, launcher.is_elsewhere)  # all three have the same


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run.

    Args:
        arguments: the command line without the program's name; by default the process's own.

    Returns:
        The exit code.

    Raises:
        SystemExit: with code 2 after bad input, whose one line is then on stderr.
    """
    return run_as_command(lambda: reproduce(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
