"""Flags beside -e that s3prl would replace by the checkpoint's, without a word; and where an experiment may go."""

import contextlib
import re
import sys
from pathlib import Path

import pytest
import runner_stand_in
import torch
import yaml
from crafted import whole_checkpoint

from s3prl_metaperser import metaperser_api, preflight, run_downstream
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.run import Run
from s3prl_metaperser.state_files import states

NEW = "-d metaperser -u fbank_no_cmvn --device cpu -c ssl_e"


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_corpus):
    """A folder with the state of a training, of -u fbank_no_cmvn, that went into its folder ``run``."""
    place = tmp_path_factory.mktemp("resumed")
    (place / "run").mkdir()
    torch.save(whole_checkpoint(small_corpus, place), place / "run/states-1.ckpt")
    return place


def check(place, flags):
    return preflight.check(f"-m evaluate -e {place / 'run'} --device cpu {flags}".split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("-p elsewhere", r"-p elsewhere beside a checkpoint to go on from: .*states-1\.ckpt was made with .*run'"),
        ("--seed 7", r'--seed 7 .* was made with 1337, .* leave --seed out, or give -o "args.seed=7"'),
        ("-u wavlm_base", "-u wavlm_base .* was made with 'fbank_no_cmvn'"),
        ("-l 3", "-l 3 .* was made with None"),
        ("-v fold2", "-v fold2 .* was made with None"),
        ("-f", "-f True .* was made with False"),
    ],
)
def test_a_flag_that_would_not_be_heard_is_refused(place, flags, said):
    with pytest.raises(MetaPerSERError, match=said):
        check(place, flags)


def test_a_flag_is_one_also_where_it_says_what_is_the_default(place, tmp_path):
    checkpoint = torch.load(place / "run/states-1.ckpt")
    checkpoint["Args"].seed = 7
    torch.save(checkpoint, tmp_path / "of-seed-7.ckpt")
    command = ["-m", "evaluate", "-e", str(tmp_path / "of-seed-7.ckpt"), "--device", "cpu"]
    assert preflight.check(command) == command
    with pytest.raises(MetaPerSERError, match=r"--seed 1337 .* was made with 7, "):
        preflight.check([*command, "--seed", "1337"])


@pytest.fixture
def edited(place, tmp_path, monkeypatch):
    """Writes ``mine.yaml``: the checkpoint's config, with a key of ``downstream_expert`` changed."""
    monkeypatch.chdir(tmp_path)

    def write(**changed):
        config = torch.load(place / "run/states-1.ckpt")["Config"]
        config["downstream_expert"] |= changed
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    return write


@pytest.mark.parametrize("again", ["-m evaluate -e {run}", "-m train -e {run}", "-m train -a -p {run} -d metaperser"])
def test_a_config_that_would_not_be_heard_is_refused_by_its_key(place, edited, again):
    command = [*again.format(run=place / "run").split(), "--device", "cpu", "-c", "mine.yaml"]
    edited()
    assert preflight.check(command) == command
    edited(select_by="UA")
    said = r"-c mine\.yaml beside .* its key 'downstream_expert\.select_by' is 'UA', but .*states-1\.ckpt was made "
    said += r"where it is 'miF1', .* leave -c out, or give -o \"config\.downstream_expert\.select_by='UA'\"; "
    with pytest.raises(MetaPerSERError, match=said):
        preflight.check(command)
    command += ["-o", "config.downstream_expert.select_by='UA'"]
    assert preflight.check(command) == command
    with pytest.raises(MetaPerSERError, match=r"-c gone\.yaml: no such file"):
        preflight.check(["gone.yaml" if word == "mine.yaml" else word for word in command])


def test_a_folder_that_only_a_has_found_cannot_be_left_out(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "moved").mkdir(exist_ok=True)
    (place / "moved/states-1.ckpt").write_bytes((place / "run/states-1.ckpt").read_bytes())
    command = ["-m", "train", "-a", "-p", "moved", "-d", "metaperser", "--device", "cpu"]
    said = r"-p moved beside .* and s3prl keeps to that; give -o \"args\.expdir='moved'\"$"
    with pytest.raises(MetaPerSERError, match=said):
        preflight.check(command)
    with pytest.raises(MetaPerSERError, match=r"; leave -u out, or give -o"):
        preflight.check([*command, "-u", "fbank", "-o", "args.expdir='moved'"])
    preflight.check([*command, "-o", "args.expdir='moved'"])


