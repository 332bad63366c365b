"""Table 1, Table 2 and Figure 2 on a small corpus: what they run, what they share, what they leave, how they resume."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml

from s3prl_metaperser import cli
from s3prl_metaperser.corpus.synthetic import write_demo_corpus
from s3prl_metaperser.experiments import reproduce
from s3prl_metaperser.experiments.plan import Override, Setup
from s3prl_metaperser.experiments.runs import Upstream
from s3prl_metaperser.reporting import RESULT_COLUMNS
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


class TestFigure2:
    def test_a_k_with_too_few_labels_is_left_out_and_named(self, out):
        """In unseen the test annotator has 12 labels: 8 and 6 queries are too many."""
        results = pd.read_csv(out / "results-figure2.csv")
        shots = results.groupby(["scenario", "system"])["shots"].unique().map(sorted)
        assert all(shots["seen"].map(lambda found: found == [2, 4, 8]))
        assert all(shots["unseen"].map(lambda found: found == [2, 4]))
        assert set(results["system"]) == {*SYSTEMS[-3:], "Entire-Few", "Entire-Zero", REFERENCE}
        assert "unseen: K = 8 is left out" in (out / "figure2.md").read_text()

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
    assert differing <= {"table1.json", "report.html"}, "these two say what was run this time"
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


def test_a_folder_holds_one_set_of_settings(out, small_corpus, capsys):
    before = changes(out)
    with pytest.raises(SystemExit) as ended:
        cli.main(table1(small_corpus, out, queries=5))
    assert ended.value.code == 2
    assert (
        "holds experiments with queries 6, this one has 5; give the same, or another --out" in capsys.readouterr().err
    )
    assert changes(out).items() >= {path: at for path, at in before.items() if path.name != ".lock"}.items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 80}, "has 60 labelled utterances here; shots 4 + queries 80"),
        ({"more": ["-u", "fbank_no_cmv"]}, "did you mean 'fbank_no_cmvn'"),
        ({"more": ["--folds", "9"]}, "--folds 9 asked for, but corpus 'small' has 3"),
        ({"settings": ["downstream_expert.meta.inner_stpes=5"]}, "unknown; did you mean 'inner_steps'"),
        ({"settings": ["runner.total_stps=5"]}, "the runner knows no 'total_stps'; did you mean 'total_steps'"),
        ({"settings": ["sle_e:runner.total_steps=5"]}, "no config 'sle_e'; did you mean"),
        ({"settings": ["total_steps=5"]}, "known: runner, optimizer"),
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


def test_a_failed_run_is_named_and_the_others_make_the_table(small_corpus, tmp_path, cache, capsys):
    broken = ["multi_few:optimizer.torch_optim_name=Adamm"]
    assert cli.main(table1(small_corpus, tmp_path / "out", "--scenario", "seen", settings=broken)) == 1
    said = capsys.readouterr()
    assert f"1 of {RUNS + 1} runs failed, 1 more need them" in said.err
    assert re.search(r"seen/fold1/multi_few-train: ended with code 1: .*no attribute 'Adamm'.*log\.txt", said.err)
    assert "Multi-Few, seen: fold 1 is missing, since a run failed." in said.out
    results = pd.read_csv(tmp_path / "out/results.csv")
    assert results["system"].drop_duplicates().tolist() == [one for one in SYSTEMS if one != "Multi-Few"] + [REFERENCE]
    assert "Adamm" in (tmp_path / "out/report.html").read_text()


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


@pytest.mark.parametrize(("scenario", "given", "steps"), [("seen", None, 6000), ("unseen", None, 20), ("unseen", 7, 7)])
def test_unseen_trainings_last_in_proportion_to_the_corpus(tmp_path, small_corpus, scenario, given, steps):
    """200 steps were chosen for 408 training utterances, with ten looks at dev; 48 get 20 steps, unless told."""
    few = Override(None, "downstream_expert.data.min_annotations", 4)
    setup = Setup(
        corpus=small_corpus,
        out=tmp_path,
        upstream=Upstream("fbank_no_cmvn", None, "cpu"),
        scenarios=("seen", "unseen"),
        folds=1,
        scope="linear",
        shots=4,
        queries=6,
        episodes=1,
        seed=1,
        threads=1,
        overrides=(few, *([Override("ssl_e_paper", "runner.total_steps", given)] if given else [])),
    )
    assert setup.config("ssl_e_paper", scenario, 1)["runner"]["total_steps"] == steps


class TestReproduce:
    def test_it_goes_from_recordings_to_all_tables(self, tmp_path, cache, capsys):
        write_demo_corpus(tmp_path / "recordings", seed=0)
        arguments = [
            *(str(tmp_path / "recordings"), "-u", "fbank_no_cmvn", "--out", str(tmp_path / "out"), "--name", "Demo"),
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

    def test_a_wrong_root_is_one_line(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as ended:
            reproduce.main([str(tmp_path), "--out", str(tmp_path / "out")])
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(f"metaperser: error: {tmp_path}: holds no folder Session1; expected")
        assert not (tmp_path / "out").exists()
