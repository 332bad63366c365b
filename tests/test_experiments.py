"""The grid on a small corpus."""

import pandas as pd
import pytest
import yaml

from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments.runs import Upstream
from s3prl_metaperser.experiments.table1 import Candidate, Table1


def small_experiment(tmp_path, corpus, **change):
    settings = {
        "shots": 4,
        "candidates": (Candidate("disjoint", 0.1),),
        "queries": 8,
        "overrides": (("downstream_expert.data.min_annotations", 4),),
    } | change
    return Table1(
        corpus=corpus,
        out=tmp_path / "out",
        upstream=Upstream("fbank_no_cmvn", None, "cpu"),
        scenarios=("seen",),
        folds=1,
        scope="head",
        episodes=2,
        seed=1,
        threads=1,
        **settings,
    )


def test_the_grid_chooses_on_dev_and_is_not_run_twice(tmp_path, small_corpus, monkeypatch):
    short = (
        *((f"runner.{key}", steps) for key, steps in [("total_steps", 4), ("eval_step", 2), ("save_step", 4)]),
        ("downstream_expert.data.min_annotations", 4),
    )
    candidates = (Candidate("disjoint", 0.1), Candidate("disjoint", 1e-6))
    experiment = small_experiment(tmp_path, small_corpus, candidates=candidates, overrides=short)
    monkeypatch.setenv("METAPERSER_CACHE", str(tmp_path / "cache"))
    results = experiment.run(jobs=1)
    assert results["system"].unique().tolist() == ["Random", "Entire-Zero", "Entire-Few", "Meta-PerSER"]
    assert len(results) == 4 * 2
    runs = tmp_path / "out/runs/seen/fold1"
    dev = {
        lr: pd.read_csv(runs / f"meta_perser-disjoint-{lr}/results-dev.csv")["miF1"].mean() for lr in ("0.1", "1e-06")
    }
    chosen = yaml.safe_load((runs / "meta_perser-disjoint/config.yaml").read_text())
    assert chosen["downstream_expert"]["meta"]["inner_lr"] == (0.1 if dev["0.1"] >= dev["1e-06"] else 1e-6)
    assert not (runs / "ssl_e/results.csv").exists(), "the test annotator is not looked at while training"
    assert {"table1.md", "table1.csv", "table1.png", "results.csv", "table1-by-query.md"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    pd.testing.assert_frame_equal(experiment.run(jobs=2), results)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_too_few_labels_are_found_before_anything_is_run(tmp_path, small_corpus):
    with pytest.raises(MetaPerSERError, match="60 labelled utterances here; shots 40"):
        small_experiment(tmp_path, small_corpus, shots=40, queries=80).run(jobs=1)
    assert not (tmp_path / "out").exists()


def test_a_failed_run_is_named_with_its_log(tmp_path, small_corpus):
    few = ("downstream_expert.data.min_annotations", 4)
    broken = (few, ("optimizer.torch_optim_name", "Adamm"))
    with pytest.raises(MetaPerSERError, match=r"1 of 1 folds failed.*no attribute 'Adamm'.*log\.txt"):
        small_experiment(tmp_path, small_corpus, overrides=broken).run(jobs=1)
    assert not (tmp_path / "out/results.csv").exists()