@pytest.mark.parametrize("folder", ["run", "run/", "./run", "run/../run", "linked", "{place}/run"])
@pytest.mark.parametrize("again", ["-m train -a", "-m evaluate -e {place}/run"])
def test_a_folder_may_be_spelled_otherwise(place, monkeypatch, folder, again):
    monkeypatch.chdir(place)
    if not Path("linked").is_symlink():
        Path("linked").symlink_to("run")
    command = [*again.format(place=place).split(), *f"-p {folder.format(place=place)} -d metaperser".split()]
    assert preflight.check([*command, "--device", "cpu"]) == [*command, "--device", "cpu"]


@pytest.mark.parametrize("again", ["-m train -a", "-m evaluate -e result/downstream/mine"])
def test_a_folder_given_by_p_may_be_named_by_n(place, tmp_path, monkeypatch, again):
    monkeypatch.chdir(tmp_path)
    folder = Path("result/downstream/mine")
    folder.mkdir(parents=True)
    checkpoint = torch.load(place / "run/states-1.ckpt")
    checkpoint["Args"].expdir = str(folder)
    torch.save(checkpoint, folder / "states-1.ckpt")
    command = [*again.split(), "-n", "mine", "-d", "metaperser", "--device", "cpu"]
    assert preflight.check(command) == command
    checkpoint["Args"].expdir = str(place / "run")
    torch.save(checkpoint, folder / "states-1.ckpt")
    with pytest.raises(MetaPerSERError, match="-n mine beside a checkpoint to go on from"):
        preflight.check(command)


def test_so_may_a_file(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(place / "run/states-1.ckpt")
    checkpoint["Args"].upstream_model_config = str(tmp_path / "model.yaml")
    torch.save(checkpoint, "with-g.ckpt")
    command = ["-m", "evaluate", "-e", "with-g.ckpt", "--device", "cpu", "-g", "model.yaml"]
    with pytest.raises(MetaPerSERError, match=r"-g model\.yaml beside a checkpoint to go on from"):
        preflight.check(command)
    Path("model.yaml").touch()
    assert preflight.check(command) == command


@pytest.mark.parametrize("flags", ["", "-u fbank_no_cmvn -d metaperser", "--seed 7 -o args.seed=7"])
def test_what_the_checkpoint_says_too_may_be_said_again(place, flags):
    assert check(place, flags)[:4] == ["-m", "evaluate", "-e", str(place / "run")]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-p", ""], "-p is empty"),
        (["-n", ""], "-n is empty"),
        (["-p", "dangling"], "-p dangling: a link to nowhere, which is not there"),
    ],
)
def test_a_folder_without_a_name_or_behind_a_broken_link(tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    command = ["-m", "train", "-d", "metaperser", "-u", "fbank_no_cmvn", "--device", "cpu", "-c", "ssl_e"]
    with pytest.raises(MetaPerSERError, match=said):
        preflight.check([*command, *flags], sets_run_up=False)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("-o config.optimizer.lr=1e-9", r"'optimizer\.lr' is 1e-09, .*states-1\.ckpt was trained where it is 0\.001, "),
        ("-o config.optimizer={'name':'AdamW'}", r"'optimizer\.name' is 'AdamW', .* where it is 'TorchOptim', "),
        ("-o config.scheduler.name=constant", r"'scheduler' is \{'name': 'constant'\}, .* where it is not set, "),
        ("-c mine.yaml", r"'optimizer\.lr' is 2\.0, "),
    ],
)
def test_training_does_not_go_on_as_if_by_another_optimizer(place, edited, flags, said):
    """s3prl loads its state, and with that its settings as they were."""
    edited()
    mine = yaml.safe_load(Path("mine.yaml").read_text())
    Path("mine.yaml").write_text(yaml.safe_dump(mine | {"optimizer": mine["optimizer"] | {"lr": 2.0}}))
    command = ["-e", str(place / "run"), "--device", "cpu", *flags.split()]
    with pytest.raises(MetaPerSERError, match=rf"config key {said}.* or train anew in another folder, .*init_from"):
        preflight.check(["-m", "train", *command])
    if flags[1] == "o":
        preflight.check(["-m", "evaluate", *command])


@pytest.mark.parametrize("again", ["-m evaluate -e old.ckpt", "-m train -e old.ckpt", "-m train -a -p old"])
def test_an_older_checkpoint_may_say_twice_who_is_tested(place, tmp_path, monkeypatch, again):
    """Its annotator was tested and is: only a command that says both itself, or another fold, is refused."""
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    checkpoint = torch.load(place / "run/states-1.ckpt")
    checkpoint["Args"].downstream_variant, checkpoint["Args"].expdir = "fold1", "old"
    checkpoint["Config"]["downstream_expert"]["data"]["test_annotator"] = "E1"
    torch.save(checkpoint, "old/states-1.ckpt")
    Path("old.ckpt").symlink_to("old/states-1.ckpt")
    command = [*again.split(), "-d", "metaperser", "--device", "cpu"]
    assert preflight.check(command) == command
    both = r"-v fold2 and config key 'downstream_expert\.data\.test_annotator' \('E1'\) both say who is tested"
    with pytest.raises(MetaPerSERError, match=both):
        preflight.check([*command, "-o", "args.downstream_variant=fold2"])
    Path("mine.yaml").write_text(yaml.safe_dump(checkpoint["Config"]))
    new = "-m train -p new -d metaperser -u fbank_no_cmvn --device cpu -c mine.yaml -v fold2"
    with pytest.raises(MetaPerSERError, match=both):
        preflight.check(new.split())


