"""Files that others wrote: nothing of them is run, and nothing outside the folders that were named is read."""

import ast
import copy
import pickle
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import metaperser
import pytest
import torch
import yaml
from crafted import personal, whole_checkpoint
from runner_stand_in import arguments

import s3prl_metaperser
from s3prl_metaperser import preflight, preflight_arguments, preflight_files
from s3prl_metaperser.cli import main
from s3prl_metaperser.config_keys import RUNNER_KEYS
from s3prl_metaperser.corpus.manifest import load_corpus
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.expert import DownstreamExpert
from s3prl_metaperser.given_arguments import check_trusted
from s3prl_metaperser.personalize.labels import read_labels
from s3prl_metaperser.yaml_text import read_yaml

PACKAGE = Path(s3prl_metaperser.__file__).parent
FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"}
FORBIDDEN |= {"subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "numpy.load", "torch.hub.load"}
FORBIDDEN_METHODS = {"extractall", "unpack_archive", "read_pickle"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "tarfile", "code", "runpy"}
SAFE_YAML = {"safe_load", "SafeLoader"}


def meanings(tree):
    """Give what each imported name stands for, wherever in the module it is imported."""
    meant = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            meant |= {one.asname or one.name.split(".")[0]: one.name for one in node.names if one.asname}
            meant |= {one.name.split(".")[0]: one.name.split(".")[0] for one in node.names if not one.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            meant |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return meant


def full_name(node, meant):
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, meant)}.{node.attr}".removeprefix("builtins.")
    return meant.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def forbidden(name):
    package, _, last = name.rpartition(".")
    is_unsafe_yaml = package.split(".")[0] == "yaml" and "load" in last.lower() and last not in SAFE_YAML
    return name in FORBIDDEN or last in FORBIDDEN_METHODS or is_unsafe_yaml


def unsafe(tree):
    """Give what in a module runs code that comes as data."""
    meant = meanings(tree)
    safe_loads = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            yield from (f"imports {name}" for name in imported if name.endswith(".*"))
        else:
            imported = []
        imported = [name.removeprefix("builtins.") for name in imported]
        yield from (f"imports {name}" for name in imported if name.split(".")[0] in FORBIDDEN_MODULES)
        yield from (f"imports {name}" for name in imported if forbidden(name))
        if isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            flags = {name: isinstance(value, ast.Constant) and value.value for name, value in given.items()}
            if "shell" in given and not (isinstance(given["shell"], ast.Constant) and flags["shell"] is False):
                yield f"{full_name(node.func, meant)} with a shell"
            if flags.get("weights_only") is True:
                safe_loads.add(node.func)
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = full_name(node, meant)
            if forbidden(name):
                yield name
            # Breadth first: a call comes before what is called in it.
            if name == "torch.load" and node not in safe_loads:
                yield "torch.load without weights_only=True"


