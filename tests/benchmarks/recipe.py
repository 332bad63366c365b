"""What does each part of `recipe: best` give? Judged on dev annotators, so that nothing is chosen on a test annotator.

    python tests/benchmarks/recipe.py CORPUS --out RESULT [--upstream fbank_no_cmvn] [--jobs 2]

Each variant of the settings is trained as the runner trains it, from the installed configs, for as long as they say,
and adapts to K labels of a listener who took no part in training.

- seen: the fold's dev annotator, as in training runs.
- unseen: dev episodes of a training run hold recordings that are trained on, so dev cannot tell when a model knows them
  by heart. Here the corpus's last session, the real test's, is dropped altogether and an earlier one takes its place:
  nobody's labels of it are trained on, and the fold's dev annotator is judged on it. The fold's test annotator takes
  no part.

A cell is a fold and, in the unseen scenario, a held-out session. Meta-PerSER takes 20 steps, and no dev-best checkpoint
is chosen. Entire-Few gets the rate and number of steps that are best on average in the very cells it is judged in, so
its rows are optimistic. Writes RESULT.csv, a row for each way to adapt and episode, and RESULT.md, the tables.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from torch import nn

from s3prl_metaperser import configs
from s3prl_metaperser.atomic import write_text
from s3prl_metaperser.checkpoints import EXTRA_STATE
from s3prl_metaperser.corpus.manifest import load_corpus, write_corpus
from s3prl_metaperser.episodes import Task, fold_count, make_split, meta_test_episodes
from s3prl_metaperser.errors import MetaPerSERError, exit_with, suggest
from s3prl_metaperser.metrics import METRICS
from s3prl_metaperser.run import Run
from s3prl_metaperser.run_downstream import install_stand_ins, quieten
from s3prl_metaperser.settings import DataSettings, Recipe, Scenario, SystemName
from s3prl_metaperser.systems import AdaptingSystem, System, make_system

SEED, EPISODES, MOST_QUERIES, FEWEST_QUERIES = 1337, 10, 64, 40
SHOTS = (32, 8)
"""Each K that is judged; the first is the one that meta-training uses."""
STEPS = 20
"""Meta-PerSER's, in the tables."""
WHISPER = "whisper"
CPU = torch.device("cpu")
CELL = ["fold", "session"]


@dataclass(frozen=True)
class Variant:
    """One row of the tables.

    Attributes:
        recipe: whose installed configs it starts from.
        system: what adapts.
        changes: settings over the recipe's, section by section.
        ssl_length: SSL-E's training steps, as a multiple of its config's.
        meta_steps: outer steps; None: as many as the config says.
        scenarios: where it is tried.
    """

    recipe: Recipe = "best"
    system: SystemName = "meta_perser"
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ssl_length: float = 1
    meta_steps: int | None = None
    scenarios: tuple[Scenario, ...] = ("seen", "unseen")

    def config(self, family: str, scenario: Scenario) -> dict[str, Any]:
        """Read the installed config of ``ssl_e`` or ``meta_perser``, with the changes."""
        name = family + ("_paper" if self.recipe == "paper" else "") + ("_unseen" if scenario == "unseen" else "")
        config: dict[str, Any] = yaml.safe_load(configs.find(name).read_text(encoding="utf-8"))
        section = config["downstream_expert"]
        for key, changed in self.changes.items():
            section[key] = section.get(key, {}) | changed
        return config

    def same_ssl_e(self) -> Hashable:
        """Tell apart what trains an SSL-E of its own, but for its length."""
        return self.recipe, str([self.changes.get(key) for key in ("model", "ssl")])

    def same_meta_training(self) -> Hashable:
        """Tell apart what meta-trains on its own from one SSL-E, but for its length."""
        return self.same_ssl_e(), str(self.changes.get("meta"))

    def steps(self, family: str, scenario: Scenario) -> int:
        """Count the training steps of a family's run."""
        total = self.config(family, scenario)["runner"]["total_steps"]
        if family == "ssl_e":
            return round(self.ssl_length * total)
        return total if self.meta_steps is None else self.meta_steps


def _best(**changes: Mapping[str, Any]) -> Variant:
    return Variant(changes=changes)


