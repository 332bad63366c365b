"""The grid: its order, its failures, and the two ways in which a run's process is started."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from submitit import SlurmJob

from s3prl_metaperser import configs
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments import runs, slurm
from s3prl_metaperser.experiments.grid import Choice, Grid, Node
from s3prl_metaperser.experiments.launchers import End, ForkLauncher, Launched, Launcher, ProcessLauncher
from s3prl_metaperser.experiments.runs import BEST, CONFIG, DEV_RESULTS, LOG, RESULTS, Run, Upstream
from s3prl_metaperser.experiments.slurm import SlurmLauncher, SlurmSettings
from s3prl_metaperser.metrics import METRICS
from s3prl_metaperser.results_file import COUNT_COLUMNS, RESULT_COLUMNS, TEXT_COLUMNS


@pytest.fixture
def make_run(tmp_path, small_corpus):
    """Makes runs whose config is real and short."""

    def make(name, mode="train", checkpoint=None, **change):
        config = yaml.safe_load(configs.find("ssl_e").read_text())
        config["runner"] |= {"total_steps": 2, "eval_step": 1, "save_step": 2, "eval_dataloaders": ["dev"]}
        expert = config["downstream_expert"]
        expert |= {"corpus": str(small_corpus), "feature_cache": str(tmp_path / "cache")} | change
        expert["data"]["min_annotations"] = 4
        expert["episodes"] |= {"shots": 4, "queries": 8, "number": 2}
        upstream = Upstream("fbank_no_cmvn", None, "cpu")
        return Run(name, tmp_path / "runs" / name, mode, config, upstream, 1, 1, checkpoint)

    return make


class Play(Launcher):
    """Plays runs: each ends after some polls, having left what it should, or having failed."""

    poll_seconds = 0

    def __init__(self, failing=(), dev=None, interrupt_at=None):
        self.failing, self.dev, self.interrupt_at = failing, dev or {}, interrupt_at
        self.started, self.under_way, self.most_at_once, self.stopped = [], set(), 0, []
        self.weights = ""

    def start(self, run):
        if run.name == self.interrupt_at:
            raise KeyboardInterrupt
        self.started.append(run.name)
        self.under_way.add(run.name)
        self.most_at_once = max(self.most_at_once, len(self.under_way))
        return Played(self, run)


class Played(Launched):
    def __init__(self, play, run):
        self.play, self.run, self.left = play, run, len(play.started) % 3

    def poll(self):
        self.left -= 1
        if self.left >= 0:
            return None
        self.play.under_way.remove(self.run.name)
        if self.run.name in self.play.failing:
            (self.run.folder / LOG).write_text("working\nno memory left\n")
            return End.with_code(1)
        if self.run.mode == "train":
            (self.run.folder / BEST).write_text(self.run.name + self.play.weights)
            score = self.play.dev.get(self.run.name, 0)
            text = dict.fromkeys(TEXT_COLUMNS, "x") | dict.fromkeys(COUNT_COLUMNS, 1) | dict.fromkeys(METRICS, 0)
            rows = [text | {"episode": episode, "miF1": score + episode} for episode in (0, 1)]
            pd.DataFrame(rows, columns=RESULT_COLUMNS).to_csv(self.run.folder / DEV_RESULTS, index=False)
        else:
            (self.run.folder / RESULTS).write_text("system\n")
        return End(None)

    def stop(self):
        self.play.stopped.append(self.run.name)

    def join(self):
        assert self.run.name in self.play.stopped


def chain(make_run):
    """First, then a and b; two trainings from a, a choice between them; an evaluation of b; and one on its own."""
    a = make_run("a")
    trainings = {name: make_run(name, init_from=str(a.folder / BEST)) for name in ("slow", "fast")}
    options = {name: make_run("choice", "evaluate", run.folder / BEST) for name, run in trainings.items()}
    folders = {name: run.folder for name, run in trainings.items()}
    b = make_run("b", fold=2)
    return [
        Node("first", make_run("first", fold=3)),
        Node("a", a, after=("first",)),
        Node("b", b, after=("first",)),
        Node("of_b", make_run("of_b", "evaluate", b.folder / BEST), needs=("b",)),
        *(Node(name, run, needs=("a",)) for name, run in trainings.items()),
        Node("choice", Choice(options, folders, "miF1"), needs=("slow", "fast")),
        Node("alone", make_run("alone", scenario="unseen"), after=("first",)),
    ]


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_runs_start_when_what_they_need_is_done_and_no_more_than_jobs_at_once(make_run, jobs):
    play = Play()
    outcome = Grid(chain(make_run)).run(play, jobs)
    place = {name: number for number, name in enumerate(play.started)}
    assert sorted(place) == ["a", "alone", "b", "choice", "fast", "first", "of_b", "slow"]
    assert place["first"] == 0
    assert place["b"] < place["of_b"]
    assert place["a"] < min(place["slow"], place["fast"]) < place["choice"]
    assert 1 <= play.most_at_once <= jobs
    assert set(outcome.states.values()) == {"done"}


def test_nothing_is_run_twice_unless_what_it_reads_has_changed(make_run):
    nodes = chain(make_run)
    Grid(nodes).run(Play(), 2)
    again = Play()
    assert set(Grid(nodes).run(again, 2).states.values()) == {"done before"}
    assert again.started == []
    (nodes[2].run.folder / BEST).write_text("damaged weights")
    Grid(nodes).run(again, 2)
    assert again.started == ["b"], "made again to the same weights, so that what reads them is as it was"
    (nodes[2].run.folder / BEST).unlink()
    again.weights = "other weights"
    Grid(nodes).run(again, 2)
    assert again.started == ["b", "b", "of_b"]


@pytest.fixture
def reader(make_run, small_corpus, tmp_path):
    """A run that reads a corpus and an upstream's folder of its own, which tests change."""
    corpus, upstream = shutil.copytree(small_corpus, tmp_path / "corpus"), tmp_path / "hubert"
    upstream.mkdir()
    (upstream / "model.safetensors").write_text("weights")
    return replace(make_run("reader", corpus=str(corpus)), upstream=Upstream("hf_hubert_custom", str(upstream), "cpu"))


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("changed", ["corpus/annotations.csv", "corpus/audio/Ses03_07.wav", "hubert/model.safetensors"])
def test_a_run_is_of_the_content_of_all_that_it_reads(reader, tmp_path, changed, cache):
    reader.config["downstream_expert"]["feature_cache"] = cache
    Grid([Node("reader", reader)]).run(Play(), 1)
    assert reader.is_done()
    with (tmp_path / changed).open("ab") as file:
        file.write(b"\n")
    assert not reader.is_done()


