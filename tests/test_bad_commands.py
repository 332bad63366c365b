"""Every command with input that it cannot use: one line that says so, exit code 2, no traceback, nothing written."""

import hashlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_small_corpus
from crafted import whole_checkpoint

from s3prl_metaperser import cli, run_downstream

ROOT = Path(__file__).resolve().parent.parent
LONG = "n" * 300
"""Longer than a file's name may be."""
MODEL = "--checkpoint whole.ckpt --device cpu"
TABLE1 = "experiment table1 --corpus corpus --out new --scenario seen --set downstream_expert.data.min_annotations=4"
TRAIN = "-m train -d metaperser -u fbank_no_cmvn --device cpu -p run"
RUN = f"{TRAIN} -c good.yaml"
EXPERT = "config.downstream_expert"
START = f"{EXPERT}.init_from=whole.ckpt"

FILES = {
    "mine.csv": "audio,emotions\ncorpus/audio/Ses01_00.wav,sad\n",
    "heard.csv": "audio,emotions\naudio/Ses02_00.wav,\naudio/gone.wav,\n",
    "table.csv": "audio,annotator,emotions\ncorpus/audio/Ses01_00.wav,me,sad\n",
    "unclosed.csv": 'audio,annotator,emotions\n"corpus/audio/Ses01_00.wav,me,sad\n' + "x" * 5000,
    "huge.csv": f"audio,annotator,emotions\n{'x' * 5000},me,sad\n",
    "line.csv": "audio,annotator,emotions\n" + "x," * 60000,
    "nul.csv": "audio,annotator,emotions\na\0.wav,me,sad\n",
    "escape.csv": 'audio,emotions\n"\x1b[2J.wav",sad\n',
    "session.csv": f"audio,annotator,emotions,session\ncorpus/audio/Ses01_00.wav,me,sad,{'9' * 20}\n",
    "utf16.csv": "audio,emotions\n".encode("utf-16"),
    "twice.csv": "audio,audio,emotions\na,b,sad\n",
    "other.csv": "clip,emotions\na.wav,sad\n",
    "long.csv": f"audio,emotions\n{LONG}.wav,sad\n",
    "empty.csv": "",
    "silent.wav": "",
    "note.wav": "RIFF and nothing more",
    "bomb.yaml": "a: &a [x, x]\n"
    + "".join(f"{b}: &{b} [{('*' + a + ',') * 9}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)),
    "python.yaml": "runner: !!python/object/apply:os.system [id]\n",
    "nested.yaml": "[" * 10000,
    "date.yaml": "runner: 2001-99-99\n",
    "ring.yaml": "runner: &a [*a]\n",
    "twice.yaml": "runner:\n  log_step: 1\n  max_keep: 2\n  log_step: 50\n",
    "list.yaml": "[runner, optimizer]\n",
    "broken/annotations.csv": "utterance,audio,session,speaker,annotator,kind,emotions\n",
    "broken/corpus.json": "[" * 5000,
    "states/states-x.ckpt": "",
    "empty/.keep": "",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a corpus, a checkpoint, a config, and files that are wrong in one way each."""
    place = tmp_path_factory.mktemp("place")
    corpus = write_small_corpus(place / "corpus", per_session=4)
    for name, content in FILES.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    checkpoint = whole_checkpoint(corpus, place)
    torch.save(checkpoint, place / "whole.ckpt")
    (place / "good.yaml").write_text(yaml.safe_dump(checkpoint["Config"]))
    (place / "moved.yaml").write_text(yaml.safe_dump({**checkpoint["Config"], "episodes": {"shots": 8}}))
    return place


METAPERSER = [
    ("prepare", "invalid choice|are required"),
    ("prepare iemocap gone --out new", "gone: no such folder"),
    ("prepare iemocap mine.csv --out new", "mine.csv: is a file; expected the folder IEMOCAP_full_release"),
    ("prepare iemocap empty --out new", "empty: holds no folder Session1"),
    ("prepare iemocap empty --out mine.csv", "mine.csv: is a file; expected a folder"),
    ("prepare iemocap empty --out corpus", "corpus: already holds annotations.csv; pass --overwrite"),
    ("prepare crema-d mine.csv --out new", "mine.csv: no such folder; expected a clone"),
    ("prepare crema-d empty --out new", "finishedResponses.csv: no such file"),
    ("prepare table corpus --out new", "corpus: is a folder; expected a csv"),
    ("prepare table table.csv --out mine.csv/new", "mine.csv/new"),
    (f"prepare table table.csv --out {LONG}", "File name too long"),
    ("prepare table table.csv --audio-root gone --out new", "gone: no such folder"),
    ("prepare table table.csv --audio-root empty --out new", "none of its 1 utterances has audio"),
    ("prepare table table.csv --name '\x1b[2J' --out new", "holds a control character; pass another with --name"),
    ("prepare table unclosed.csv --out new", "not a readable csv|is a quote not closed"),
    ("prepare table huge.csv --out new", "huge.csv:2: audio has 5,000 characters; expected at most 4,096"),
    ("prepare table line.csv --out new", "line.csv:2: a line of 120,000 characters"),
    ("prepare table nul.csv --out new", "holds a control character|line contains NUL"),
    ("prepare table session.csv --out new", "session.csv:2: session '9{20}' is no session number"),
    ("prepare table empty.csv --out new", "empty.csv:1: has no header line"),
    ("demo-corpus", "required: --out"),
    ("demo-corpus --out mine.csv", "mine.csv"),
    ("demo-corpus --out new --seed one", "--seed: invalid int value: 'one'"),
    ("demo-corpus --out new --seed -1", "--seed"),
    ("config ../downstream_configs/ssl_e", "no config is called '../downstream_configs/ssl_e'"),
    ("config ''", "no config is called ''"),
    ("experiment", "required: EXPERIMENT"),
    ("experiment table1 --corpus gone -u fbank_no_cmvn --out new", "gone: no such corpus folder"),
    ("experiment table1 --corpus broken -u fbank_no_cmvn --out new", "broken/corpus.json: not the JSON of a corpus"),
    (
        f"{TABLE1} -u fbnk --out new --shots 4 --queries 8",
        "fbnk",
    ),
    (
        f"{TABLE1} 'runner.x=&a [*a]' -u fbank_no_cmvn --out new",
        r"runner.x:1: \*a stands for something that is not complete before it",
    ),
    (
        f"{TABLE1} -u fbank_no_cmvn --out mine.csv --shots 4 --queries 8",
        "mine.csv",
    ),
    (
        f"{TABLE1} -u fbank_no_cmvn --out new --shots 0",
        "'0' is not a whole number above 0",
    ),
    (
        f"{TABLE1} -u fbank_no_cmvn --out new --jobs many",
        "'many' is not a whole number above 0",
    ),
    (
        f"{TABLE1} -u fbank_no_cmvn --out new --inner-lr nan",
        "'nan' is not a number above 0",
    ),
    (
        f"{TABLE1} -u fbank_no_cmvn --out new --set nonsense",
        "not of the form KEY=VALUE",
    ),
    (
        f"{TABLE1} -u fbank_no_cmvn --out new --set a.b=[",
        "a.b:1: not valid YAML",
    ),
    (
        f"{TABLE1} -u fbank_no_cmvn --out new --set downstream_expert.scpoe=1",
        "scpoe",
    ),
    (
        f"{TABLE1} -u fbank_no_cmvn --out new --slurm-gpus 99",
        "invalid choice: 99",
    ),
    (
        f"{TABLE1} -u fbank_no_cmvn --out new --scope entire --recipe best",
        "--recipe best adapts",
    ),
    (
        f"{TABLE1} -u wavlm_local -k gone.pt --out new --shots 4 --queries 8",
        "gone.pt: no such file",
    ),
    (
        f"{TABLE1} -u fbank_no_cmvn --device gpu --out new --shots 4 --queries 8",
        "gpu",
    ),
    ("experiment table2 --corpus corpus -u fbank_no_cmvn --out new --recipe best", "unrecognized arguments"),
    ("experiment figure2 --corpus corpus -u fbank_no_cmvn --out new --queries 100000", "100000|labelled"),
    (f"suggest {MODEL} --audio-root gone", "gone: no such folder; expected one with recordings"),
    (f"suggest {MODEL} --audio-root empty", "empty: holds no recording"),
    (f"suggest {MODEL} --audio-root corpus --n 0", "'0' is no whole number above 0"),
    (f"suggest {MODEL} --audio-root . --labels escape.csv", "escape.csv:2: audio .* holds a control character"),
    (f"suggest {MODEL} --audio-root . --labels long.csv", "there is no recording"),
    (f"suggest {MODEL} --audio-root . --labels utf16.csv", "utf16.csv: is not UTF-8 text"),
    (f"suggest {MODEL} --audio-root . --labels twice.csv", "twice.csv:1: column 'audio' stands twice"),
    (f"suggest {MODEL} --audio-root corpus --out mine.csv", "mine.csv: already there"),
    ("suggest --checkpoint corpus --audio-root corpus", "corpus does not exist"),
    ("labels --corpus gone --annotator E1 --out new.csv", "gone: no such corpus folder"),
    ("labels --corpus broken --annotator E1 --out new.csv", "broken/corpus.json: not the JSON of a corpus"),
    ("labels --corpus corpus --annotator '' --out new.csv", "--annotator : not in corpus"),
    ("labels --corpus corpus --annotator E1 --only gone.csv --out new.csv", "gone.csv: no such file"),
    ("labels --corpus corpus --annotator E1 --only other.csv --out new.csv", "other.csv:1: missing column 'audio'"),
    (
        "labels --corpus corpus --annotator E1 --only mine.csv --out new.csv",
        r"none of its clips is a recording of corpus, such as \['corpus/audio/.* suggest --audio-root /.*/corpus$",
    ),
    ("labels --corpus corpus --annotator E9 --only heard.csv --out new.csv", "E9 labelled none of its clips"),
    ("labels --corpus corpus --annotator E1 --out empty", "empty: is a folder"),
    (f"adapt {MODEL} --labels mine.csv --out new.ckpt --folds 1", "'1' is no number of groups"),
    (f"adapt {MODEL} --labels mine.csv --out new.ckpt --steps 2.5", "'2.5' is no whole number above 0"),
    (f"adapt {MODEL} --labels mine.csv --out new.ckpt --lr nan", "nan"),
    (f"adapt {MODEL} --labels mine.csv --out new.ckpt --lr -1", "-1"),
    (f"adapt {MODEL} --labels gone.csv --out new.ckpt", "gone.csv: no such file"),
    (f"adapt {MODEL} --labels empty.csv --out new.ckpt", "empty.csv:1: has no header line"),
    ("adapt --checkpoint states/states-x.ckpt --labels mine.csv --out new.ckpt", "not a readable torch file"),
    (f"predict {MODEL}", "required: WAV"),
    (f"predict {MODEL} --format xml corpus/audio", "invalid choice: 'xml'"),
    (f"predict {MODEL} silent.wav", "silent.wav: is empty"),
    (f"predict {MODEL} note.wav", "note.wav: is not a readable recording"),
    (f"predict {MODEL} {LONG}.wav", "File name too long"),
    (f"predict --checkpoint {LONG} corpus/audio", "File name too long"),
    ("predict --checkpoint whole.ckpt --device cuda:x corpus/audio", "'cuda:x'"),
    ("predict --checkpoint whole.ckpt --device meta corpus/audio", "'meta'"),
    (f"calibrate {MODEL} --audio-root gone --out new.ckpt", "gone"),
    (f"calibrate {MODEL} --audio-root corpus --out empty", "empty"),
    (f"calibrate {MODEL} --audio-root corpus --out new.ckpt --port 99999", "99999"),
    ("calibrate --checkpoint gone.ckpt --audio-root corpus --out new.ckpt", "gone.ckpt does not exist"),
    ("portrait --corpus gone --out new.html", "gone: no such corpus folder"),
    ("portrait --corpus broken --out new.html", "broken/corpus.json: not the JSON of a corpus"),
    ("portrait --corpus corpus --out mine.csv", "mine.csv"),
    ("portrait --corpus '' --out new.html", "--corpus: is given as empty text"),
    *(
        (f"portrait --corpus corpus --out new.html {option}", f"{option}: .*give --checkpoint, or leave --[a-z]+ out")
        for option in ("--shots 3", "--draws 7", "--clips 9", "--lr -1.0", "--device nonsense")
    ),
    (f"calibrate {MODEL} --audio-root '' --out new.ckpt", "--audio-root: is given as empty text"),
    ("prepare table '' --out new", "SOURCE: is given as empty text"),
    (TABLE1.replace("--corpus corpus", "--corpus ''"), "--corpus: is given as empty text"),
    ("export-s3prl ''", "DIR: is given as empty text"),
    ("portrait --corpus corpus --checkpoint mine.csv --out new.html", "not a readable torch file"),
    ("link-s3prl --s3prl gone", "gone"),
    ("link-s3prl --s3prl mine.csv", "mine.csv"),
    ("unlink-s3prl --s3prl empty", "is not an s3prl"),
    ("export-s3prl", "required"),
    ("export-s3prl mine.csv", "mine.csv"),
]

RUN_DOWNSTREAM = [
    ("-m fly", "invalid choice: 'fly'"),
    (f"{RUN} --seed -1", "seed is -1; expected a whole number from 0"),
    (f"{RUN} -o args.seed=-1", "seed is -1; expected a whole number from 0"),
    (f"{RUN} -o args.mode=fly", "args.mode is 'fly'; expected train or evaluate or inference"),
    (f"{RUN} -o args.device=[1]", r"args.device is \[1\]; expected text of one line"),
    (f"{RUN} -o args.upstream=7", "args.upstream is 7; expected text"),
    (f"{RUN} -o args.expdir=None,,args.expname=5", "args.expname is 5; expected text"),
    (f"{RUN} -o args.upstream_trainable=maybe", "args.upstream_trainable is 'maybe'; expected True or False"),
    (f"{RUN} -o config.a=0x{'F' * 3000}", "a value of 3,002 characters"),
    (f"{RUN} -o config{'.a' * 40}=1", "40 keys in each other; expected 32 at most"),
    (f"{RUN} -o config.a={'1' * 110_000}", "-o has 110,009 characters; expected 100,000 at most: use -c"),
    (f"{RUN} -o config.optimizer=5", "missing optimizer|'optimizer' should be a mapping"),
    (f"{RUN} -o config.runner.eval_dataloaders=5", "runner.eval_dataloaders' is 5"),
    (f"{RUN} -o config.downstream_expert=[1]", "should be a mapping"),
    (f"{RUN} -o config.downstream_expert.corpus=gone", "gone: no such corpus folder"),
    (f"{RUN} -o config.downstream_expert.corpus=broken", "broken/corpus.json"),
    (
        f"{RUN} -o config.downstream_expert.model.projector_dim=1000000000000",
        "projector_dim' has the value 1000000000000",
    ),
    (f"{RUN} -o config.downstream_expert.init_from=mine.csv", "mine.csv is not a readable torch file"),
    (f"{RUN} -o {START},,{EXPERT}.fold=2", "whole.ckpt was trained or chosen on labels of E2, whom this run tests on"),
    (f"{RUN} -o {START} -v fold2", "whole.ckpt was trained or chosen on labels of E2, whom this run tests on"),
    (
        f"{RUN} -o {START},,{EXPERT}.scenario=unseen,,{EXPERT}.episodes.shots=1,,{EXPERT}.episodes.queries=1",
        "whole.ckpt was trained on recordings of session 5, which this run keeps for the test",
    ),
    (f"{RUN} -o {START},,{EXPERT}.model.pooling=mean_std", "pooling 'mean', this run has 'mean_std'"),
    (f"{RUN} -o {START} -u fbank", "made with upstream 'fbank_no_cmvn', this run has 'fbank'"),
    (f"{TRAIN} -c bomb.yaml", "bomb.yaml:5: more than 10,000 values"),
    (f"{TRAIN} -c python.yaml", "python.yaml:1: not valid YAML: could not determine a constructor"),
    (f"{TRAIN} -c nested.yaml", "nested.yaml:1: more than 32 levels"),
    (f"{TRAIN} -c date.yaml", "date.yaml: not valid YAML: ValueError: month must be in 1..12"),
    (f"{TRAIN} -c ring.yaml", r"ring.yaml:1: \*a stands for something"),
    (f"{TRAIN} -c twice.yaml", "twice.yaml:4: the key 'log_step' stands twice in one mapping"),
    (f"{TRAIN} -c moved.yaml", "moved.yaml: .*'episodes' is unknown; did you mean 'downstream_expert.episodes'"),
    (f"{RUN} -o config.fold=2", "-o: config key 'fold' is unknown; did you mean 'downstream_expert.fold'"),
    (f"{RUN} -o config.downstrem_expert.fold=2", "'downstrem_expert' is unknown; did you mean 'downstream_expert'"),
    (f"{RUN} -o config.sheduler=None", "'sheduler' is unknown; did you mean 'scheduler'"),
    (f"{RUN} -o config.runner.fp_16=True", "-o: config key 'runner.fp_16' is unknown; did you mean 'fp16'"),
    ("-m evaluate -e whole.ckpt --device cpu -o config.fold=2", "-o: config key 'fold' is unknown"),
    (f"{RUN} -o config.runner.log_step=4 -o {EXPERT}.fold=2", "-o is given 2 times, of which s3prl takes the last"),
    (f"{RUN} -c moved.yaml", "-c is given 2 times, of which s3prl takes the last"),
    (f"{TRAIN} -c list.yaml", "list.yaml: expected keys such as runner"),
    (f"{TRAIN} -c empty", "empty: a folder; expected a YAML file"),
    (f"{TRAIN} -c {LONG}.yaml", "File name too long"),
    (f"{RUN} -i mine.csv", "-i mine.csv: not readable as a checkpoint"),
    (f"{RUN} -u wavlm_local -k empty", "-k empty"),
    (f"{RUN} -d os", "-d os: s3prl has no such downstream"),
    (f"{RUN} --device meta", "--device meta"),
    (f"{RUN} -p whole.ckpt", "-p whole.ckpt: a file"),
    ("-m evaluate -e empty --device cpu", "-e empty: no checkpoint in this folder"),
    ("-m evaluate -e states --device cpu", "states"),
    ("-m evaluate -e whole.ckpt --device cpu -o args.upstream=fbnk", "-u fbnk: s3prl has no such upstream"),
    ("-m evaluate -e whole.ckpt --device cpu -o config.downstream_expert.fold=99", "fold 99 does not exist"),
    (f"-m evaluate -e whole.ckpt --device cpu -o {EXPERT}.fold=2", "trained or chosen on labels of E2"),
    (f"-m evaluate -e whole.ckpt --device cpu -o {EXPERT}.model.naming=True", "naming False, this run has True"),
    (f"{RUN} --local_rank 0", "--local_rank 0: only for processes that torchrun has started, which sets RANK"),
    ("-m inference -e whole.ckpt --device cpu -t empty", "-t empty: no such file"),
    ("-m evaluate -e whole.ckpt --device cpu -t tset", "-t tset: evaluation is of dev or test"),
    ("-m evaluate -e whole.ckpt --device cpu -t train", "-t train: evaluation is of dev or test"),
    (f"{RUN} -m inference -t note.wav", "give -e CHECKPOINT"),
]

LAUNCHER = [
    ("", "fly", "no subcommand 'fly'"),
    ("", "demo now", "'demo' takes no arguments, but got: now"),
    ("", "reproduce", "reproduce needs the folder of IEMOCAP first"),
    ("", "reproduce gone", "gone holds no Session1/dialog/EmoEvaluation"),
    ("VIRTUAL_ENV=gone", "setup", "has no bin/python"),
]


def listing(folder):
    """Give what is in a folder: every path, and a hash of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@pytest.fixture
def unchanged(place, monkeypatch, tmp_path_factory):
    """In the working folder, of which nothing may be changed; the user's own folders are in it."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cached"))
    monkeypatch.delenv("METAPERSER_CACHE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path_factory.getbasetemp()))
    before = listing(place)
    yield place
    assert listing(place) == before


def ends_well(ended, capfd, expected):
    said = capfd.readouterr().err
    lines = said.splitlines()
    assert ended.value.code == 2, said
    assert "Traceback" not in said
    assert re.search(r"\berror: ", lines[-1]), said
    assert re.search(expected, lines[-1]), lines[-1]
    assert len(lines[-1]) < 1500
    assert len(lines) == 1 or lines[0].startswith(("usage: ", "metaperser: ", "[")), said


@pytest.mark.parametrize(("line", "expected"), METAPERSER)
def test_metaperser(unchanged, capfd, line, expected):
    with pytest.raises(SystemExit) as ended:
        cli.main(shlex.split(line))
    ends_well(ended, capfd, expected)


@pytest.mark.parametrize(("line", "expected"), RUN_DOWNSTREAM)
def test_run_downstream(unchanged, capfd, monkeypatch, line, expected):
    monkeypatch.setattr(sys, "argv", ["run_downstream", *shlex.split(line)])
    with pytest.raises(SystemExit) as ended:
        run_downstream.main()
    ends_well(ended, capfd, expected)


@pytest.mark.parametrize(("environment", "line", "expected"), LAUNCHER)
def test_the_launcher(unchanged, environment, line, expected):
    own = dict(one.split("=") for one in environment.split())
    ended = subprocess.run(
        ["bash", str(ROOT / "run_downstream.sh"), *line.split()], capture_output=True, text=True, env=os.environ | own
    )
    assert ended.returncode == 2, ended.stderr
    assert expected in ended.stderr.splitlines()[0]
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("cli", "prepare table huge.csv --out new", "metaperser: error: huge.csv:2: audio has 5,000 characters"),
        ("run_downstream", f"{TRAIN} -c bomb.yaml", "run_downstream: error: bomb.yaml:5: more than 10,000 values"),
    ],
)
def test_the_same_as_processes(unchanged, module, line, expected):
    command = [sys.executable, "-m", f"s3prl_metaperser.{module}", *shlex.split(line)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(expected)
    assert ended.stderr.count("\n") == 1
