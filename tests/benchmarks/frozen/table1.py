"""Where the time of ``metaperser experiment table1`` goes, on real recordings, from an empty folder and an empty cache.

The whole experiment as the README gives it (both scenarios, five folds, two recipes; minutes), two runs at once. Its
time is that of the places for runs: two times the seconds from the command's start to its end. Each second of a place
counts for one share:

- start-up: before the first run (imports, the check of settings and corpus); in each run the fork, all that comes
  before training or evaluation begins (s3prl's runner, its upstream, corpus, split), and the end of the process;
- input: reading and resampling recordings, the feature cache, drawing episodes and minibatches, gathering features;
- upstream: its forward passes, those of feature extraction (with the reading that its processes do) and those of the
  runner's silent clip;
- inner loop in meta-training: with the outer loss and its backward pass; the same at meta-test: adapting to dev and
  test listeners, the reference's fine-tuning among it, and predicting;
- SSL-E and Multi-Few: the loss of a minibatch and its backward pass;
- optimizer, checkpoints, results: s3prl's optimizer and clipping; reading and writing checkpoints; scores, result
  files, TensorBoard, progress bars, and tables and report at the end;
- runner: what is left of s3prl's loops;
- no run: a place that had none, since all that was left waited for others.

Inside runs ``attribution.py`` tells them apart; between runs, when they start and end does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from frozen.attribution import Attribution, Rule
from frozen.measuring import Line, Options
from s3prl_metaperser.experiments.runs import DONE

JOBS = 2
TARGET = 0.15
STARTING, INPUT, UPSTREAM, NO_RUN = "start-up", "input", "upstream", "no run"
META_TRAINING, META_TEST = "inner loop in meta-training", "inner loop at meta-test"
MINIBATCHES, OPTIMIZER, RUNNER = "SSL-E and Multi-Few", "optimizer, checkpoints, results", "runner"
SHARES = (META_TRAINING, META_TEST, MINIBATCHES, UPSTREAM, INPUT, STARTING, OPTIMIZER, RUNNER, NO_RUN)
INNER, BACKWARD = "inner loop", "backward"
TRAINING, EVALUATION = "training", "evaluation"

RULES: tuple[Rule, ...] = (
    # Waiting for the processes that extract; no other loader has processes.
    (UPSTREAM, "torch/utils/data/dataloader.py", ("_try_get_data",)),
    (INPUT, "s3prl_metaperser/upstream/cache.py", ()),
    (INPUT, "s3prl_metaperser/upstream/extraction.py", ()),
    (INPUT, "s3prl_metaperser/upstream/features.py", ()),
    (INPUT, "s3prl_metaperser/upstream/waveforms.py", ()),
    (INPUT, "s3prl_metaperser/audio.py", ()),
    (INPUT, "s3prl_metaperser/datasets.py", ()),
    (INPUT, "s3prl_metaperser/episodes.py", ()),
    (INPUT, "s3prl_metaperser/run_features.py", ()),
    (INPUT, "s3prl_metaperser/systems.py", ("task_batch",)),
    (INPUT, "torch/utils/data/", ()),
    (UPSTREAM, "s3prl_metaperser/upstream/", ()),
    (UPSTREAM, "s3prl/upstream/", ()),
    (INNER, "s3prl_metaperser/adaptation/", ()),
    (INNER, "s3prl_metaperser/training.py", ("episodes_loss",)),
    (INNER, "s3prl_metaperser/systems.py", ()),
    (INNER, "s3prl_metaperser/tuning.py", ()),
    (MINIBATCHES, "s3prl_metaperser/training.py", ("minibatch_loss",)),
    (BACKWARD, "torch/_tensor.py", ("backward",)),
    (BACKWARD, "s3prl_metaperser/training.py", ("differentiated",)),
    (OPTIMIZER, "torch/optim/", ()),
    (OPTIMIZER, "torch/nn/utils/clip_grad.py", ()),
    (OPTIMIZER, "torch/serialization.py", ()),
    (OPTIMIZER, "s3prl_metaperser/metrics.py", ()),
    (OPTIMIZER, "s3prl_metaperser/reporting.py", ()),
    (OPTIMIZER, "s3prl_metaperser/run.py", ("log_training", "log_evaluation")),
    (OPTIMIZER, "tensorboardX/", ()),
    (OPTIMIZER, "tqdm/", ()),
)
OUTSIDE: tuple[Rule, ...] = (
    (EVALUATION, "s3prl/downstream/runner.py", ("evaluate",)),
    (TRAINING, "s3prl/downstream/runner.py", ("train",)),
)
"""An evaluation during training is called by it, and so found first."""
SECONDS = "seconds.json"


def measure(options: Options) -> Iterator[Line]:
    """Run the experiment and give the share of each kind of work."""
    what = "experiment table1"
    if options.real_speech is None:
        yield Line(f"{what}: start-up and input", f"≤ {TARGET:.0%}", "left out", None, "needs --real-speech FOLDER")
        return
    from s3prl_metaperser.experiments.preparation import prepare

    corpus, out = options.scratch / "corpus", options.scratch / "table1"
    prepare(options.real_speech, corpus, "real speech")
    arguments = ["--corpus", str(corpus), "-u", "fbank_no_cmvn", "--scenario", "seen", "unseen", "--queries", "64"]
    minutes, runs, shares = conducted([*arguments, "--jobs", str(JOBS)], out, options.scratch / "cache")
    yield Line(f"{what}, {JOBS} runs at once: minutes", "", f"{minutes:.1f}", None, f"{runs} runs")
    both = shares[STARTING] + shares[INPUT]
    yield Line(f"{what}: start-up and input", f"≤ {TARGET:.0%}", f"{both:.1%}", both <= TARGET)
    for share in SHARES:
        yield Line(f"{what}: {share}", "", f"{shares[share]:.1%}", None)


def conducted(arguments: Sequence[str], out: Path, cache: Path) -> tuple[float, int, dict[str, float]]:
    """Run the experiment in a process of its own.

    Args:
        arguments: of ``metaperser experiment table1``, without ``--out``.
        out: its folder.
        cache: of features.

    Returns:
        The minutes that it took, how many runs it had, and each share of its time.
    """
    command = [sys.executable, "-m", "frozen.table1", "experiment", "table1", *arguments, "--out", str(out)]
    environment = {**os.environ, "METAPERSER_CACHE": str(cache)}
    begun = time.time()
    with out.with_suffix(".log").open("w") as log:
        subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[1], stdout=log, stderr=log)
    ended = time.time()
    records = [json.loads(path.read_text()) for path in (out / "runs").rglob(DONE)]
    within = [json.loads(path.read_text()) for path in (out / "runs").rglob(SECONDS)]
    starts, ends = (
        [datetime.fromisoformat(record[at]).timestamp() for record in records] for at in ("started", "ended")
    )
    seconds: Counter[str] = Counter()
    for own in within:
        seconds.update(own)
    # What its place was taken for, and it had not begun or had ended.
    seconds[STARTING] += sum(ends) - sum(starts) - seconds.total()
    seconds[STARTING] += JOBS * (min(starts) - begun)
    seconds[OPTIMIZER] += JOBS * (ended - max(ends))
    total = JOBS * (ended - begun)
    seconds[NO_RUN] = total - seconds.total()
    return (ended - begun) / 60, len(records), {share: seconds[share] / total for share in SHARES}


def by_share(seconds: Mapping[str, float], is_meta_training: bool) -> Counter[str]:
    """Name what a run was interrupted in as this page does."""
    shares: Counter[str] = Counter()
    for place, value in seconds.items():
        outside, slash, share = place.rpartition("/")
        if not slash:
            share = STARTING
        elif share == INNER:
            share = META_TRAINING if outside == TRAINING else META_TEST
        elif share == BACKWARD:
            share = META_TRAINING if is_meta_training else MINIBATCHES
        shares[share] += value
    return shares


def watched(arguments: Sequence[str], log: Path, environment: Mapping[str, str], threads: int) -> None:
    """Do what a fork of the experiment does, and write down where its time went."""
    attribution = Attribution(RULES, OUTSIDE, RUNNER)
    attribution.start()
    from s3prl_metaperser.experiments.launchers import be_the_run

    try:
        be_the_run(arguments, log, environment, threads)
    finally:
        attribution.stop()
        shares = by_share(attribution.seconds, log.parent.name.startswith("meta_perser"))
        (log.parent / SECONDS).write_text(json.dumps(shares))


def main() -> None:
    """Be ``metaperser``, but watch what its forks do."""
    from s3prl_metaperser.cli import build_parser
    from s3prl_metaperser.experiments.launchers import ForkLauncher

    args = build_parser().parse_args()
    launcher = ForkLauncher(args.threads, watched)
    from s3prl_metaperser.experiments.conduct import conduct, tell

    experiment = args.plan(args)
    sys.exit(tell(experiment, conduct(experiment, launcher, args.jobs)))


if __name__ == "__main__":
    main()
