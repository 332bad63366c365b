"""``metaperser experiment``: the paper's experiments on any prepared corpus."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from s3prl_metaperser.argument_types import Gather, given_path
from s3prl_metaperser.errors import MetaPerSERError

if TYPE_CHECKING:
    from s3prl_metaperser.experiments.experiment import Experiment
    from s3prl_metaperser.experiments.launchers import Launcher
    from s3prl_metaperser.experiments.plan import Setup
    from s3prl_metaperser.settings import Recipe

T = TypeVar("T")

SHOTS = (2, 4, 8, 16, 32, 64)
INNER_LRS = (0.03, 0.1)
RERUN = (
    "Every run is s3prl's own runner in a process of its own. Experiments in one folder share runs, and runs that have "
    "ended well are not repeated: given again, the command goes on where it was stopped, and a training that was under "
    "way from the last state that it has saved. Exit code 1: a run failed."
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == []
        return action.help if says_nothing else super()._get_help_string(action)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``experiment`` and its kinds to the command line."""
    experiment = subparsers.add_parser(
        "experiment",
        help="run one of the paper's experiments on a prepared corpus",
        description=f"Run one of the paper's experiments. {RERUN}",
    )
    kinds = experiment.add_subparsers(title="experiments", metavar="EXPERIMENT", required=True)
    for kind, plan, help_, description in (
        (
            "table1",
            _table1,
            "the systems on the same episodes",
            "Compare the seven systems on the same episodes, and a reference that learns from all of a listener's "
            "labels. Rates and steps are chosen on the dev annotator of each fold.",
        ),
        (
            "table2",
            _table2,
            "Meta-PerSER without some of its parts",
            "Compare what each part of the method gives: INI, CSMT, DA and LSLR in the paper's six combinations.",
        ),
        (
            "figure2",
            _figure2,
            "more or fewer labelled clips",
            "Evaluate Meta-PerSER, meta-trained at one K, and Entire-Few at several K, on the same query clips.",
        ),
    ):
        parser = kinds.add_parser(
            kind,
            help=help_,
            description=f"{description} {RERUN}",
            formatter_class=HelpFormatter,
        )
        parser.add_argument(
            "--corpus", type=given_path, required=True, metavar="DIR", help="the folder that `metaperser prepare` wrote"
        )
        parser.add_argument(
            "--out", type=given_path, required=True, metavar="DIR", help="where runs, results and tables go"
        )
        parser.add_argument("-u", "--upstream", required=True, help="s3prl upstream: fbank_no_cmvn, wavlm_base, …")
        add_shots(parser, kind)
        if kind != "table2":
            add_recipes(parser)
        add_run_arguments(parser)
        parser.set_defaults(run=_run, plan=plan)