def test_an_older_checkpoint_listens_whatever_it_was_trained_by(place, tmp_path):
    checkpoint = torch.load(place / "run/states-1.ckpt")
    checkpoint["Args"].downstream_variant = "fold1"
    checkpoint["Config"]["downstream_expert"]["data"]["test_annotator"] = "E1"
    checkpoint["Config"]["runner"]["train_dataloader"] = "dev"
    torch.save(checkpoint, tmp_path / "old.ckpt")
    metaperser_api.load(tmp_path / "old.ckpt", "cpu")
    command = ["-e", str(tmp_path / "old.ckpt"), "--device", "cpu"]
    for asked in (["evaluate"], ["inference", "-t", str(tmp_path / "old.ckpt")]):
        assert preflight.check(["-m", *asked, *command]) == ["-m", *asked, *command]
    with pytest.raises(MetaPerSERError, match=r"runner\.train_dataloader' is 'dev'; expected train"):
        preflight.check(["-m", "train", *command, "-o", f"args.expdir='{tmp_path / 'new'}'"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("-m train -p {own} " + NEW, "-p {own}"),
        ("-m train -a -p {own} " + NEW, "-p {own}"),
        ("-m evaluate -e {own} --device cpu", "-e {own}"),
    ],
)
def test_a_state_without_a_step_is_named_by_the_flag_that_was_given(tmp_path, flags, named):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/states-last.ckpt").touch()
    said = re.escape(f"{named.format(own=tmp_path / 'own')}: holds states-last.ckpt, which has no step number; ")
    with pytest.raises(MetaPerSERError, match=f"^{said}"):
        preflight.check(flags.format(own=tmp_path / "own").split(), sets_run_up=False)
    with pytest.raises(MetaPerSERError, match=f"^{re.escape(str(tmp_path / 'own'))}: holds states-last"):
        states(tmp_path / "own")


