"""Table 1: the systems on the same episodes, scenario by scenario, fold by fold.

For each scenario and fold: SSL-E is trained once; Random, Entire-Zero and Entire-Few are evaluated from it; Meta-PerSER
is meta-trained from it at every candidate setting. For each ``query`` the rate that scores best on the dev annotator is
evaluated, and the ``query`` that scores best on dev is the row Meta-PerSER. No choice looks at the test annotator.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from tqdm import tqdm

from s3prl_metaperser import configs
from s3prl_metaperser.atomic import locked
from s3prl_metaperser.corpus.manifest import load_corpus
from s3prl_metaperser.episodes import fold_count, make_split, meta_test_episodes
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments.figures import systems_figure, write_figure
from s3prl_metaperser.experiments.runs import Run, Upstream
from s3prl_metaperser.experiments.tables import read_results, summarise, write_table
from s3prl_metaperser.settings import Query, Scenario, Scope, SystemName, read_settings

SSL_E = "ssl_e"
META_PERSER = "meta_perser"
BEST = "dev-best.ckpt"
BASELINES: tuple[SystemName, ...] = ("random", "entire_zero", "entire_few")


@dataclass(frozen=True)
class Candidate:
    """One setting of Meta-PerSER that dev may choose.

    Attributes:
        query: what the outer loss sees.
        inner_lr: what LSLR's rates start from.
    """

    query: Query
    inner_lr: float

    @property
    def name(self) -> str:
        """A folder name."""
        return f"{self.query}-{self.inner_lr:g}"


@dataclass(frozen=True)
class FoldResults:
    """What one scenario and fold gave.

    Attributes:
        folders: of the evaluation of each system, Meta-PerSER at the setting that dev chose.
        by_query: of Meta-PerSER's evaluation for each ``query``, its rate chosen on dev.
    """

    folders: list[Path]
    by_query: dict[Query, Path]


@dataclass(frozen=True)
class Table1:
    """The experiment.

    Attributes:
        corpus: folder that ``metaperser prepare`` wrote.
        out: where everything goes.
        upstream: what s3prl loads.
        scenarios: ``seen``, ``unseen`` or both.
        folds: how many of the corpus's folds; None for all.
        scope: what adapts.
        shots: K.
        queries: Q.
        episodes: per test annotator.
        candidates: settings of Meta-PerSER to choose from on dev.
        seed: of everything.
        threads: CPU threads of each run.
        overrides: further settings of both configs, by dotted key.
    """

    corpus: Path
    out: Path
    upstream: Upstream
    scenarios: tuple[Scenario, ...]
    folds: int | None
    scope: Scope
    shots: int
    queries: int
    episodes: int
    candidates: tuple[Candidate, ...]
    seed: int
    threads: int
    overrides: tuple[tuple[str, Any], ...] = ()

    def run(self, jobs: int) -> pd.DataFrame:
        """Run the grid and write ``results.csv`` and the tables.

        Args:
            jobs: folds that run side by side, each in processes of its own.

        Returns:
            All rows of ``results.csv``.

        Raises:
            MetaPerSERError: when the corpus or a setting is wrong, before anything is run, or when runs failed.
        """
        cells = [(scenario, fold) for scenario in self.scenarios for fold in self._folds()]
        self._check(cells)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = (self.out / ".lock").open("a")
        except OSError as error:
            raise MetaPerSERError(f"--out {self.out} cannot be written: {error.strerror}") from None
        with lock, locked(lock, f"another experiment writes into {self.out}; waiting for it"):
            return self._run_cells(cells, jobs)

    def _run_cells(self, cells: list[tuple[Scenario, int]], jobs: int) -> pd.DataFrame:
        queries = {candidate.query for candidate in self.candidates}
        total = len(cells) * (1 + len(BASELINES) + len(self.candidates) + len(queries))
        failures: list[str] = []
        with tqdm(total=total, desc="runs", unit="run", dynamic_ncols=True) as progress:

            def of_fold(cell: tuple[Scenario, int]) -> FoldResults | None:
                try:
                    return self._run_fold(*cell, progress)
                except MetaPerSERError as error:
                    failures.append(str(error))
                    return None

            with ThreadPoolExecutor(max_workers=jobs) as pool:
                finished = [cell for cell in pool.map(of_fold, cells) if cell is not None]
        if failures:
            raise MetaPerSERError(
                f"{len(failures)} of {len(cells)} folds failed, the others are kept and not repeated; "
                f"the first: {failures[0]}"
            )
        results = read_results([folder for cell in finished for folder in cell.folders])
        by_query = pd.concat(
            [
                read_results([folder]).assign(system=f"Meta-PerSER, {query}")
                for cell in finished
                for query, folder in cell.by_query.items()
            ],
            ignore_index=True,
        )
        write_table(results, self.out, "results", "table1")
        title = f"{load_corpus(self.corpus).name}, {self.upstream.name}, K={self.shots}, Q={self.queries}"
        write_figure(systems_figure(summarise(results), title), self.out, "table1")
        write_table(by_query, self.out, "results-by-query", "table1-by-query")
        return results

    def _folds(self) -> list[int]:
        corpus = load_corpus(self.corpus)
        available = fold_count(corpus, read_settings(self._config(SSL_E, self.scenarios[0])["downstream_expert"]).data)
        wanted = available if self.folds is None else self.folds
        if wanted > available:
            raise MetaPerSERError(f"--folds {wanted} asked for, but corpus {corpus.name!r} has {available}")
        return list(range(1, wanted + 1))

    def _check(self, cells: list[tuple[Scenario, int]]) -> None:
        """Draw every cell's episodes, so that too few labels are found before anything is run."""
        corpus = load_corpus(self.corpus)
        for scenario, fold in cells:
            settings = read_settings(self._config(SSL_E, scenario)["downstream_expert"])
            split = make_split(corpus, scenario, fold, settings.data)
            for tasks in (split.dev, split.test):
                meta_test_episodes(tasks, self.shots, self.queries, 1, self.seed)

    def _config(self, system: str, scenario: Scenario) -> dict[str, Any]:
        name = system if scenario == "seen" else f"{system}_{scenario}"
        config = yaml.safe_load(configs.find(name).read_text(encoding="utf-8"))
        config["runner"]["eval_dataloaders"] = ["dev"]
        expert = config["downstream_expert"]
        expert |= {"corpus": str(self.corpus.resolve()), "scope": self.scope}
        expert["episodes"] |= {"shots": self.shots, "queries": self.queries, "number": self.episodes}
        for key, value in self.overrides:
            _set(config, key, value)
        return config

    def _run_fold(self, scenario: Scenario, fold: int, progress: tqdm) -> FoldResults:
        base = self.out / "runs" / scenario / f"fold{fold}"

        def run(name: str, mode: str, config: dict[str, Any], checkpoint: Path | None = None) -> Path:
            config = copy.deepcopy(config)
            config["downstream_expert"] |= {"scenario": scenario, "fold": fold}
            progress.set_postfix_str(f"{scenario} fold{fold} {name}")
            Run(base / name, mode, config, self.upstream, self.seed, checkpoint).execute(self.threads)
            progress.update(1)
            return base / name

        ssl = self._config(SSL_E, scenario)
        ssl_best = run(SSL_E, "train", ssl) / BEST
        evaluated = []
        for system in BASELINES:
            config = copy.deepcopy(ssl)
            config["downstream_expert"]["system"] = system
            evaluated.append(run(system, "evaluate", config, ssl_best))

        meta = self._config(META_PERSER, scenario)
        of_query: dict[Query, tuple[float, Path]] = {}
        for query in dict.fromkeys(candidate.query for candidate in self.candidates):
            trained: dict[Candidate, Path] = {}
            for candidate in self.candidates:
                if candidate.query == query:
                    config = copy.deepcopy(meta)
                    config["downstream_expert"]["init_from"] = str(ssl_best)
                    config["downstream_expert"]["meta"] |= {"query": query, "inner_lr": candidate.inner_lr}
                    trained[candidate] = run(f"{META_PERSER}-{candidate.name}", "train", config)
            scores = {candidate: self._dev_score(folder, meta) for candidate, folder in trained.items()}
            best = max(scores, key=scores.__getitem__)
            config = copy.deepcopy(meta)
            config["downstream_expert"]["init_from"] = None
            config["downstream_expert"]["meta"] |= {"query": query, "inner_lr": best.inner_lr}
            folder = run(f"{META_PERSER}-{query}", "evaluate", config, trained[best] / BEST)
            of_query[query] = (scores[best], folder)
        chosen = max(of_query, key=lambda query: of_query[query][0])
        return FoldResults(
            [*evaluated, of_query[chosen][1]], {query: folder for query, (_, folder) in of_query.items()}
        )

    @staticmethod
    def _dev_score(folder: Path, config: dict[str, Any]) -> float:
        rows = pd.read_csv(folder / "results-dev.csv")
        return float(rows[config["downstream_expert"]["select_by"]].mean())


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        config = config.setdefault(name, {})
    config[last] = value