def add_shots(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add K: one for the tables; for the figure, one to train at and several to evaluate at."""
    if kind == "figure2":
        add_figure_shots(parser)
        parser.add_argument("--train-shots", type=_positive, default=32, metavar="K", help="K of meta-training")
    else:
        parser.add_argument("--shots", type=_positive, default=32, metavar="K", help="labelled clips to adapt on")


def add_figure_shots(parser: argparse.ArgumentParser, flag: str = "--shots") -> None:
    """Add the K of Figure 2."""
    parser.add_argument(
        flag,
        type=_positive,
        nargs="+",
        action=Gather,
        default=list(SHOTS),
        metavar="K",
        help="each K of the figure; those that the corpus has too few labels for are left out",
    )


def add_recipes(parser: argparse.ArgumentParser) -> None:
    """Add the recipes of Meta-PerSER."""
    parser.add_argument(
        "--recipe",
        nargs="+",
        action=Gather,
        choices=["best", "paper"],
        help="of Meta-PerSER, a row each; the first is compared with the other systems, which are the paper's "
        "(default: best paper; paper with --scope entire)",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what all experiments have in common beside corpus, upstream, K and folder."""
    add = parser.add_argument
    add("-k", "--ckpt", metavar="CKPT", help="checkpoint of a *_local upstream")
    add("--device", default="cpu", help="where torch computes: cpu, cuda, cuda:1")
    add(
        "--scenario",
        nargs="+",
        action=Gather,
        choices=["seen", "unseen"],
        default=["seen", "unseen"],
        help="of the paper",
    )
    add(
        "--scope",
        choices=["head", "linear", "entire"],
        default="linear",
        help="what adapts: two linear layers, the weighted sum too, or the upstream too (entire, the paper's: a GPU's "
        "work; see --set)",
    )
    add("--folds", type=_positive, metavar="N", help="only the first N folds; all by default")
    add("--queries", type=_positive, default=128, metavar="Q", help="clips to score")
    add("--episodes", type=_positive, default=10, metavar="N", help="per test annotator")
    add(
        "--inner-lr",
        nargs="+",
        action=Gather,
        type=_rate,
        default=list(INNER_LRS),
        metavar="LR",
        help="inner rates of meta-training to choose from on dev",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        type=_override,
        default=[],
        metavar="[CONFIG:]KEY=VALUE",
        help="further settings of all configs, or of one: downstream_expert.data.min_annotations=24, "
        "ssl_e_unseen:runner.total_steps=400; with --scope entire, downstream_expert.precision=bfloat16 and "
        "downstream_expert.entire.chunk_seconds=16 save memory",
    )
    add("--seed", type=int, default=1337, help="of initial weights and all draws")
    add("--threads", type=_positive, default=1, metavar="N", help="CPU threads of each run")
    add("--jobs", type=_positive, default=1, metavar="N", help="runs at once; with --slurm, jobs submitted at once")
    add("--dry-run", action="store_true", help="print every run and its command, and do nothing")
    slurm = parser.add_argument_group("on a cluster", "One Slurm job a run; needs pip install submitit.")
    slurm.add_argument("--slurm", action="store_true", help="submit runs to Slurm; --out must be on a shared disk")
    slurm.add_argument("--slurm-partition", metavar="NAME", help="partition; the cluster's default without it")
    slurm.add_argument("--slurm-gpus", type=int, choices=range(9), default=0, metavar="N", help="GPUs of each job")
    slurm.add_argument(
        "--slurm-time",
        type=_positive,
        default=240,
        metavar="MINUTES",
        help="time limit of each job; a training that it stops goes on from its last state when the command is given "
        "again",
    )
    slurm.add_argument("--slurm-cpus", type=_positive, metavar="N", help="CPUs of each job; --threads without it")
    slurm.add_argument("--slurm-account", metavar="NAME", help="account to charge; your default without it")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _override(text: str) -> tuple[str | None, str, Any]:
    from s3prl_metaperser.yaml_text import read_yaml

    name, equals, value = text.partition("=")
    config, colon, key = name.rpartition(":")
    if not (key and equals) or (colon and not config):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE or CONFIG:KEY=VALUE")
    try:
        return config or None, key, read_yaml(value, name)
    except MetaPerSERError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def unique(given: Sequence[T]) -> list[T]:
    """Drop what was given twice."""
    return list(dict.fromkeys(given))


def make_setup(args: argparse.Namespace, corpus: Path, out: Path, shots: int) -> Setup:
    """Make the setup that a command line asks for."""
    from s3prl_metaperser.experiments.plan import Override, Setup
    from s3prl_metaperser.experiments.runs import Upstream

    # Runs are described by absolute paths, so that their commands work from anywhere.
    ckpt = os.path.abspath(args.ckpt) if args.ckpt and os.path.exists(args.ckpt) else args.ckpt
    return Setup(
        corpus=corpus,
        out=out,
        upstream=Upstream(args.upstream, ckpt, args.device),
        scenarios=tuple(unique(args.scenario)),
        folds=args.folds,
        scope=args.scope,
        shots=shots,
        queries=args.queries,
        episodes=args.episodes,
        seed=args.seed,
        threads=args.threads,
        overrides=tuple(Override(*one) for one in args.set),
    )


def recipes_of(args: argparse.Namespace) -> list[Recipe]:
    """Give the recipes that a command line asks for, or those that its scope has.

    Raises:
        MetaPerSERError: for a recipe that has no configs in that scope.
    """
    from s3prl_metaperser.experiments.plan import RECIPES

    available = RECIPES[args.scope]
    if args.recipe is None:
        return list(available)
    for recipe in args.recipe:
        if recipe not in available:
            raise MetaPerSERError(
                f"--recipe {recipe} adapts a listener's naming, on an upstream that is not trained; with --scope "
                f"{args.scope} give --recipe {' '.join(available)}"
            )
    return unique(args.recipe)


def make_launcher(args: argparse.Namespace) -> Launcher:
    """Make what starts the runs that a command line asks for."""
    from s3prl_metaperser.experiments.launchers import local_launcher

    if not args.slurm:
        return local_launcher(args.device, args.threads)
    from s3prl_metaperser.experiments.slurm import SlurmLauncher, SlurmSettings

    return SlurmLauncher(
        SlurmSettings(
            args.slurm_partition,
            args.slurm_gpus,
            args.slurm_time,
            args.slurm_cpus or args.threads,
            args.slurm_account,
        )
    )


def run_all(args: argparse.Namespace, experiments: Sequence[Callable[[], Experiment]]) -> int:
    """Conduct experiments one after the other, or describe them for ``--dry-run``.

    Returns:
        The exit code: 1 where a run failed.

    Raises:
        MetaPerSERError: when an experiment cannot be what it is asked for, before any of them is begun.
    """
    if args.dry_run:
        from s3prl_metaperser.experiments.grid import Grid
        from s3prl_metaperser.experiments.launchers import check

        for experiment in [make() for make in experiments]:
            experiment.setup.check(check, runs_are_elsewhere=True)
            print(f"# {experiment.kind}: the config of each run is written into its folder when it is started")
            for line in Grid(experiment.nodes).describe():
                print(line)
        return 0
    # First of all: it may begin to import, in a process of its own, what runs need.
    launcher = make_launcher(args)
    from s3prl_metaperser.experiments.conduct import conduct, tell

    planned = [make() for make in experiments]
    return max([tell(experiment, conduct(experiment, launcher, args.jobs)) for experiment in planned])


def _run(args: argparse.Namespace) -> int:
    return run_all(args, [lambda: args.plan(args)])


def _table1(args: argparse.Namespace) -> Experiment:
    from s3prl_metaperser.experiments.table1 import table1

    return table1(make_setup(args, args.corpus, args.out, args.shots), args.inner_lr, recipes_of(args))


def _table2(args: argparse.Namespace) -> Experiment:
    from s3prl_metaperser.experiments.table2 import table2

    return table2(make_setup(args, args.corpus, args.out, args.shots), args.inner_lr)


def _figure2(args: argparse.Namespace) -> Experiment:
    from s3prl_metaperser.experiments.figure2 import figure2

    setup = make_setup(args, args.corpus, args.out, args.train_shots)
    return figure2(setup, args.inner_lr, recipes_of(args), unique(args.shots))