@pytest.mark.parametrize(
    ("changed", "source"),
    [
        ("corpus/audio/Ses03_07.wav", "recordings"),
        ("hubert/model.safetensors", "upstream weights"),
        ("corpus/annotations.csv", None),
    ],
)
def test_a_run_that_has_ended_says_which_of_its_sources_is_another(reader, tmp_path, changed, source):
    """What settings tell, and a folder of experiments therefore refuses, is none."""
    Grid([Node("reader", reader)]).run(Play(), 1)
    before = runs.sources_of(reader.folder)
    assert set(before) == {"code", "recordings", "upstream weights"}
    with (tmp_path / changed).open("ab") as file:
        file.write(b"\n")
    Grid([Node("reader", reader)]).run(Play(), 1)
    after = runs.sources_of(reader.folder)
    assert [name for name in before if before[name] != after[name]] == ([source] if source else [])


def test_a_run_is_of_its_libraries(reader, monkeypatch):
    with_these = reader.fingerprint()
    for library in ("torch", "transformers"):
        newer = {library: "99.0"}
        monkeypatch.setattr(runs, "version", lambda name, newer=newer: newer.get(name, version(name)))
        runs._code_fingerprint.cache_clear()
        assert reader.fingerprint() != with_these
    monkeypatch.undo()
    runs._code_fingerprint.cache_clear()
    assert reader.fingerprint() == with_these


