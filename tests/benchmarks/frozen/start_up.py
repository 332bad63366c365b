"""What starting takes: the command line's help, and making the expert.

- Help: ``metaperser --help``, ``--version`` and every subcommand's ``--help``, each a process of its own from start
  to end; beside them a Python that does nothing. Which of the heavy libraries any of them has loaded, too.
- Expert: what s3prl's runner makes before its first batch, on a corpus of IEMOCAP's size (10,000 utterances, 12
  annotators, 36,000 annotations; no recordings, which construction does not look at), for every kind of training, in
  one process after the imports.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import sys
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from frozen.measuring import Line, Options, side_by_side
from s3prl_metaperser import configs
from s3prl_metaperser.cli import build_parser
from s3prl_metaperser.corpus.emotions import EMOTIONS
from s3prl_metaperser.corpus.manifest import COLUMNS, build_corpus, write_corpus
from s3prl_metaperser.expert import DownstreamExpert

HELP_SECONDS, EXPERT_SECONDS = 0.5, 2.0
UTTERANCES, SESSIONS, EXTERNAL = 10_000, 5, 6
HEARD_BY = 3
"""External annotators of an utterance; its speaker labels it too, where the actor has done so."""
HEAVY = ("torch", "s3prl", "pandas", "numpy", "transformers", "scipy", "yaml")
SAYS_WHAT_IS_LOADED = (
    "import sys\nfrom s3prl_metaperser.cli import main\n"
    "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
    f"print(*(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)\n"
)
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SSL-E, recipe best": ("ssl_e", {}),
    "SSL-E, recipe paper": ("ssl_e_paper", {}),
    "Multi-Few": ("multi_few", {}),
    "Meta-PerSER, recipe best": ("meta_perser", {"init_from": None}),
    "Meta-PerSER, recipe paper, unseen": ("meta_perser_paper_unseen", {"init_from": None}),
}


def commands(parser: ArgumentParser, names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Give every command line that prints a parser's help."""
    yield (*names, "--help")
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for name, own in action.choices.items():
                yield from commands(own, (*names, name))


def measure_help(options: Options) -> Iterator[Line]:
    """Time processes that only say how they are used."""
    asked = [*commands(build_parser()), ("--version",)]
    code = "import sys; from s3prl_metaperser.cli import main; sys.exit(main())"
    programs: dict[str, Callable[[], object]] = {"nothing": lambda: run("pass")}
    programs |= {" ".join(one): (lambda one=one: run(code, *one)) for one in asked}
    seconds = {name: statistics.median(taken) for name, taken in side_by_side(programs, options.rounds).items()}
    nothing, main_help = seconds.pop("nothing"), seconds["--help"]
    yield Line(
        "metaperser --help",
        f"< {HELP_SECONDS} s",
        f"{main_help:.3f} s; Python alone {nothing:.3f} s",
        main_help < HELP_SECONDS,
    )
    slowest = max(seconds, key=seconds.__getitem__)
    loaded = {name for one in asked for name in run(SAYS_WHAT_IS_LOADED, *one).stderr.split()}
    yield Line(
        f"the slowest of all {len(asked)} helps, metaperser {slowest}",
        f"< {HELP_SECONDS} s, nothing heavy loaded",
        f"{seconds[slowest]:.3f} s, loaded of {', '.join(HEAVY)}: {', '.join(sorted(loaded)) or 'none'}",
        seconds[slowest] < HELP_SECONDS and not loaded,
    )


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a Python of its own."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)


def write_sized_corpus(folder: Path) -> str:
    """Write a corpus of IEMOCAP's size and shape, and say what it is."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(UTTERANCES):
        session = number % SESSIONS + 1
        dialogue = f"Ses{session:02d}F_impro{number % 30:02d}"
        utterance = f"{dialogue}_{'FM'[number % 2]}{number:05d}"
        audio = f"Session{session}/sentences/wav/{dialogue}/{utterance}.wav"
        heard = [(f"C-E{one + 1}", "external") for one in rng.choice(EXTERNAL, HEARD_BY, replace=False)]
        speaks_and_labels = number % 2 == 0 or session == 1
        for annotator, kind in [*heard, *([(f"C-{'FM'[number % 2]}{session}", "self")] * speaks_and_labels)]:
            ticked = sorted(rng.choice(len(EMOTIONS), 1 + (rng.random() < 0.15), replace=False))
            said = ";".join(EMOTIONS[one] for one in ticked)
            rows.append((utterance, audio, session, f"Ses{session:02d}", annotator, kind, said))
    corpus = build_corpus("sized", Path("/"), pd.DataFrame(rows, columns=list(COLUMNS)))
    write_corpus(corpus, folder)
    return ", ".join(f"{count:,} {what}" for what, count in corpus.counts().items())


def arguments(corpus: Path, config: str, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Give what s3prl's runner passes to the expert for a config."""
    given = yaml.safe_load(configs.find(config).read_text(encoding="utf-8"))
    given["downstream_expert"] |= {"corpus": str(corpus), "feature_cache": str(folder / "cache"), **changes}
    command_line = {"mode": "train", "seed": 1337, "device": "cpu", "upstream": "wavlm_base", "upstream_dim": 768}
    return {**given, **command_line, "upstream_rate": 320, "expdir": str(folder / "run")}


def measure_experts(options: Options) -> Iterator[Line]:
    """Time what the runner makes before its first batch."""
    size = write_sized_corpus(options.scratch / "corpus")

    def make(config: str, changes: dict[str, Any]) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            DownstreamExpert(**arguments(options.scratch / "corpus", config, changes, options.scratch))

    programs = {name: (lambda given=given: make(*given)) for name, given in EXPERTS.items()}
    for name, taken in side_by_side(programs, options.rounds).items():
        median = statistics.median(taken)
        yield Line(
            f"making the expert, {name}: {size}",
            f"< {EXPERT_SECONDS:g} s",
            f"{median:.2f} s ({min(taken):.2f} to {max(taken):.2f})",
            median < EXPERT_SECONDS,
        )


def measure(options: Options) -> Iterator[Line]:
    """Give this part's lines."""
    yield from measure_help(options)
    yield from measure_experts(options)
