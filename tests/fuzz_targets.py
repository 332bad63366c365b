"""What reads files that others wrote, each as a function of bytes, with valid files and the pieces they are made of.

A target either accepts an input or refuses it with ``MetaPerSERError``; any other exception is a finding. What it
accepts must survive being written and read again (where the project writes such files).
"""

import argparse
import contextlib
import copy
import io
import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

from s3prl_metaperser import preflight, preflight_arguments, preflight_files
from s3prl_metaperser.config_keys import RUNNER_KEYS, check_keys
from s3prl_metaperser.configs import folder as config_folder
from s3prl_metaperser.corpus.crema_d import prepare_crema_d
from s3prl_metaperser.corpus.iemocap import prepare_iemocap
from s3prl_metaperser.corpus.manifest import Corpus, load_corpus, write_corpus
from s3prl_metaperser.corpus.report import summary
from s3prl_metaperser.corpus.table import prepare_table
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments.experiment import read_results
from s3prl_metaperser.experiments.significance import compare
from s3prl_metaperser.experiments.tables import write_tables
from s3prl_metaperser.given_arguments import check_types
from s3prl_metaperser.personalize.labels import read_labels, write_labels
from s3prl_metaperser.results_file import merged, read_checkpoints, read_tuning, runs_of
from s3prl_metaperser.settings import SECTION, read_settings

CONSTANT = 16 << 20
"""Bytes that a reader may take beyond ten times its input's."""

JOINT = b"\n#####\n"
"""Between the files of one input."""

NASTY = [
    *(
        "",
        "\0",
        '"',
        '""',
        "'",
        "\ufeff",
        "\r",
        "\n",
        "\r\n",
        "\x85",
        "\u2028",
        "\x1a",
        "\ud7ff",
        "\U0010ffff",
        "é",
        "\t",
    ),
    *("../", "..\\", "/etc/passwd", "~", "C:\\a.wav", "a/../../b.wav", "nan", "inf", "-0", "1e999", "1_000", "٣", "²"),
    *(
        "9" * 25,
        "9" * 5000,
        "0x" + "F" * 5000,
        "-" * 40,
        "x" * 5000,
        "é" * 3000,
        ",",
        ";",
        ";;",
        "other",
        "angry;angry",
    ),
    *("[" * 200, "{" * 200, "(" * 200, "- " * 100, "{a: " * 50, '{"a": ' * 200, "[" * 20000),
    *("&a [*a, *a]", "*a", "<<: *a", "!!python/object/apply:os.system [id]", "!!int x", "!!timestamp x", "2001-99-99"),
    *(
        "!!binary x",
        "0x",
        "0b",
        "1:1:1:99",
        "!!bool maybe",
        "? [a]",
        "~:",
        "%YAML 9.9\n---",
        "...\n---\n",
        "{a: 1, a: 2}",
    ),
    *('{"a": 1, "a": 2}', "\\ud800", "NaN", "Infinity", "__import__('os')", "[0]*10**9", "lambda: 0", "b''", "1j"),
    *("true", "null", "off", "=", "==", ",,", "a.b.c", "[1, 2", "{'a': 1}", "[[1]]", "'\\x00'", "-1", "0", "1.5"),
]
"""What files that break readers are made of."""

