"""``metaperser export-s3prl``: a folder of s3prl's own, in a clone of s3prl where this package cannot be imported."""

import ast
import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from packaging.requirements import Requirement
from workshop import Workshop, same_weights

from s3prl_metaperser import cli, configs, s3prl_link
from s3prl_metaperser.s3prl_export import folder, prepare

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = s3prl_link.find_s3prl()

# A clone that is on the import path without being installed, and where this package is not to be had.
WITHOUT_THE_PACKAGE = """
import sys
from importlib import metadata
installed = metadata.distribution
def distribution(name):
    if name in ("s3prl", "s3prl-metaperser"):
        raise metadata.PackageNotFoundError(name)
    return installed(name)
metadata.distribution = distribution
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("s3prl_metaperser", "metaperser"):
            raise ModuleNotFoundError(f"{name} is not for this clone", name=name)
sys.meta_path.insert(0, Absent())
"""

# Runs s3prl's own main once for each command line; with "no fallbacks", bind is the only way to the runner's modules.
RUNS = """
import importlib, json, sys
from s3prl import run_downstream
place, fallbacks, *commands = json.loads(sys.argv[1])
expert = importlib.import_module("s3prl.downstream.metaperser.expert")
assert expert.DownstreamExpert.__module__.startswith(place), expert.DownstreamExpert.__module__
if not fallbacks:
    expert.modules_of_the_calling_runner = lambda: None
    expert.catch_upstream_and_featurizer = lambda expert: None
for command in commands:
    sys.argv = ["run_downstream.py", *command]
    run_downstream.main()
print("loaded:", *(name for name in sys.modules if name.partition(".")[0] == "s3prl_metaperser"))
"""

# What the patched runner hands to ``bind`` when DDP has wrapped its modules: what is inside.
BINDS_UNWRAPPED = """
import argparse, sys, tempfile, types
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from s3prl.downstream.runner import ModelEntry, Runner
class Probe(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
    def bind(self, *modules):
        self.bound = modules
    get_dataloader = log_records = None
sys.modules["s3prl.downstream.probe.expert"] = types.SimpleNamespace(DownstreamExpert=Probe)
distributed.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
inside = nn.Linear(2, 2), nn.Linear(2, 2)
runner = Runner.__new__(Runner)
runner.args, runner.config, runner.init_ckpt = argparse.Namespace(downstream="probe", device="cpu"), {}, {}
runner.upstream, runner.featurizer = (ModelEntry(DistributedDataParallel(one), "", True, []) for one in inside)
runner.featurizer.model.output_dim = runner.featurizer.model.downsample_rate = 2
distributed.destroy_process_group()
assert all(bound is one for bound, one in zip(runner._get_downstream().model.bound, inside, strict=True))
"""


def export(*arguments):
    return cli.main(["export-s3prl", *map(str, arguments)])


def tree(place):
    """Every file of a folder, as bytes."""
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    place = tmp_path_factory.mktemp("export")
    assert export(place) == 0
    return place / "downstream/metaperser"


@pytest.fixture(scope="module")
def contents():
    return folder.contents()


def make_clone(place):
    """A clone: links to the installed s3prl's files, and copies of the two that are patched."""
    patched = {INSTALLED / "run_downstream.py", INSTALLED / "downstream/runner.py"}
    for source, target in ((INSTALLED, place / "s3prl"), (INSTALLED / "downstream", place / "s3prl/downstream")):
        target.mkdir(parents=True)
        for path in source.iterdir():
            if path.name not in ("downstream", "metaperser", "__pycache__") and path not in patched:
                (target / path.name).symlink_to(path)
    for path in patched:
        shutil.copy(path, place / "s3prl" / path.relative_to(INSTALLED))
    (place / "sitecustomize.py").write_text(WITHOUT_THE_PACKAGE)
    return place


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with the exported folder in it."""
    place = make_clone(tmp_path_factory.mktemp("clone"))
    assert export(place) == 0
    return place


def apply(clone, *patches):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(clone.parent)}
    patches = [f"s3prl/downstream/metaperser/{name}.patch" for name in patches]
    subprocess.run(["git", "apply", "-v", *patches], cwd=clone, check=True, env=environment)


def run(clone, command, cwd=None):
    """Run Python in a clone, or, where there is none, as this package is installed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(clone)} if clone else {})
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd or clone, env=environment, capture_output=True, text=True
    )