@pytest.mark.parametrize(
    ("flags", "goes_on"),
    [
        ("-m train -p {run} " + NEW, True),
        ("-m train -e {run} --device cpu", True),
        ("-m train -e {run}/states-1.ckpt --device cpu", False),
        ("-m train -e {run} --device cpu -o args.expdir='elsewhere'", False),
        ("-m train -p {run}/none_yet " + NEW, False),
        ("-m evaluate -e {run} --device cpu", False),
    ],
)
def test_ctrl_c_says_how_to_go_on_with_a_training_that_has_left_a_state(place, monkeypatch, capfd, flags, goes_on):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["run_downstream", *flags.format(run=place / "run").split()])
    monkeypatch.setattr(preflight, "check", lambda given, _: given)
    monkeypatch.setattr("s3prl.run_downstream.main", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run_downstream.main()
    way_on = "; the same command and -a go on from the last checkpoint" if goes_on else ""
    assert capfd.readouterr().err == f"\nrun_downstream: interrupted{way_on}\n"


@pytest.mark.parametrize("odd", ["states-best.ckpt", None])
def test_ctrl_c_is_no_bad_input_whatever_is_in_the_folder_by_then(tmp_path, monkeypatch, capfd, odd):
    (tmp_path / "run").mkdir()
    if odd is None:
        monkeypatch.setattr("os.access", lambda path, mode: False)
    else:
        (tmp_path / "run" / odd).touch()

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["run_downstream", *f"-m train -p {tmp_path / 'run'} {NEW}".split()])
    monkeypatch.setattr(preflight, "check", lambda given, _: given)
    monkeypatch.setattr("s3prl.run_downstream.main", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run_downstream.main()
    assert capfd.readouterr().err == "\nrun_downstream: interrupted\n"


@pytest.fixture
def other(place, tmp_path):
    """A folder with another training in it."""
    (tmp_path / "other").mkdir()
    for name in ("states-9.ckpt", "dev-best.ckpt"):
        (tmp_path / "other" / name).write_bytes((place / "run/states-1.ckpt").read_bytes())
    return tmp_path / "other"


@pytest.mark.parametrize(
    ("flags", "by"),
    [("-e {run}", "-e {other}"), ("-a -p {run} -d metaperser", "-e {other}"), (f"-a -n new {NEW}", "-a")],
)
def test_a_training_that_goes_on_replaces_no_other(place, other, flags, by):
    command = ["-m", "train", *flags.format(run=place / "run").split(), "--device", "cpu"]
    command += ["-o", f"args.expdir='{other}'"]
    said = re.escape(
        f"-p {other}: holds an earlier training (states-9.ckpt); go on with it by {by.format(other=other)}, "
    )
    with pytest.raises(MetaPerSERError, match=said):
        preflight.check(command, sets_run_up=False)


@pytest.mark.parametrize("again", ["-e run", "-e run/states-1.ckpt", "-a -p run", "-e linked.ckpt"])
def test_a_state_may_be_a_link(place, tmp_path, monkeypatch, again):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    checkpoint = torch.load(place / "run/states-1.ckpt")
    checkpoint["Args"].expdir = "run"
    torch.save(checkpoint, "elsewhere.ckpt" if "linked" not in again else "run/states-1.ckpt")
    if "linked" in again:
        Path("linked.ckpt").symlink_to("run/states-1.ckpt")
    else:
        Path("run/states-1.ckpt").symlink_to("../elsewhere.ckpt")
    command = ["-m", "train", *again.split(), "-d", "metaperser", "--device", "cpu"]
    assert preflight.check(command) == command


def test_a_training_that_was_stopped_before_its_first_state_begins_anew_by_a(other, edited):
    (other / "states-9.ckpt").unlink()
    edited()
    command = f"-m train -p {other} {NEW} -c mine.yaml".replace(" -c ssl_e", "").split()
    with pytest.raises(MetaPerSERError, match=r"holds an earlier training \(dev-best\.ckpt\); go on with it by -a"):
        preflight.check(command, sets_run_up=False)
    preflight.check([*command, "-a"], sets_run_up=False)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--seed 7", "seed is 1337 there and is 7 here"),
        ("-i {run}/states-1.ckpt", "init_ckpt is None there and is '.*states-1.ckpt' here"),
        ("-o config.downstream_expert.fold=2", r"downstream_expert\.fold is 1 there and is 2 here"),
        ("-o config.optimizer.lr=1e-9", r"optimizer\.lr is 0\.001 there and is 1e-09 here"),
    ],
)
def test_another_command_replaces_by_a_nothing_that_has_no_state_left(place, other, edited, flags, said):
    (other / "states-9.ckpt").unlink()
    edited()
    command = f"-m train -a -p {other} {NEW} -c mine.yaml".replace(" -c ssl_e", "").split()
    command += flags.replace("{run}", str(place / "run")).split()
    said = rf"holds an earlier training \(dev-best\.ckpt\) of another command: {said}; .* give another folder"
    with pytest.raises(MetaPerSERError, match=said):
        preflight.check(command, sets_run_up=False)
    whole = (other / "dev-best.ckpt").read_bytes()
    (other / "dev-best.ckpt").write_bytes(whole[:-500])  # s3prl's own runner writes in place
    preflight.check(command, sets_run_up=False)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"past_exp": "{run}"}, True),
        ({"past_exp": "{run}", "auto_resume": True}, True),
        ({"past_exp": "{run}", "expdir": "{run}"}, False),
        ({}, True),
    ],
)
def test_the_stock_runner_replaces_no_other_either(place, other, small_corpus, given, refused):
    """By ``-e``, or by ``-i`` where nothing has been resumed."""
    state = {"expdir": str(other), "init_ckpt": str(place / "run/states-1.ckpt")}
    state |= {name: one.format(run=place / "run") if isinstance(one, str) else one for name, one in given.items()}
    arguments = runner_stand_in.arguments(small_corpus, place) | state
    run = Run(arguments["downstream_expert"], 1, Path(arguments["expdir"]), arguments)
    with pytest.raises(MetaPerSERError, match="holds an earlier training") if refused else contextlib.nullcontext():
        run.hold_folder()


@pytest.mark.parametrize(("given", "refused"), [({}, False), ({"seed": 7}, True)])
def test_nor_by_a(place, other, small_corpus, given, refused):
    (other / "states-9.ckpt").unlink()
    arguments = runner_stand_in.arguments(small_corpus, place) | vars(torch.load(other / "dev-best.ckpt")["Args"])
    arguments |= {"auto_resume": True, "expdir": str(other)} | given
    section, _, _ = (arguments.pop(name) for name in ("downstream_expert", "upstream_dim", "upstream_rate"))
    run = Run(section, 1, other, arguments)
    with pytest.raises(MetaPerSERError, match="seed is 1337 there") if refused else contextlib.nullcontext():
        run.hold_folder()