BOMBS = [
    "a: &a [x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "a: &a {x: 1, y: 2}\n"
    + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "&a [*a]",
    "&a {*a: *a}",
]


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        name: of the target.
        accept: reads the input in a folder of its own; raises MetaPerSERError to refuse it.
        valid: inputs that it accepts.
        words: pieces of valid files.
    """

    name: str
    accept: Callable[[bytes, Path], None]
    valid: list[bytes]
    words: list[str] = field(default_factory=list)

    def pieces(self) -> list[bytes]:
        """Give what inputs are made of, beside bytes at random."""
        return [text.encode("utf-8", "surrogatepass") for text in (*self.words, *NASTY)]


class Room:
    """A folder in which a target's inputs are read, one after the other."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.folder = Path(tempfile.mkdtemp(prefix="metaperser-fuzz-"))

    def __enter__(self) -> "Room":
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def is_accepted(self, data: bytes) -> bool:
        """Read an input; what is said meanwhile is thrown away."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                self.target.accept(data, self.folder)
            except MetaPerSERError as error:
                str(error).encode(errors="backslashreplace")
                return False
        return True


def _recordings(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"RIFF")


def _same_again(corpus: Corpus, folder: Path) -> None:
    """What was accepted is written, and read again as it was."""
    write_corpus(corpus, folder / "again", overwrite=True)
    again = load_corpus(folder / "again")
    assert (again.name, again.emotions, again.source) == (corpus.name, corpus.emotions, corpus.source)
    assert again.root == corpus.root.resolve()
    assert again.annotations.astype(str).equals(corpus.annotations.astype(str))
    assert (again.targets() == corpus.targets()).all()
    assert list(again.audio_paths()) == list(corpus.audio_paths())


IEMOCAP = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
C-E4:\tAnger; Frustration;\t(calm at
first)
C-F1:\tNeutral state;\t()
A-E3:\tval 3; act 2; dom  2;\t()

[10.01 - 11.39]\tSes01F_impro01_M000\txxx\t[2.5, 2.5, 2.5]
C-E2:\tOther;\t(cr\u00e9p)
C-E2:\tSadness;\t()
"""


def _iemocap(data: bytes, folder: Path) -> None:
    labels = folder / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"
    labels.parent.mkdir(parents=True, exist_ok=True)
    wav = "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_"
    _recordings(folder, f"{wav}F000.wav", f"{wav}M000.wav")
    labels.write_bytes(data)
    corpus, report = prepare_iemocap(folder, sessions=(1,))
    summary(corpus, report)
    _same_again(corpus, folder)


CREMA_D = """"","localid","pos","ans","ttr","queryType","numTries","clipNum","questNum","subType","clipName",\
"sessionNums","respEmo","respLevel","dispEmo"
"1",140,1,"N_x",1,1,0,46,35,"a","1001_DFA_ANG_XX",1,"A","50","A"
"2",140,2,"D_x",1,2,0,46,35,"a","1001_DFA_ANG_XX",1,"D","50","A"
"3",141,3,"H_x",1,1,0,46,35,"a","1002_DFA_HAP_XX",2,"H","50","A"
"4",141,3,"H_x",1,1,0,46,35,"a","1002_DFA_HAP_XX",2,"NA","50","A"
"5",7,3,"H_x",1,1,0,46,35,"a","x_practice",2,"N","50","A"
"""


def _crema_d(data: bytes, folder: Path) -> None:
    _recordings(folder, "AudioWAV/1001_DFA_ANG_XX.wav", "AudioWAV/1002_DFA_HAP_XX.wav")
    (folder / "finishedResponses.csv").write_bytes(data)
    corpus, report = prepare_crema_d(folder)
    summary(corpus, report)
    _same_again(corpus, folder)


TABLE = """audio,annotator,emotions,session,speaker,kind
a.wav,me,Anger; sad,1,s1,self
b.wav,me,happy,2,s2,self
b.wav,"you, too",other;neutral state,2,s2,external
sub/c.wav,you,other,02,s3,external
"""


def _table(data: bytes, folder: Path) -> None:
    _recordings(folder, "a.wav", "b.wav", "sub/c.wav")
    (folder / "mine.csv").write_bytes(data)
    corpus, report = prepare_table(folder / "mine.csv")
    summary(corpus, report)
    _same_again(corpus, folder)


MANIFEST = """utterance,audio,session,speaker,annotator,kind,emotions
u1,a.wav,1,s1,me,self,angry;sad
u1,a.wav,1,s1,you,external,happy
u2,sub/b.wav,2,s2,you,external,sad
"""
ABOUT = {
    "name": "mine",
    "source": "table",
    "root": "recordings",
    "emotions": ["angry", "sad", "happy"],
    "counts": {"utterances": 2, "annotators": 2, "annotations": 3},
}


