"""The launcher: s3prl's command line, checked before s3prl acts on it, and what newer libraries need."""

import argparse
import contextlib
import os
import re
import socket
import subprocess
import sys
import types
import urllib.error
from pathlib import Path

import pytest
import requests
import torch
import yaml
from crafted import whole_checkpoint

from s3prl_metaperser import configs, preflight, preflight_arguments, preflight_upstream, run_downstream, s3prl_errors
from s3prl_metaperser.errors import MetaPerSERError

CONFIG = {
    "runner": {
        "total_steps": 2,
        "gradient_clipping": 1,
        "gradient_accumulate_steps": 1,
        "log_step": 1,
        "eval_step": 2,
        "save_step": 2,
        "max_keep": 1,
        "eval_dataloaders": ["dev"],
        "evaluate_ratio": 0.02,
    },
    "optimizer": {"name": "AdamW", "lr": 2.0e-4},
    "downstream_expert": {
        "datarc": {"num_workers": 0, "train_batch_size": 2, "eval_batch_size": 2},
        "modelrc": {"input_dim": 8},
    },
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_downstream.quieten()
    run_downstream.trust_namespaces()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as s3prl's runner writes it, of the upstream fbank."""
    folder = tmp_path / "past"
    folder.mkdir()
    args = preflight_arguments.parse(
        f"-m train -d example -u fbank --device cpu -p {folder} -c gone.yaml".split()
    ).namespace
    path = folder / "states-2.ckpt"
    torch.save({"Args": args, "Config": CONFIG, "Step": 2, "Epoch": 0}, path)
    return path


def check(config, flags):
    given = f"-m train -d example -u fbank --device cpu -n run {flags}".split()
    return preflight.check(given if "-c" in given else [*given, "-c", str(config)])


def launch(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "s3prl_metaperser.run_downstream", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("-u fbnk", "-u fbnk: s3prl has no such upstream: did you mean 'fbank'?"),
        ("-u Path", "-u Path: s3prl has no such upstream: try one of fbank_no_cmvn"),
        ("-u wavlm_local", "-u wavlm_local needs the upstream's checkpoint"),
        ("-u wavlm_local -k gone.pt", "-k gone.pt: no such file"),
        ("-u wavlm_local -k https://host/model.pt", "-k https://host/model.pt: no such file"),
        ("-u wav2vec2_custom -k gone.pt", "-k gone.pt: no such file"),
        ("-u hf_hubert_custom -k ./gone", "-k ./gone: no folder with a config.json"),
        ("-u mos_wav2vec2", "-u mos_wav2vec2 gives one score a clip"),
        ("-u passt_base", "-u passt_base cannot be made by s3prl's own runner"),
        (
            "-u baseline_local -k config.yaml",
            "-u baseline_local needs the upstream's own config: give its path with -g",
        ),
        ("-u pase_local -k config.yaml -g config.yaml", "-u pase_local needs the Python package 'pase'"),
        ("-g gone.yaml", "-g gone.yaml: no such file"),
        ("-d exmple", "-d exmple: s3prl has no such downstream: did you mean 'example'?"),
        ("-c gone/config.yaml", "-c gone/config.yaml: no such file"),
        ("-c .", "-c .: a folder"),
        ("-c sle_e", "-c sle_e: no such file, and no config of that name: did you mean 'ssl_e'?"),
        ("--device cuda", "add --device cpu"),
        ("--device gpu", "--device gpu: not a device of torch"),
        ("-e gone.ckpt", "-e gone.ckpt: no such file"),
        ("-e .", "-e .: no checkpoint in this folder"),
        ("-e config.yaml", "-e config.yaml: not readable as a checkpoint"),
        ("-i gone.ckpt", "-i gone.ckpt: no such file"),
        ("-p config.yaml", "-p config.yaml: a file"),
        ("-p config.yaml/run", "-p config.yaml/run: cannot be made"),
        ("-o nonsense", "expected args.NAME=VALUE or config.KEY.KEY=VALUE"),
        ("-o config.a=b=c", "each with one '='"),
        ("-o runner.total_steps=3", "expected args.NAME=VALUE or config.KEY.KEY=VALUE"),
        ("-o args.upstrem=fbank", "no such argument; did you mean 'upstream'"),
        ("-o args.upstream='mfc'", "-u mfc: s3prl has no such upstream: did you mean 'mfcc'?"),
        ("-o config.runner.total_steps.a=1", "'total_steps' holds the value 2"),
        ("-o config.runner.max_keep=None", "missing runner.max_keep"),
        ("-o config.runner=None", "the key 'runner' is missing"),
        ("--device mps", "--device mps: torch has no such device here"),
        ("--push_to_hf_hub True", "--push_to_hf_hub: s3prl logs in by a function that huggingface_hub"),
        ("-u someone/model --hub huggingface", "--hub huggingface: s3prl asks huggingface_hub"),
        ("-m inference -t gone.wav", "-t gone.wav: no such file"),
    ],
)
def test_bad_input_is_one_line_that_names_it_and_writes_nothing(config, flags, said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MetaPerSERError) as caught:
        check(config, flags)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("-u fbank -d example -c config.yaml", "give it a name with -n"),
        ("-u fbank -n run -c config.yaml", "no downstream given: -d metaperser"),
        ("-d example -n run -c config.yaml", "no upstream given"),
        ("-u fbank -d example -n run", "no config given"),
        ("-u fbank -d example -n run --hub huggingface -o args.upstream=None -c config.yaml", "name of a repository"),
    ],
)
def test_a_missing_flag_is_named(config, arguments, said):
    with pytest.raises(MetaPerSERError, match=said):
        preflight.check(["-m", "train", "--device", "cpu", *arguments.split()])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runner:\n  total_steps: 1\n bad: [\n", r"broken\.yaml:3: not valid YAML"),
        ("a: 1\nb:\t- c: d\n", r"broken\.yaml:2: not valid YAML"),
        ("just words", "expected keys such as runner"),
        ("", "expected keys such as runner"),
        ("runner: {total_steps: 1}", "missing runner.gradient_clipping, .*, optimizer"),
    ],
)
def test_a_broken_config_is_named_with_its_line(tmp_path, text, said):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(MetaPerSERError, match=said):
        check(path, "")


