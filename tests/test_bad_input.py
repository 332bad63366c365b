"""Bad input to the expert: one line on stderr that names value and cure, exit code 2, no traceback, nothing written."""

import argparse
import errno
import importlib
import pkgutil
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from runner_stand_in import arguments, one_training_step, saved
from s3prl.upstream.baseline.hubconf import fbank, fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer

import s3prl_metaperser
from s3prl_metaperser.atomic import UnwritableError
from s3prl_metaperser.calibration.uploads import TooLargeError
from s3prl_metaperser.corpus.manifest import build_corpus, load_corpus, write_corpus
from s3prl_metaperser.errors import MetaPerSERError, RefusedFileError, UnreadableError
from s3prl_metaperser.expert import DownstreamExpert
from s3prl_metaperser.settings import read_settings
from s3prl_metaperser.upstream.cache import DamagedShardError


def refused(capfd, function, *expected):
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        function()
    assert exit_.value.code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1, errors
    assert errors[0].startswith("metaperser: error: ")
    for part in expected:
        assert part in errors[0]


CONFIGS = {
    "misspelt key": ({"scpoe": "head"}, ["downstream_expert.scpoe", "did you mean 'scope'"]),
    "misspelt key inside": ({"meta": {"inner_step": 3}}, ["downstream_expert.meta.inner_step", "'inner_steps'"]),
    "unknown value": ({"scenario": "heard"}, ["downstream_expert.scenario", "'heard'", "'seen' or 'unseen'"]),
    "unknown query": ({"meta": {"query": "split"}}, ["meta.query", "'split'", "'disjoint'"]),
    "not a number": ({"episodes": {"shots": "many"}}, ["episodes.shots", "'many'", "integer"]),
    "no shots": ({"episodes": {"shots": 0}}, ["episodes.shots", "0", "greater than or equal to 1"]),
    "negative rate": ({"meta": {"inner_lr": -1}}, ["meta.inner_lr", "-1"]),
    "annealing of nothing": ({"meta": {"annealing": {"fraction": 2}}}, ["meta.annealing.fraction", "2"]),
    "fold that is not there": ({"fold": 7}, ["fold 7 does not exist", "fold1 to fold3"]),
    "K and Q too large": ({"episodes": {"queries": 100}}, ["'E2'", "60 labelled utterances", "104"]),
    "nothing to train": ({"system": "random"}, ["random", "-m evaluate"]),
    "bad candidate rate": ({"adaptation": {"lr": [0.1, "x"]}}, ["downstream_expert.adaptation.lr'", "'x'"]),
    "unknown recipe": ({"recipe": "bets"}, ["downstream_expert.recipe", "'bets'", "'paper' or 'best'"]),
    "recipe of many": ({"recipe": ["best"]}, ["downstream_expert.recipe", "['best']", "'paper' or 'best'"]),
    "no naming to adapt": ({"meta": {"adapts": "naming"}}, ["meta.adapts", "'naming'", "naming: true", "recipe: best"]),
    "nothing expressed": ({"ssl": {"targets": "expressed"}}, ["ssl.targets", "'expressed'", "naming: true"]),
    "everything dropped": ({"model": {"dropout": 1.0}}, ["model.dropout", "1.0", "less than 1"]),
    "no such annotator": ({"data": {"test_annotator": "E33"}}, ["test_annotator 'E33'", "'E3'"]),
    "no such checkpoint": ({"init_from": "nowhere.ckpt"}, ["nowhere.ckpt", "does not exist"]),
    "entire without -f": ({"scope": "entire"}, ["scope 'entire'", "add -f"]),
    "tasks side by side": (
        {"scope": "entire", "meta": {"tasks_per_batch": 2}},
        ["meta.tasks_per_batch", "2", "gradient_accumulate_steps"],
    ),
    "rough features": ({"precision": "bfloat16"}, ["downstream_expert.precision", "scope: entire"]),
    "unknown precision": ({"precision": "half"}, ["downstream_expert.precision", "'half'", "'bfloat16'"]),
    "steps drawn twice": (
        {"meta": {"backend": "checkpointed"}, "model": {"dropout": 0.5}},
        ["meta.backend", "model.dropout: 0", "higher"],
    ),
    "yes for a count": ({"episodes": {"shots": True}}, ["episodes.shots", "True", "valid integer"]),
    "text for a count": ({"episodes": {"number": "3"}}, ["episodes.number", "'3'", "valid integer"]),
    "more episodes than any": ({"episodes": {"number": 1_000_000}}, ["episodes.number", "10000"]),
    "yes for a rate": ({"meta": {"inner_lr": True}}, ["meta.inner_lr", "True", "a number, not true or false"]),
    "text for a switch": ({"meta": {"lslr": "no"}}, ["meta.lslr", "'no'", "valid boolean"]),
    "no such corpus": ({"corpus": "nowhere"}, ["nowhere"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_cannot_be_used(capfd, tmp_path, small_corpus, case):
    change, expected = CONFIGS[case]
    given = arguments(small_corpus, tmp_path, **change)
    refused(capfd, lambda: DownstreamExpert(**given), *expected)
    assert list(tmp_path.iterdir()) == []


def test_command_line_that_cannot_be_used(capfd, tmp_path, small_corpus):
    for change, expected in [
        ({"upstream_trainable": True}, ["-f", "frozen", "scope: entire"]),
        ({"downstream_variant": "split2"}, ["split2", "fold1"]),
        ({"downstream_variant": "fold9"}, ["fold 9 does not exist"]),
        ({"downstream_expert": None}, ["downstream_expert", "mapping"]),
    ]:
        given = arguments(small_corpus, tmp_path) | change
        refused(capfd, lambda given=given: DownstreamExpert(**given), *expected)
    given = arguments(small_corpus, tmp_path, data={"test_annotator": "E1"}) | {"downstream_variant": "fold2"}
    refused(capfd, lambda: DownstreamExpert(**given), "-v fold2", "data.test_annotator' ('E1')", "leave one")
    for key, value, *expected in [
        ("fp16", True, "is True"),
        ("fp16", "false", "is 'false'; ", "(after -o, to False)"),
        ("train_dataloader", "dev", "is 'dev'; expected train"),
        ("total_steps", "1e4"),
        ("log_step", 0),
        ("eval_dataloaders", ["test", "dev"]),
    ]:
        given = arguments(small_corpus, tmp_path)
        given["runner"][key] = value
        refused(capfd, lambda given=given: DownstreamExpert(**given), f"runner.{key}", *expected)
    given = arguments(small_corpus, tmp_path) | {"specaug": {"max_n_masks": 2}}
    refused(capfd, lambda: DownstreamExpert(**given), "specaug")
    given = arguments(small_corpus, tmp_path)
    given["optimizer"]["lr"] = "1e-3"
    refused(capfd, lambda: DownstreamExpert(**given), "optimizer.lr", "1.0e-3")
    without_section = {k: v for k, v in arguments(small_corpus, tmp_path).items() if k != "downstream_expert"}
    refused(capfd, lambda: DownstreamExpert(**without_section), "downstream_expert", "mapping")
    expert = DownstreamExpert(**arguments(small_corpus, tmp_path))
    refused(capfd, lambda: expert.get_dataloader("tset"), "tset", "dev or test")


def state_of(expert, **contract):
    state = expert.state_dict()
    extra = state["_extra_state"] = {**state["_extra_state"]}
    extra["contract"] = extra["contract"] | contract
    return state


CHECKPOINTS = {
    "another upstream": ({"upstream": "wavlm_base"}, ["upstream 'wavlm_base'", "'fbank_no_cmvn'"]),
    "another emotion set": ({"emotions": ["sad", "happy"]}, ["emotions sad, happy", "frustrated, angry"]),
    "another pooling": ({"pooling": "mean_std"}, ["pooling 'mean_std'", "'mean'"]),
    "another width": ({"projector_dim": 7}, ["projector_dim 7", "256"]),
    "another layer": ({"layer_selection": 3}, ["layer_selection 3", "None"]),
    "another activation": ({"activation": "relu"}, ["activation 'relu'", "'none'"]),
    "with a naming": ({"naming": True}, ["naming True", "False"]),
    "unbalanced": ({"class_balanced": False}, ["class_balanced False", "True"]),
    "unstandardised": ({"standardize": False}, ["standardize False", "True"]),
    "an older format": ({"normalize": None}, ["normalize None", "False"]),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint_of_something_else(capfd, tmp_path, small_corpus, case):
    contract, expected = CHECKPOINTS[case]
    expert = DownstreamExpert(**arguments(small_corpus, tmp_path, system="entire_zero"))
    path = tmp_path / "other.ckpt"
    torch.save({"Downstream": state_of(expert, **contract), "Args": argparse.Namespace()}, path)
    given = arguments(small_corpus, tmp_path, init_from=str(path))
    refused(capfd, lambda: DownstreamExpert(**given), "other.ckpt", *expected)
    refused(capfd, lambda: expert.load_state_dict(state_of(expert, **contract)), *expected)


def test_a_fine_tuned_upstream_does_not_start_a_run_that_would_not_save_it(capfd, tmp_path, small_corpus):
    expert = DownstreamExpert(**arguments(small_corpus, tmp_path, system="entire_zero"))
    state = expert.state_dict()
    state["_extra_state"] = {**state["_extra_state"], "upstream_weights": "in the checkpoint"}
    path = tmp_path / "entire.ckpt"
    torch.save({"Downstream": state, "Args": argparse.Namespace()}, path)
    given = arguments(small_corpus, tmp_path, init_from=str(path))
    refused(capfd, lambda: DownstreamExpert(**given), "entire.ckpt", "fine-tuned upstream", "scope: entire", "-f")


def test_checkpoint_that_is_none(capfd, tmp_path, small_corpus):
    path = tmp_path / "broken.ckpt"
    given = arguments(small_corpus, tmp_path, init_from=str(path))
    path.write_bytes(b"PK\x03\x04 cut off")
    refused(capfd, lambda: DownstreamExpert(**given), "broken.ckpt", "not a readable torch file")
    torch.save({"Downstream": {"linear.weight": torch.zeros(1)}}, path)
    refused(capfd, lambda: DownstreamExpert(**given), "broken.ckpt", "not made by -d metaperser")


def test_ssl_e_checkpoint_is_no_meta_perser(capfd, tmp_path, small_corpus):
    """The rates would be missing; its weights are for init_from."""
    ssl = DownstreamExpert(**arguments(small_corpus, tmp_path, system="entire_zero")).state_dict()
    meta = DownstreamExpert(**arguments(small_corpus, tmp_path))
    refused(capfd, lambda: meta.load_state_dict(ssl), "trained on aggregated", "init_from")
    given = arguments(small_corpus, tmp_path, system="entire_few") | {"mode": "evaluate", "init_ckpt": "x.ckpt"}
    few = DownstreamExpert(**given)
    refused(capfd, lambda: few.load_state_dict(meta.state_dict()), "x.ckpt was trained on episodes")
    for change in ({"inner_steps": 3}, {"lslr": False}):
        other = DownstreamExpert(**arguments(small_corpus, tmp_path, meta=change))
        refused(capfd, lambda other=other: other.load_state_dict(meta.state_dict()), next(iter(change)))
    given = arguments(small_corpus, tmp_path) | {"mode": "evaluate"}
    refused(capfd, lambda: DownstreamExpert(**given), "needs a trained checkpoint; give -e")


def test_checkpoint_that_has_heard_the_test(capfd, tmp_path, small_corpus):
    """One SSL-E serves one fold: in another, its training annotators are tested; in unseen, its recordings are."""
    ssl = DownstreamExpert(**arguments(small_corpus, tmp_path, system="entire_zero"))
    path = saved(ssl, tmp_path / "seen1.ckpt")
    for change, expected in [
        ({"fold": 3}, ["seen1.ckpt was trained or chosen on labels of E3"]),
        ({"fold": 2}, ["labels of E2, whom this run tests on"]),
        ({"scenario": "unseen", "episodes": {"queries": 4}}, ["recordings of session 5", "scenario unseen"]),
    ]:
        given = arguments(small_corpus, tmp_path, init_from=path, **change)
        refused(capfd, lambda given=given: DownstreamExpert(**given), *expected)
    other_fold = DownstreamExpert(**arguments(small_corpus, tmp_path, system="entire_zero", fold=2))
    refused(capfd, lambda: other_fold.load_state_dict(ssl.state_dict()), "labels of E2")
    DownstreamExpert(**arguments(small_corpus, tmp_path, init_from=path))


def prepared_anew(folder, out, name, change):
    """The corpus again under a name, its annotations changed."""
    corpus = load_corpus(folder)
    write_corpus(build_corpus(name, corpus.root, change(corpus.annotations), corpus.emotions), out)
    return out


def without_a_clip(annotations):
    return annotations[annotations["utterance"] != annotations["utterance"].iloc[0]]


def of_other_recordings(annotations, called="Other"):
    return annotations.assign(utterance=annotations["utterance"].astype(str).str.replace("Ses", called))


def of_third_recordings(annotations):
    return of_other_recordings(annotations, "Third")


@pytest.mark.parametrize(
    ("name", "change", "cure"),
    [
        ("small", without_a_clip, "where this is another E2, give annotators other names"),
        ("small", of_other_recordings, "where this is another corpus, prepare it under another --name"),
        ("another", without_a_clip, "where this is another E2, give annotators other names"),
        ("another", of_other_recordings, None),
    ],
)
@pytest.mark.parametrize("links", [1, 2], ids=["of SSL-E", "of what SSL-E began"])
def test_what_a_checkpoint_has_heard_it_knows_in_a_corpus_prepared_anew(
    capfd, tmp_path, small_corpus, name, change, cure, links
):
    """By the corpus's name or recordings; also where another training has gone on from it, on another corpus."""
    ssl = DownstreamExpert(**arguments(small_corpus, tmp_path, system="entire_zero"))
    path = saved(ssl, tmp_path / "ssl.ckpt")
    if links == 2:
        elsewhere = prepared_anew(small_corpus, tmp_path / "elsewhere", "elsewhere", of_third_recordings)
        meta = DownstreamExpert(**arguments(elsewhere, tmp_path, system="entire_zero", init_from=path, fold=3))
        path = saved(meta, tmp_path / "meta.ckpt")
    given = arguments(prepared_anew(small_corpus, tmp_path / "anew", name, change), tmp_path, init_from=path, fold=2)
    if cure is None:
        DownstreamExpert(**given)
    else:
        refused(capfd, lambda: DownstreamExpert(**given), "labels of E2 in the corpus 'small ", cure)


def with_other_session_numbers(annotations):
    return annotations.assign(session=annotations["session"].map({1: 5, 2: 1, 3: 2, 4: 3, 5: 4}))


def with_those_and_without_a_clip(annotations):
    return with_other_session_numbers(without_a_clip(annotations))


@pytest.mark.parametrize("change", [with_other_session_numbers, with_those_and_without_a_clip])
def test_recordings_that_are_kept_for_the_test_are_known_by_name_whatever_their_sessions_number(
    capfd, tmp_path, small_corpus, change
):
    ssl = DownstreamExpert(**arguments(small_corpus, tmp_path, system="entire_zero", scenario="unseen"))
    assert ssl.run.provenance.kept_sessions == [5]
    path = saved(ssl, tmp_path / "ssl.ckpt")
    anew = prepared_anew(small_corpus, tmp_path / "anew", "small", change)
    given = arguments(anew, tmp_path, scenario="unseen", init_from=path, episodes={"queries": 4})
    refused(capfd, lambda: DownstreamExpert(**given), "trained on the recording 'Ses01_", "keeps for the test")


def test_a_training_goes_on_with_the_labels_that_it_was_begun_on(capfd, tmp_path, small_corpus):
    begun = DownstreamExpert(**arguments(small_corpus, tmp_path, init_from=None))
    anew = prepared_anew(small_corpus, tmp_path / "anew", "small", lambda a: a.assign(emotions="sad"))
    given = arguments(anew, tmp_path, init_from=None)
    DownstreamExpert(**given | {"mode": "evaluate", "init_ckpt": "x"}).load_state_dict(begun.state_dict())
    going_on = DownstreamExpert(**given | {"init_ckpt": "x", "past_exp": "x"})
    refused(capfd, lambda: going_on.load_state_dict(begun.state_dict()), "other labels than those of the corpus")
    unchanged = arguments(small_corpus, tmp_path, init_from=None) | {"init_ckpt": "x", "past_exp": "x"}
    DownstreamExpert(**unchanged).load_state_dict(begun.state_dict())


def test_checkpoint_of_the_same_upstream_with_other_weights(capfd, tmp_path, small_corpus):
    ssl = DownstreamExpert(**arguments(small_corpus, tmp_path, system="entire_zero"))
    upstream = fbank_no_cmvn()
    ssl.bind(upstream, Featurizer(upstream, upstream_device="cpu"))
    given = arguments(small_corpus, tmp_path, init_from=saved(ssl, tmp_path / "ssl.ckpt"))
    DownstreamExpert(**given).bind(upstream, Featurizer(upstream, upstream_device="cpu"))
    upstream.register_buffer("window", torch.ones(1))
    other = DownstreamExpert(**given)
    featurizer = Featurizer(upstream, upstream_device="cpu")
    refused(capfd, lambda: other.bind(upstream, featurizer), "ssl.ckpt was trained on an upstream of other weights")


AUDIO = {
    "empty": (lambda path: path.write_bytes(b""), "Ses03_04.wav"),
    "not audio": (lambda path: path.write_text("RIFF? no"), "Ses03_04.wav"),
    "no samples": (lambda path: soundfile.write(path, np.zeros(0), 16000), "Ses03_04.wav"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:3000]), "Ses03_04.wav"),
    "too short for a frame": (lambda path: soundfile.write(path, np.zeros(70), 16000), "Ses03_04.wav"),
    "missing": (lambda path: path.unlink(), "Ses03_04.wav"),
}


@pytest.mark.parametrize("case", AUDIO)
def test_audio_that_cannot_be_heard(capfd, tmp_path, small_corpus, case):
    damage, expected = AUDIO[case]
    corpus = shutil.copytree(small_corpus, tmp_path / "corpus")
    damage(corpus / "audio/Ses03_04.wav")
    refused(capfd, lambda: one_training_step(arguments(corpus, tmp_path)), expected)
    assert not list(tmp_path.rglob("*.safetensors.*")), "no half-written shard"


def test_stereo_and_other_rates_are_heard_as_they_sound(tmp_path, small_corpus):
    corpus = shutil.copytree(small_corpus, tmp_path / "corpus")
    samples, _ = soundfile.read(corpus / "audio/Ses03_04.wav")
    soundfile.write(corpus / "audio/Ses03_04.wav", np.stack([samples, samples], axis=1), 16000)
    soundfile.write(corpus / "audio/Ses03_05.wav", samples, 22050)
    assert torch.isfinite(one_training_step(arguments(corpus, tmp_path)))


def test_upstream_whose_pooled_features_never_vary(capfd, tmp_path, small_corpus):
    given = arguments(small_corpus, tmp_path)
    refused(capfd, lambda: one_training_step(given, fbank), "do not vary between utterances", "-u fbank_no_cmvn")


def test_cache_folder_that_cannot_be_written(capfd, tmp_path, small_corpus):
    (tmp_path / "file").write_text("")
    given = arguments(small_corpus, tmp_path, feature_cache=str(tmp_path / "file/cache"))
    refused(capfd, lambda: one_training_step(given), "file/cache", "feature_cache")


def test_off_in_yaml_is_off(small_corpus):
    """YAML 1.1 reads an unquoted off as false."""
    section = yaml.safe_load(f"{{corpus: '{small_corpus}', feature_cache: off}}")
    assert read_settings(section).feature_cache == "off"


def test_results_file_of_another_program_is_not_touched(capfd, tmp_path, small_corpus):
    given = arguments(small_corpus, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/results.csv").write_text("name,score\nme,1\n")
    refused(capfd, lambda: DownstreamExpert(**given), "run/results.csv:1: unknown column 'name'", "test_annotator")


def all_below(kind):
    return {one for below in kind.__subclasses__() for one in (below, *all_below(below))}


def test_errors_come_back_whole_from_another_process():
    """Each is known here by what it is made of, so that a further one is not forgotten."""
    refused_file = Path("file"), PermissionError(errno.EACCES, "Permission denied")
    made_of = {
        RefusedFileError: refused_file,
        UnreadableError: refused_file,
        UnwritableError: refused_file,
        DamagedShardError: (Path("shard"),),
        TooLargeError: (),
    }
    for module in pkgutil.walk_packages(s3prl_metaperser.__path__, "s3prl_metaperser."):
        importlib.import_module(module.name)
    assert all_below(MetaPerSERError) == set(made_of)
    for kind, given in {**made_of, MetaPerSERError: ("message",)}.items():
        error = kind(*given)
        back = ForkingPickler.loads(ForkingPickler.dumps(error))
        assert (type(back), str(back), back.args, vars(back)) == (kind, str(error), error.args, vars(error))
        for name in ("errno", "strerror", "filename"):
            assert getattr(back, name, None) == getattr(error, name, None)