BASELINE = "best"
ENTIRE: dict[str, SystemName] = {"Entire-Zero": "entire_zero", "Entire-Few": "entire_few"}
VARIANTS: dict[str, Variant] = {
    "Entire-Zero, paper": Variant("paper", "entire_zero"),
    "Entire-Few, paper": Variant("paper", "entire_few"),
    "paper": Variant("paper"),
    "paper, query disjoint": Variant("paper", changes={"meta": {"query": "disjoint"}}),
    "Entire-Zero, best": Variant(system="entire_zero"),
    "Entire-Few, best": Variant(system="entire_few"),
    BASELINE: Variant(),
    "best, pooling mean": _best(model={"pooling": "mean"}),
    "best, activation none": _best(model={"activation": "none"}),
    "best, dropout 0": _best(model={"dropout": 0.0}),
    "best, targets mean": _best(ssl={"targets": "mean"}),
    "best, class_balanced true": _best(model={"class_balanced": True}),
    "best, adapts all, inner_lr 0.1": _best(meta={"adapts": "all", "inner_lr": 0.1}),
    "best, adapts all, inner_lr 0.03": _best(meta={"adapts": "all", "inner_lr": 0.03}),
    "best, outer_loss cross_entropy": _best(meta={"outer_loss": "cross_entropy"}),
    "best, query combined": _best(meta={"query": "combined"}),
    "best, query resampled": _best(meta={"query": "resampled"}),
    "best, annealing null": _best(meta={"annealing": None}),
    "best, lslr false": _best(meta={"lslr": False}),
    "best, meta steps 0": Variant(meta_steps=0),
    "best, meta steps 50": Variant(meta_steps=50),
    "best, meta steps 100": Variant(meta_steps=100),
    "best, meta steps 300": Variant(meta_steps=300),
    "best, SSL-E × 0.5": Variant(ssl_length=0.5),
    "best, SSL-E × 2": Variant(ssl_length=2),
    **{
        f"{name}, paper, SSL-E × {length:g}": Variant("paper", system, ssl_length=length, scenarios=("unseen",))
        for name, system in ENTIRE.items()
        for length in (0.5, 2, 5, 10)
    },
}


@dataclass(frozen=True)
class Cell:
    """Where variants are judged.

    Attributes:
        scenario: ``seen`` or ``unseen``.
        fold: from 1.
        session: held out for the judged annotator; 0 in the seen scenario.
    """

    scenario: Scenario
    fold: int
    session: int = 0

    @property
    def data(self) -> dict[str, Any]:
        """Say which sessions training leaves out, as settings."""
        return {"test_sessions": [self.session]} if self.session else {}

    def judged(self, corpus: Path) -> tuple[list[Task], int]:
        """Give the dev annotators who labelled enough here, and the number of queries that they all have."""
        loaded, data = load_corpus(corpus), DataSettings(**self.data)
        if self.session:
            # The next fold tests whom this one chooses on: the test of the unseen scenario is on held-out sessions.
            following = self.fold % fold_count(loaded, data) + 1
            tasks = make_split(loaded, self.scenario, following, data).test
        else:
            tasks = make_split(loaded, self.scenario, self.fold, data).dev
        able = [task for task in tasks if len(task) >= max(SHOTS) + FEWEST_QUERIES]
        return able, min([MOST_QUERIES, *(len(task) - max(SHOTS) for task in able)])


@cache
def upstream_and_featurizer(name: str) -> tuple[nn.Module, nn.Module]:
    """Make an upstream of s3prl's hub, or Whisper's encoder, and what sums its layers."""
    install_stand_ins()
    quieten()
    from s3prl import hub
    from s3prl.upstream.interfaces import Featurizer

    if name == WHISPER:
        from whisper_upstream import WhisperEncoder

        upstream: nn.Module = WhisperEncoder()
    elif hasattr(hub, name):
        upstream = getattr(hub, name)()
    else:
        raise MetaPerSERError(f"--upstream {name!r} is not in s3prl's hub; {suggest(name, dir(hub))}")
    return upstream, Featurizer(upstream, upstream_device="cpu")