def test_a_config_that_is_no_text(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"runner: \xff\xfe")
    with pytest.raises(MetaPerSERError, match=r"config\.yaml: not valid YAML"):
        check(path, "")


def test_an_installed_config_goes_by_its_name(config, monkeypatch):
    monkeypatch.setattr(configs, "available", lambda: {"mine": config})
    arguments = check("mine", "")
    assert preflight_arguments.parse(arguments).namespace.config == str(config)


def test_a_good_command_line_passes_unchanged(config):
    given = f"-m train -d example -u fbank --device cpu -n run -c {config} -o config.runner.log_step=5".split()
    assert preflight.check(given) == given
    assert not Path("result").exists()


def test_every_upstream_of_s3prl_is_known_and_nothing_else():
    from s3prl import hub

    names = preflight_upstream.upstream_names(hub)
    assert {"fbank", "fbank_no_cmvn", "wavlm_local", "hf_hubert_custom", "wav2vec2"} <= names.keys()
    assert names.keys() <= set(hub.options())
    assert not names.keys() & {"options", "Path", "torch", "os", "load_and_convert_fairseq_ckpt"}


GPUS = [
    # GPUs, processes, --device, refused because
    (0, 2, "cpu", "torchrun has started 2 processes here, .* torch finds no CUDA device; .* --device cpu"),
    (0, 1, "cuda", "torchrun has started 1 process here, .* torch finds no CUDA device; .* --device cpu"),
    (2, 2, "cpu", "--device cpu: torchrun has started 2 processes here, .* leave --device out"),
    (2, 2, "cuda:0", "--device cuda:0: torchrun has started 2 processes here, .* give --device cuda$"),
    (2, 4, "cuda", "4 processes here, .* torch finds 2; start --nproc_per_node 2 at most"),
    (2, 1, "cuda:1", "--device cuda:1: torchrun has started 1 process here"),
    (1, None, "cuda:7", "--device cuda:7: torch finds no such CUDA device here, only cuda:0$"),
    (3, None, "cuda:3", "only cuda:0 to cuda:2$"),
    (2, 2, "cuda", None),
    (4, 2, "cuda", None),
    (1, 1, "cuda:0", None),
    (3, None, "cuda:2", None),
    (1, None, "cuda", None),
    (0, None, "cpu", None),
]