def test_no_module_runs_what_it_reads():
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 100
    found = {
        f"{path.relative_to(PACKAGE)}: {what}"
        for path in modules
        for what in unsafe(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set()


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "import pickle",
        "from marshal import loads",
        "yaml.load(text)",
        "yaml.full_load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "archive.extractall(folder)",
        "subprocess.run(line, shell=True)",
        "subprocess.run(line, shell=flag)",
        "subprocess.getoutput(line)",
        "from torch import load; load(path)",
        "from torch import load as read; read(path, weights_only=flag)",
        "import torch as t; t.load(path)",
        "read = torch.load",
        "from yaml import unsafe_load",
        "from yaml import *",
        "import yaml as y; y.load(text, Loader=y.FullLoader)",
        "from os import system; system(line)",
        "import os as o; o.popen(line)",
        "pandas.read_pickle(path)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "builtins.eval(text)",
        "from builtins import exec as run",
        "list(map(eval, texts))",
        "import a.b, pickle as p",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert list(unsafe(ast.parse(line)))


def test_the_search_passes_over_what_only_looks_like_it():
    fine = """
import re, subprocess, torch as t
from yaml import safe_load
from torch import load
re.compile(text); model.eval(); runner.model.eval(); safe_load(text); subprocess.run(line, shell=False)
t.load(path, weights_only=True); load(path, map_location=place, weights_only=True); json.load(file)
"""
    assert list(unsafe(ast.parse(fine))) == []


class TestYaml:
    def test_no_tag_makes_an_object(self):
        for text in ("!!python/name:os.system", "!!python/object/apply:os.system [id]", "!!python/tuple [1]"):
            with pytest.raises(MetaPerSERError, match="not valid YAML"):
                read_yaml(f"a: {text}", "c.yaml")

    @pytest.mark.parametrize("item", ["[{}]", "{{<<: [{}]}}"])
    def test_aliases_are_counted_as_what_they_stand_for(self, item):
        lines = ["a: &a {x: 1, y: 2}"]
        lines += [
            f"{b}: &{b} {item.format(', '.join([f'*{a}'] * 9))}" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ]
        with pytest.raises(MetaPerSERError, match=r"c\.yaml:5: more than 10,000 values"):
            read_yaml("\n".join(lines), "c.yaml")
        assert read_yaml("a: &a [1]\nb: [*a, *a]", "c.yaml") == {"a": [1], "b": [[1], [1]]}
        with pytest.raises(MetaPerSERError, match=r"c\.yaml:1: \*a stands for something that is not complete"):
            read_yaml("&a [*a]", "c.yaml")

    @pytest.mark.parametrize("value", ["0x_", "2001-99-99", "!!bool maybe", "!!int x", "0x" + "F" * 5000, "[" * 5000])
    def test_what_only_looks_like_a_value(self, value):
        with pytest.raises(MetaPerSERError, match=r"^c\.yaml"):
            read_yaml(f"a: {value}", "c.yaml")


OUTSIDE = {
    "up": "../secret.wav",
    "up and down": "a/../../secret.wav",
    "up in another system": "..\\secret.wav",
    "absolute": "/etc/passwd",
    "a drive": "C:\\secret.wav",
    "a share": "\\\\host\\secret.wav",
    "cut by a NUL": "a.wav\0.txt",
    "an escape": "\x1b[2Ja.wav",
    "a link": "link.wav",
    "below a link": "folder/secret.wav",
    "up from a link": "inner/../../secret.wav",
}


class TestPaths:
    """What a manifest or a label file names stays below the corpus root."""

    @pytest.fixture
    def root(self, tmp_path):
        root = tmp_path / "root"
        (root / "inner").mkdir(parents=True)
        (root / "a.wav").write_bytes(b"RIFF")
        (tmp_path / "secret.wav").write_bytes(b"RIFF")
        (root / "link.wav").symlink_to(tmp_path / "secret.wav")
        (root / "stays.wav").symlink_to("a.wav")
        (root / "folder").symlink_to(tmp_path)
        return root

    def manifest(self, root, audio):
        (root / "annotations.csv").write_text(
            f'utterance,audio,session,speaker,annotator,kind,emotions\nu,"{audio}",1,s,me,self,sad\n'
        )
        (root / "corpus.json").write_text(
            '{"name": "c", "source": "table", "root": ".", "emotions": ["sad", "happy"],'
            ' "counts": {"utterances": 1, "annotators": 1, "annotations": 1}}'
        )
        return root

    @pytest.mark.parametrize("case", OUTSIDE)
    def test_outside(self, root, case):
        audio = OUTSIDE[case]
        (root / "mine.csv").write_text(f'audio,emotions\n"{audio}",sad\n')
        expected = "outside the audio root|absolute path|control character"
        with pytest.raises(MetaPerSERError, match=expected):
            read_labels(root / "mine.csv")
        with pytest.raises(MetaPerSERError, match=expected):
            load_corpus(self.manifest(root, audio)).audio_paths()["u"]
        (root / "table.csv").write_text(f'audio,annotator,emotions\n"{audio}",me,sad\n')
        with pytest.raises(SystemExit):
            main(["prepare", "table", str(root / "table.csv"), "--out", str(root / "out")])
        assert not (root / "out").exists()

    @pytest.mark.parametrize("audio", ["a.wav", "inner/../a.wav", "stays.wav", "~/a.wav", "ab:c.wav", "..a.wav"])
    def test_inside(self, root, audio):
        place = load_corpus(self.manifest(root, audio)).audio_paths()["u"]
        assert place == root / audio
        assert place.resolve().is_relative_to(root)


class TestOverrides:
    """s3prl evaluates what stands after -o as Python."""

    def test_s3prl_gets_literals_only(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        given = [
            "-m",
            "train",
            "-d",
            "example",
            "-u",
            "fbank",
            "--device",
            "cpu",
            "-n",
            "run",
            "-c",
            "config.yaml",
            "-o",
        ]
        config = {"runner": dict.fromkeys(RUNNER_KEYS, 1), "optimizer": {"name": "Adam", "lr": 0.1}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        code = "config.a=open('made','w'),,config.b=sum,,config.c=[1, 'x'],,args.expname=mine"
        passed_on = preflight.check([*given, code])
        args = preflight_arguments.parse(passed_on).namespace
        from s3prl.utility.helper import override

        override(args.override, args, config)
        assert (config["a"], config["b"], config["c"]) == ("open('made','w')", "sum", [1, "x"])
        assert args.expname == "mine"
        assert not (tmp_path / "made").exists()


@pytest.fixture(scope="module")
def checkpoint(small_corpus, tmp_path_factory):
    return whole_checkpoint(small_corpus, tmp_path_factory.mktemp("whole"))


class Made:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self):
        return open, ("made", "w")


def without(name):
    def change(content):
        del content[name]

    return change


def with_tensor(part, name, tensor):
    def change(content):
        content[part][name] = tensor

    return change


def with_about(*path, value):
    def change(content):
        place = content["Downstream"]["_extra_state"]
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value

    return change


def with_argument(name, value):
    return lambda content: setattr(content["Args"], name, value)


def with_upstream(upstream, place):
    def change(content):
        content["Args"].upstream, content["Args"].upstream_ckpt = upstream, place

    return change


def with_part(name, part):
    return lambda content: content.update({name: part})


def with_setting(*path, value):
    def change(content):
        place = content["Config"]
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value

    return change


def recursive():
    ring = []
    ring.append(ring)
    return ring


def nested(levels):
    return [nested(levels - 1)] if levels else []


WITH_NAN, WITHOUT_END = torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])
HUGE = torch.zeros(1).expand(10**12)
PROJECTOR = "learner.model.projector.weight"
CRAFTED = {
    "an object that runs code": (lambda content: content.update(Step=Made()), "not a readable torch file"),
    "no arguments": (without("Args"), "no command line"),
    "no config": (without("Config"), "no config"),
    "arguments that are none": (lambda content: content.update(Args=7), "no command line"),
    "a config that is none": (lambda content: content.update(Config=[1]), "no config"),
    "a downstream that is none": (lambda content: content.update(Downstream=[1]), "not made by -d metaperser"),
    "a featurizer that is none": (lambda content: content.update(Featurizer=7), "its Featurizer is a int"),
    "a tensor of any size": (with_tensor("Downstream", PROJECTOR, HUGE), "claims the shape (1000000000000,)"),
    "a tensor without numbers": (
        with_tensor("Featurizer", "w", torch.empty(9, device="meta")),
        "no numbers of its own",
    ),
    "a sparse tensor": (with_tensor("Downstream", PROJECTOR, torch.eye(2).to_sparse()), "no numbers of its own"),
    "a tensor of a type to store only": (
        with_tensor("Featurizer", "w", torch.zeros(2).to(torch.float8_e5m2)),
        "that is of the type torch.float8_e5m2",
    ),
    "a tensor of another shape": (with_tensor("Downstream", PROJECTOR, torch.zeros(2)), "does not fit"),
    "a featurizer of others": (with_tensor("Featurizer", "other", torch.zeros(2)), "does not fit"),
    "standardised otherwise": (
        with_tensor("Downstream", "learner.standardization.mean", torch.zeros(2)),
        "does not fit",
    ),
    "a number as a name": (with_tensor("Downstream", 7, torch.zeros(1)), "has the name 7"),
    "text for a tensor": (with_tensor("Downstream", PROJECTOR, "text"), "does not fit"),
    "no contract": (with_about("contract", value=None), "no contract"),
    "one emotion": (with_about("contract", "emotions", value=["sad"]), "contract.emotions"),
    "emotions of numbers": (with_about("contract", "emotions", value=[1, 2]), "contract.emotions"),
    "a tensor among names": (with_about("contract", "upstream", value=torch.zeros(3)), "a Tensor in it"),
    "a ring": (with_about("contract", "left_out", value=recursive()), "more than any run does"),
    "tensors left out by number": (with_about("contract", "left_out", value=[1]), "contract.left_out is [1]"),
    "heads of numbers": (with_about("contract", "heads", value=[1, 2]), "contract.heads is [1, 2]"),
    "an emotion that clears the screen": (with_about("contract", "emotions", value=["sad", "\x1b[2J"]), "control"),
    "an upstream that is a tensor": (with_part("Upstream", torch.zeros(3)), "its Upstream is a Tensor"),
    "a featurizer that is an empty list": (with_part("Featurizer", []), "its Featurizer is a list"),
    "a changed upstream that is an empty list": (with_part("ChangedUpstream", []), "its ChangedUpstream is a list"),
    "weights that are no numbers": (
        with_tensor("Downstream", PROJECTOR, WITH_NAN),
        f"its weights {PROJECTOR!r} in Downstream are not finite",
    ),
    "a featurizer without end": (with_tensor("Featurizer", "weights", -WITHOUT_END), "'weights' in Featurizer are not"),
    "an upstream without end": (with_part("Upstream", {"w": WITHOUT_END}), "'w' in Upstream are not finite"),
    "an argument of no name": (lambda content: vars(content["Args"]).update({7: 1}), "its Args has the key 7"),
    "a section of no name": (with_setting(7, value=1), "its Config has the key 7"),
    "a tensor among arguments": (with_argument("seed", torch.zeros(1)), "its Args holds something with a Tensor"),
    "a config without end": (with_setting("deep", value=nested(300)), "its Config holds more than any run does"),
    "a width of text": (with_about("contract", "projector_dim", value="wide"), "projector_dim 'wide'"),
    "annotators that are none": (with_about("provenance", "annotators", value=5), "provenance.annotators"),
    "a past that is none": (with_about("provenance", "before", value=[5]), "provenance.before is [5]"),
    "a past of nobody": (with_about("provenance", "before", value=[{}]), "provenance.before.annotators is None"),
    "training that is none": (with_about("training", value=[1]), "training is [1]"),
    "a parent that is none": (with_about("parent", value="here"), "names a parent without a fingerprint"),
    "a parent nowhere": (
        with_about("parent", value={"fingerprint": "0", "places": ["../../etc/passwd", "/dev/null"]}),
        "which is not there",
    ),
    "a parent that is no checkpoint": (
        with_about("parent", value={"fingerprint": "0", "places": ["../corpus.json", "/etc/passwd"]}),
        "not a readable torch file",
    ),
    "code to download": (with_argument("hub", "huggingface"), "asks for hub 'huggingface'"),
    "code to download, by the other flag": (with_argument("from_hf_hub", True), "asks for from_hf_hub True"),
    "a file to unpickle": (
        with_argument("upstream_ckpt", "https://host/x.pt"),
        "asks for upstream_ckpt 'https://host/x.pt'",
    ),
    "code in an address": (with_upstream("distiller_url", "data:;base64,UEsD/x.pt"), "asks for upstream_ckpt 'data:"),
    "code in a file's address": (with_upstream("mockingjay_url", "file:/x.pt"), "asks for upstream_ckpt 'file:/x.pt'"),
    "an upload": (with_argument("push_to_hf_hub", "True"), "asks for push_to_hf_hub 'True'"),
    "an upstream that is none": (with_argument("upstream", "os"), "no such upstream"),
    "an upstream of no text": (with_argument("upstream", 3), "args.upstream is 3; expected text"),
    "a layer of no number": (with_argument("upstream_layer_selection", "x"), "args.upstream_layer_selection is 'x'"),
    "a model of any size": (
        with_setting("downstream_expert", "model", "projector_dim", value=10**12),
        "model.projector_dim' has the value 1000000000000",
    ),
    "no section": (with_setting("downstream_expert", value=None), "should be a mapping"),
    "a runner that is none": (with_setting("runner", value=[1]), "'runner' should be a mapping"),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_checkpoints_are_refused(checkpoint, case, small_corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_corpus.parent / "cache"))
    change, expected = CRAFTED[case]
    content = copy.deepcopy(checkpoint)
    change(content)
    torch.save(content, tmp_path / "crafted.ckpt")
    with pytest.raises(SystemExit) as ended:
        main(["predict", "--checkpoint", "crafted.ckpt", "--device", "cpu", str(small_corpus / "audio/Ses01_00.wav")])
    said = capfd.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert said.startswith("metaperser: error: ")
    assert expected in said
    assert len(said) < 1500
    assert [path.name for path in tmp_path.iterdir()] == ["crafted.ckpt"]


def test_as_it_is_the_checkpoint_loads(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "whole.ckpt")
    assert len(metaperser.load(tmp_path / "whole.ckpt", "cpu").emotions) == 9


def test_a_parent_is_taken_only_by_its_fingerprint(checkpoint, tmp_path):
    """A personal checkpoint from elsewhere names any file as its parent; the weights there must be those it names."""
    (tmp_path / "theirs").mkdir()
    torch.save(checkpoint, tmp_path / "mine.ckpt")
    torch.save(personal(checkpoint, "../mine.ckpt"), tmp_path / "theirs/small.ckpt")
    assert metaperser.load(tmp_path / "theirs/small.ckpt", "cpu").is_personal
    other = copy.deepcopy(checkpoint)
    other["Downstream"][PROJECTOR] += 1
    torch.save(other, tmp_path / "mine.ckpt")
    with pytest.raises(MetaPerSERError, match="has other weights"):
        metaperser.load(tmp_path / "theirs/small.ckpt", "cpu")


def test_a_pickle_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.ckpt").write_bytes(pickle.dumps(OrderedDict(Downstream=Made())))
    for load in (metaperser.load, lambda path: preflight_files.load_checkpoint(Path(path), "-e")):
        with pytest.raises(MetaPerSERError, match=r"old\.ckpt"):
            load("old.ckpt")
    assert not Path("made").exists()


def crafted_at(place, checkpoint, change):
    """Write a changed checkpoint into a folder, and give what is in it."""
    content = copy.deepcopy(checkpoint)
    change(content)
    torch.save(content, place / "crafted.ckpt")
    return content


def launcher_says(mode):
    """Give the launcher's error on the crafted checkpoint; None where it hands it on to s3prl."""
    try:
        preflight.check(["-m", mode, "-e", "crafted.ckpt", "--device", "cpu"])
    except MetaPerSERError as error:
        return str(error)
    return None


KNOWN_ONCE_THE_MODEL_IS_MADE = (
    "a tensor of another shape",
    "text for a tensor",
    "a parent nowhere",
    "a parent that is no checkpoint",
)
KNOWN_ONCE_THE_UPSTREAM_IS_MADE = ("a featurizer of others", "standardised otherwise")
"""Which ``predict`` makes, above, and the launcher leaves to s3prl."""


@pytest.mark.parametrize(
    "case", [case for case in CRAFTED if case not in (*KNOWN_ONCE_THE_MODEL_IS_MADE, *KNOWN_ONCE_THE_UPSTREAM_IS_MADE)]
)
def test_the_launcher_refuses_them_too(checkpoint, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    crafted_at(tmp_path, checkpoint, CRAFTED[case][0])
    for mode in ("evaluate", "train"):
        said = launcher_says(mode)
        assert said is not None
        assert len(said) < 1500
    assert [path.name for path in tmp_path.iterdir()] == ["crafted.ckpt"]


@pytest.mark.parametrize("case", KNOWN_ONCE_THE_MODEL_IS_MADE)
def test_the_expert_refuses_what_does_not_fit_it(checkpoint, case, small_corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    change, expected = CRAFTED[case]
    content = crafted_at(tmp_path, checkpoint, change)
    given = arguments(small_corpus, tmp_path) | {"mode": "evaluate", "init_ckpt": "crafted.ckpt"}
    with pytest.raises(SystemExit):
        DownstreamExpert(**given).load_state_dict(content["Downstream"])
    assert expected in capfd.readouterr().err.splitlines()[-1]


NOT_TO_TRAIN_ON = {
    "steps of no number": (with_part("Step", "x"), "its Step is 'x'"),
    "less than no epochs": (with_part("Epoch", -1), "its Epoch is -1"),
    "an optimizer that is a list": (with_part("Optimizer", [1]), "its Optimizer is a list"),
    "a schedule that is a number": (with_part("Scheduler", 3), "its Scheduler is a int"),
    "an optimizer of no groups": (with_part("Optimizer", {"param_groups": [1], "state": {}}), "param_groups"),
    "an optimizer of no state": (
        with_part("Optimizer", {"param_groups": [], "state": {0: 1}}),
        "not of its parameters",
    ),
}


@pytest.mark.parametrize("case", NOT_TO_TRAIN_ON)
def test_what_only_training_reads_is_looked_at_before_training(checkpoint, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, expected = NOT_TO_TRAIN_ON[case]
    crafted_at(tmp_path, checkpoint, change)
    assert expected in launcher_says("train")
    assert launcher_says("evaluate") is None


def test_as_it_is_the_launcher_hands_the_checkpoint_on(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    crafted_at(tmp_path, checkpoint, lambda content: None)
    assert launcher_says("evaluate") is launcher_says("train") is None


class TestUnasked:
    """Which of a checkpoint's own arguments s3prl is given."""

    @pytest.mark.parametrize(
        ("upstream", "place", "is_taken"),
        [
            ("wavlm_base", None, True),
            ("wavlm_local", "moved.pt", True),  # told by what looks for the file
            ("hubert_custom", "here.pt", True),
            ("hf_hubert_custom", "facebook/hubert-base-ls960", True),
            ("hf_wav2vec2_custom", "folder", True),
            ("wavlm_local", "/1:2.pt", True),
            ("distiller_url", "here.pt", False),
            ("tera_url", "data:;base64,UEsD/x.pt", False),
            ("hubert_custom", "https://host/x.pt", False),
            ("hubert_custom", " \thttp://host/x.pt", False),
            ("apc_local", "<URL:file:///x.pt>", False),
            ("hf_hubert_custom", "https://host/x", False),
            ("fbank", "moved.pt", False),
        ],
    )
    def test_upstream_ckpt(self, tmp_path, monkeypatch, upstream, place, is_taken):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here.pt").touch()
        (tmp_path / "folder").mkdir()
        saved = {"upstream": upstream, "upstream_ckpt": place}
        check_trusted(saved, ["upstream_ckpt"], "it")
        with nullcontext() if is_taken else pytest.raises(MetaPerSERError, match=r"^it asks for upstream_ckpt '"):
            check_trusted(saved, [], "it")

    @pytest.mark.parametrize("code", ["f(x)", "[0 for a.b in c]", "a['b']"])
    def test_a_downstream_that_evaluates_its_config(self, checkpoint, tmp_path, monkeypatch, code):
        monkeypatch.chdir(tmp_path)

        def change(content):
            content["Args"].downstream = "ctc"
            content["Config"]["downstream_expert"] = {"model": {"select": code}}

        crafted_at(tmp_path, checkpoint, change)
        for mode in ("evaluate", "train", "inference"):
            assert "asks for downstream 'ctc'" in launcher_says(mode)
        crafted_at(tmp_path, checkpoint, lambda content: setattr(content["Args"], "downstream", "example"))
        assert launcher_says("evaluate") is None


def test_where_the_cache_is_no_checkpoint_says(checkpoint, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("METAPERSER_CACHE", str(tmp_path / "mine"))
    (tmp_path / "theirs").mkdir()
    crafted_at(tmp_path, checkpoint, with_setting("downstream_expert", "feature_cache", value=str(tmp_path / "theirs")))
    metaperser.load(tmp_path / "crafted.ckpt", "cpu").predict([small_corpus / "audio/Ses01_00.wav"])
    assert list((tmp_path / "theirs").iterdir()) == []
    assert list((tmp_path / "mine").rglob("*.safetensors"))
