"""What the experiments are made of: the settings that they share, and the runs that they share.

One folder (``--out``) holds one set of settings. SSL-E is trained once in it for each recipe, scenario and fold,
whichever experiments need it. The features of a frozen upstream are extracted once for each recipe, by a first run
that the others wait for; in scope ``entire`` only trainings look at them, and the first of these extracts them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from s3prl_metaperser import configs
from s3prl_metaperser.config_keys import CONFIG_ROOTS, OPTIONAL_RUNNER_KEYS
from s3prl_metaperser.corpus.manifest import Corpus, load_corpus
from s3prl_metaperser.episodes import Split, fold_count, make_split, meta_test_episodes
from s3prl_metaperser.errors import MetaPerSERError, suggest
from s3prl_metaperser.experiments.grid import Choice, Node
from s3prl_metaperser.experiments.runs import BEST, Mode, Run, Upstream
from s3prl_metaperser.numerals import exact
from s3prl_metaperser.settings import Recipe, Scenario, Scope, Settings, SystemName, read_settings

RUNS = "runs"
"""The folder in ``--out`` that all runs have their own in."""
SSL_E = "ssl_e"
MULTI_FEW = "multi_few"
META_PERSER = "meta_perser"
"""Names of installed configs, of the recipe that has no name of its own there."""
UNNAMED: Recipe = "best"
BASELINES_RECIPE: Recipe = "paper"
"""What the systems other than Meta-PerSER are made by, which are the paper's."""
RECIPES: Mapping[Scope, tuple[Recipe, ...]] = {
    "head": ("best", "paper"),
    "linear": ("best", "paper"),
    "entire": (BASELINES_RECIPE,),
}
"""The recipes of Meta-PerSER that a scope has configs for, in the order of preference."""

TEST_ANNOTATOR = "downstream_expert.data.test_annotator"
INIT_FROM = "downstream_expert.init_from"
ITSELF = "the experiment itself"
DECIDED = {
    "runner.eval_dataloaders": ITSELF,
    "downstream_expert.system": ITSELF,
    "downstream_expert.recipe": "--recipe",
    "downstream_expert.corpus": "--corpus",
    "downstream_expert.scope": "--scope",
    "downstream_expert.scenario": "--scenario",
    "downstream_expert.fold": "--folds",
    "downstream_expert.episodes.shots": "--shots",
    "downstream_expert.episodes.queries": "--queries",
    "downstream_expert.episodes.number": "--episodes",
    "downstream_expert.meta.inner_lr": "--inner-lr",
}
"""Keys that the plan gives each run, by which tables tell runs apart: and what decides them."""
OF_ALL_RUNS = ("downstream_expert.data", "downstream_expert.episodes")
"""Sections that say on whom systems are compared, the same for all."""

LENGTHS_CHOSEN_ON = 408
"""Training utterances of the corpus on which the lengths of the unseen scenario's configs were chosen."""
IN_PROPORTION = (SSL_E, f"{SSL_E}_paper", f"{SSL_E}_entire", MULTI_FEW, f"{MULTI_FEW}_entire")
"""Those of them that train for so many epochs, as dev cannot tell when to stop; larger corpora take more steps."""


@dataclass(frozen=True)
class Override:
    """A setting given beside the configs.

    Attributes:
        config: the config it is for, such as ``ssl_e`` or ``ssl_e_unseen``; None for all.
        key: dotted.
        value: as YAML gave it.
    """

    config: str | None
    key: str
    value: Any

    def __str__(self) -> str:
        where = f"{self.config}:" if self.config else ""
        # JSON is YAML on one line.
        return f"{where}{self.key}={json.dumps(self.value)}"