@pytest.mark.parametrize(("gpus", "processes", "device", "refused"), GPUS)
def test_a_gpu_for_each_process_and_none_that_is_not_there(config, monkeypatch, gpus, processes, device, refused):
    """Every process of a machine says the same: one that went on alone would wait for the others for ever."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    place = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in (place | {"LOCAL_WORLD_SIZE": str(processes)}).items() if processes else ():
        monkeypatch.setenv(name, value)
    said = set()
    for rank in range(processes or 1):
        flags = f"--device {device}" + (f" --local_rank {rank}" if processes else "")
        if refused is None:
            check(config, flags)
            continue
        with pytest.raises(MetaPerSERError, match=refused) as caught:
            check(config, flags)
        said.add(str(caught.value))
    assert len(said) == (refused is not None)


class TestCheckpoints:
    def test_resuming_takes_the_arguments_from_the_checkpoint(self, checkpoint):
        arguments = ["-m", "train", "-e", str(checkpoint.parent), "--device", "cpu"]
        assert preflight.check(arguments) == arguments

    def test_keys_that_no_one_reads_pass_where_an_earlier_version_took_them(self, small_corpus, tmp_path):
        earlier = whole_checkpoint(small_corpus, tmp_path)
        earlier["Config"] |= {"about": "mine", "runner": {**earlier["Config"]["runner"], "log_steps": 1}}
        torch.save(earlier, tmp_path / "earlier.ckpt")
        arguments = ["-m", "evaluate", "-e", str(tmp_path / "earlier.ckpt"), "--device", "cpu"]
        assert preflight.check(arguments) == arguments
        with pytest.raises(
            MetaPerSERError, match=r"-o: config key 'runner\.log_stp' is unknown; did you mean 'log_step'"
        ):
            preflight.check([*arguments, "-o", "config.runner.log_stp=1"])

    @pytest.mark.parametrize(
        ("before", "now", "refused"),
        [
            (None, None, None),
            (None, 2, r"states-2\.ckpt: was trained without torchrun, not by 2 processes of torchrun; "),
            (2, None, r"states-2\.ckpt: was trained by 2 processes of torchrun, not without torchrun; "),
            (2, 4, r"states-2\.ckpt: was trained by 2 processes of torchrun, not by 4 processes of torchrun; "),
            (2, 2, None),
        ],
    )
    def test_training_goes_on_with_as_many_processes_only(self, checkpoint, monkeypatch, before, now, refused):
        saved = torch.load(checkpoint)
        if before is not None:
            saved["Args"].local_rank, saved["WorldSize"] = 0, before
            torch.save(saved, checkpoint)
        flags = f"-e {checkpoint} --device cpu"
        if now is not None:
            flags += " --local_rank 0"
            monkeypatch.setenv("WORLD_SIZE", str(now))
            monkeypatch.setattr(preflight, "check_processes", lambda device, rank: None)
        with pytest.raises(MetaPerSERError, match=refused) if refused else contextlib.nullcontext():
            preflight.check(f"-m train {flags}".split())
        preflight.check(f"-m evaluate {flags}".split())

    def test_resuming_by_auto_resume(self, checkpoint):
        checkpoint.write_bytes(b"PK cut off")
        with pytest.raises(
            MetaPerSERError, match=r"states-2\.ckpt is damaged \(10 bytes, .*no sound checkpoint is left"
        ):
            preflight.check(f"-m train -a -p {checkpoint.parent} -u fbank -d example --device cpu".split())

    def test_the_latest_sound_state_is_the_one_that_is_read(self, checkpoint, capsys):
        folder = checkpoint.parent
        for step, content in ((4, checkpoint.read_bytes()), (10, b""), (12, checkpoint.read_bytes()[:-500])):
            (folder / f"states-{step}.ckpt").write_bytes(content)
        sound = str(folder / "states-4.ckpt")
        for mode, flags in (("evaluate", f"-e {folder}"), ("train", f"-a -p {folder} -u fbank -d example")):
            passed_on = preflight.check(f"-m {mode} {flags} --device cpu".split())
            read = preflight_arguments.parse(passed_on).namespace
            assert (read.past_exp, read.auto_resume) == (sound, False)
            said = capsys.readouterr().err
            assert f"states-12.ckpt is damaged ({(folder / 'states-2.ckpt').stat().st_size - 500} bytes" in said
            assert said.endswith(f"going on from the one before, {sound}\n")
        assert {path.name for path in folder.iterdir()} == {
            *("states-2.ckpt", "states-4.ckpt", "damaged-states-10.ckpt", "damaged-states-12.ckpt")
        }

    @pytest.mark.parametrize("share", [0.3, 0.9])
    def test_a_truncated_checkpoint(self, checkpoint, share):
        whole = checkpoint.read_bytes()
        checkpoint.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(MetaPerSERError, match="not readable as a checkpoint"):
            preflight.check(f"-m evaluate -e {checkpoint} --device cpu".split())

    @pytest.mark.parametrize("content", [{"weights": torch.zeros(2)}, [1, 2], {"Args": argparse.Namespace(a=1)}])
    def test_a_checkpoint_of_something_else(self, config, tmp_path, content):
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(MetaPerSERError, match=r"other\.ckpt: .*s3prl's runner"):
            check(config, "-i other.ckpt")

    def test_a_checkpoint_made_with_another_upstream(self, config, checkpoint):
        with pytest.raises(MetaPerSERError, match="made with -u fbank, but this run has -u mfcc"):
            check(config, f"-i {checkpoint} -u mfcc")
        assert check(config, f"-i {checkpoint} -u fbank")

    def test_a_resumed_upstream_checkpoint_that_has_moved(self, checkpoint):
        saved = torch.load(checkpoint)
        saved["Args"].upstream, saved["Args"].upstream_ckpt = "wavlm_local", "moved.pt"
        torch.save(saved, checkpoint)
        with pytest.raises(MetaPerSERError, match=r"-k moved\.pt: no such file.*-o args\.upstream_ckpt=PATH"):
            preflight.check(f"-m evaluate -e {checkpoint} --device cpu".split())

    def test_an_upstream_checkpoint_that_is_cut_off(self, config, checkpoint, tmp_path):
        (tmp_path / "half.pt").write_bytes(checkpoint.read_bytes()[:200])
        with pytest.raises(MetaPerSERError, match=r"-k half\.pt: cut off \(200 bytes\)"):
            check(config, "-u wavlm_local -k half.pt")


class TestStandIns:
    """With the modules of torchaudio 2.9 and huggingface_hub 1, as far as they matter here."""

    @pytest.fixture(autouse=True)
    def _newer_libraries(self, monkeypatch):
        self.torchaudio = types.ModuleType("torchaudio")
        self.torchaudio.__path__ = []
        self.huggingface_hub = types.ModuleType("huggingface_hub")
        monkeypatch.setitem(sys.modules, "torchaudio", self.torchaudio)
        monkeypatch.setitem(sys.modules, "huggingface_hub", self.huggingface_hub)
        monkeypatch.delitem(sys.modules, "torchaudio.sox_effects", raising=False)

    def test_what_s3prl_imports_is_there_and_fails_with_the_cure_when_used(self, monkeypatch):
        run_downstream.install_stand_ins()
        from huggingface_hub import HfFolder
        from torchaudio.sox_effects import apply_effects_file

        assert self.torchaudio.set_audio_backend("sox_io") is None
        with pytest.raises(ImportError, match=r"apply_effects_file is missing .*'torchaudio<2.9'"):
            apply_effects_file("a.wav", [])
        with pytest.raises(ImportError, match=r"HfFolder is missing .*'huggingface_hub<1'"):
            HfFolder.get_token()
        with pytest.raises(ImportError, match="HfFolder is missing"):
            HfFolder()
        assert not hasattr(HfFolder, "__wrapped__")

    def test_they_are_installed_once_however_often_a_process_asks(self):
        run_downstream.install_stand_ins()
        first = vars(self.torchaudio).copy(), vars(self.huggingface_hub).copy()
        run_downstream.install_stand_ins()
        assert (vars(self.torchaudio), vars(self.huggingface_hub)) == first

    def test_what_is_there_is_left_alone(self):
        mine = object()
        self.torchaudio.set_audio_backend = self.huggingface_hub.Repository = mine
        run_downstream.install_stand_ins()
        assert self.torchaudio.set_audio_backend is self.huggingface_hub.Repository is mine


def test_going_on_automatically_is_left_out_of_flags_in_one():
    actions = preflight_arguments.parse(["-m", "train"]).actions
    given = ["-m", "train", "-a", "-fa", "-n", "a", "--auto", "-u", "fbank", "-f"]
    assert preflight_arguments.without_auto_resume(given, actions) == [
        "-m",
        "train",
        "-f",
        "-n",
        "a",
        "-u",
        "fbank",
        "-f",
    ]


def test_the_launcher_itself_ends_in_one_line_and_code_2(config, tmp_path):
    ended = launch("-m", "train", "-d", "example", "-u", "fbnk", "-p", tmp_path / "run", "-c", config)
    assert ended.returncode == 2
    assert ended.stderr == "run_downstream: error: -u fbnk: s3prl has no such upstream: did you mean 'fbank'?\n"
    assert not (tmp_path / "run").exists()


def test_the_launcher_resumes_from_a_checkpoint_that_torchs_safe_loader_refuses(checkpoint):
    ended = launch("-m", "evaluate", "-e", checkpoint, "-t", "dev", "--device", "cpu")
    assert ended.returncode == 0, ended.stderr
    assert f"Resume from {checkpoint}" in ended.stdout
    assert "deprecated" not in ended.stderr


def test_a_layer_that_the_upstream_has_not(config, tmp_path, small_wavlm):
    upstream = ["-u", "wavlm_local", "-k", small_wavlm, "-l", "7", "--device", "cpu"]
    ended = launch("-m", "train", "-d", "example", *upstream, "-p", tmp_path / "run", "-c", config)
    assert ended.returncode == 2
    said = "run_downstream: error: -l 7: this upstream has 3 layers in hidden_states; expected 0 to 2"
    assert ended.stderr.splitlines()[-1] == said
    assert "Traceback" not in ended.stderr


def test_weights_that_do_not_fit_the_upstream(checkpoint):
    torch.save(torch.load(checkpoint, weights_only=True) | {"Featurizer": {"weights": torch.zeros(7)}}, checkpoint)
    ended = launch("-m", "evaluate", "-e", checkpoint, "-t", "dev", "--device", "cpu")
    assert ended.returncode == 2
    said = f"run_downstream: error: {checkpoint}: its Featurizer does not fit -u fbank: Error(s) in loading state_dict"
    assert ended.stderr.splitlines()[-1].startswith(said)
    assert "Traceback" not in ended.stderr


@pytest.fixture
def no_network():
    """As the environment: every connection is refused, by a proxy that does not listen."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{held.getsockname()[1]}"
        yield dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy) | {"no_proxy": ""}