def _manifest(data: bytes, folder: Path) -> None:
    # Without the checksum that the project's own have: with it, no input but the valid one would get any further.
    rows, _, about = data.partition(JOINT)
    (folder / "annotations.csv").write_bytes(rows)
    (folder / "corpus.json").write_bytes(about)
    _same_again(load_corpus(folder), folder)


LABELS = """audio,emotions
a.wav,Anger;sad
sub/c.wav,happy
"b.wav",other
"""


def _labels(data: bytes, folder: Path) -> None:
    _recordings(folder, "a.wav", "b.wav", "sub/c.wav")
    path = folder / "mine.csv"
    path.write_bytes(data)
    labels = read_labels(path)
    write_labels(folder / "again.csv", dict(zip(labels.audio, labels.emotions, strict=True)))
    again = read_labels(folder / "again.csv")
    assert (again.audio, again.emotions) == (labels.audio, labels.emotions)


def _settings(data: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(data)
    settings = read_settings(preflight_files.load_config(path).get(SECTION))
    repr(settings)


def _config(data: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(data)
    config = preflight_files.load_config(path)
    for mode in ("train", "evaluate"):
        preflight._check_config(argparse.Namespace(config="config.yaml", mode=mode), config)
    check_keys(config, {}, "config.yaml", [])


_ARGUMENTS = ["-m", "train", "-d", "metaperser", "-u", "fbank_no_cmvn", "--device", "cpu", "-n", "run", "-o", "none"]
_OVERRIDDEN = {
    "runner": dict.fromkeys(RUNNER_KEYS, 1),
    "optimizer": {"name": "AdamW", "lr": 0.1},
    SECTION: {"corpus": "here"},
}


def _override(data: bytes, folder: Path) -> None:
    args, config = copy.deepcopy(_parsed().namespace), copy.deepcopy(_OVERRIDDEN)
    args.override = data.decode("utf-8", "surrogateescape")
    preflight_arguments.apply_overrides(args, config)
    check_types(_parsed().actions, args, "the command line")
    preflight._check_device(args.device)
    preflight._check_config(args, config)
    read_settings(config.get(SECTION), args.downstream_variant)


@cache
def _parsed() -> preflight_arguments.Parsed:
    return preflight_arguments.parse(_ARGUMENTS)


RESULTS = "system,scenario,upstream,scope,test_annotator,episode,shots,queries,maF1,miF1,UA\n" + "".join(
    f"{system},seen,fbank,linear,{annotator},{episode},4,8,{30 + place}.25,{40 + place}.5,{50 + episode}.0\n"
    for place, system in enumerate(("Meta-PerSER", "Entire-Few"))
    for annotator in ("E1", "E2")
    for episode in range(2)
)


FAILURES = """system,scenario,upstream,scope,test_annotator,episode,shots,queries,diverged_at_step
Entire-Few,seen,fbank,linear,E2,1,4,8,3
"""
TUNING = """system,scenario,upstream,scope,fold,shots,queries,lr,steps,miF1,chosen
Entire-Few,seen,fbank,linear,1,4,8,0.1,5,40.1,False
Entire-Few,seen,fbank,linear,1,4,8,0.01,50,41.25,True
"""
CHECKPOINTS = """system,scenario,upstream,scope,test_annotator,shots,queries,checkpoint,weights
Entire-Few,seen,fbank,linear,E2,4,8,dev-best.ckpt,0123456789abcdef
"""
RESULT_FILES = (RESULTS, FAILURES, TUNING, CHECKPOINTS)


def _results(data: bytes, folder: Path) -> None:
    names = ("results.csv", "failures.csv", "tuning.csv", "checkpoints.csv")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for name, content in zip(names, data.split(JOINT), strict=False):
        (folder / name).write_bytes(content)
    results = read_results(folder, "table1", {"E1": 1, "E2": 2})
    write_tables(results, folder / "tables", "table1")
    compare(results, "Meta-PerSER", ["Entire-Few"], resamples=20)
    added = results.drop(columns=["fold", "diverged_at_step"])[:1]
    assert len(merged(folder / "results.csv", added, added)) <= len(results)
    if (folder / "tuning.csv").exists():
        read_tuning(folder / "tuning.csv")
    if (folder / "checkpoints.csv").exists():
        runs_of(read_checkpoints(folder / "checkpoints.csv"))


def _configs() -> list[bytes]:
    return [path.read_bytes() for path in sorted(config_folder().glob("*.yaml"))[:6]]


def _words(*texts: str) -> list[str]:
    return sorted({word for text in texts for word in re.findall(r"[\w.+-]+|\S", text)})


def targets() -> dict[str, Target]:
    """Give all targets by name."""
    manifest = MANIFEST.encode() + JOINT + json.dumps(ABOUT, indent=2).encode()
    bombs = [bomb.encode() for bomb in BOMBS]
    configs = _configs()
    config_words = _words(*(text.decode() for text in configs[:3]))
    overrides = [
        b"config.runner.total_steps=3,,args.seed=1",
        b"config.downstream_expert.adaptation.lr=[0.1, 0.2],,args.device='cpu'",
        b"config.runner.eval_dataloaders=['dev', 'test'],,config.optimizer.name='AdamW'",
    ]
    found = [
        Target("iemocap", _iemocap, [IEMOCAP.encode(), IEMOCAP.encode("latin-1")], _words(IEMOCAP)),
        Target("crema-d", _crema_d, [CREMA_D.encode()], _words(CREMA_D)),
        Target("table", _table, [TABLE.encode()], _words(TABLE)),
        Target("manifest", _manifest, [manifest], _words(manifest.decode())),
        Target("labels", _labels, [LABELS.encode()], _words(LABELS)),
        Target(
            "settings",
            _settings,
            [*configs, *(f"{SECTION}:\n  ".encode() + b.replace(b"\n", b"\n  ") for b in bombs)],
            config_words,
        ),
        Target("config", _config, [*configs, *bombs], config_words),
        Target("override", _override, overrides, _words(*(text.decode() for text in overrides))),
        Target(
            "results",
            _results,
            [JOINT.join(part.encode() for part in RESULT_FILES[:count]) for count in (1, 2, 3, 4)],
            _words(*RESULT_FILES),
        ),
    ]
    return {target.name: target for target in found}


def drawn(target: Target) -> st.SearchStrategy[bytes]:
    """Draw valid inputs with faults, pieces one after the other, and anything."""
    pieces = st.sampled_from(target.pieces())
    mutations = st.builds(mutated, st.just(target), st.randoms(use_true_random=False))
    joined = st.lists(st.one_of(pieces, st.sampled_from([b"\n", b",", b": ", b"  ", b";"])), max_size=40).map(b"".join)
    return st.one_of(mutations, joined, st.text().map(lambda text: text.encode("utf-8", "replace")), st.binary())


def mutated(target: Target, rng: random.Random) -> bytes:
    """Give a valid input with a few faults, as files come by them: cut, doubled, pasted into, in another encoding."""
    data = bytearray(rng.choice(target.valid))
    pieces = target.pieces()
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
        begin = rng.randrange(len(data) + 1)
        end = min(len(data), begin + rng.choice((0, 1, 2, 4, 8, 40, 400)))
        match rng.randrange(8):
            case 0:
                del data[begin:end]
            case 1 | 2 | 3:
                data[begin:end] = rng.choice(pieces)
            case 4:
                data[begin:end] = rng.randbytes(rng.choice((1, 2, 8)))
            case 5:
                data[begin:begin] = data[begin:end] * rng.choice((1, 2, 50))
            case 6:
                lines = bytes(data).split(b"\n")
                rng.shuffle(lines)
                data = bytearray(rng.choice((b"\n", b"\r\n", b"\r")).join(lines))
            case 7:
                data = bytearray(
                    rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"")) + bytes(_cells_swapped(bytes(data), rng))
                )
    return bytes(data[: 1 << 17])


