"""What an installation holds, and the script that makes one."""

import ast
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import s3prl_metaperser
from s3prl_metaperser import configs

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTION_OF = {"sklearn": "scikit-learn", "yaml": "pyyaml", "tensorboardX": "tensorboardx"}
"""The modules whose package has another name."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the project to build from: building leaves folders behind, and reads those of an earlier build."""
    copy = tmp_path_factory.mktemp("source") / "project"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("s3prl_metaperser", "downstream_configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def build(source, hook, suffix, **environment):
    """Build by the hook that pip calls, without a network and without touching the environment."""
    out = source.parent / hook
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    code = f"import setuptools.build_meta as backend; backend.{hook}({str(out)!r})"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=source, env=os.environ | environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (built,) = out.glob(f"*{suffix}")
    return built


@pytest.fixture(scope="module")
def wheel(source):
    return zipfile.ZipFile(build(source, "build_wheel", ".whl"))


def declared(metadata):
    lines = metadata.splitlines()
    return [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines if line.startswith("Requires-Dist: ")]


@pytest.fixture(scope="module")
def requirements(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return declared(wheel.read(name).decode())


class TestWheel:
    def test_the_plugin_lies_where_s3prl_looks_for_a_downstream(self, wheel):
        plugin = {name: wheel.read(name) for name in wheel.namelist() if name.startswith("s3prl/")}
        assert plugin.keys() == {"s3prl/downstream/metaperser/__init__.py", "s3prl/downstream/metaperser/expert.py"}
        assert (
            b"from s3prl_metaperser.expert import DownstreamExpert" in plugin["s3prl/downstream/metaperser/expert.py"]
        )

    def test_every_file_of_the_package_and_every_config_is_in(self, wheel):
        names = set(wheel.namelist())
        for folder in ("s3prl_metaperser", "downstream_configs"):
            for path in (ROOT / folder).rglob("*"):
                if path.is_file() and "__pycache__" not in path.parts:
                    inside = "s3prl_metaperser/" if folder == "downstream_configs" else ""
                    assert f"{inside}{path.relative_to(ROOT).as_posix()}" in names

    def test_nothing_else_is_in(self, wheel):
        tops = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
        assert tops == {"s3prl_metaperser", "s3prl", "metaperser"}

    def test_the_command_and_the_licence_are_in(self, wheel):
        texts = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
        assert "metaperser = s3prl_metaperser.cli:main" in texts["entry_points.txt"]
        assert "Apache License" in texts["LICENSE"]
        assert f"Version: {s3prl_metaperser.__version__}\n" in texts["METADATA"]

    def test_each_third_party_module_that_is_imported_is_declared(self, requirements):
        known = {
            requirement.name.lower()
            for requirement in requirements
            if requirement.marker is None or requirement.marker.evaluate({"extra": "slurm"})
        }
        imported = {}
        for path in (ROOT / "s3prl_metaperser").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                imported.update({name.split(".")[0]: path.name for name in names})
        third_party = imported.keys() - sys.stdlib_module_names - {"s3prl_metaperser"}
        undeclared = {m: imported[m] for m in third_party if DISTRIBUTION_OF.get(m, m).lower() not in known}
        assert not undeclared

    def test_the_installed_versions_are_in_the_declared_ranges(self, requirements):
        for requirement in requirements:
            if requirement.marker is None or requirement.marker.evaluate({"extra": "test"}):
                assert requirement.specifier.contains(metadata.version(requirement.name)), requirement


def test_the_sdist_holds_all_that_the_wheel_is_built_from(source, wheel, tmp_path):
    subprocess.run(["tar", "-xf", build(source, "build_sdist", ".tar.gz"), "-C", tmp_path], check=True)
    (unpacked,) = tmp_path.iterdir()
    again = zipfile.ZipFile(build(unpacked, "build_wheel", ".whl"))
    assert sorted(again.namelist()) == sorted(wheel.namelist())
    contents = {name for name in wheel.namelist() if not name.endswith("/RECORD")}
    assert all(again.read(name) == wheel.read(name) for name in contents)


class TestStacks:
    """Which libraries s3prl is installed with."""

    def of(self, source, stack):
        info = build(source, "prepare_metadata_for_build_wheel", ".dist-info", METAPERSER_STACK=stack)
        metadata = (info / "METADATA").read_text()
        return metadata, {one.name: one.specifier for one in declared(metadata) if one.marker is None}

    def test_the_newest_stack_lifts_the_upper_bounds_that_s3prls_own_command_needs_and_no_other(self, source):
        stock, newest = (self.of(source, stack)[1] for stack in ("stock", "newest"))
        first_without = {"torch": "2.9.0", "torchaudio": "2.9.0", "huggingface_hub": "1.0.0", "transformers": "5.0.0"}
        assert {name for name in stock if stock[name] != newest[name]} == first_without.keys()
        for name, version in first_without.items():
            assert not stock[name].contains(version)
            assert newest[name].contains(version)
            oldest = next(one.version for one in stock[name] if one.operator == ">=")
            assert newest[name].contains(oldest)

    def test_its_version_says_so(self, source):
        assert f"Version: {s3prl_metaperser.__version__}+newest\n" in self.of(source, "newest")[0]

    def test_a_misspelt_stack_ends_the_installation_in_a_line(self, source):
        with pytest.raises(AssertionError, match="METAPERSER_STACK=newst: expected stock or newest"):
            self.of(source, "newst")


def test_an_editable_install_reads_the_plugin_and_the_configs_from_the_clone(source, tmp_path):
    """From another folder, beside an s3prl in site-packages, and without this interpreter's own site-packages."""
    zipfile.ZipFile(build(source, "build_editable", ".whl")).extractall(tmp_path / "site")
    (tmp_path / "site/s3prl/downstream").mkdir(parents=True)
    for name in ("s3prl/__init__.py", "s3prl/downstream/__init__.py"):
        (tmp_path / "site" / name).touch()
    code = (
        f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n"
        "from importlib.util import find_spec; from s3prl_metaperser import configs\n"
        "print(find_spec('s3prl.downstream.metaperser.expert').origin, configs.folder(), sep='\\n')"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    plugin, folder = ended.stdout.splitlines()
    assert plugin == str(source / "s3prl_metaperser/s3prl_downstream/expert.py")
    assert folder == str(source / "downstream_configs")


def test_this_installation_registers_the_plugin_from_any_folder(tmp_path):
    code = "from importlib.util import find_spec; print(find_spec('s3prl.downstream.metaperser.expert').origin)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, f"install the project first (./run_downstream.sh setup): {ended.stderr}"
    assert Path(ended.stdout.strip()).is_file()


def test_configs_are_found_inside_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "s3prl_metaperser/downstream_configs").mkdir(parents=True)
    (tmp_path / "downstream_configs").mkdir()
    monkeypatch.setattr(configs, "_PACKAGE", tmp_path / "s3prl_metaperser")
    assert configs.folder() == tmp_path / "s3prl_metaperser/downstream_configs"
    (tmp_path / "s3prl_metaperser/downstream_configs").rmdir()
    assert configs.folder() == tmp_path / "downstream_configs"


def test_the_citation_names_the_paper_and_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == s3prl_metaperser.__version__
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("Meta-PerSER: Few-Shot Listener Personalized Speech Emotion Recognition")
    names = [author["family-names"] for author in paper["authors"]]
    assert (names, paper["year"]) == (["Fang", "Shen", "Lin", "Chou", "Lee"], 2025)


class TestScript:
    """``run_downstream.sh`` in a folder of its own, with a stand-in for Python that notes what it is asked."""

    @pytest.fixture(autouse=True)
    def _copy(self, tmp_path):
        self.root = tmp_path / "project"
        self.root.mkdir()
        for name in ("run_downstream.sh", "setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        self.log = tmp_path / "log"

    def python(self, path, failing="nothing"):
        """Put a stand-in in ``path``; it fails for the module ``failing``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'#!/bin/bash\necho "$*" >> "{self.log}"\n'
            f'case "$*" in *"-m {failing}"*) echo "{failing} says no"; exit 3 ;;\n'
            f'*hashlib*) cat | cksum ;; *sys.prefix*) echo "{path.parent.parent}" ;;\n'
            f'*__path__*) [ -e "$0.installed" ] && echo "{self.root}/s3prl_metaperser" ;;\n'
            '*"pip install"*) touch "$0.installed" ;;\n'
            '*"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;\n'
            '*"-m pytest"*) echo "== 1 passed ==" ;; esac\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def run(self, *arguments, cwd=None, **environment):
        names = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON")
        kept = {name: value for name, value in os.environ.items() if name not in names}
        return subprocess.run(
            [self.root / "run_downstream.sh", *arguments],
            capture_output=True,
            text=True,
            cwd=cwd or self.root.parent,
            env={**kept, **{name: str(value) for name, value in environment.items()}},
            stdin=subprocess.DEVNULL,
        )

    def asked(self):
        return [line for line in self.log.read_text().splitlines() if line.startswith(("-m", "-u"))]

    @pytest.mark.parametrize("arguments", [[], ["--help"]])
    def test_alone_it_explains_its_subcommands(self, arguments):
        ended = self.run(*arguments)
        assert ended.returncode == 0
        assert all(f"\n  {name}" in ended.stdout for name in ("demo", "test", "setup"))
        assert not self.log.exists()

    @pytest.mark.parametrize("arguments", [["tset"], ["test", "now"]])
    def test_what_it_does_not_know_ends_with_code_2(self, arguments):
        ended = self.run(*arguments)
        assert ended.returncode == 2
        assert "error:" in ended.stderr

    def test_all_checks_run_and_all_count(self):
        python = self.python(self.root / "env/bin/python", failing="ruff check")
        ended = self.run("test", VIRTUAL_ENV=python.parent.parent)
        assert ended.returncode == 1
        ran = [line.split()[1] for line in self.asked()]
        assert ran == ["pip", "ruff", "ruff", "mypy", "pytest"]
        assert ended.stdout.splitlines()[-1] == "== 1 passed =="

    def test_when_all_is_well_it_says_so_by_its_exit_code(self):
        python = self.python(self.root / "env/bin/python")
        assert self.run("test", VIRTUAL_ENV=python.parent.parent).returncode == 0

    def test_an_environment_with_a_relative_path_is_found_from_elsewhere(self, tmp_path):
        self.python(tmp_path / "elsewhere/env/bin/python")
        ended = self.run("setup", cwd=tmp_path / "elsewhere", VIRTUAL_ENV="env")
        assert ended.returncode == 0, ended.stderr
        assert self.asked() == ["-m pip install --disable-pip-version-check -e ."]

    def test_without_an_environment_one_is_made_and_the_second_run_installs_nothing(self, tmp_path):
        python = self.python(tmp_path / "bin/python3")
        # The stand-in's own pip check is what tells the script that there is no environment yet.
        ended = self.run("demo", PYTHON=python)
        assert ended.returncode == 0, ended.stderr
        assert self.asked()[0] == f"-m venv --clear {self.root}/.venv"
        assert self.asked()[-1] == "-u -m s3prl_metaperser.experiments.demo --out result/demo"

    def test_reproduce_hands_its_options_on_and_reads_paths_from_where_it_was_called(self, tmp_path):
        (tmp_path / "here/IEMOCAP/Session1/dialog/EmoEvaluation").mkdir(parents=True)
        python = self.python(self.root / "env/bin/python")
        given = ["IEMOCAP", "--upstream", "wavlm_base", "--set", "a.b=[1, 2]"]
        ended = self.run("reproduce", *given, cwd=tmp_path / "here", VIRTUAL_ENV=python.parent.parent)
        assert ended.returncode == 0, ended.stderr
        assert self.asked()[-1] == f"-u -m s3prl_metaperser.experiments.reproduce {' '.join(given)}"

    @pytest.mark.parametrize("arguments", [[], ["--device", "cuda"], ["nowhere", "--device", "cuda"], ["."]])
    def test_reproduce_without_recordings_fails_before_anything_is_installed(self, tmp_path, arguments):
        python = self.python(tmp_path / "bin/python3")
        ended = self.run("reproduce", *arguments, PYTHON=python)
        assert ended.returncode == 2
        assert ended.stderr.startswith("==> error: ")
        assert ended.stderr.count("\n") == 1
        assert not (self.root / ".venv").exists()
        assert not self.log.exists()

    def test_an_unchanged_project_is_not_installed_again(self):
        python = self.python(self.root / "env/bin/python")
        for _ in range(2):
            assert self.run("setup", VIRTUAL_ENV=python.parent.parent).returncode == 0
        assert len(self.asked()) == 1
        with (self.root / "setup.py").open("a") as file:
            file.write("# changed\n")
        self.run("setup", VIRTUAL_ENV=python.parent.parent)
        assert len(self.asked()) == 2

    def test_a_python_of_the_wrong_version_is_named(self, tmp_path):
        old = tmp_path / "bin/python3"
        old.parent.mkdir()
        old.write_text('#!/bin/bash\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
        old.chmod(0o755)
        ended = self.run("test", PYTHON=old)
        assert ended.returncode == 2
        assert "Python 3.8.1" in ended.stderr
        assert "3.10 to 3.13" in ended.stderr

    def test_no_python_at_all(self, tmp_path):
        ended = self.run("test", PYTHON=tmp_path / "gone")
        assert ended.returncode == 2
        assert f"there is no '{tmp_path / 'gone'}'" in ended.stderr