def test_a_run_whose_corpus_changes_meanwhile_is_not_done_and_run_again(reader, tmp_path):
    play = Play()

    def start(run):
        with (tmp_path / "corpus/audio/Ses03_07.wav").open("ab") as file:
            file.write(b"\n")
        return Play.start(play, run)

    play.start = start
    nodes = [Node("reader", reader)]
    (failure,) = Grid(nodes).run(play, 1).failures
    assert "its corpus, recordings or weights are not what it was begun with" in failure.reason
    assert Grid(nodes).run(Play(), 1).states == {"reader": "done"}


@pytest.mark.parametrize(("dev", "best"), [({"slow": 40, "fast": 41}, "fast"), ({"slow": 40, "fast": 40}, "slow")])
def test_the_best_on_dev_is_chosen_and_of_equals_the_first(make_run, dev, best):
    outcome = Grid(chain(make_run)).run(Play(dev=dev), 1)
    assert outcome.chosen == {"choice": best}
    assert outcome.runs["choice"].checkpoint.parent.name == best


def test_a_failure_takes_along_what_needs_it_and_nothing_else(make_run, capsys):
    outcome = Grid(chain(make_run)).run(Play(failing={"first", "slow", "b"}), 2)
    states = outcome.states
    of = {state: sorted(name for name in states if states[name] == state) for state in set(states.values())}
    assert of == {"failed": ["b", "first", "slow"], "done": ["a", "alone", "fast"], "not run": ["choice", "of_b"]}
    said = {failure.name: str(failure) for failure in outcome.failures}
    assert said["b"] == f"b: ended with code 1: no memory left (all of it: {outcome.runs['b'].folder / LOG})"
    assert said["b"] in capsys.readouterr().err


def test_a_run_that_leaves_no_checkpoint_has_failed(make_run):
    class Forgetful(Played):
        def poll(self):
            return End(None)

    play = Play()
    play.start = lambda run: Forgetful(play, run)
    outcome = Grid([Node("a", make_run("a"))]).run(play, 1)
    assert "left no dev-best.ckpt" in outcome.failures[0].reason


def test_ctrl_c_stops_what_is_under_way(make_run):
    play = Play(interrupt_at="of_b")
    with pytest.raises(KeyboardInterrupt):
        Grid(chain(make_run)).run(play, 3)
    assert set(play.stopped) == play.under_way


def test_a_node_before_what_it_needs_is_refused(make_run):
    nodes = chain(make_run)
    with pytest.raises(ValueError, match="of_b"):
        Grid([nodes[3], *nodes[:3]])


def tensors(path):
    state = torch.load(path, weights_only=False)
    parts = {**state["Downstream"], **state["Featurizer"]}
    return {name: one for name, one in parts.items() if isinstance(one, torch.Tensor)}


