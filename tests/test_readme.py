"""The README's commands, run as they are written, one after the other, in an empty folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from s3prl_metaperser import configs
from s3prl_metaperser.cli import build_parser
from s3prl_metaperser.experiments import reproduce
from s3prl_metaperser.settings import read_settings

README = Path(__file__).parent.parent / "README.md"


def section(title):
    return README.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands(text):
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]


WORDS_OF_A_PERSON = ("adapt ", "predict", "inference")


def in_python(folder, environment):
    """The README's Python, on clips of the names it has."""
    (code,) = re.findall(r"```python\n(.*?)```", section("Use it"), re.S)
    recordings = sorted((folder / "data/recordings/Session1").rglob("*.wav"))
    for name, recording in zip("abcde", recordings, strict=False):
        shutil.copy(recording, folder / f"{name}.wav")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "mine.ckpt").exists()


def test_the_walk_works_as_written(tmp_path):
    """Corpus, SSL-E, Meta-PerSER, evaluation, inference: what a newcomer types, in that order."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "METAPERSER_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    walk = commands(section("Use it"))
    assert len(walk) == 14
    printed = {}
    for command in walk:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        printed[command] = done.stdout
    told = {word: next(text for command, text in printed.items() if word in command) for word in WORDS_OF_A_PERSON}
    assert "personalising helped" in told["adapt "]
    heard = json.loads(told["inference"].splitlines()[-1])
    assert heard["utterance"] == "Ses01F_impro01_F000"
    assert f"Ses01F_impro01_F000.wav  {', '.join(heard['emotions'])} " in told["predict"]
    assert (tmp_path / "my.ckpt").stat().st_size < 10_000
    assert (tmp_path / "portrait_figures/map.png").exists()
    in_python(tmp_path, environment)
    for path in ("results.csv", "predictions.csv", "dev-best.ckpt"):
        assert (tmp_path / "result/meta_perser" / path).exists()
    assert "Entire-Few" in (tmp_path / "result/ssl_e/results.csv").read_text()


def test_commands_elsewhere_in_the_readme_are_understood():
    """What takes a licence, or long, is checked to parse: subcommands, flags and config names."""
    text = README.read_text()
    mentioned = re.findall(r"`(metaperser [^`]+)`", text) + [
        line for line in commands(section("What it gives")) if line.startswith("metaperser")
    ]
    assert len(mentioned) >= 8
    for command in mentioned:
        arguments = shlex.split(command)[1:]
        if "--help" in arguments:
            with pytest.raises(SystemExit) as exit_:
                build_parser().parse_args(arguments)
            assert exit_.value.code == 0
            continue
        parsed = build_parser().parse_args(arguments)
        if arguments[0] == "config" and parsed.name not in (None, "NAME"):
            configs.find(parsed.name)


def test_the_command_for_those_with_a_licence_is_understood():
    (command,) = [line for line in commands(section("What it gives")) if "reproduce" in line]
    program, subcommand, *arguments = shlex.split(command)
    assert (README.parent / program).exists()
    assert f"{subcommand} IEMOCAP_ROOT" in (README.parent / program).read_text()
    assert reproduce.build_parser().parse_args(arguments).upstream == "wavlm_base"


@pytest.mark.parametrize("name", configs.available())
def test_every_installed_config_is_accepted(name):
    config = yaml.safe_load(configs.find(name).read_text())
    read_settings(config["downstream_expert"])
    assert configs.describe(configs.find(name))


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if "://" not in target:
            assert (README.parent / target).exists(), target
    rooms = re.findall(r"`([\w_]+(?:\.py|/))`", section("How it works"))
    assert len(rooms) > 10
    for room in rooms:
        assert (README.parent / "s3prl_metaperser" / room).exists(), room


@pytest.mark.parametrize("path", [README, *sorted((README.parent / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_a_table_ends_in_a_blank_line(path):
    """Without one, the paragraph below becomes rows of the table."""
    lines = path.read_text().splitlines()
    after = [below for row, below in pairwise(lines) if row.startswith("|")]
    assert [below for below in after if below and not below.startswith("|")] == []
