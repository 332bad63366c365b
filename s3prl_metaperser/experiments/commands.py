"""``metaperser experiment``: the paper's experiments on any prepared corpus."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``experiment`` and its kinds to the command line."""
    experiment = subparsers.add_parser(
        "experiment",
        help="run one of the paper's experiments on a prepared corpus",
        description="Run one of the paper's experiments: every run is s3prl's own runner in a process of its own. "
        "Runs that have ended well are not repeated when the command is given again.",
    )
    kinds = experiment.add_subparsers(title="experiments", metavar="EXPERIMENT", required=True)
    table1 = kinds.add_parser(
        "table1",
        help="the systems on the same episodes",
        description="Compare Random, Entire-Zero, Entire-Few and Meta-PerSER on the same episodes. Learning rates and "
        "Meta-PerSER's query are chosen on the dev annotator of each fold.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_table1_arguments(table1)
    table1.set_defaults(run=_run_table1)


def _add_table1_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--corpus", type=Path, required=True, metavar="DIR", help="the folder that `metaperser prepare` wrote")
    add("--out", type=Path, required=True, metavar="DIR", help="where runs, results and tables go")
    add("-u", "--upstream", required=True, help="s3prl upstream, such as fbank_no_cmvn or wavlm_base")
    add("-k", "--ckpt", metavar="CKPT", help="checkpoint of a *_local upstream")
    add("--device", default="cpu", help="where torch computes: cpu, cuda, cuda:1")
    add("--scenario", nargs="+", choices=["seen", "unseen"], default=["seen", "unseen"], help="of the paper")
    add(
        "--scope",
        choices=["head", "linear"],
        default="linear",
        help="what adapts: two linear layers, or the weighted sum too",
    )
    add("--folds", type=_positive, metavar="N", help="only the first N folds; all by default")
    add("--shots", type=_positive, default=32, help="K, labelled clips to adapt on")
    add("--queries", type=_positive, default=128, help="Q, clips to score")
    add("--episodes", type=_positive, default=10, help="per test annotator")
    add(
        "--query",
        nargs="+",
        choices=["combined", "resampled", "disjoint"],
        default=["combined", "resampled", "disjoint"],
        help="outer-loss examples of Meta-PerSER to choose from on dev",
    )
    add(
        "--inner-lr",
        nargs="+",
        type=float,
        default=[0.03, 0.1],
        help="inner rates of Meta-PerSER to choose from on dev",
    )
    add(
        "--set",
        nargs="+",
        type=_setting,
        default=[],
        metavar="KEY=VALUE",
        help="further config settings, such as downstream_expert.data.min_annotations=24",
    )
    add("--seed", type=int, default=1337, help="of initial weights and all draws")
    add("--jobs", type=_positive, default=1, help="folds that run side by side")
    add("--threads", type=_positive, default=1, help="CPU threads of each run")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _setting(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text!r}: the value is not YAML") from None


def _run_table1(args: argparse.Namespace) -> int:
    from s3prl_metaperser.experiments.runs import Upstream
    from s3prl_metaperser.experiments.table1 import Candidate, Table1

    experiment = Table1(
        corpus=args.corpus,
        out=args.out,
        upstream=Upstream(args.upstream, args.ckpt, args.device),
        scenarios=tuple(args.scenario),
        folds=args.folds,
        scope=args.scope,
        shots=args.shots,
        queries=args.queries,
        episodes=args.episodes,
        candidates=tuple(Candidate(query, lr) for query in args.query for lr in args.inner_lr),
        seed=args.seed,
        threads=args.threads,
        overrides=tuple(args.set),
    )
    experiment.run(args.jobs)
    print((args.out / "table1.md").read_text(encoding="utf-8"))
    print(f"Rows per episode: {args.out / 'results.csv'}   Runs, checkpoints, predictions: {args.out / 'runs'}")
    return 0