def test_a_forked_run_computes_the_bits_of_its_command_given_by_hand(make_run, tmp_path):
    run = make_run("forked")
    outcome = Grid([Node(run.name, run)]).run(ForkLauncher(1), 1)
    assert outcome.states == {"forked": "done"}, outcome.failures
    shutil.move(run.folder, tmp_path / "kept")
    run.prepare()
    by_hand = subprocess.run(run.shown_command(), shell=True, capture_output=True, text=True)
    assert by_hand.returncode == 0, by_hand.stderr
    for name in (DEV_RESULTS, "predictions-dev.csv"):
        assert (run.folder / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()
    ours, theirs = tensors(tmp_path / "kept" / BEST), tensors(run.folder / BEST)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "[metaperser] seen fold1" in (tmp_path / "kept" / LOG).read_text()


@pytest.mark.parametrize("launcher", [ForkLauncher, ProcessLauncher])
def test_a_run_with_bad_input_fails_with_its_own_words(make_run, launcher):
    run = make_run("broken", fold=9)
    outcome = Grid([Node(run.name, run)]).run(launcher(1) if launcher is ForkLauncher else launcher(), 1)
    says = "metaperser" if launcher is ForkLauncher else "run_downstream"
    assert f"ended with code 2: {says}: error: fold 9 does not exist" in outcome.failures[0].reason


@pytest.mark.parametrize("launcher", [ForkLauncher, ProcessLauncher])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fold": 9}, "fold 9 does not exist"),
        ({"init_from": "/proc/self/mem"}, r"/proc/self/mem cannot be read \(Input/output error\)"),
    ],
)
def test_what_is_wrong_with_a_run_is_found_before_its_folder_is_made(make_run, tmp_path, launcher, change, message):
    run = make_run("broken", **change)
    config = tmp_path / "broken.yaml"
    config.write_text(yaml.safe_dump(run.config))
    arguments = [str(config) if given == str(run.folder / CONFIG) else given for given in run.arguments()]
    with pytest.raises(MetaPerSERError, match=message):
        (launcher(1) if launcher is ForkLauncher else launcher()).check(arguments)
    assert not run.folder.exists()


def test_a_process_that_outlives_the_experiment_keeps_its_lock(make_run, tmp_path):
    """Where runs cannot be forked: killed alone, the experiment leaves a run behind, which others must wait for."""
    launcher = ProcessLauncher()
    with (tmp_path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        launcher.held = [lock]
        run = make_run("left")
        run.prepare()
        launched = launcher.start(run)
    with (tmp_path / ".lock").open("a") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        launched.stop()
        launched.join()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


SBATCH = """#!{python}
# Runs the script in the background, as a node would, and says the job's number.
import os, pathlib, re, subprocess, sys
state = pathlib.Path({state!r})
number = str(len(list(state.glob("*.script"))) + 1)
script = pathlib.Path(sys.argv[1])
if os.environ.get("REFUSE"):
    sys.exit("sbatch: error: invalid partition specified: gone")
(state / f"{{number}}.script").write_text(script.read_text())
for name in [name for name in os.environ if name.startswith("SLURM_")]:
    del os.environ[name]
job = {{"SLURM_JOB_ID": number, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0",
       "SLURM_JOB_NODELIST": "node1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}}
process = subprocess.Popen(["bash", str(script)], env=os.environ | job, start_new_session=True,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
(state / f"{{number}}.pid").write_text(str(process.pid))
print(f"Submitted batch job {{number}}")
"""
SRUN = """#!{python}
# srun --unbuffered --output FILE COMMAND ...
import os, sys
place = sys.argv.index("--output")
out = open(sys.argv[place + 1].replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", "0"), "a")
os.dup2(out.fileno(), 1)
os.dup2(out.fileno(), 2)
os.execvp(sys.argv[place + 2], sys.argv[place + 2:])
"""
SACCT = """#!{python}
import pathlib, sys
state = pathlib.Path({state!r})
print("JobID|State|NodeList")
for number in [sys.argv[place + 1] for place, word in enumerate(sys.argv) if word == "-j"]:
    ended = state / f"{{number}}.ended"
    print(f"{{number}}|{{ended.read_text() if ended.exists() else 'RUNNING'}}|node1")
"""
SCANCEL = """#!{python}
import os, pathlib, signal, sys
state = pathlib.Path({state!r})
(state / f"{{sys.argv[1]}}.ended").write_text("CANCELLED by 0")
os.killpg(int((state / f"{{sys.argv[1]}}.pid").read_text()), signal.SIGKILL)
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Slurm's commands, played: jobs run on this machine. Gives the folder with a script and a state of each job."""
    programs, state = tmp_path / "bin", tmp_path / "jobs"
    programs.mkdir()
    state.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT), ("scancel", SCANCEL)):
        (programs / name).write_text(text.format(python=sys.executable, state=str(state)))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    # Job numbers begin anew for each of these clusters, and submitit remembers jobs by them.
    SlurmJob.watcher.clear()
    monkeypatch.setattr(slurm, "ASK_SECONDS", 0.5)
    monkeypatch.setattr(slurm, "LAG_SECONDS", 0.5)
    return state