def train_and_judge(root, corpus, wavlm, clone=None, fallbacks=True, evaluate=False, first=""):
    """SSL-E, Meta-PerSER from it and Meta-PerSER through a WavLM, after some code; give the folder of their folders."""
    root.mkdir(exist_ok=True)
    shop = Workshop(root, corpus, [])
    short = {"total_steps": 2, "eval_step": 2, "save_step": 2}
    ssl = shop.config("ssl_e", short)
    meta = shop.config("meta_perser", short, init_from="ssl/dev-best.ckpt", adaptation={"steps": [2]})
    once = {"adaptation": {"steps": [2]}, "meta": {"inner_steps": 2}, "init_from": None}
    entire = shop.config("meta_perser_entire", short | {"gradient_accumulate_steps": 1}, **once)
    train = ["-m", "train", "-d", "metaperser", "--device", "cpu"]
    commands = [
        [*train, "-u", "fbank_no_cmvn", "-c", str(ssl), "-p", "ssl"],
        [*train, "-u", "fbank_no_cmvn", "-c", str(meta), "-p", "meta"],
        [*train, "-u", "wavlm_local", "-k", str(wavlm), "-f", "-c", str(entire), "-p", "entire"],
    ]
    if evaluate:
        override = ["-o", "args.expdir='evaluated'"]
        commands.append(["-m", "evaluate", "-e", "meta/dev-best.ckpt", "--device", "cpu", *override])
    place = "s3prl.downstream.metaperser" if clone else "s3prl_metaperser"
    done = run(clone, ["-c", first + RUNS, json.dumps([place, fallbacks, *commands])], cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("s3prl_metaperser.expert" in done.stdout) == (clone is None)
    return root


@pytest.fixture(scope="module")
def as_installed(tmp_path_factory, small_corpus, small_wavlm):
    return train_and_judge(tmp_path_factory.mktemp("installed"), small_corpus, small_wavlm)


def assert_same_runs(ours, theirs):
    for name in ("ssl", "meta", "entire"):
        for checkpoint in ("dev-best.ckpt", "states-2.ckpt"):
            assert same_weights(ours / name / checkpoint, theirs / name / checkpoint), (name, checkpoint)
        for table in ("results.csv", "predictions.csv", "results-dev.csv"):
            assert (ours / name / table).read_bytes() == (theirs / name / table).read_bytes(), (name, table)


class TestRuns:
    def test_in_a_stock_clone_without_this_package_all_bits_are_the_same(
        self, as_installed, clone, small_corpus, small_wavlm, tmp_path
    ):
        theirs = train_and_judge(tmp_path / "runs", small_corpus, small_wavlm, clone)
        assert_same_runs(as_installed, theirs)

    def test_patched_the_runner_binds_and_no_hook_and_no_look_up_is_needed(
        self, as_installed, small_corpus, small_wavlm, tmp_path
    ):
        clone = make_clone(tmp_path / "clone")
        export(clone)
        apply(clone, "bind", "resume")
        patched = {"clone": clone, "fallbacks": False, "evaluate": True, "first": BINDS_UNWRAPPED}
        theirs = train_and_judge(tmp_path / "runs", small_corpus, small_wavlm, **patched)
        assert_same_runs(as_installed, theirs)
        assert (theirs / "evaluated/results.csv").read_bytes() == (theirs / "meta/results.csv").read_bytes()

    def test_bind_touches_the_runner_alone_and_applies_with_patch_too(self, clone, exported, tmp_path):
        text = (exported / "bind.patch").read_text()
        assert [line for line in text.splitlines() if line.startswith("+++ ")] == ["+++ b/s3prl/downstream/runner.py"]
        if shutil.which("patch") is None:
            pytest.skip("patch is not installed")
        (tmp_path / "s3prl/downstream").mkdir(parents=True)
        shutil.copy(INSTALLED / "downstream/runner.py", tmp_path / "s3prl/downstream")
        subprocess.run(["patch", "-p1", "-F0", "-i", exported / "bind.patch"], cwd=tmp_path, check=True)
        assert "model.bind(" in (tmp_path / "s3prl/downstream/runner.py").read_text()

    def test_its_prepare_writes_what_ours_does(self, clone, tmp_path):
        (tmp_path / "labels").mkdir()
        soundfile.write(tmp_path / "labels/a.wav", np.zeros(16000), 16000)
        table = tmp_path / "labels/mine.csv"
        table.write_text("audio,annotator,emotions\na.wav,E1,angry;sad\n")
        module = ["-m", "s3prl.downstream.metaperser.prepare"]
        done = run(clone, [*module, "table", table, "--out", tmp_path / "theirs"])
        assert done.returncode == 0, done.stderr
        assert cli.main(["prepare", "table", str(table), "--out", str(tmp_path / "ours")]) == 0
        assert tree(tmp_path / "theirs").keys() == {"annotations.csv", "corpus.json"}
        assert tree(tmp_path / "theirs") == tree(tmp_path / "ours")

    def test_its_prepare_says_what_is_wrong_in_a_line(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as exit_:
            prepare.main(["table", str(tmp_path / "none.csv"), "--out", str(tmp_path / "refused")])
        assert exit_.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith("metaperser.prepare: error: ")
        assert line.count("\n") == 1
        assert not (tmp_path / "refused").exists()


class WithoutImportsAndWording(ast.NodeTransformer):
    """What a module does: its syntax without imports, all strings the same."""

    def visit_ImportFrom(self, node):
        return None

    def visit_Constant(self, node):
        return ast.Constant("") if isinstance(node.value, str) else node


def what_it_does(path):
    return ast.dump(WithoutImportsAndWording().visit(ast.parse(path.read_text())))


class TestContents:
    def test_it_is_laid_out_as_s3prl_lays_out_a_downstream(self, exported):
        tops = {path.name for path in exported.iterdir()}
        assert {"__init__.py", "expert.py", "dataset.py", "model.py", "config.yaml", "README.md"} <= tops
        assert {"bind.patch", "resume.patch", "requirements.txt", "prepare.py", "configs"} <= tops
        assert "class DownstreamExpert(" in (exported / "expert.py").read_text()

    def test_the_package_is_not_mentioned_and_what_is_not_needed_stays_out(self, exported):
        assert not [name for name, data in tree(exported).items() if b"s3prl_metaperser" in data]
        rooms = {path.name for path in exported.iterdir() if path.is_dir()}
        assert rooms == {"adaptation", "corpus", "upstream", "configs"}
        assert not {"cli.py", "run_downstream.py", "preflight.py", "s3prl_link.py"} & {
            p.name for p in exported.iterdir()
        }
        assert not (exported / "corpus/commands.py").exists()

    def test_every_module_is_ours_but_for_imports_and_wording(self, exported):
        ours = {"dataset.py": "datasets.py", "prepare.py": "s3prl_export/prepare.py"}
        for path in exported.rglob("*.py"):
            name = path.relative_to(exported).as_posix()
            source = ROOT / "s3prl_metaperser" / ours.get(name, name)
            assert what_it_does(path) == what_it_does(source), name

    def test_its_imports_are_relative_and_lead_to_its_own_modules(self, exported):
        """Relative is what s3prl's downstream/README.md asks for."""
        for path in exported.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    module = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                    assert module.is_relative_to(exported), path
                    assert module.with_suffix(".py").is_file() or (module / "__init__.py").is_file(), (
                        path,
                        node.module,
                    )
                elif isinstance(node, ast.ImportFrom):
                    assert not node.module.startswith("s3prl.downstream"), path

    def test_ruff_finds_nothing(self, exported):
        for command in (["check"], ["format", "--check"]):
            options = ["--config", ROOT / "pyproject.toml", "--no-cache"]
            ended = subprocess.run([sys.executable, "-m", "ruff", *command, *options, exported], capture_output=True)
            assert ended.returncode == 0, ended.stdout.decode()

    def test_all_that_it_imports_is_required_in_our_ranges(self, exported):
        lines = (exported / "requirements.txt").read_text().splitlines()
        required = {wanted.name.lower(): wanted for wanted in map(Requirement, lines)}
        declared = {wanted.name.lower(): wanted for wanted in map(Requirement, metadata.requires("s3prl-metaperser"))}
        assert all(declared[name].specifier == wanted.specifier for name, wanted in required.items())
        imported = {"torch", "tensorboardx", "huggingface_hub"}  # what s3prl 0.4.18's runner needs and does not declare
        for path in exported.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                imported |= {name.split(".")[0] for name in names}
        distributions = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
        third_party = {distributions.get(name, name) for name in imported - sys.stdlib_module_names - {"s3prl"}}
        assert third_party <= required.keys()
        assert not {"s3prl", "jinja2", "matplotlib", "starlette", "uvicorn", "submitit"} & required.keys()
        assert all(f"- `{line}`" in (exported / "README.md").read_text() for line in lines)

    def test_its_configs_are_ours_and_start_from_where_its_commands_write(self, exported):
        theirs = {"ssl_e": exported / "config.yaml"} | {path.stem: path for path in exported.glob("configs/*.yaml")}
        assert theirs.keys() == configs.available().keys()
        for name, path in theirs.items():
            ours = yaml.safe_load(configs.find(name).read_text())
            origin = ours["downstream_expert"].get("init_from")
            if origin:
                ours["downstream_expert"]["init_from"] = origin.replace("result/", "result/downstream/")
            assert yaml.safe_load(path.read_text()) == ours, name

    def test_what_the_readme_points_to_is_there(self, clone, exported):
        inside = clone / "s3prl/downstream/metaperser"
        text = (inside / "README.md").read_text()
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("#")]
        # The wheel has no README of s3prl's own, a clone has.
        assert all((inside / link).is_file() for link in links if link != "../README.md")
        paths = re.findall(r"(?<=-c )downstream/\S+|(?<=-r )downstream/\S+", text)
        assert len(paths) == 3
        assert all((clone / "s3prl" / path).is_file() for path in paths)
        assert all((clone / path).is_file() for path in re.findall(r"s3prl/downstream/metaperser/\S+\.patch", text))

    def test_the_same_bytes_every_time(self, tmp_path):
        for seed in "12":
            command = [sys.executable, "-m", "s3prl_metaperser.cli", "export-s3prl", tmp_path / seed]
            subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True)
        assert tree(tmp_path / "1") == tree(tmp_path / "2")


