"""Table 1, Table 2 and Figure 2 on a small corpus: what they run, what they share, what they leave, how they resume."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from s3prl.utility.helper import override
from workshop import LAUNCHER, same_weights

from s3prl_metaperser import cli, configs, torch_files
from s3prl_metaperser.checkpoints import read_checkpoint
from s3prl_metaperser.checksums import CheckedFolder, sealed
from s3prl_metaperser.corpus.synthetic import write_demo_corpus
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments import conduct, reproduce
from s3prl_metaperser.experiments.conduct import report, tell_replaced
from s3prl_metaperser.experiments.experiment import own_names, refuse_others
from s3prl_metaperser.experiments.figure2 import figure2
from s3prl_metaperser.experiments.grid import Grid, Node
from s3prl_metaperser.experiments.launchers import ProcessLauncher
from s3prl_metaperser.experiments.plan import Override, Setup
from s3prl_metaperser.experiments.preparation import prepare
from s3prl_metaperser.experiments.runs import Run, Upstream, last_words
from s3prl_metaperser.experiments.table1 import table1 as plan_table1
from s3prl_metaperser.results_file import RESULT_COLUMNS, RUN_COLUMNS
from s3prl_metaperser.settings import AnnealingSettings, read_settings

SYSTEMS = [
    *("Random", "Linear-Few", "Entire-Few", "Entire-Zero", "Multi-Few", "Entire-Sim."),
    *("Entire-Few (best)", "Meta-PerSER (paper)", "Meta-PerSER"),
]
REFERENCE = "Reference (all labels)"
RUNS = 17
"""Of Table 1 in a cell: 10 evaluations, 3 trainings, 4 meta-trainings. One more extracts the best recipe's features."""
SHORT = [
    *("runner.total_steps=4", "runner.eval_step=2", "runner.save_step=4"),
    *("downstream_expert.data.min_annotations=4", "downstream_expert.reference.steps=5"),
    *("downstream_expert.adaptation.steps=[2,4]", "downstream_expert.adaptation.lr=[0.01,0.1]"),
]


def command(kind, corpus, out, *more, settings=(), queries=6):
    return [
        *("experiment", kind, "--corpus", str(corpus), "--out", str(out), "-u", "fbank_no_cmvn", "--folds", "1"),
        *("--queries", str(queries), "--episodes", "2", "--seed", "1", "--set", *SHORT, *settings, *more),
    ]


def settings_of(out, run):
    config = yaml.safe_load((out / "runs" / run / "config.yaml").read_text())
    return read_settings(config["downstream_expert"])


def table1(corpus, out, *more, **change):
    return command("table1", corpus, out, "--shots", "4", "--inner-lr", "0.1", "1e-6", *more, **change)


def changes(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def record(out, kind):
    return json.loads((out / f"{kind}.json").read_text())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAPERSER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory, small_corpus, cache):
    """A folder in which all three experiments have been made."""
    out = tmp_path_factory.mktemp("experiments") / "out"
    assert cli.main(table1(small_corpus, out, "--jobs", "2")) == 0
    shared = changes(out / "runs")
    assert cli.main(command("table2", small_corpus, out, "--shots", "4", "--inner-lr", "0.1", "--jobs", "2")) == 0
    figure = ["--shots", "2", "4", "8", "--train-shots", "4", "--inner-lr", "0.1", "1e-6", "--jobs", "2"]
    assert cli.main(command("figure2", small_corpus, out, *figure)) == 0
    assert shared.items() <= changes(out / "runs").items(), "what Table 1 has run is not run again"
    return out


class TestTable1:
    def test_it_has_the_papers_rows_and_the_reference_in_both_scenarios(self, out):
        results = pd.read_csv(out / "results.csv")
        assert results.columns.tolist() == RESULT_COLUMNS
        rows = results[["scenario", "system"]].drop_duplicates().itertuples(index=False, name=None)
        assert list(rows) == [(scenario, one) for scenario in ("seen", "unseen") for one in [*SYSTEMS, REFERENCE]]
        assert len(results) == 2 * 10 * 2
        shown = re.findall(r"^\| \*?([^|]*[^| ]) +\|", (out / "table1.md").read_text(), re.M)
        assert shown[:-1] == ["System", *SYSTEMS]
        assert shown[-1].startswith(REFERENCE)

    def test_each_recipe_starts_from_its_own_ssl_e_and_the_baselines_are_the_papers(self, out):
        for run, ssl_e, recipe in (
            ("meta_perser-lr0.1", "ssl_e", "best"),
            ("meta_perser_paper-lr0.1", "ssl_e_paper", "paper"),
        ):
            settings = settings_of(out, f"seen/fold1/{run}")
            assert settings.recipe == recipe
            assert settings.init_from == str(out / f"runs/seen/fold1/{ssl_e}/dev-best.ckpt")
            assert settings_of(out, f"seen/fold1/{ssl_e}").recipe == recipe
        papers = dict.fromkeys(["linear_few", "entire_few", "entire_zero", "entire_sim"], "ssl_e_paper")
        for system, ssl_e in {**papers, "entire_few-best": "ssl_e", "reference-best": "ssl_e"}.items():
            command = json.loads((out / f"runs/seen/fold1/{system}/done.json").read_text())["command"]
            assert command.endswith(f"-i {out}/runs/seen/fold1/{ssl_e}/dev-best.ckpt")

    def test_the_inner_rate_is_the_best_on_dev(self, out):
        said = {(row["scenario"], row["system"]): row["setting"] for row in record(out, "table1")["chosen"]}
        for scenario in ("seen", "unseen"):
            for system, run in (("Meta-PerSER", "meta_perser"), ("Meta-PerSER (paper)", "meta_perser_paper")):
                trained = {lr: out / f"runs/{scenario}/fold1/{run}-lr{lr}" for lr in ("0.1", "1e-06")}
                dev = {lr: pd.read_csv(one / "results-dev.csv")["miF1"].mean() for lr, one in trained.items()}
                best = "0.1" if dev["0.1"] >= dev["1e-06"] else "1e-06"
                assert said[scenario, system].startswith(f"inner_lr {best}, ")
                rows = pd.read_csv(out / "results.csv").query("scenario == @scenario and system == @system")
                evaluated = pd.read_csv(out / f"runs/{scenario}/fold1/{run}-lr{best}-test/results.csv")
                assert rows["miF1"].tolist() == evaluated["miF1"].tolist()

    def test_the_test_annotator_is_not_looked_at_before_everything_is_chosen(self, out):
        trained = [path.parent for path in out.rglob("dev-best.ckpt")]
        assert len(trained) == 2 * (2 + 1 + 4) + 2 * 5
        assert not any((folder / "results.csv").exists() for folder in trained)

    def test_all_systems_meet_the_same_query_clips(self, out):
        for scenario in ("seen", "unseen"):
            met = {
                tuple(pd.read_csv(path)[["episode", "utterance", "labels"]].itertuples(index=False, name=None))
                for path in out.glob(f"runs/{scenario}/fold1/*/predictions.csv")
                if "-k" not in path.parent.name
            }
            assert len(met) == 1

    def test_it_says_which_systems_coincide(self, out):
        assert "Linear-Few coincides with Entire-Few here" in (out / "table1.md").read_text()