def test_an_upstream_that_cannot_be_downloaded(config, tmp_path, no_network):
    run = ["-m", "train", "-d", "example", "-u", "wavlm_base", "--device", "cpu", "-p", tmp_path / "run", "-c", config]
    ended = launch(*run, HOME=str(tmp_path), **no_network)
    assert ended.returncode == 2
    address = "https://huggingface.co/s3prl/converted_ckpts/resolve/main/wavlm_base.pt"
    said = ended.stderr.splitlines()[-1]
    assert said.startswith(f"run_downstream: error: -u wavlm_base: cannot be downloaded from {address} (")
    assert "Connection refused" in said
    assert said.endswith("or give a file of your own: -u wavlm_local -k FILE")
    assert "Traceback" not in ended.stderr


def test_a_model_of_hugging_face_that_cannot_be_downloaded(config, tmp_path):
    upstream = ["-u", "hf_hubert_custom", "-k", "someone/hubert", "--device", "cpu"]
    run = ["-m", "train", "-d", "example", *upstream, "-p", tmp_path / "run", "-c", config]
    ended = launch(*run, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert ended.returncode == 2
    said = r"run_downstream: error: -u hf_hubert_custom -k someone/hubert: cannot be downloaded from (https://)?"
    # Old versions of huggingface_hub say which file it was.
    assert re.match(said + r"huggingface\.co(/someone/hubert/\S+)? \(", ended.stderr)
    assert ended.stderr.endswith("or give a folder of your own: -k FOLDER\n")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def raised_while_the_upstream_is_made(error, monkeypatch):
    """What s3prl's runner lets through of an upstream that fails so."""
    from s3prl.downstream.runner import Runner

    def upstream(**_):
        raise error

    monkeypatch.setattr("s3prl.hub.wavlm", upstream)
    runner = object.__new__(Runner)
    runner.args = preflight_arguments.parse(["-m", "train", "-u", "wavlm", "--device", "cpu"]).namespace
    with pytest.raises(type(error)) as caught:
        runner._get_upstream()
    return caught.value


@pytest.mark.parametrize(
    ("error", "first", "reason"),
    [
        (TimeoutError("timed out"), None, "timed out"),
        (OSError(101, "Network is unreachable"), None, "[Errno 101] Network is unreachable"),
        (
            KeyError("Content-Length"),
            urllib.error.HTTPError("", 404, "Not Found", {}, None),
            "HTTP Error 404: Not Found",
        ),
        (requests.ConnectionError("reset"), urllib.error.URLError("no host"), "<urlopen error no host>"),
        (FileNotFoundError(2, "No such file", "model.pt"), None, None),
        (RuntimeError("bad weights"), None, None),
        (OSError(28, "No space left on device", "model.pt"), urllib.error.URLError("no host"), None),
    ],
)
def test_only_what_the_network_has_refused_is_told_as_that(monkeypatch, error, first, reason):
    """Whatever s3prl raises while it handles a first failure, by another way to download that fails too."""
    error.__context__ = first
    found = s3prl_errors.explained(raised_while_the_upstream_is_made(error, monkeypatch))
    if reason is None:
        assert found is None
    else:
        assert f"-u wavlm: cannot be downloaded from huggingface.co ({reason}); " in str(found)
    assert s3prl_errors.explained(ConnectionError("elsewhere")) is None