class Training:
    """A run of the runner's training loop, in this process.

    Args:
        family: ``ssl_e`` or ``meta_perser``.
        variant: gives the config.
        cell: gives scenario, fold and sessions.
        corpus: a prepared folder.
        upstream: s3prl's name.
        steps: after how many steps the model is wanted.
        start: the state to start from.
    """

    def __init__(
        self,
        family: str,
        variant: Variant,
        cell: Cell,
        corpus: Path,
        upstream: str,
        steps: Collection[int],
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.steps = variant.config(family, cell.scenario), steps
        self.config["runner"]["total_steps"] = max(1, *steps)
        section = self.config["downstream_expert"]
        # The run's own episodes are not used; some annotators have too few labels in a session for them.
        section |= {"corpus": str(corpus), "fold": cell.fold, "episodes": {"shots": SHOTS[0], "queries": 1}}
        section["data"] = section.get("data", {}) | cell.data
        module, featurizer = upstream_and_featurizer(upstream)
        self.featurizer = copy.deepcopy(featurizer)
        torch.manual_seed(SEED)
        arguments = {"mode": "train", "seed": SEED, "upstream": upstream, **self.config}
        # Nothing is reported into the folder: the runner would ask for that.
        self.run = Run(section, int(self.featurizer.output_dim), Path("unwritten"), arguments)
        if start is not None:
            self.run.load_initial_weights(start)
            self.featurizer.load_state_dict(start["featurizer"])
        self.run.bind(module, self.featurizer, CPU)

    def reached(self) -> Iterator[int]:
        """Train, and stop after each of the wanted numbers of steps."""
        from s3prl.optimizers import get_optimizer

        learner, runner = self.run.learner, self.config["runner"]
        trained = [learner, self.featurizer]
        optimizer = get_optimizer(trained, runner["total_steps"], self.config["optimizer"])
        parameters = [parameter for module in trained for parameter in module.parameters()]
        records: dict[str, list[Any]] = {name: [] for name in ("loss", "query_loss")}
        records |= {f"support_loss/step{step}": [] for step in range(self.run.settings.meta.inner_steps)}
        if 0 in self.steps:
            yield 0
        for position, (_, batch) in enumerate(itertools.islice(self.run.dataloader("train", 0), max(self.steps))):
            learner.train()
            self.run.training_loss(batch, position, records).backward()
            norm = nn.utils.clip_grad_norm_(parameters, runner["gradient_clipping"])
            if torch.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad()
            if position + 1 in self.steps:
                yield position + 1

    def state(self) -> dict[str, Any]:
        """Copy what a checkpoint holds."""
        model = {f"learner.{name}": tensor.clone() for name, tensor in self.run.learner.state_dict().items()}
        return model | {EXTRA_STATE: self.run.saved_state(), "featurizer": copy.deepcopy(self.featurizer.state_dict())}


class Judge:
    """Scores systems on a cell's dev annotators.

    Args:
        cell: where.
        corpus: a prepared folder.
    """

    def __init__(self, cell: Cell, corpus: Path) -> None:
        self.cell = cell
        tasks, queries = cell.judged(corpus)
        self.episodes = {shots: meta_test_episodes(tasks, shots, queries, EPISODES, SEED)[0] for shots in SHOTS}
        self.rows: list[dict[str, Any]] = []

    def __call__(self, name: str, system: System, run: Run) -> None:
        """Add a row for each K, rate, number of steps and episode."""
        for shots, episodes in self.episodes.items():
            given = run.learner, run.features, episodes
            predictions = (
                {
                    (lr, steps): prediction
                    for lr in system.lrs
                    for steps, prediction in system.adapt_and_predict(*given, lr, system.steps).items()
                }
                if isinstance(system, AdaptingSystem)
                else {(None, 0): system.predict(*given)}
            )
            for (lr, steps), prediction in predictions.items():
                for episode, scores in zip(episodes, prediction.scores(episodes), strict=True):
                    self.rows.append(
                        {"variant": name, "scenario": self.cell.scenario, "fold": self.cell.fold}
                        | {"session": self.cell.session, "annotator": episode.annotator, "episode": episode.index}
                        | {"shots": shots, "queries": len(episode.query), "lr": lr or 0.0, "steps": steps}
                        | {metric: getattr(scores, metric) for metric in METRICS}
                    )


def grouped(names: Iterable[str], key: Callable[[Variant], Hashable]) -> list[list[str]]:
    """Put variants together that have the same key, in order."""
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(key(VARIANTS[name]), []).append(name)
    return list(groups.values())


def judge_cell(cell: Cell, corpus: Path, upstream: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Train and judge variants in one cell; what they share is trained once.

    Training is the same whatever its length, so a shorter one is a longer one's beginning.
    """
    torch.set_num_threads(1)
    judge = Judge(cell, corpus)
    ssl_steps, meta_steps = (
        {name: VARIANTS[name].steps(family, cell.scenario) for name in names} for family in ("ssl_e", "meta_perser")
    )
    for group in grouped(names, Variant.same_ssl_e):
        lengths = {ssl_steps[name] for name in group}
        ssl_e = Training("ssl_e", VARIANTS[group[0]], cell, corpus, upstream, lengths)
        for length in ssl_e.reached():
            here = [name for name in group if ssl_steps[name] == length]
            meta_trained = [name for name in here if VARIANTS[name].system == "meta_perser"]
            for name in here:
                if name not in meta_trained:
                    settings = replace(ssl_e.run.settings, system=VARIANTS[name].system)
                    judge(name, make_system(settings, SEED, ssl_e.run.split), ssl_e.run)
            state = ssl_e.state()
            for alike in grouped(meta_trained, Variant.same_meta_training):
                wanted = {meta_steps[name] for name in alike}
                meta = Training("meta_perser", VARIANTS[alike[0]], cell, corpus, upstream, wanted, state)
                for step in meta.reached():
                    for name in alike:
                        if meta_steps[name] == step:
                            judge(name, meta.run.system, meta.run)
    print(f"judged {cell}", file=sys.stderr, flush=True)
    return judge.rows


def tables(rows: pd.DataFrame) -> str:
    """Write the table of each scenario and K, as Markdown."""
    parts = []
    for (scenario, shots), own in rows.groupby(["scenario", "shots"], sort=False):
        cells = {
            name: of_variant.groupby(["lr", "steps", *CELL])[list(METRICS)].mean()
            for name, of_variant in own.groupby("variant", observed=True)
        }
        shown = {name: _shown(VARIANTS[name], means) for name, means in cells.items()}
        count = own.groupby(CELL).ngroups
        parts += [
            f"{scenario}, K={shots}: mean ± standard deviation over {count} cells (fold, held-out session)\n",
            f"| variant | {' | '.join(METRICS)} | miF1 − miF1 of {BASELINE} | miF1 at best steps |",
            "|---|" + "---|" * (len(METRICS) + 2),
        ]
        for name, (means, how) in shown.items():
            scores = " | ".join(_spread(means[metric]) for metric in METRICS)
            gain = (means["miF1"] - shown[BASELINE][0]["miF1"]) if BASELINE in shown else None
            lead = "" if gain is None or name == BASELINE else _spread(gain, "+")
            best, value = _best_way(cells[name])
            label = f"{name} ({how})" if how else name
            parts.append(f"| {label} | {scores} | {lead} | {value:.1f} ({best[1]}) |")
        parts.append("")
    return "\n".join(parts)


def _best_way(means: pd.DataFrame) -> tuple[tuple[float, int], float]:
    of_way = means["miF1"].groupby(["lr", "steps"]).mean()
    return of_way.idxmax(), float(of_way.max())


def _shown(variant: Variant, means: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Choose how a variant adapts in the table: its cells' means, and what to say of the choice."""
    match variant.system:
        case "meta_perser":
            return means.xs((0.0, STEPS), level=("lr", "steps")), ""
        case "entire_zero":
            return means.xs((0.0, 0), level=("lr", "steps")), ""
    way, _ = _best_way(means)
    return means.xs(way, level=("lr", "steps")), f"lr {way[0]:g}, {way[1]} steps"


def _spread(values: pd.Series, sign: str = "") -> str:
    return f"{values.mean():{sign}.1f} ± {values.std(ddof=0):.1f}"


def without_last_session(corpus: Path, folder: Path) -> list[int]:
    """Write a corpus without the session that the real test of the unseen scenario is on; give the others."""
    whole = load_corpus(corpus)
    *earlier, last = sorted(int(session) for session in whole.annotations["session"].unique())
    if len(earlier) < 2:
        raise MetaPerSERError(f"corpus {whole.name!r} has {len(earlier) + 1} sessions; scenario unseen needs 3 here")
    kept = whole.annotations[whole.annotations["session"] != last].reset_index(drop=True)
    write_corpus(replace(whole, annotations=kept), folder)
    return earlier


def able_sessions(corpus: Path, folds: Sequence[int], sessions: Sequence[int]) -> list[int]:
    """Find the sessions in which every fold's dev annotators labelled enough to be judged."""
    return [session for session in sessions if all(Cell("unseen", fold, session).judged(corpus)[0] for fold in folds)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder that `metaperser prepare` wrote")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="RESULT", help="RESULT.csv and RESULT.md are written"
    )
    parser.add_argument("-u", "--upstream", default="fbank_no_cmvn", help=f"of s3prl's hub, or {WHISPER}")
    parser.add_argument("--scenario", nargs="+", choices=["unseen", "seen"], default=["unseen", "seen"])
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=f"of: {'; '.join(VARIANTS)}. By default all")
    parser.add_argument("--folds", type=int, metavar="N", help="only the first N folds")
    parser.add_argument(
        "--sessions",
        nargs="+",
        metavar="S",
        default=["last"],
        help="held-out sessions of scenario unseen: numbers, all, or last (the default), where dev labelled enough",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, a cell at a time each")
    return parser.parse_args(arguments)


def held_out(wanted: Sequence[str], able: Sequence[int]) -> list[int]:
    """Read ``--sessions``."""
    if not able:
        raise MetaPerSERError(f"in no session has every dev annotator {max(SHOTS) + FEWEST_QUERIES} labels")
    if wanted in (["all"], ["last"]):
        return list(able) if wanted == ["all"] else [able[-1]]
    for session in wanted:
        if session not in map(str, able):
            raise MetaPerSERError(f"--sessions {session!r}: expected all, last or of {', '.join(map(str, able))}")
    return [int(session) for session in wanted]


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge all variants and print the tables."""
    args = parse(arguments)
    names = list(VARIANTS) if args.variants is None else args.variants
    for name in names:
        if name not in VARIANTS:
            raise MetaPerSERError(f"--variants {name!r} is unknown; {suggest(name, VARIANTS)}")
    csv, markdown = (args.out.with_name(args.out.name + ending) for ending in (".csv", ".md"))
    for path in (csv, markdown):
        if path.exists():
            raise MetaPerSERError(f"--out {args.out}: {path} is already there; move it away or give another name")
    folds = list(range(1, fold_count(load_corpus(args.corpus), DataSettings()) + 1))[: args.folds]
    with tempfile.TemporaryDirectory() as folder:
        work: list[tuple[Cell, Path]] = []
        if "unseen" in args.scenario:
            earlier = Path(folder)
            able = able_sessions(earlier, folds, without_last_session(args.corpus, earlier))
            sessions = held_out(args.sessions, able)
            work += [(Cell("unseen", fold, session), earlier) for session in sessions for fold in folds]
        if "seen" in args.scenario:
            work += [(Cell("seen", fold), args.corpus) for fold in folds]
        upstream_and_featurizer(args.upstream)
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            tried = [[name for name in names if cell.scenario in VARIANTS[name].scenarios] for cell, _ in work]
            cells, corpora = zip(*work, strict=True)
            judged = list(pool.map(judge_cell, cells, corpora, [args.upstream] * len(work), tried))
    rows = pd.DataFrame([row for own in judged for row in own])
    rows["variant"] = pd.Categorical(rows["variant"], [name for name in VARIANTS if name in names])
    text = tables(rows)
    write_text(csv, rows.to_csv(index=False, float_format="%.4f", lineterminator="\n"))
    write_text(markdown, text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except MetaPerSERError as error:
        raise exit_with(error, "recipe.py") from None
