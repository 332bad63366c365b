"""The main job from end to end on a synthetic corpus: ``python -m s3prl_metaperser.experiments.demo``.

Makes recordings and listeners, reads them as IEMOCAP is read, trains SSL-E and Meta-PerSER with s3prl's runner, and
compares the systems on listeners that no training has seen.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from s3prl_metaperser.argument_types import given_path
from s3prl_metaperser.errors import run_as_command
from s3prl_metaperser.experiments.preparation import prepare

NAME = "synthetic demo corpus"
FOLDS = 2
QUERIES = 64


def run_demo(out: Path, seed: int) -> int:
    """Run the demo.

    Args:
        out: folder for corpus, runs and tables; finished parts found there are not repeated.
        seed: of the corpus.

    Returns:
        The exit code: 1 where a run failed.
    """
    from s3prl_metaperser.experiments.conduct import conduct, tell
    from s3prl_metaperser.experiments.launchers import local_launcher
    from s3prl_metaperser.experiments.plan import Override, Setup
    from s3prl_metaperser.experiments.runs import Upstream
    from s3prl_metaperser.experiments.table1 import table1

    begin = time.monotonic()
    corpus = make_corpus(out, seed)
    say(f"training and comparing, {FOLDS} of 5 folds, both scenarios (log files in {out / 'runs'})")
    setup = Setup(
        corpus=corpus,
        out=out,
        upstream=Upstream("fbank_no_cmvn", None, "cpu"),
        scenarios=("seen", "unseen"),
        folds=FOLDS,
        scope="linear",
        shots=32,
        queries=QUERIES,
        episodes=10,
        seed=1337,
        threads=1,
        # The widest search of all is the reference's; here it would take a third of the time.
        overrides=(
            Override("ssl_e", "downstream_expert.reference.lr", 0.1),
            Override("ssl_e", "downstream_expert.reference.steps", [50, 150]),
        ),
    )
    experiment = table1(setup, inner_lrs=[0.1], recipes=["best"])
    outcome = conduct(experiment, local_launcher(setup.upstream.device, setup.threads), jobs=2)
    print()
    code = tell(experiment, outcome)
    print(
        "Entire-Zero is the average listener's model, Entire-Few the same one fine-tuned on 32 clips of the new "
        "listener, Meta-PerSER the meta-learned one adapted to the same 32 clips."
    )
    say(f"done in {time.monotonic() - begin:.0f} s")
    return code


def make_corpus(out: Path, seed: int) -> Path:
    """Make recordings and listeners, read them as IEMOCAP is read, and give the folder of the corpus.

    Args:
        out: of the demo; what is there already is kept.
        seed: of recordings and listeners.

    Raises:
        MetaPerSERError: when the folder holds another corpus.
    """
    from s3prl_metaperser.corpus.synthetic import write_demo_corpus

    recordings, corpus = out / f"recordings-seed{seed}", out / "corpus"
    if not recordings.exists():
        say(f"making synthetic recordings and listeners in {recordings}")
        unfinished = recordings.with_name(f"{recordings.name}.part")
        write_demo_corpus(unfinished, seed=seed, overwrite=True)
        unfinished.rename(recordings)
    say(f"metaperser prepare iemocap {recordings} --name '{NAME}' --out {corpus}")
    prepare(recordings, corpus, NAME)
    return corpus


def say(what: str) -> None:
    """Tell on stderr what comes next."""
    print(f"==> {what}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m s3prl_metaperser.experiments.demo", description=__doc__)
    parser.add_argument(
        "--out", type=given_path, default=Path("result/demo"), help="folder for everything (result/demo)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic corpus (0)")
    args = parser.parse_args(arguments)
    sys.exit(run_as_command(lambda: run_demo(args.out, args.seed)))


if __name__ == "__main__":
    main()