class TestWriting:
    @pytest.fixture(autouse=True)
    def _made_once(self, contents, monkeypatch):
        monkeypatch.setattr(folder, "contents", lambda: contents)

    @pytest.mark.parametrize(
        ("given", "written"),
        [
            ("", "s3prl/downstream/metaperser"),
            ("s3prl", "s3prl/downstream/metaperser"),
            ("s3prl/downstream/metaperser", "s3prl/downstream/metaperser"),
            ("new/folder", "new/folder/downstream/metaperser"),
        ],
    )
    def test_it_goes_where_s3prl_looks(self, tmp_path, capsys, given, written):
        (tmp_path / "s3prl/downstream").mkdir(parents=True)
        for name in ("hub.py", "downstream/runner.py"):
            (tmp_path / "s3prl" / name).touch()
        assert export(tmp_path / given) == 0
        assert (tmp_path / written / "expert.py").is_file()
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"wrote {len(tree(tmp_path / written))} files to {tmp_path / written}"
        assert [line.split()[:3] for line in lines if line.startswith("  ")] == [
            ["python3", "-m", "pip"],
            ["python3", "-m", "s3prl.downstream.metaperser.prepare"],
            ["python3", "run_downstream.py", "-n"],
        ]

    def refused(self, capsys, *arguments):
        """The one line of a refusal; code 2, and nothing on stdout."""
        with pytest.raises(SystemExit) as exit_:
            export(*arguments)
        out, line = capsys.readouterr()
        assert (exit_.value.code, out, line.count("\n")) == (2, "", 1)
        return line

    def test_an_earlier_export_is_replaced_when_told_so(self, tmp_path, capsys):
        place = tmp_path / "downstream/metaperser"
        export(tmp_path)
        before = tree(place)
        (place / "expert.py").write_text("edited")
        (place / "model.py").unlink()
        capsys.readouterr()
        assert "give --overwrite to replace it" in self.refused(capsys, tmp_path)
        assert (place / "expert.py").read_text() == "edited"
        assert export(tmp_path, "--overwrite") == 0
        assert tree(place) == before

    @pytest.mark.parametrize("name", ["notes.txt", "corpus/mine.py"])
    def test_a_folder_with_files_of_others_is_left_alone(self, tmp_path, capsys, name):
        place = tmp_path / "downstream/metaperser"
        export(tmp_path)
        capsys.readouterr()
        (place / name).write_text("mine")
        before = tree(place)
        line = self.refused(capsys, tmp_path, "--overwrite")
        assert name in line
        assert tree(place) == before

    def test_what_link_s3prl_placed_is_left_alone(self, tmp_path, capsys):
        (tmp_path / "s3prl/downstream").mkdir(parents=True)
        for name in ("hub.py", "downstream/runner.py"):
            (tmp_path / "s3prl" / name).touch()
        s3prl_link.link(tmp_path / "s3prl", tmp_path)
        before = tree(tmp_path)
        assert "left alone" in self.refused(capsys, tmp_path, "--overwrite")
        assert tree(tmp_path) == before

    def test_a_file_or_a_link_in_the_way(self, tmp_path, capsys):
        (tmp_path / "file").write_text("mine")
        assert str(tmp_path / "file") in self.refused(capsys, tmp_path / "file", "--overwrite")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "downstream").mkdir()
        (tmp_path / "downstream/metaperser").symlink_to(tmp_path / "elsewhere")
        assert "no folder" in self.refused(capsys, tmp_path, "--overwrite")
        assert list((tmp_path / "elsewhere").iterdir()) == []

    @pytest.mark.parametrize("there_already", [False, True])
    def test_a_full_disk_leaves_all_as_it_was(self, tmp_path, capsys, monkeypatch, there_already):
        if there_already:
            export(tmp_path)
            capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        write_text, written = Path.write_text, []

        def until_full(path, *args, **kwargs):
            written.append(path)
            if len(written) == 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_text(path, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", until_full)
        assert "No space left on device" in self.refused(capsys, tmp_path, "--overwrite")
        assert sorted(tmp_path.rglob("*")) == before

    def test_when_the_last_step_fails_the_earlier_export_is_back(self, tmp_path, capsys, monkeypatch):
        export(tmp_path)
        capsys.readouterr()
        before = tree(tmp_path)
        rename = Path.rename

        def fails_into_place(path, target):
            if "new" in path.parts:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fails_into_place)
        assert "Input/output error" in self.refused(capsys, tmp_path, "--overwrite")
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("renames", [0, 1, 2])
    def test_killed_anywhere_the_next_export_begins_with_what_was_there(self, tmp_path, capsys, monkeypatch, renames):
        """A kill is stood for by renames, and a removal at the end, that do not come to pass any more."""
        export(tmp_path)
        before, rename, left = tree(tmp_path), Path.rename, [None] * renames
        (tmp_path / "downstream/metaperser/model.py").write_text("edited")

        class Killed(BaseException):
            pass

        def until_killed(path, target):
            if not left:
                raise Killed
            left.pop()
            return rename(path, target)

        def killed(*args, **kwargs):
            raise Killed

        monkeypatch.setattr(Path, "rename", until_killed)
        monkeypatch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            export(tmp_path, "--overwrite")
        monkeypatch.undo()
        assert len(list((tmp_path / "downstream").glob(".metaperser-*"))) == 1
        capsys.readouterr()
        assert "give --overwrite to replace it" in self.refused(capsys, tmp_path)
        assert (tmp_path / "downstream/metaperser/model.py").read_text() == "edited" or renames == 2
        assert export(tmp_path, "--overwrite") == 0
        assert tree(tmp_path) == before

    def test_a_users_folder_beside_it_is_no_killed_exports(self, tmp_path):
        mine = (".metaperser-export-12345678/new/notes.txt", ".metaperser-export-12345678/old/expert.py")
        for name in mine:
            (tmp_path / "downstream" / name).parent.mkdir(parents=True)
            (tmp_path / "downstream" / name).write_text("mine")
        export(tmp_path)
        assert all((tmp_path / "downstream" / name).read_text() == "mine" for name in mine)

    def test_the_folder_is_as_readable_as_others(self, tmp_path):
        export(tmp_path / "made")
        ordinary = tmp_path / "ordinary"
        ordinary.mkdir()
        for path in (tmp_path / "made", tmp_path / "made/downstream", tmp_path / "made/downstream/metaperser"):
            assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_help_says_where_it_goes(capsys):
    with pytest.raises(SystemExit, match="0"):
        export("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "DIR/downstream/metaperser" in text
    assert "bind.patch" in text
    assert "--overwrite" in text
