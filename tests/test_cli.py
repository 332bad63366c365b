"""The command `metaperser`: its help, the configs, and the link into an s3prl clone."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import s3prl_metaperser
from s3prl_metaperser import cli, configs, s3prl_link
from s3prl_metaperser.errors import MetaPerSERError

ROOT = Path(s3prl_metaperser.__file__).resolve().parent.parent


def every_help(parser, names=()):
    yield [*names, "--help"]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, own in action.choices.items():
                yield from every_help(own, (*names, name))


def test_no_help_no_version_and_no_wrong_command_line_imports_anything_heavy():
    asked = [
        *every_help(cli.build_parser()),
        ["--version"],
        ["confg"],
        ["prepare", "iemocap"],
        ["experiment", "table1"],
    ]
    assert ["prepare", "table", "--help"] in asked
    assert ["experiment", "figure2", "--help"] in asked
    code = (
        "import sys; from s3prl_metaperser import cli\n"
        f"for arguments in {asked!r}:\n"
        "    try: cli.main(arguments)\n"
        "    except SystemExit: pass\n"
        "    else: print('went on after', arguments)\n"
        "heavy = ('torch', 's3prl', 'pandas', 'numpy', 'scipy', 'sklearn', 'matplotlib', 'soundfile', 'yaml',"
        " 'starlette', 'uvicorn')\n"
        "print('heavy:', [name for name in heavy if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout.splitlines()[-1:] == ["heavy: []"], ended.stderr
    assert "went on after" not in ended.stdout


@pytest.mark.parametrize("subcommand", ["prepare", "demo-corpus", "experiment", "config", "link-s3prl", "unlink-s3prl"])
def test_each_subcommand_explains_itself(subcommand, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([subcommand, "--help"])
    assert ended.value.code == 0
    assert f"usage: metaperser {subcommand}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"metaperser {s3prl_metaperser.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["confg"], ["config", "a", "b"]])
def test_a_wrong_command_line_ends_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: metaperser" in capsys.readouterr().err


def test_ctrl_c_ends_with_the_shells_code_and_no_traceback(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(configs, "available", interrupted)
    assert cli.main(["config"]) == 130
    assert capsys.readouterr().err == "metaperser: interrupted\n"


class TestConfig:
    def test_without_a_name_all_are_listed_with_what_each_is_for(self, capsys):
        assert cli.main(["config"]) == 0
        out = capsys.readouterr().out
        for name, path in configs.available().items():
            assert configs.describe(path), f"{path} begins without a comment that says what it is for"
            assert any(line.split() == [name, *configs.describe(path).split()] for line in out.splitlines())
        assert {"ssl_e", "meta_perser"} <= configs.available().keys()

    @pytest.mark.parametrize("ending", ["", ".yaml"])
    def test_with_a_name_one_is_printed_as_it_stands(self, capsys, ending):
        assert cli.main(["config", f"ssl_e{ending}"]) == 0
        assert capsys.readouterr().out == (configs.folder() / "ssl_e.yaml").read_text(encoding="utf-8")

    def test_a_misspelt_name_gets_the_nearest(self, capsys):
        with pytest.raises(SystemExit) as ended:
            cli.main(["config", "sle_e"])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("metaperser: error: no config is called 'sle_e': did you mean 'ssl_e'?")
        assert error.count("\n") == 1

    def test_a_reader_that_goes_early_gets_no_traceback(self):
        command = f"'{sys.executable}' -m s3prl_metaperser.cli config | true"
        ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
        assert ended.stderr == ""


@pytest.fixture
def clone(tmp_path):
    """What matters of an s3prl clone's layout."""
    package = tmp_path / "clone" / "s3prl"
    (package / "downstream" / "example").mkdir(parents=True)
    for name in (
        "__init__.py",
        "hub.py",
        "downstream/__init__.py",
        "downstream/runner.py",
        "downstream/example/expert.py",
    ):
        (package / name).write_text(f"# {name}\n")
    return package.parent


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PLACES = """
import sys
from pathlib import Path
from s3prl_metaperser import s3prl_link
s3prl_link._SOURCE = Path(sys.argv[1])
s3prl_link.link(Path(sys.argv[2]))
"""
KILLED = """
import os, signal, sys
from pathlib import Path
from s3prl_metaperser import s3prl_link
verb, package, left = getattr(s3prl_link, sys.argv[1]), sys.argv[2], int(sys.argv[3])
def counts_down(event, arguments):
    global left
    # rmtree removes by names alone, in folders that it holds open.
    if event in BY_NAME or event in BY_PATH and any(package in str(argument) for argument in arguments):
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
BY_NAME, BY_PATH = ("os.remove", "os.rmdir"), ("open", "os.rename", "os.mkdir", "os.chmod", "shutil.rmtree")
sys.addaudithook(counts_down)
verb(Path(package))
"""


