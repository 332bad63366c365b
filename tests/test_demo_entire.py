"""``demo-entire``: scope entire from end to end, as a newcomer runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from workshop import STOCK, downstream_state, same_weights

from s3prl_metaperser.checkpoints import read_checkpoint
from s3prl_metaperser.experiments import demo_entire
from s3prl_metaperser.results_file import RESULT_COLUMNS

SCRIPT = Path(__file__).parent.parent / "run_downstream.sh"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's folder, and what it said."""
    folder = tmp_path_factory.mktemp("demo")
    environment = os.environ | {"METAPERSER_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "s3prl_metaperser.experiments.demo_entire", "--out", "out"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out", done


def test_it_compares_the_systems_on_episodes_of_one_listener(demo):
    out, done = demo
    results = pd.read_csv(out / "results.csv")
    assert results.columns.tolist() == RESULT_COLUMNS
    systems = ["Entire-Zero", "Entire-Few", "Meta-PerSER"]
    assert results[["system", "upstream", "scope"]].drop_duplicates().to_numpy().tolist() == [
        [system, "wavlm_local", "entire"] for system in systems
    ]
    assert results["test_annotator"].nunique() == 1
    assert all(f"| {system} " in done.stdout for system in systems)
    assert "random weights: it has learned nothing about speech" in done.stdout


def test_training_is_by_the_stock_runner_with_the_upstream_trainable(demo):
    trainings = [line for line in demo[1].stderr.splitlines() if "-m train" in line and "-e" not in line.split()]
    assert len(trainings) == 3
    for line in trainings:
        assert line.startswith(f"    python -m {STOCK[-1]} -m train -d metaperser -u wavlm_local")
        assert "-f" in line.split()


def test_where_s3prl_does_not_import_the_launcher_trains(tmp_path, monkeypatch):
    """With a torchaudio that lacks what s3prl asks it for while it is imported."""
    (tmp_path / "torchaudio.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert demo_entire._program() == "s3prl_metaperser.run_downstream"


def test_both_trainings_move_the_upstream_and_leave_its_front_end(demo):
    out, _ = demo
    given = torch.load(out / "random-wavlm-seed0.pt")["model"]
    ssl_e = read_checkpoint(out / "runs/ssl_e/dev-best.ckpt")["Upstream"]
    meta = read_checkpoint(out / "runs/meta_perser/states-4.ckpt")["Upstream"]
    for before, after in ((given, ssl_e), ({name.removeprefix("model."): one for name, one in ssl_e.items()}, meta)):
        moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[f"model.{name}"])}
        assert {"post_extract_proj.weight", "encoder.pos_conv.0.weight_g", "encoder.layers.2.fc2.weight"} <= moved
        assert not any("feature_extractor" in name for name in moved)


def test_the_killed_training_went_on_to_the_same_weights(demo):
    out, done = demo
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("resumed:"))
    whole, resumed = (out / f"runs/{name}" for name in ("meta_perser", "meta_perser-resumed"))
    log = (resumed / "log.txt").read_text()
    first, second = log.split(f"Resume from {resumed.resolve()}/states-2.ckpt")
    assert "states-2.ckpt" in first
    assert "states-4.ckpt" not in first, "killed before its end"
    assert "states-4.ckpt" in second
    assert same_weights(whole / "states-4.ckpt", resumed / "states-4.ckpt")
    tensors = [value for value in downstream_state(whole / "states-4.ckpt").values() if isinstance(value, torch.Tensor)]
    assert line == (
        "resumed: killed after step 2 of 4 and gone on with by -e, meta-training ended in the same weights as "
        f"uninterrupted, bit for bit ({len(tensors)} tensors)"
    )


def test_other_weights_would_be_told():
    whole = {"a": torch.tensor([1.0, 2.0]), "b": torch.ones(3)}
    is_same, line = demo_entire._compared(whole, {**whole, "a": torch.tensor([1.0, 2.5])})
    assert not is_same
    assert line == "ended in other weights: 1 of 2 tensors differ, by 5.0e-01 at the most"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--upstream-ckpt", "a.pt"], "--upstream-ckpt a.pt: of which upstream? add --upstream wavlm_local"),
        (["--upstream", "wavlm_locla"], "-u wavlm_locla: s3prl has no such upstream: did you mean 'wavlm_local'"),
        (
            ["--upstream", "fbank_no_cmvn"],
            "holds experiments with upstream 'wavlm_local', this one has 'fbank_no_cmvn'",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_everything_as_it_is(demo, capsys, options, said):
    out, _ = demo
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(SystemExit) as ended:
        demo_entire.main(["--out", str(out), *options])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_script_hands_its_options_on(tmp_path):
    """With a stand-in for the active environment's Python that notes what it is asked."""
    asked, python = tmp_path / "asked", tmp_path / "env/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/bash\necho "$*" >> {asked}\n'
        f'case "$*" in *hashlib*) cat | cksum ;; *sys.prefix*) echo {tmp_path}/env ;; esac\n'
    )
    python.chmod(0o755)
    given = "--upstream wavlm_local --upstream-ckpt w.pt --device cuda"
    environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path / "env")}
    command = [SCRIPT, "demo-entire", *given.split()]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    default = f"--out {SCRIPT.parent}/result/demo-entire"
    assert asked.read_text().splitlines()[-1] == f"-u -m s3prl_metaperser.experiments.demo_entire {default} {given}"


def test_help_needs_no_installation(tmp_path):
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | {"PYTHON": str(python)}
    done = subprocess.run([SCRIPT, "demo-entire", "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--upstream-ckpt FILE" in done.stdout
    assert "\n  demo-entire [OPTION ...]" in subprocess.run([SCRIPT], capture_output=True, text=True).stdout