class TestTable2:
    def test_each_row_has_the_parts_that_it_names(self, out):
        """INI: from SSL-E; CSMT: the support is the query; DA: the config's annealing; LSLR: learned rates."""
        found = {}
        for path in out.glob("runs/seen/fold1/meta_perser_paper*-lr0.1"):
            settings = settings_of(out, path)
            parts = {
                "ini": settings.init_from is not None,
                "csmt": {"combined": True, "disjoint": False}[settings.meta.query],
                "da": settings.meta.annealing == AnnealingSettings(fraction=0.3, over="inner_steps"),
                "lslr": settings.meta.lslr,
            }
            assert parts["da"] or settings.meta.annealing is None
            found[path.name] = [part for part, there in parts.items() if there]
        some = [[], ["ini"], ["ini", "csmt"], ["ini", "da"], ["ini", "lslr"]]
        rows = {f"meta_perser_paper-{'+'.join(['maml', *parts])}-lr0.1": parts for parts in some}
        assert found == {**rows, "meta_perser_paper-lr0.1": ["ini", "csmt", "da", "lslr"]}

    def test_the_results_are_named_by_row(self, out):
        results = pd.read_csv(out / "results-table2.csv")
        assert results.columns.tolist() == RESULT_COLUMNS
        names = ["MAML", "MAML+INI", "MAML+INI+CSMT", "MAML+INI+DA", "MAML+INI+LSLR", "MAML+INI+CSMT+DA+LSLR"]
        assert results["system"].drop_duplicates().tolist() == names


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "overall: 0%| | 0/4\nmetaperser: error: E3 diverged; lower it\n\noverall: 0%|   | 0/4 [00:00<?]\r",
            "metaperser: error: E3 diverged; lower it",
        ),
        ("50%|#| 2/4\x1b[A1%|  |metaperser predict: error: no\x1b[A50%|#| 2/4", "metaperser predict: error: no"),
        ("Traceback\nKeyError: 'x'\n  5%|  | 1/20", "KeyError: 'x'"),
        ("run_downstream: error: full\n[metaperser] this training was stopped; it goes on\nKilled", "Killed"),
        ("1%| | 1/100\n", "1%| | 1/100"),
        ("\n \n", "it said nothing"),
    ],
)
def test_the_reason_of_a_failure_is_its_error_not_a_bar_that_is_drawn_after_it(tmp_path, log, said):
    (tmp_path / "log").write_text(log)
    assert last_words(tmp_path / "log") == said


def test_what_the_last_command_has_not_made_is_not_left_of_the_one_before(out, small_corpus, tmp_path, monkeypatch):
    """No run of Meta-PerSER has ended well, and then none at all."""
    copy = tmp_path / "copy"
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns("*.ckpt"))
    setup = setup_of(small_corpus, copy, "linear")
    read, left = conduct.read_results, lambda rows: rows[rows["system"] != "Meta-PerSER"]
    monkeypatch.setattr(conduct, "read_results", lambda *given: left(read(*given)))
    report(setup, "table1")
    assert {path.name for path in copy.glob("table1*")} >= {"table1.csv", "table1.md", "table1.tex", "table1.svg"}
    assert not list(copy.glob("table1-comparison.*"))
    monkeypatch.setattr(conduct, "read_results", lambda *given: read(*given)[:0])
    report(setup, "table1")
    made = [path.name for kind in ("table1", "table2", "figure2") for path in copy.glob(f"{kind}*")]
    assert sorted(made) == ["figure2.json", "table1.json", "table2.json"]
    monkeypatch.undo()
    report(setup, "table1")
    again = {path.name: path.read_bytes() for path in copy.glob("table*.csv")}
    assert again == {path.name: path.read_bytes() for path in out.glob("table*.csv")}