@dataclass(frozen=True)
class Setup:
    """What all experiments of one folder share.

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
        seed: of everything.
        threads: CPU threads of each run.
        overrides: further settings, the later over the earlier.
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
    seed: int
    threads: int
    overrides: tuple[Override, ...] = ()

    @cached_property
    def listeners(self) -> Corpus:
        """The corpus, loaded once."""
        return load_corpus(self.corpus)

    @cached_property
    def cells(self) -> tuple[tuple[Scenario, int], ...]:
        """Every scenario with every fold.

        Raises:
            MetaPerSERError: when the corpus has fewer folds than asked for.
        """
        available = fold_count(self.listeners, self._settings(self.scenarios[0]).data)
        wanted = available if self.folds is None else self.folds
        if wanted > available:
            raise MetaPerSERError(f"--folds {wanted} asked for, but corpus {self.listeners.name!r} has {available}")
        return tuple((scenario, fold) for scenario in self.scenarios for fold in range(1, wanted + 1))

    @cached_property
    def splits(self) -> dict[tuple[Scenario, int], Split]:
        """Who trains, chooses and is tested in each cell."""
        return {
            (scenario, fold): make_split(self.listeners, scenario, fold, self._settings(scenario).data)
            for scenario, fold in self.cells
        }

    def folds_of(self) -> dict[str, int]:
        """Map each test annotator to its fold."""
        return {task.annotator: fold for (_, fold), split in self.splits.items() for task in split.test}

    def has_enough(self, scenario: Scenario, shots: int) -> bool:
        """Tell whether the dev and test annotators of all folds have labels for K = ``shots`` and Q."""
        try:
            self._draw([split for (of, _), split in self.splits.items() if of == scenario], shots)
        except MetaPerSERError:
            return False
        return True

    def _draw(self, splits: Sequence[Split], shots: int) -> None:
        for split in splits:
            for tasks in (split.dev, split.test):
                meta_test_episodes(tasks, shots, self.queries, 1, self.seed)

    def check(self, check_run: Callable[[Sequence[str]], None], runs_are_elsewhere: bool = False) -> None:
        """Find what is wrong with corpus, settings, upstream or device before anything is run or written.

        Args:
            check_run: checks the command line of a run; see :mod:`s3prl_metaperser.experiments.launchers`.
            runs_are_elsewhere: whether the device is another machine's, and not to be looked for here.

        Raises:
            MetaPerSERError: naming it.
        """
        self._draw(list(self.splits.values()), self.shots)
        scenario, fold = self.cells[0]
        self._check_overrides(scenario)
        with tempfile.TemporaryDirectory() as folder:
            family = self.family(SSL_E, BASELINES_RECIPE)
            run = self.run(f"{scenario}/fold{fold}/{family}", "train", self.config(family, scenario, fold))
            upstream = replace(self.upstream, device="cpu") if runs_are_elsewhere else self.upstream
            run = replace(run, folder=Path(folder), upstream=upstream)
            run.prepare()
            check_run(run.arguments())

    def _check_overrides(self, scenario: Scenario) -> None:
        for one in self.overrides:
            if one.config is not None and one.config not in configs.available():
                raise MetaPerSERError(
                    f"--set {one}: no config {one.config!r}; {suggest(one.config, configs.available())}"
                )
            root, *names = one.key.split(".")
            if root == "specaug":
                raise MetaPerSERError(
                    f"--set {one}: it masks frames, but features are pooled once and cached without it; leave it out"
                )
            if root not in CONFIG_ROOTS:
                known = [name for name in CONFIG_ROOTS if name != "specaug"]
                raise MetaPerSERError(f"--set {one}: no config has {root!r}; {suggest(root, known)}")
            if not all(names) or not names:
                raise MetaPerSERError(f"--set {one}: expected a key below {root!r}, such as {root}.KEY=VALUE")
            known = [*self._installed(SSL_E, scenario)["runner"], *OPTIONAL_RUNNER_KEYS]
            if root == "runner" and names[0] not in known:
                raise MetaPerSERError(f"--set {one}: the runner knows no {names[0]!r}; {suggest(names[0], known)}")
            self._check_decided(one)

    def _check_decided(self, one: Override) -> None:
        """Refuse a setting by which runs would not be what their rows of a table say."""
        decided = dict(DECIDED)
        if self.folds != 1:
            decided[TEST_ANNOTATOR] = "--folds, unless that is 1,"
        if one.config is not None and one.config.startswith(META_PERSER):
            decided[INIT_FROM] = ITSELF
        for key, decider in decided.items():
            if _is_within(one.key, key):
                raise MetaPerSERError(f"--set {one}: {key} is for {decider} to say; leave it out")
            if _is_within(key, one.key):
                raise MetaPerSERError(
                    f"--set {one}: holds {key}, which is for {decider} to say; give other keys one by one"
                )
        if one.config is not None and any(_is_within(one.key, section) for section in OF_ALL_RUNS):
            raise MetaPerSERError(
                f"--set {one}: all runs must have the same listeners and episodes; give it without {one.config}:"
            )

    def shared(self) -> dict[str, Any]:
        """Give what must be the same for all experiments of a folder, for the record."""
        annotations = (self.corpus / "annotations.csv").read_bytes()
        return {
            "corpus": self.listeners.name,
            "annotations": hashlib.sha256(annotations).hexdigest()[:16],
            "upstream": self.upstream.name,
            "ckpt": self.upstream.ckpt,
            "device": self.upstream.device,
            "scope": self.scope,
            "shots": self.shots,
            "queries": self.queries,
            "episodes": self.episodes,
            "seed": self.seed,
            "threads": self.threads,
            "set": [str(one) for one in self.overrides],
        }

    def arguments(self) -> list[str]:
        """Give the command line of these settings, all but the experiment's own."""
        return [
            *("--corpus", str(self.corpus), *self.upstream.arguments(), "--scenario", *self.scenarios),
            *(["--folds", str(self.folds)] if self.folds else []),
            *("--scope", self.scope, "--queries", str(self.queries), "--episodes", str(self.episodes)),
            *("--seed", str(self.seed), "--threads", str(self.threads)),
            *(["--set", *map(str, self.overrides)] if self.overrides else []),
            *("--out", str(self.out)),
        ]

    def _installed(self, family: str, scenario: Scenario) -> dict[str, Any]:
        text = configs.find(_config_name(family, scenario)).read_text(encoding="utf-8")
        return dict(yaml.safe_load(text))

    def _settings(self, scenario: Scenario) -> Settings:
        """Give what a scenario's runs have in common, for who is dealt into which fold."""
        family = self.family(SSL_E, BASELINES_RECIPE)
        return read_settings(self._overridden(self._installed(family, scenario), family, scenario)["downstream_expert"])

    def family(self, config: str, recipe: Recipe) -> str:
        """Name a recipe's variety of a config in this setup's scope; see :func:`family_of`."""
        return family_of(config, recipe, self.scope)

    def config(
        self,
        family: str,
        scenario: Scenario,
        fold: int,
        change: Mapping[str, Any] | None = None,
        shots: int | None = None,
    ) -> dict[str, Any]:
        """Make a run's config.

        Args:
            family: the installed config it starts from, without the scenario; see :func:`family_of`.
            scenario: of the run.
            fold: of the run.
            change: the run's own settings in ``downstream_expert``, by dotted key.
            shots: K, where it is not the setup's.

        Raises:
            MetaPerSERError: for an override that the settings don't know.
        """
        config = self._installed(family, scenario)
        runner = config["runner"]
        runner["eval_dataloaders"] = ["dev"]
        if scenario == "unseen" and family in IN_PROPORTION:
            evaluations, logs = runner["total_steps"] // runner["eval_step"], runner["eval_step"] // runner["log_step"]
            utterances = len(self.splits[scenario, fold].aggregated)
            runner["eval_step"] = max(1, round(runner["eval_step"] * utterances / LENGTHS_CHOSEN_ON))
            runner["log_step"] = max(1, runner["eval_step"] // logs)
            runner["total_steps"] = runner["save_step"] = evaluations * runner["eval_step"]
        if self.scope == "entire":
            # A training takes hours, and goes on from its last state when it is killed or its time is up. A state is
            # as large as three upstreams (Adam's moments); dev-best.ckpt is another, and may be written as often.
            # log_step divides it: the means that go to TensorBoard are of steps that no kill comes between.
            runner["save_step"] = runner["eval_step"]
        expert = config["downstream_expert"]
        expert |= {"corpus": str(self.corpus.resolve()), "scope": self.scope, "scenario": scenario, "fold": fold}
        expert["episodes"] |= {"shots": self.shots, "queries": self.queries, "number": self.episodes}
        config = self._overridden(config, family, scenario)
        if shots is not None:
            config["downstream_expert"]["episodes"]["shots"] = shots
        for key, value in (change or {}).items():
            _put(config["downstream_expert"], key, value)
        read_settings(config["downstream_expert"])
        return config

    def _overridden(self, config: dict[str, Any], family: str, scenario: Scenario) -> dict[str, Any]:
        config = copy.deepcopy(config)
        for one in self.overrides:
            if one.config in (None, family, _config_name(family, scenario)):
                _put(config, one.key, one.value)
        return config

    def run(
        self,
        name: str,
        mode: Mode,
        config: Mapping[str, Any],
        checkpoint: Path | None = None,
        folder: str | None = None,
    ) -> Run:
        """Make a run of this setup, in the folder of its name if no other is given."""
        place = self.folder(folder or name)
        return Run(name, place, mode, config, self.upstream, self.seed, self.threads, checkpoint)

    def folder(self, name: str) -> Path:
        """Give the folder of a run."""
        return self.out.resolve() / RUNS / name


def family_of(config: str, recipe: Recipe, scope: Scope) -> str:
    """Name a recipe's variety of a config.

    >>> [family_of("ssl_e", recipe, "linear") for recipe in ("best", "paper")], family_of("ssl_e", "paper", "entire")
    (['ssl_e', 'ssl_e_paper'], 'ssl_e_entire')
    """
    if scope == "entire":
        return f"{config}_entire"
    return config if recipe == UNNAMED else f"{config}_{recipe}"


def _is_within(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


def _config_name(family: str, scenario: Scenario) -> str:
    return family if scenario == "seen" else f"{family}_{scenario}"


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        below = config.get(name)
        if not isinstance(below, dict):
            # An absent section, or one that is switched off by null, is begun anew.
            below = config[name] = {}
        config = below
    config[last] = value


@dataclass(frozen=True)
class Variant:
    """One way to meta-train.

    Attributes:
        recipe: of Meta-PerSER and of the SSL-E that it starts from.
        name: ends the names of its runs; empty for the recipe as it is.
        change: settings in ``downstream_expert`` that make it, by dotted key.
        from_ssl: whether it starts from SSL-E (INI) or from random weights.
    """

    recipe: Recipe
    name: str = ""
    change: tuple[tuple[str, Any], ...] = ()
    from_ssl: bool = True


class Plan:
    """Collects the runs of an experiment; a run that is asked for twice is there once.

    Args:
        setup: what they share.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._nodes: dict[str, Node] = {}

    @property
    def nodes(self) -> list[Node]:
        """All runs, each after those it waits for."""
        return list(self._nodes.values())

    def evaluated(
        self,
        system: SystemName,
        scenario: Scenario,
        fold: int,
        shots: int | None = None,
        recipe: Recipe = BASELINES_RECIPE,
    ) -> str:
        """Evaluate a system on the test annotators' episodes.

        Args:
            system: any but Meta-PerSER, which has variants.
            scenario: of the run.
            fold: of the run.
            shots: K, where it is not the setup's.
            recipe: of the SSL-E that it uses.

        Returns:
            The name of the run.
        """
        of_k = "" if shots in (None, self.setup.shots) else f"-k{shots}"
        own = system if recipe == BASELINES_RECIPE else f"{system}-{recipe}"
        name = f"{scenario}/fold{fold}/{own}{of_k}"
        if name in self._nodes:
            return name
        of_multi_few = self.setup.family(MULTI_FEW, UNNAMED)
        family = of_multi_few if system == "multi_few" else self.setup.family(SSL_E, recipe)
        change: dict[str, Any] = {"system": system}
        trained, change_of_training = family, {}
        if system == "linear_few" and self.setup.scope == "entire":
            # Before adaptation only linear layers and weighted sum are trained (paper section 2.4), and then adapted at
            # rates that would wreck an upstream.
            trained = family_of(SSL_E, recipe, "linear")
            change_of_training = {"scope": "linear", "precision": "float32"}
            linear = self.setup.config(trained, scenario, fold, change_of_training)
            change["adaptation"] = linear["downstream_expert"]["adaptation"]
        config = self.setup.config(family, scenario, fold, change, shots)
        if system == "random":
            return self._add(self.setup.run(name, "evaluate", config), after=self._first(recipe))
        training = self._trained(trained, scenario, fold, recipe, change_of_training)
        return self._add(self.setup.run(name, "evaluate", config, self._best(training)), training)

    def meta_perser(
        self,
        scenario: Scenario,
        fold: int,
        variant: Variant,
        inner_lrs: Sequence[float],
        shots: int | None = None,
    ) -> str:
        """Meta-train at every inner rate, and evaluate the one that is best on the dev annotator.

        Args:
            scenario: of the runs.
            fold: of the runs.
            variant: how it is meta-trained.
            inner_lrs: rates to choose from; of equals the first.
            shots: K of the evaluation, where it is not the one it is trained at.

        Returns:
            The name of the evaluation.
        """
        family = self.setup.family(META_PERSER, variant.recipe)
        own = f"{scenario}/fold{fold}/{family}" + (f"-{variant.name}" if variant.name else "")
        of_k = "" if shots in (None, self.setup.shots) else f"-k{shots}"
        name = f"{own}{of_k}"
        if name in self._nodes:
            return name
        options = {}
        for inner_lr in inner_lrs:
            change = {**dict(variant.change), "meta.inner_lr": inner_lr, "init_from": None}
            training = f"{own}-lr{exact(inner_lr)}"
            if training not in self._nodes:
                self._meta_train(training, scenario, fold, variant, change)
            config = self.setup.config(family, scenario, fold, change, shots)
            # A folder for each rate: another experiment here may choose from other rates, and choose another.
            folder = f"{training}-test{of_k}"
            options[training] = self.setup.run(name, "evaluate", config, self._best(training), folder)
        if len(options) == 1:
            ((training, run),) = options.items()
            return self._add(run, training)
        folders = {training: self.setup.folder(training) for training in options}
        metric = read_settings(self.setup.config(family, scenario, fold)["downstream_expert"]).select_by
        self._nodes[name] = Node(name, Choice(options, folders, metric), needs=tuple(options))
        return name

    def _meta_train(
        self, name: str, scenario: Scenario, fold: int, variant: Variant, change: Mapping[str, Any]
    ) -> None:
        family = self.setup.family(META_PERSER, variant.recipe)
        if not variant.from_ssl:
            run = self.setup.run(name, "train", self.setup.config(family, scenario, fold, change))
            self._add(run, after=self._first(variant.recipe))
            return
        start = self._trained(self.setup.family(SSL_E, variant.recipe), scenario, fold, variant.recipe)
        config = self.setup.config(family, scenario, fold, {**change, "init_from": str(self._best(start))})
        self._add(self.setup.run(name, "train", config), start)

    def _trained(
        self, family: str, scenario: Scenario, fold: int, recipe: Recipe, change: Mapping[str, Any] | None = None
    ) -> str:
        name = f"{scenario}/fold{fold}/{family}"
        name += "-train" if family == MULTI_FEW else ""
        if name not in self._nodes:
            run = self.setup.run(name, "train", self.setup.config(family, scenario, fold, change))
            self._add(run, after=self._first(recipe))
        return name

    def _first(self, recipe: Recipe) -> str | None:
        """Give the run that extracts a recipe's features of the whole corpus, and does little else, if there is one."""
        if self.setup.scope == "entire":
            return None
        scenario, fold = self.setup.cells[0]
        family = self.setup.family(SSL_E, recipe)
        name = f"{scenario}/fold{fold}/random" + ("" if recipe == BASELINES_RECIPE else f"-{recipe}")
        if name not in self._nodes:
            config = self.setup.config(family, scenario, fold, {"system": "random"})
            self._add(self.setup.run(name, "evaluate", config))
        return name

    def _best(self, training: str) -> Path:
        return self.setup.folder(training) / BEST

    def _add(self, run: Run, *needs: str, after: str | None = None) -> str:
        # The first run of all is asked for by the name under which it would be added again.
        if run.name not in self._nodes:
            self._nodes[run.name] = Node(run.name, run, needs, (after,) if after else ())
        return run.name