def _cells_swapped(data: bytes, rng: random.Random) -> Iterator[int]:
    cells = re.split(rb"([,\n:;=])", data)
    first, second = rng.randrange(len(cells)), rng.randrange(len(cells))
    cells[first], cells[second] = cells[second], cells[first]
    return iter(b"".join(cells))


def large_inputs(size: int) -> Iterator[tuple[str, str, bytes]]:
    """Give inputs of about that many bytes that take most memory: target, what they are, and the bytes."""
    count = size // 8
    about = json.dumps(ABOUT).encode()
    header = MANIFEST.split("\n", 1)[0]
    different = "\n".join(f"{i:x},{i:x}.wav,1,s,me,self,sad" for i in range(size // 32))
    in_all = "\n".join(f"{i:x},{i:x},{i % 10**9},{i:x},{i:x},self,sad" for i in range(size // 40))
    tables = {
        "manifest": (header, JOINT + about),
        "table": ("audio,annotator,emotions", b""),
        "labels": ("audio,emotions", b""),
        "results": (RESULTS.split("\n", 1)[0], b""),
        "crema-d": ("localid,queryType,clipName,respEmo", b""),
    }
    for name, (columns, tail) in tables.items():
        width = columns.count(",") + 1
        yield name, "one huge cell", f'{columns}\n"{"x" * size}"'.encode() + tail
        yield name, "one huge line", f"{columns}\n{'ab,' * (size // 3)}".encode() + tail
        yield name, "many columns", ("ab," * (size // 3)).encode() + tail
        cells = ",".join(["x"] * (width - 1))
        yield (
            name,
            "rows of one cell that differ",
            (columns + "\n" + "".join(f"{i:x},{cells}\n" for i in range(size // (8 + 2 * width)))).encode() + tail,
        )
        yield (
            name,
            "rows of cells that all differ",
            (columns + "\n" + "".join(",".join([f"{i:x}"] * width) + "\n" for i in range(size // (6 * width)))).encode()
            + tail,
        )
        yield name, "quotes", (columns + "\n" + '"",' * (size // 3)).encode() + tail
        yield name, "blank lines", (columns + "\n" * size).encode() + tail
    yield "manifest", "valid: an annotation an utterance", f"{header}\n{different}\n".encode() + JOINT + about
    yield "manifest", "valid rows: every cell another", f"{header}\n{in_all}\n".encode() + JOINT + about
    yield "manifest", "nested JSON", MANIFEST.encode() + JOINT + b"[" * size
    yield "manifest", "a list of numbers", MANIFEST.encode() + JOINT + b"[" + b"1000," * (size // 5) + b"1]"
    yield "manifest", "a long number", MANIFEST.encode() + JOINT + b"9" * size
    yield "iemocap", "one huge comment", IEMOCAP.encode() + b"C-E1: Neutral; (" + b"x" * size + b")"
    yield "iemocap", "short lines", (IEMOCAP + "A-\n" * (size // 3)).encode() + b"A-()"
    yield "iemocap", "a comment of short lines", (IEMOCAP + "C-E1: Neutral; (\n" + "x\n" * (size // 2) + ")").encode()
    yield "iemocap", "labels", (IEMOCAP + "C-E1:;()\n" * (size // 9)).encode()
    yield "iemocap", "an emotion of nothing but x", IEMOCAP.encode() + b"C-E1: " + b"x" * size + b"; ()"
    for name in ("config", "settings"):
        yield name, "nested lists", b"[" * size
        yield name, "a list of letters", b"[" + b"a," * (size // 2) + b"a]"
        yield name, "one huge value", b"a: " + b"x" * size
        yield name, "many keys", b"".join(b"%x: 1\n" % i for i in range(count))
        yield name, "comments", b"#\n" * (size // 2)
    for bomb in BOMBS:
        yield "config", f"bomb: {bomb[:24]!r}", bomb.encode()
    yield "override", "one huge value", b"config.a=" + b"9" * size
    yield "override", "nested lists", b"config.a=" + b"[" * size
    yield "override", "many", b",,".join([b"config.a=1"] * (size // 12))
    yield "override", "a long path", b"config" + b".a" * (size // 2) + b"=1"