class TestFigure2:
    def test_a_k_with_too_few_labels_is_left_out_and_named(self, out):
        """In unseen the test annotator has 12 labels: 8 and 6 queries are too many."""
        results = pd.read_csv(out / "results-figure2.csv")
        shots = results.groupby(["scenario", "system"])["shots"].unique().map(sorted)
        assert all(shots["seen"].map(lambda found: found == [2, 4, 8]))
        assert all(shots["unseen"].map(lambda found: found == [2, 4]))
        assert set(results["system"]) == {*SYSTEMS[-3:], "Entire-Few", "Entire-Zero", REFERENCE}
        assert "unseen: K = 8 is left out" in (out / "figure2.md").read_text()
        assert "small, fbank_no_cmvn, meta-trained at K=4, Q=6" in (out / "figure2.svg").read_text()

    def test_every_k_is_judged_on_the_same_clips_after_training_at_one(self, out):
        queries = set()
        for k, ending in ((2, "-k2"), (4, ""), (8, "-k8")):
            (run,) = out.glob(f"runs/seen/fold1/meta_perser-lr*-test{ending}")
            queries.add(tuple(pd.read_csv(run / "predictions.csv")["utterance"]))
            settings = settings_of(out, run)
            assert settings.episodes.shots == k
            trained = settings_of(out, str(run).split("-test")[0])
            assert trained.episodes.shots == 4, "--train-shots"
        assert len(queries) == 1


def test_given_again_nothing_is_run_and_the_same_is_written(out, small_corpus, capsys):
    before = changes(out / "runs")
    written = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert cli.main(table1(small_corpus, out, "--jobs", "1")) == 0
    assert changes(out / "runs") == before
    differing = {path.name for path, content in written.items() if path.read_bytes() != content}
    about_this_time = {"table1.json", "report.html", "checksums.sha256"}
    assert differing <= about_this_time, "two say what was run this time, and one has their checksums"
    assert (out / "table1.md").read_text() in capsys.readouterr().out


def test_the_report_shows_every_experiment_of_the_folder(out):
    report = (out / "report.html").read_text()
    for text in ("Table 1", "Table 2", "Figure 2", "metaperser experiment table2", "inner_lr", "seen/fold1/ssl_e"):
        assert text in report