SETTINGS = SlurmSettings(partition="short", gpus=1, minutes=30, cpus=2, account="lab")


class TestSlurm:
    def test_each_run_is_a_job_that_asks_for_what_it_was_told(self, make_run, cluster):
        trained = make_run("seen/fold1/ssl_e")
        evaluated = make_run("seen/fold1/few", "evaluate", trained.folder / BEST, system="entire_few")
        nodes = [Node(trained.name, trained), Node(evaluated.name, evaluated, needs=(trained.name,))]
        outcome = Grid(nodes).run(SlurmLauncher(SETTINGS), 2)
        assert set(outcome.states.values()) == {"done"}, outcome.failures
        assert len(pd.read_csv(evaluated.folder / RESULTS)) == 2
        script = (cluster / "2.script").read_text()
        for asked in ("partition=short", "gpus-per-node=1", "time=30", "cpus-per-task=2", "account=lab"):
            assert f"#SBATCH --{asked}\n" in script
        assert "#SBATCH --job-name=seen-fold1-few\n" in script

    def test_a_run_that_fails_is_told_apart_from_a_job_that_is_killed(self, make_run, cluster):
        broken = make_run("broken", fold=9)
        outcome = Grid([Node("broken", broken)]).run(SlurmLauncher(SETTINGS), 1)
        assert "ended with code 2: run_downstream: error: fold 9 does not exist" in outcome.failures[0].reason
        killed = make_run("killed")
        launcher = SlurmLauncher(SETTINGS)
        killed.prepare()
        launched = launcher.start(killed)
        subprocess.run(["scancel", "2"], check=True)
        (cluster / "2.ended").write_text("OUT_OF_MEMORY")
        end = None
        while end is None:
            end = launched.poll()
        assert end.reason == "Slurm job 2 ended as OUT_OF_MEMORY"

    def test_a_job_left_behind_is_cancelled_before_its_folder_is_made_anew(self, make_run, cluster):
        run = make_run("left")
        run.prepare()
        SlurmLauncher(SETTINGS).start(run)
        outcome = Grid([Node("left", run)]).run(SlurmLauncher(SETTINGS), 1)
        assert (cluster / "1.ended").read_text() == "CANCELLED by 0"
        assert outcome.states == {"left": "done"}

    def test_a_refused_job_is_a_failure_with_slurms_words(self, make_run, cluster, monkeypatch):
        monkeypatch.setenv("REFUSE", "1")
        outcome = Grid([Node("a", make_run("a"))]).run(SlurmLauncher(SETTINGS), 1)
        assert "invalid partition specified: gone" in outcome.failures[0].reason

    def test_without_submitit_or_slurm_it_says_what_to_do(self, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(MetaPerSERError, match="no 'sbatch' here; give the command on a login node"):
            SlurmLauncher(SETTINGS)
        monkeypatch.setitem(sys.modules, "submitit", None)
        with pytest.raises(MetaPerSERError, match="pip install submitit"):
            SlurmLauncher(SETTINGS)


def test_the_record_of_a_run_says_how_to_repeat_it_and_how_long_it_took(make_run):
    run = make_run("a")
    Grid([Node("a", run)]).run(Play(), 1)
    record = json.loads((run.folder / "done.json").read_text())
    assert record["command"] == run.shown_command()
    assert record["started"] <= record["ended"]
    assert record["seconds"] >= 0
    assert Path(sys.executable).name in record["command"]