class TestLink:
    @pytest.mark.parametrize("given", ["", "s3prl"])
    def test_unlinking_leaves_the_clone_as_it_was(self, clone, given, capsys):
        before = files(clone)
        assert cli.main(["link-s3prl", "--s3prl", str(clone / given)]) == 0
        placed = files(clone).keys() - before.keys()
        assert placed == {
            f"s3prl/downstream/metaperser/{name}" for name in ("__init__.py", "expert.py", s3prl_link.MARKER)
        }
        assert "placed the downstream" in capsys.readouterr().out
        assert cli.main(["unlink-s3prl", "--s3prl", str(clone / given)]) == 0
        assert files(clone) == before
        assert not (clone / "s3prl/downstream/metaperser").exists()

    def test_doing_either_twice_changes_nothing(self, clone):
        package = s3prl_link.find_s3prl(clone)
        s3prl_link.link(package)
        linked = files(clone)
        assert "linked already" in s3prl_link.link(package)[0]
        assert files(clone) == linked
        s3prl_link.unlink(package)
        assert "nothing to remove" in s3prl_link.unlink(package)[0]

    def test_what_an_older_version_placed_is_replaced(self, clone, monkeypatch, tmp_path):
        package = s3prl_link.find_s3prl(clone)
        older = tmp_path / "older"
        older.mkdir()
        for name in ("__init__.py", "expert.py"):
            (older / name).write_text("# older\n")
        with monkeypatch.context() as patch:
            patch.setattr(s3prl_link, "_SOURCE", older)
            s3prl_link.link(package)
        s3prl_link.link(package)
        assert "DownstreamExpert" in (package / "downstream/metaperser/expert.py").read_text()

    @pytest.mark.parametrize("verb", ["link", "unlink"])
    def test_killed_at_any_step_it_leaves_nothing_half_done(self, clone, tmp_path, verb):
        """An older version is placed; ``link`` or ``unlink`` is killed before its first change, its second, …"""
        package = s3prl_link.find_s3prl(clone)
        target = package / "downstream/metaperser"
        whole = {"__init__.py", "expert.py", s3prl_link.MARKER}
        older = tmp_path / "older"
        older.mkdir()
        for name in ("__init__.py", "expert.py"):
            (older / name).write_text("# older\n")
        for step in range(100):
            subprocess.run([sys.executable, "-c", PLACES, str(older), str(package)], check=True)
            killed = subprocess.run([sys.executable, "-c", KILLED, verb, str(package), str(step)], check=False)
            if killed.returncode == 0:
                break
            assert killed.returncode == -signal.SIGKILL
            assert not target.exists() or {path.name for path in target.iterdir()} == whole
            s3prl_link.link(package)
            s3prl_link.unlink(package)
        assert step > 5

    def test_byte_code_does_not_count_as_a_change(self, clone):
        package = s3prl_link.find_s3prl(clone)
        s3prl_link.link(package)
        cache = package / "downstream/metaperser/__pycache__"
        cache.mkdir()
        (cache / "expert.cpython-311.pyc").write_bytes(b"code")
        s3prl_link.unlink(package)
        assert not cache.parent.exists()

    @pytest.mark.parametrize("verb", [s3prl_link.link, s3prl_link.unlink])
    @pytest.mark.parametrize("changed", ["expert.py", "my_notes.txt", "sub/file.py"])
    def test_what_the_user_changed_is_left_alone(self, clone, verb, changed):
        package = s3prl_link.find_s3prl(clone)
        s3prl_link.link(package)
        path = package / "downstream/metaperser" / changed
        path.parent.mkdir(exist_ok=True)
        path.write_text("# mine\n")
        before = files(clone)
        with pytest.raises(MetaPerSERError, match="was changed since"):
            verb(package)
        assert files(clone) == before

    @pytest.mark.parametrize("verb", [s3prl_link.link, s3prl_link.unlink])
    @pytest.mark.parametrize("kind", ["folder", "file", "link to a folder", "dangling link"])
    def test_what_is_not_ours_is_left_alone(self, clone, verb, kind):
        package = s3prl_link.find_s3prl(clone)
        target = package / "downstream" / "metaperser"
        if kind == "folder":
            target.mkdir()
            (target / "expert.py").write_text("# mine\n")
        elif kind == "file":
            target.write_text("mine")
        else:
            target.symlink_to(package / ("downstream/example" if kind == "link to a folder" else "gone"))
        before = files(clone)
        with pytest.raises(MetaPerSERError, match="was not placed by"):
            verb(package)
        assert files(clone) == before
        assert os.path.lexists(target)

    def test_what_pip_installed_needs_no_link(self, clone):
        package = s3prl_link.find_s3prl(clone)
        target = package / "downstream" / "metaperser"
        target.mkdir()
        for name in ("__init__.py", "expert.py"):
            (target / name).write_bytes((s3prl_link._SOURCE / name).read_bytes())
        assert "installed by pip" in s3prl_link.link(package)[0]
        with pytest.raises(MetaPerSERError, match="pip uninstall"):
            s3prl_link.unlink(package)

    def test_a_folder_that_is_no_s3prl(self, tmp_path):
        with pytest.raises(MetaPerSERError, match="is not an s3prl"):
            s3prl_link.find_s3prl(tmp_path)

    def test_a_clone_that_the_installed_plugin_hides_can_be_imported_again(self, clone, tmp_path):
        """Site-packages holds our s3prl/downstream/metaperser and the record of a clone that is imported by a hook."""
        site = tmp_path / "site"
        (site / "s3prl/downstream/metaperser").mkdir(parents=True)
        record = site / "s3prl-0.4.18.dist-info"
        record.mkdir()
        (record / "METADATA").write_text("Metadata-Version: 2.1\nName: s3prl\nVersion: 0.4.18\n")
        (record / "direct_url.json").write_text(f'{{"dir_info": {{"editable": true}}, "url": "{clone.as_uri()}"}}')

        def python(code):
            start = f"import sys, site; sys.path.append({str(ROOT)!r}); site.addsitedir({str(site)!r})\n"
            # Without this interpreter's own site-packages, which may hold a whole s3prl.
            command = [sys.executable, "-I", "-S", "-c", start + code]
            return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.strip()

        where = "import s3prl; print(s3prl.__file__)"
        link = "from s3prl_metaperser.s3prl_link import *; from pathlib import Path\n"
        link += f"print(*{{verb}}(find_s3prl(), Path({str(site)!r})), sep='\\n')"
        assert python(where) == "None"
        assert "it was hidden by" in python(link.format(verb="link"))
        assert python(where) == str(clone / "s3prl/__init__.py")
        assert python(link.format(verb="link")).endswith("is linked already")
        placed, path_file = python(link.format(verb="unlink")).splitlines()
        assert placed == f"removed {clone / 's3prl/downstream/metaperser'}"
        assert path_file.startswith(f"removed {site / s3prl_link.PATH_FILE}; ")
        assert list(site.glob("*.pth")) == []
        assert python(where) == "None"