def test_a_dry_run_names_the_commands_and_what_is_open_and_writes_nothing(out, small_corpus, tmp_path, capsys):
    before = changes(out)
    assert cli.main(table1(small_corpus, out, "--dry-run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("done ") for line in lines) == 2 * RUNS + 1
    ran = {json.loads(path.read_text())["command"] for path in out.rglob("done.json")}
    assert {line.strip() for line in lines if "run_downstream" in line} <= ran
    assert changes(out) == before

    assert cli.main(table1(small_corpus, tmp_path / "new", "--dry-run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("to run ") for line in lines) == 2 * RUNS + 1
    trainings = "seen/fold1/meta_perser-lr0.1, seen/fold1/meta_perser-lr1e-06"
    assert f"        chosen on dev from {trainings}; one of:" in lines
    assert not (tmp_path / "new").exists()


def test_inner_rates_that_differ_in_a_late_digit_are_different_runs(small_corpus, tmp_path):
    rates = [0.1, 0.10000001]
    plan = plan_table1(setup_of(small_corpus, tmp_path, "linear"), rates, ["best"])
    for rate in ("0.1", "0.10000001"):
        assert [node.name for node in plan.nodes].count(f"seen/fold1/meta_perser-lr{rate}") == 1
    assert "--inner-lr 0.1 0.10000001" in plan.command


def test_a_folder_holds_one_set_of_settings(out, small_corpus, capsys):
    before = changes(out)
    with pytest.raises(SystemExit) as ended:
        cli.main(table1(small_corpus, out, queries=5))
    assert ended.value.code == 2
    assert (
        "holds experiments with queries 6, this one has 5; give the same, or another --out" in capsys.readouterr().err
    )
    assert changes(out).items() >= {path: at for path, at in before.items() if path.name != ".lock"}.items()


def test_files_that_no_experiment_has_written_are_not_replaced(out, small_corpus, tmp_path):
    written = {path.name for path in out.iterdir()} - {".lock", "checksums.sha256", "experiment.json"}
    assert written <= set(own_names())
    for name in ("results.csv", "report.html", "runs/mine.txt"):
        own = tmp_path / name.partition(".")[0] / name
        own.parent.mkdir(parents=True)
        own.write_text("mine")
        with pytest.raises(MetaPerSERError, match=f"holds {name.split('/')[0]}, which no experiment there has written"):
            refuse_others(tmp_path / name.partition(".")[0])
    with pytest.raises(SystemExit) as ended:
        cli.main(table1(small_corpus, tmp_path / "results"))
    assert ended.value.code == 2
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["results.csv"]
    again = tmp_path / "again"
    shutil.copytree(out, again, ignore=shutil.ignore_patterns("runs", "experiment.json"))
    refuse_others(again)  # a damaged experiment.json is to be deleted, says its error


def test_which_table_is_replaced_is_said_with_the_command_that_brings_it_back(out, small_corpus, tmp_path, capsys):
    setup = setup_of(small_corpus, out, "linear")
    given = [0.1, 1e-6], ["best", "paper"]
    tell_replaced(plan_table1(setup, *given))
    assert capsys.readouterr().err == ""
    for other in (
        plan_table1(replace(setup, scenarios=("seen",)), *given),
        plan_table1(replace(setup, folds=2), *given),
        plan_table1(setup, [0.1], given[1]),
        plan_table1(setup, given[0], ["best"]),
    ):
        tell_replaced(other)
        assert capsys.readouterr().err.endswith(f"and this brings it back: {record(out, 'table1')['command']}\n")
    shutil.copytree(out, tmp_path / "copy")
    before = changes(tmp_path / "copy/runs")
    assert cli.main(table1(small_corpus, tmp_path / "copy", "--scenario", "seen")) == 0
    assert "brings it back" in capsys.readouterr().err
    assert changes(tmp_path / "copy/runs") == before


def test_what_the_report_can_no_longer_show_is_said_with_the_command_that_brings_it_back(
    out, small_corpus, tmp_path, capsys
):
    """Rows that are gone; rows of runs that have been redone since, or are gone."""
    copy = tmp_path / "copy"
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns("*.ckpt"))
    setup = setup_of(small_corpus, copy, "linear")
    report(setup, "table1")
    assert capsys.readouterr().err == ""
    assert "no longer there" not in (copy / "report.html").read_text()

    table2 = record(copy, "table2")
    assert all(json.loads((copy / "runs" / run / "done.json").read_text()) for run in table2["made_of"])
    ssl_e = copy / "runs/seen/fold1/ssl_e_paper/done.json"
    ssl_e.write_text(json.dumps(sealed(json.loads(ssl_e.read_text()) | {"fingerprint": "of other recordings"})))
    (copy / "results-figure2.csv").unlink()
    report(setup, "table1")
    *stale, gone = capsys.readouterr().err.splitlines()
    command = record(copy, "figure2")["command"]
    assert f"results-figure2.csv is gone, and report.html is without figure2; this brings them back: {command}" in gone
    shown = (copy / "report.html").read_text()
    assert "Figure 2" not in shown
    for kind, line in zip(("table1", "table2"), stale, strict=True):
        said = "made of runs that are no longer there; this brings it up to date: "
        assert line == f"metaperser: {copy}: its {kind} is {said}{record(copy, kind)['command']}"
        assert f"This {kind} is {said}" in shown

    table1 = record(copy, "table1") | {"sources": table2["sources"] | {"recordings": "of before"}}
    CheckedFolder(copy).replace({"table1.json": json.dumps(table1), "table2.json": json.dumps(table2)})
    report(setup, "table2")
    first, *_ = capsys.readouterr().err.splitlines()
    said = "made of other recordings than table2; this brings it up to date: "
    assert first == f"metaperser: {copy}: its table1 is {said}{table1['command']}"
    assert f"This table1 is {said}" in (copy / "report.html").read_text()

    for kind in ("table1", "table2"):
        old = {key: value for key, value in record(copy, kind).items() if key not in ("made_of", "sources")}
        CheckedFolder(copy).replace({f"{kind}.json": json.dumps(old)})
    report(setup, "table1")
    assert "no longer there" not in capsys.readouterr().err, "made before fingerprints were kept"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": ["--scope", "entire", "--recipe", "best"]}, "with --scope entire give --recipe paper"),
        ({"queries": 80}, "has 60 labelled utterances here; shots 4 + queries 80"),
        ({"more": ["-u", "fbank_no_cmv"]}, "did you mean 'fbank_no_cmvn'"),
        ({"more": ["--folds", "9"]}, "--folds 9 asked for, but corpus 'small' has 3"),
        ({"settings": ["downstream_expert.meta.inner_stpes=5"]}, "unknown; did you mean 'inner_steps'"),
        ({"settings": ["runner.total_stps=5"]}, "the runner knows no 'total_stps'; did you mean 'total_steps'"),
        ({"settings": ["sle_e:runner.total_steps=5"]}, "no config 'sle_e'; did you mean"),
        (
            {"settings": ["total_steps=5"]},
            "no config has 'total_steps'; known: runner, optimizer, scheduler, downst",
        ),
        ({"settings": ["optimzer.lr=3"]}, "no config has 'optimzer'; did you mean 'optimizer'?"),
        (
            {"settings": ["optimizer=3"]},
            "--set optimizer=3: expected a key below 'optimizer', such as optimizer.KEY",
        ),
        ({"settings": ["optimizer.=3"]}, "expected a key below 'optimizer'"),
        (
            {"settings": ["specaug.max_n_masks=2"]},
            "--set specaug.max_n_masks=2: it masks frames, but features",
        ),
        ({"settings": ["downstream_expert.fold=2"]}, "downstream_expert.fold is for --folds to say; leave it out"),
        ({"settings": ["downstream_expert.corpus=elsewhere"]}, "is for --corpus to say"),
        ({"settings": ["ssl_e_paper:downstream_expert.scenario=unseen"]}, "is for --scenario to say"),
        ({"settings": ["downstream_expert.scope=head"]}, "is for --scope to say"),
        ({"settings": ["downstream_expert.recipe=best"]}, "is for --recipe to say"),
        ({"settings": ["downstream_expert.system=random"]}, "is for the experiment itself to say"),
        ({"settings": ["runner.eval_dataloaders=[dev,test]"]}, "is for the experiment itself to say"),
        ({"settings": ["downstream_expert.episodes.shots=8"]}, "is for --shots to say"),
        ({"settings": ["downstream_expert.episodes.queries=8"]}, "is for --queries to say"),
        ({"settings": ["downstream_expert.episodes.number=8"]}, "is for --episodes to say"),
        ({"settings": ["downstream_expert.episodes={seed: 1}"]}, "holds downstream_expert.episodes.shots, which"),
        ({"settings": ["downstream_expert.meta.inner_lr=1"]}, "is for --inner-lr to say"),
        ({"settings": ["meta_perser:downstream_expert.init_from=a"]}, "is for the experiment itself to say"),
        ({"settings": ["multi_few:downstream_expert.data.fold_count=2"]}, "must have the same listeners and episodes"),
        (
            {"more": ["--folds", "2"], "settings": ["downstream_expert.data.test_annotator=E1"]},
            "downstream_expert.data.test_annotator is for --folds, unless that is 1, to say",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_run(small_corpus, tmp_path, capsys, change, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(table1(small_corpus, tmp_path / "out", *change.pop("more", []), **change))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_fold_may_be_of_a_chosen_listener(small_corpus, tmp_path):
    setup = setup_of(small_corpus, tmp_path, "linear", Override(None, "downstream_expert.data.test_annotator", "E2"))
    setup.check(lambda arguments: None)
    assert setup.folds_of() == {"E2": 1}


def test_what_rows_of_table2_differ_in_is_not_set_for_all_of_them(recordings, tmp_path, capsys):
    """Also where another experiment comes first."""
    short = ["--scenario", "seen", "--folds", "1", "--shots", "4", "--queries", "20", "--figure-shots", "4"]
    for key, value in (("lslr", "false"), ("query", "resampled"), ("annealing", "null")):
        full = f"downstream_expert.meta.{key}"
        given = [str(recordings), "-u", "fbank_no_cmvn", "--out", str(tmp_path / "out"), *short]
        with pytest.raises(SystemExit) as ended:
            reproduce.main([*given, "--set", f"{full}={value}"])
        assert ended.value.code == 2
        assert f": {full} is what rows of Table 2 differ in" in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "out").exists()


def test_a_flag_given_again_adds_to_what_it_was_given_before():
    parser = reproduce.build_parser()
    flags = "--scenario unseen --scenario seen --recipe paper --recipe best --inner-lr 0.1 --inner-lr 0.2 0.3"
    given = parser.parse_args(["IEMOCAP", *flags.split(), "--figure-shots", "4", "--figure-shots", "8"])
    assert (given.scenario, given.recipe) == (["unseen", "seen"], ["paper", "best"])
    assert (given.inner_lr, given.figure_shots) == ([0.1, 0.2, 0.3], [4, 8])
    assert parser.parse_args(["IEMOCAP"]).scenario == ["seen", "unseen"]


def test_failed_runs_and_episodes_are_named_and_all_others_make_the_table(small_corpus, tmp_path, cache, capsys):
    broken = ["multi_few:optimizer.torch_optim_name=Adamm", "ssl_e_paper:downstream_expert.adaptation.lr=1.0e+30"]
    assert cli.main(table1(small_corpus, tmp_path / "out", "--scenario", "seen", settings=broken)) == 1
    said = capsys.readouterr()
    assert f"1 of {RUNS + 1} runs failed, 1 more need them" in said.err
    assert re.search(r"seen/fold1/multi_few-train: ended with code 2: .*no attribute 'Adamm'.*log\.txt", said.err)
    assert "Multi-Few, seen: fold 1 is missing, since a run failed." in said.out
    results = pd.read_csv(tmp_path / "out/results.csv")
    assert results["system"].drop_duplicates().tolist() == [one for one in SYSTEMS if one != "Multi-Few"] + [REFERENCE]
    report = (tmp_path / "out/report.html").read_text()
    assert "Adamm" in report
    few = results[results["system"].isin(["Linear-Few", "Entire-Few"])]
    assert few["miF1"].tolist() == [0] * 4
    failures = pd.read_csv(tmp_path / "out/failures.csv")
    assert failures[list(RUN_COLUMNS)].to_numpy().tolist() == few[list(RUN_COLUMNS)].to_numpy().tolist()
    assert (failures["diverged_at_step"] > 0).all()
    assert re.search(r"\| Linear-Few +\| ‡ 0\.0 ± 0\.0", said.out)
    note = "‡ Episodes in which adaptation diverged, which score 0: Linear-Few, seen: 2 of 2; "
    for shown in (said.out, report, (tmp_path / "out/table1.tex").read_text().replace(r"$\ddagger$", "‡")):
        assert f"{note}Entire-Few, seen: 2 of 2" in shown
    failed = pd.read_csv(tmp_path / "out/table1.csv").set_index("system")["failed"]
    assert failed[failed > 0].to_dict() == {"Linear-Few": 2, "Entire-Few": 2}


def descendants(pid):
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    parents = {int(one): int(parent) for one, parent, state in map(str.split, listed.splitlines()) if "Z" not in state}
    found = {pid}
    while more := {one for one, parent in parents.items() if parent in found} - found:
        found |= more
    return found & parents.keys()


def wait_until(condition, seconds=120):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "whom"), [(signal.SIGTERM, "itself"), (signal.SIGKILL, "itself"), (signal.SIGKILL, "group")]
)
def test_stopped_or_killed_anywhere_and_given_again_it_gives_the_same(out, small_corpus, tmp_path, number, whom):
    arguments = table1(small_corpus, tmp_path / "out", "--jobs", "2")
    program = [sys.executable, "-m", "s3prl_metaperser.cli", *arguments]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(program, stdout=log, stderr=log, start_new_session=True)
    wait_until(lambda: len(list((tmp_path / "out").rglob("done.json"))) >= 3 or process.poll() is not None)
    family = descendants(process.pid)
    assert len(family) > 1, (tmp_path / "log").read_text()
    os.kill(process.pid, number) if whom == "itself" else os.killpg(process.pid, number)
    assert process.wait() == (143 if number == signal.SIGTERM else -number)
    wait_until(lambda: all(not descendants(one) for one in family), 20)
    assert not (tmp_path / "out/results.csv").exists()
    done = {path: path.read_bytes() for path in (tmp_path / "out").rglob("done.json")}
    assert cli.main(arguments) == 0
    assert all(path.read_bytes() == content for path, content in done.items())
    for name in ("results.csv", "table1.md", "table1.tex", "table1.csv", "table1.svg", "table1-comparison.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


def setup_of(corpus, out, scope, *overrides):
    return Setup(
        corpus=corpus,
        out=out,
        upstream=Upstream("fbank_no_cmvn", None, "cpu"),
        scenarios=("seen", "unseen"),
        folds=1,
        scope=scope,
        shots=4,
        queries=6,
        episodes=1,
        seed=1,
        threads=1,
        overrides=(Override(None, "downstream_expert.data.min_annotations", 4), *overrides),
    )


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


class TestWhatATrainingGoesOnFrom:
    @pytest.fixture
    def run(self, small_corpus, tmp_path):
        """A training that was killed after its second state, and before it has looked at dev."""
        setup = setup_of(small_corpus, tmp_path, "linear", Override(None, "runner.eval_step", 6))
        run = setup.run("ssl_e", "train", setup.config("ssl_e", "seen", 1))
        assert run.begin() is None
        for step in (2, 4):
            torch_files.save({"Step": step, "weights": torch.zeros(100)}, run.folder / f"states-{step}.ckpt")
        (run.folder / ".states-6.ckpt.abcdefgh.part").write_text("half a sta")
        return run

    def test_its_newest_sound_state(self, run):
        assert run.begin() == run.folder / "states-4.ckpt"
        assert not list(run.folder.glob(".*.part"))
        cut_off(run.folder / "states-4.ckpt")
        assert run.begin() == run.folder / "states-2.ckpt"

    @pytest.mark.parametrize(
        "change",
        [
            lambda run: replace(run, seed=2),
            lambda run: replace(run, config={**run.config, "optimizer": {**run.config["optimizer"], "lr": 1.0}}),
            lambda run: replace(run, mode="evaluate"),
            lambda run: replace(run, folder=run.folder.rename(run.folder.with_name("moved"))),
            lambda run: [cut_off(state) for state in run.folder.glob("states-*")],
            lambda run: (run.folder / "done.json").write_text("{}"),
            lambda run: (run.folder / "begun.json").unlink(),
            lambda run: (run.folder / "states-4.ckpt").rename(run.folder / "states-6.ckpt"),
            lambda run: (run.folder / "dev-best.ckpt").write_text("cut o"),
            lambda run: (run.folder / "checksums.sha256").write_text("no checksum"),
        ],
        ids=["other", "config", "evaluation", "moved", "damaged", "ended", "unknown", "no best", "half a best", "list"],
    )
    def test_nothing_where_it_is_not_this_runs_or_not_sound(self, run, change):
        """A step 6 has looked at dev, and left dev-best.ckpt."""
        changed = change(run)
        run = changed if isinstance(changed, Run) else run
        assert run.begin() is None
        assert {path.name for path in run.folder.iterdir()} == {"begun.json", "config.yaml"}

    def test_a_state_without_a_step_is_a_failure_that_leaves_all_states(self, run):
        (run.folder / "states-best.ckpt").write_text("a copy made by hand")
        before = {path: path.read_bytes() for path in run.folder.iterdir()}
        (failure,) = Grid([Node(run.name, run)]).run(ProcessLauncher(), 1).failures
        assert failure.reason.startswith(f"could not be started: {run.folder}: holds states-best.ckpt, which has no")
        assert {path: path.read_bytes() for path in run.folder.iterdir()} == before

    def test_an_upstreams_address_is_given_again_as_a_states_is_not_trusted(self, run):
        address = "https://example.org/o'clock.pt?size=base,,large"
        *_, flag, option = replace(run, upstream=Upstream("wavlm_url", address, "cpu")).started_arguments()
        args = Namespace(upstream_ckpt=None)
        override(option, args, {})
        assert (flag, args.upstream_ckpt) == ("-o", address)
        assert "-o" not in run.started_arguments()


@pytest.mark.parametrize(
    ("scope", "family", "scenario", "given", "steps"),
    [
        ("linear", "ssl_e_paper", "seen", None, 6000),
        ("linear", "ssl_e_paper", "unseen", None, 20),
        ("linear", "ssl_e_paper", "unseen", 7, 7),
        ("entire", "ssl_e_entire", "seen", None, 1500),
        ("entire", "ssl_e_entire", "unseen", None, 8),
        ("entire", "multi_few_entire", "unseen", None, 8),
    ],
)
def test_unseen_trainings_last_in_proportion_to_the_corpus(
    tmp_path, small_corpus, scope, family, scenario, given, steps
):
    """200 steps (64 in scope entire) are for 408 training utterances, with ten (8) looks at dev; here are 48."""
    setup = setup_of(small_corpus, tmp_path, scope, *([Override(family, "runner.total_steps", given)] if given else []))
    runner = setup.config(family, scenario, 1)["runner"]
    assert runner["total_steps"] == steps
    # What trains for hours saves a state at each look at dev, beside the one before: there is always one to go on from.
    # TensorBoard's means are of the steps since the one before: none of them may lie before a state and after it.
    assert scope != "entire" or runner["save_step"] == runner["eval_step"] <= steps / 8
    assert scope != "entire" or runner["save_step"] % runner["log_step"] == 0
    assert runner["max_keep"] == 2


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, small_corpus, small_wavlm):
    """The command line of a Table 1 in scope entire."""
    out = tmp_path_factory.mktemp("entire") / "out"
    whole = ["-u", "wavlm_local", "-k", str(small_wavlm), "--scope", "entire", "--scenario", "seen", "--jobs", "2"]
    shorter = ["runner.gradient_accumulate_steps=2", "downstream_expert.meta.inner_steps=2"]
    shorter += ["meta_perser_entire:runner.save_step=1"]
    return table1(small_corpus, out, *whole, "--inner-lr", "0.1", settings=shorter)


@pytest.fixture(scope="module")
def made(arguments, cache):
    """The folder in which it has been made."""
    assert cli.main(arguments) == 0
    return Path(arguments[arguments.index("--out") + 1])


class TestEntire:
    """Scope entire: what is run, and Table 1 from end to end through a small WavLM."""

    def test_every_system_of_the_paper_is_a_row_of_its_own(self, made):
        results = pd.read_csv(made / "results.csv")
        rows = [*SYSTEMS[:6], "Meta-PerSER"]
        assert results["system"].drop_duplicates().tolist() == rows
        assert set(results["scope"]) == {"entire"}
        table = (made / "table1.md").read_text()
        assert "coincides" not in table
        assert "The reference" in table
        few = {tuple(results.query("system == @one")["miF1"]) for one in ("Linear-Few", "Entire-Few")}
        assert len(few) == 2

    def test_trainings_move_the_upstream_behind_its_front_end(self, made, small_wavlm):
        given = torch.load(small_wavlm)["model"]
        for run in ("ssl_e_entire", "multi_few_entire", "meta_perser_entire-lr0.1"):
            trained = read_checkpoint(made / f"runs/seen/fold1/{run}/dev-best.ckpt")["Upstream"]
            moved = {name for name, tensor in given.items() if not torch.equal(tensor, trained[f"model.{name}"])}
            assert "encoder.layers.1.fc1.weight" in moved
            assert not any("feature_extractor" in name for name in moved)

    def test_an_evaluation_uses_the_upstream_of_its_checkpoint(self, made, tmp_path):
        """As given by hand: -e takes everything from SSL-E's checkpoint, and the system is named."""
        ssl_e, few = (made / f"runs/seen/fold1/{run}" for run in ("ssl_e_entire", "entire_few"))
        options = f"args.expdir='{tmp_path}',,config.downstream_expert.system='entire_few'"
        command = [*LAUNCHER, "-m", "evaluate", "-e", ssl_e / "dev-best.ckpt", "--device", "cpu", "-o", options]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert (tmp_path / "predictions.csv").read_bytes() == (few / "predictions.csv").read_bytes()

    def test_given_again_nothing_is_run(self, made, arguments, capsys):
        assert cli.main([*arguments, "--dry-run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert not any(line.startswith("to run") for line in lines)
        for line in lines:
            if "run_downstream" in line:
                trains_upstream = " -m train " in line and "ssl_e_paper" not in line  # that one is Linear-Few's
                assert (" -f " in line) == trains_upstream

    def test_a_killed_training_goes_on_from_its_last_state_to_the_same(self, made, arguments, tmp_path):
        out, name = tmp_path / "out", "runs/seen/fold1/meta_perser_entire-lr0.1"
        shutil.copytree(made, out)
        shutil.rmtree(out / name)
        given = [str(out) if one == str(made) else one for one in arguments]
        program = [sys.executable, "-m", "s3prl_metaperser.cli", *given]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(program, stdout=log, stderr=log, start_new_session=True)
        wait_until(lambda: list((out / name).glob("states-*.ckpt")) or process.poll() is not None)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = max((out / name).glob("states-*.ckpt"))
        assert left.name < "states-4.ckpt", "killed under way"
        said = (out / name / "log.txt").read_text()

        assert cli.main(given) == 0
        assert read_checkpoint(out / name / "states-4.ckpt")["Args"].init_ckpt == str(left)
        assert (out / name / "log.txt").read_text().startswith(f"{said}\n[metaperser] this training was stopped")
        for state in ("dev-best.ckpt", "states-4.ckpt"):
            assert same_weights(out / name / state, made / name / state)
        for file in ("results-dev.csv", "predictions-dev.csv", "tuning.csv", "checksums.sha256"):
            assert (out / name / file).read_bytes() == (made / name / file).read_bytes()
        assert (out / "results.csv").read_bytes() == (made / "results.csv").read_bytes()
        records = [json.loads((place / name / "done.json").read_text()) for place in (out, made)]
        assert records[0]["fingerprint"] == records[1]["fingerprint"]
        assert records[0]["command"] == records[1]["command"].replace(str(made), str(out))

    def test_each_run_has_the_settings_of_the_scopes_configs(self, tmp_path, small_corpus):
        setup = setup_of(small_corpus, tmp_path, "entire", Override(None, "downstream_expert.precision", "bfloat16"))
        runs = {node.name: node.run for node in plan_table1(setup, [0.1], ["paper"]).nodes}

        def installed(config):
            return yaml.safe_load(configs.find(config).read_text())

        for scenario, ending in (("seen", ""), ("unseen", "_unseen")):
            for name, config in (
                ("ssl_e_entire", "ssl_e_entire"),
                ("multi_few_entire", "multi_few_entire"),
                ("meta_perser_entire-lr0.1", "meta_perser_entire"),
            ):
                run, as_given = runs[f"{scenario}/fold1/{name}"].config, installed(config + ending)
                assert run["optimizer"] == as_given["optimizer"]
                assert run["runner"]["gradient_accumulate_steps"] == as_given["runner"]["gradient_accumulate_steps"] > 1
                assert run["downstream_expert"]["precision"] == "bfloat16"
            # Linear-Few never trains the upstream, and adapts what adapts in scope linear.
            for system, config in (("linear_few", "ssl_e_paper"), ("entire_few", "ssl_e_entire")):
                run = runs[f"{scenario}/fold1/{system}"]
                assert (
                    run.config["downstream_expert"]["adaptation"]
                    == installed(config)["downstream_expert"]["adaptation"]
                )
                assert run.checkpoint == tmp_path / f"runs/{scenario}/fold1/{config}/dev-best.ckpt"
                assert runs[f"{scenario}/fold1/{config}"].trains_upstream == (system == "entire_few")
        assert len(runs) == 2 * 11

    def test_figure2_has_no_reference_either(self, tmp_path, small_corpus):
        rows = figure2(setup_of(small_corpus, tmp_path, "entire"), [0.1], ["paper"], [4]).rows
        assert {row.system for row in rows} == {"Entire-Few", "Meta-PerSER", "Entire-Zero"}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "recordings"
    write_demo_corpus(folder, seed=0)
    return folder


class TestReproduce:
    def test_in_scope_entire_all_experiments_train_the_upstream(self, recordings, small_wavlm, tmp_path, capsys):
        upstream = ["-u", "wavlm_local", "-k", str(small_wavlm), "--scope", "entire", "--out", str(tmp_path / "out")]
        short = ["--folds", "1", "--queries", "20", "--dry-run"]
        assert reproduce.main([str(recordings), *upstream, *short]) == 0
        planned = capsys.readouterr().out
        experiments = planned.split("# ")[1:]
        assert [one.split(":")[0] for one in experiments] == ["table1", "table2", "figure2"]
        assert all("meta_perser_entire" in one and "meta_perser_paper" not in one for one in experiments)

    def test_it_goes_from_recordings_to_all_tables(self, recordings, tmp_path, cache, capsys):
        arguments = [
            *(str(recordings), "-u", "fbank_no_cmvn", "--out", str(tmp_path / "out"), "--name", "Demo"),
            *("--scenario", "unseen", "--folds", "1", "--queries", "20", "--episodes", "1", "--jobs", "2"),
            *("--shots", "8", "--figure-shots", "4", "8", "--inner-lr", "0.1", "--set", *SHORT),
        ]
        assert reproduce.main(arguments) == 0
        for name in ("table1", "table2", "figure2"):
            assert {"md", "csv", "tex", "json"} <= {path.suffix[1:] for path in (tmp_path / "out").glob(f"{name}.*")}
        assert "Demo" in (tmp_path / "out/report.html").read_text()
        capsys.readouterr()
        assert reproduce.main([*arguments, "--dry-run"]) == 0
        assert "to run" not in capsys.readouterr().out

    def refused(self, capsys, *arguments):
        """Give the one line; nothing is said on standard output."""
        with pytest.raises(SystemExit) as ended:
            reproduce.main([str(one) for one in arguments])
        said = capsys.readouterr()
        assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1)
        return said.err

    def test_what_is_refused_leaves_no_corpus(self, recordings, tmp_path, capsys):
        out = tmp_path / "out"
        given = [recordings, "--out", out, "--shots", 4, "--queries", 20, "--figure-shots", 4]
        assert "nosuch_up" in self.refused(capsys, *given, "-u", "nosuch_up")
        assert not out.exists()
        out.mkdir()
        (out / "table1.md").write_text("mine")
        assert f"--out {out} holds table1.md" in self.refused(capsys, *given, "-u", "fbank_no_cmvn")
        assert [path.name for path in out.iterdir()] == ["table1.md"]

    def test_a_folder_keeps_the_name_of_its_corpus(self, recordings, tmp_path, capsys):
        prepare(recordings, tmp_path / "corpus", "Demo")
        capsys.readouterr()
        for name in ("Berlin", ""):
            said = self.refused(capsys, recordings, "--out", tmp_path, "--name", name)
            assert f"corpus was prepared with --name 'Demo', not {name!r}; give the same, or another --out" in said

    def test_killed_between_the_corpus_and_its_description_it_goes_on(self, recordings, tmp_path, capsys):
        folder = tmp_path / "corpus"
        prepare(recordings, folder, "Demo")
        whole = {path.name: path.read_bytes() for path in folder.iterdir()}
        (folder / "corpus.json").unlink()
        prepare(recordings, folder, "Demo")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
        (folder / "corpus.json").unlink()
        (folder / "annotations.csv").write_text("mine")
        capsys.readouterr()
        said = self.refused(capsys, recordings, "--out", tmp_path, "--name", "Demo")
        assert f"annotations.csv is not of {recordings}; move it away, or give another --out" in said
        assert (folder / "annotations.csv").read_text() == "mine"

    def test_a_wrong_root_is_one_line(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as ended:
            reproduce.main([str(tmp_path), "--out", str(tmp_path / "out")])
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(f"metaperser: error: {tmp_path}: holds no folder Session1; expected")
        assert not (tmp_path / "out").exists()
