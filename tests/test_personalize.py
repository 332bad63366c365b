"""One person's model from files: adapt, predict, and s3prl's own runner with what they make."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import metaperser
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import write_small_corpus
from test_reliability import bound_by_file_modes
from workshop import LAUNCHER, STOCK, Workshop

from s3prl_metaperser.audio import read_audio
from s3prl_metaperser.checkpoints import read_checkpoint
from s3prl_metaperser.cli import main
from s3prl_metaperser.corpus.manifest import load_corpus
from s3prl_metaperser.episodes import make_split, meta_test_episodes
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.metrics import decide, score
from s3prl_metaperser.personalize.labels import distributions, read_labels, write_labels
from s3prl_metaperser.personalize.recordings import find_recordings

STEPS = 7
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of this module's own, which a test may hide."""
    return write_small_corpus(tmp_path_factory.mktemp("personal") / "corpus")


@pytest.fixture(scope="module")
def shop(tmp_path_factory, corpus, small_wavlm):
    """Meta-PerSER on a small WavLM: frozen, and adapted itself; its SSL-E."""
    shop = Workshop(tmp_path_factory.mktemp("shop"), corpus, ["-u", "wavlm_local", "-k", str(small_wavlm)])
    shop.train("ssl", shop.config("ssl_e_paper", {"total_steps": 3}))
    adaptation = {"steps": STEPS}
    given = {"init_from": str(shop.root / "ssl/dev-best.ckpt"), "adaptation": adaptation}
    shop.train("frozen", shop.config("meta_perser_paper", {"total_steps": 3}, **given))
    config = shop.config(
        "meta_perser_entire", {"total_steps": 2, "eval_step": 2}, init_from=None, adaptation=adaptation
    )
    shop.run("-m", "train", *shop.upstream, "-f", "-c", config, "-p", shop.root / "entire")
    return shop


@pytest.fixture(scope="module")
def episode(shop, corpus):
    """The first meta-test episode of fold 1's test annotator, E1."""
    settings = metaperser.load(shop.root / "frozen/dev-best.ckpt", "cpu").settings
    split = make_split(load_corpus(corpus), "seen", 1, settings.data)
    return meta_test_episodes(split.test, 4, 8, 2, 1337)[0][0]


def audio_of(utterances):
    return [f"audio/{utterance}.wav" for utterance in utterances]


def labels_of(episode, emotions):
    return [[emotions[index] for index in np.flatnonzero(row)] for row in episode.support.targets]


@pytest.fixture(scope="module")
def labels_csv(shop, episode, corpus):
    """The episode's support as a person would write it down."""
    path = shop.root / "mine.csv"
    model = metaperser.load(shop.root / "frozen/dev-best.ckpt", "cpu")
    write_labels(path, dict(zip(audio_of(episode.support.utterances), labels_of(episode, model.emotions), strict=True)))
    return path


def command(shop, *arguments):
    """As a user calls it."""
    command_line = [sys.executable, "-m", "s3prl_metaperser.cli", *map(str, arguments)]
    done = subprocess.run(command_line, cwd=shop.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def called(shop, monkeypatch, capfd):
    """The same in this process, which has torch imported already."""

    def call(*arguments, given="", check=True):
        monkeypatch.chdir(shop.root)
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        capfd.readouterr()
        try:
            code = main([str(one) for one in arguments])
        except SystemExit as exit_:
            code = exit_.code
        done = subprocess.CompletedProcess(arguments, code, *capfd.readouterr())
        assert code == 0 or not check, done.stderr
        return done

    return call


def adapted(call, labels_csv, corpus, run, out, *options):
    return call(
        *(
            "adapt",
            "--checkpoint",
            f"{run}/dev-best.ckpt",
            "--labels",
            labels_csv,
            "--audio-root",
            corpus,
            "--out",
            out,
        ),
        *("--steps", STEPS, "--device", "cpu", *options),
    )


def inference(shop, checkpoint, clip, program=STOCK):
    done = subprocess.run(
        [*program, "-m", "inference", "-e", str(checkpoint), "-t", str(clip), "--device", "cpu"],
        cwd=shop.root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def difference(first, second):
    assert list(first) == list(second)
    return max(abs(first[name] - second[name]) for name in first)


@pytest.mark.parametrize(("run", "options"), [("frozen", []), ("frozen", ["--standalone"]), ("entire", [])])
def test_the_stock_runner_predict_and_python_hear_the_same(shop, corpus, labels_csv, run, options):
    """Without the corpus, which whoever has only a checkpoint does not have."""
    out = shop.root / f"{run}{''.join(options)}.ckpt"
    done = adapted(partial(command, shop), labels_csv, corpus, run, out, "--folds", 2, *options)
    assert "adapted to 4 clips" in done.stdout
    assert "generic → personal: maF1" in done.stdout
    clip = corpus / "audio/Ses05_03.wav"
    (corpus / "annotations.csv").rename(corpus / "hidden.csv")
    try:
        stock = inference(shop, out, clip)
        (by_command,) = json.loads(command(shop, "predict", "--checkpoint", out, clip, "--format", "json").stdout)
        in_python = metaperser.load(out, "cpu").predict([clip])[0]
        launched = inference(shop, out, clip, LAUNCHER)
    finally:
        (corpus / "hidden.csv").rename(corpus / "annotations.csv")
    assert launched == stock
    assert difference(stock["probabilities"], by_command["probabilities"]) < TOLERANCE
    assert difference(stock["probabilities"], in_python.probabilities) < TOLERANCE
    assert stock["emotions"] == by_command["emotions"] == list(in_python.emotions)
    generic = metaperser.load(shop.root / run / "dev-best.ckpt", "cpu").predict([clip])[0]
    assert difference(generic.probabilities, in_python.probabilities) > 1e-4, "adaptation changed nothing"


@pytest.mark.parametrize("run", ["frozen", "entire"])
def test_adapting_is_what_meta_test_does(shop, corpus, episode, labels_csv, run):
    """The same support gives the predictions that -m evaluate wrote for the episode."""
    shop.evaluate(shop.root / run / "dev-best.ckpt", f"judged-{run}")
    rows = pd.read_csv(shop.root / f"judged-{run}/predictions.csv")
    rows = rows[rows["episode"] == 0]
    model = metaperser.load(shop.root / run / "dev-best.ckpt", "cpu")
    labels = read_labels(labels_csv, corpus)
    personal = model.adapt(labels.paths, labels.emotions, steps=STEPS)
    query = [corpus / "audio" / f"{utterance}.wav" for utterance in rows["utterance"]]
    written = rows[[f"p_{emotion}" for emotion in model.emotions]].to_numpy()
    assert np.abs(personal.probabilities(query) - written).max() < 5e-6, "predictions.csv has six digits"
    assert personal.adaptation.losses.shape == (STEPS + 1,)
    assert personal.adaptation.losses[-1] < personal.adaptation.losses[0]


def test_minus_m_evaluate_judges_the_personal_model_as_it_is(shop, called, corpus, labels_csv):
    out = shop.root / "evaluated.ckpt"
    adapted(called, labels_csv, corpus, "frozen", out, "--folds", 0)
    shop.evaluate(out, "personal")
    results = pd.read_csv(shop.root / "personal/results.csv")
    assert set(results["system"]) == {"Personal model"}
    rows = pd.read_csv(shop.root / "personal/predictions.csv")
    rows = rows[rows["episode"] == 1]
    model = metaperser.load(out, "cpu")
    heard = model.probabilities([corpus / "audio" / f"{name}.wav" for name in rows["utterance"]])
    labels = distributions([str(cell) for cell in rows["labels"]], model.emotions)
    assert results.loc[results["episode"] == 1, "miF1"].item() == pytest.approx(score(heard, labels).miF1, abs=1e-3)


def test_each_listener_is_judged_in_a_folder_of_their_own(shop, corpus, labels_csv, tmp_path):
    model = metaperser.load(shop.root / "frozen/dev-best.ckpt", "cpu")
    labels = read_labels(labels_csv, corpus)
    given = {"mine": labels.emotions, "bobs": labels.emotions[::-1]}
    folders = {}
    for name, emotions in given.items():
        for standalone in (False, True):
            model.adapt(labels.paths, emotions, steps=2).save(tmp_path / f"{name}{standalone}", standalone=standalone)
            folders[name, standalone] = read_checkpoint(tmp_path / f"{name}{standalone}")["Args"].expdir
    assert len({folders["mine", False], folders["bobs", False]}) == 2
    assert all(folders[name, True] == folders[name, False] for name in given)
    assert all(re.fullmatch("result/downstream/personal-[0-9a-f]{8}", folder) for folder in folders.values())


def test_leaving_one_out_is_adapting_to_all_others(shop, corpus, labels_csv):
    model = metaperser.load(shop.root / "frozen/dev-best.ckpt", "cpu")
    labels = read_labels(labels_csv, corpus)
    judgement = model.judge(labels.paths, labels.emotions, steps=STEPS)
    left_out = []
    for place in range(len(labels)):
        rest = [row for row in range(len(labels)) if row != place]
        taught = model.adapt([labels.paths[row] for row in rest], [labels.emotions[row] for row in rest], steps=STEPS)
        left_out.append(taught.probabilities([labels.paths[place]])[0])
    targets = distributions(labels.emotions, model.emotions)
    assert judgement.personal == score(np.stack(left_out), targets)
    assert judgement.generic == score(model.probabilities(labels.paths), targets)
    by_hand = -np.mean([(targets[row] * np.log(left_out[row])).sum() for row in range(len(labels))])
    assert judgement.personal_log_loss == pytest.approx(by_hand, abs=1e-5)
    assert judgement.low <= judgement.personal.miF1 - judgement.generic.miF1 <= judgement.high
    assert (judgement.clips, judgement.folds) == (4, 4)


def test_files_of_any_kind_and_waveforms_are_heard_alike(shop, corpus, tmp_path):
    model = metaperser.load(shop.root / "frozen/dev-best.ckpt", "cpu")
    files = sorted((corpus / "audio").glob("Ses01_0*.wav"))
    wavs = [read_audio(file) for file in files]
    heard = model.probabilities(files)
    assert np.abs(model.probabilities(wavs) - heard).max() < TOLERANCE
    assert np.abs(model.probabilities([wav.double().numpy() for wav in wavs]) - heard).max() < TOLERANCE
    assert np.abs(model.probabilities([*files[:3], *wavs[3:]]) - heard).max() < TOLERANCE
    mine = model.adapt(files[:4], ["sad", ["Anger", "neutral"], "sad;other", "happy"], steps=2)
    same = model.adapt(wavs[:4], ["sadness", "neutral;angry", ["sad"], "joy"], steps=2)
    for name, tensor in mine.adaptation.params.items():
        torch.testing.assert_close(tensor, same.adaptation.params[name], atol=1e-5, rtol=1e-5)
    assert all(0 < change < 1 for change in mine.moved().values())
    with torch.no_grad():
        model.network.learner.model.classifier.bias.zero_()
    changes = model.adapt(files[:4], ["sad", "angry", "happy", "sad"], steps=2).moved()
    assert [name for name, change in changes.items() if np.isnan(change)] == ["classifier.bias"], "relative to nothing"


@pytest.mark.parametrize("run", ["frozen", "entire"])
def test_a_file_that_is_called_like_an_array_is_another_recording(shop, corpus, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    model = metaperser.load(shop.root / f"{run}/dev-best.ckpt", "cpu")
    files = sorted((corpus / "audio").glob("Ses01_0*.wav"))[:3]
    one, two = (read_audio(file) for file in files[1:])
    shutil.copy(files[0], "waveform 1")
    labels = ["sad", "angry", "happy"]
    mine, same = (model.adapt(given, labels, steps=2) for given in (["waveform 1", one, two], files))
    for name, tensor in mine.adaptation.params.items():
        torch.testing.assert_close(tensor, same.adaptation.params[name], atol=1e-5, rtol=1e-5)
    given, meant = ["waveform 1", one, Path("waveform 1"), two], [files[0], files[1], files[0], files[2]]
    for either in (model, same):
        expected = either.probabilities(meant)
        assert np.ptp(expected[[0, 1, 3]], axis=0).max() > 10 * TOLERANCE
        for several in (2, 4):
            assert np.abs(either.probabilities(given[:several]) - expected[:several]).max() < TOLERANCE
    assert [heard.audio for heard in model.predict(given)] == ["waveform 1", "waveform 1", "waveform 1", "waveform 3"]
    with pytest.raises(MetaPerSERError, match=r"^waveform 1: holds samples of up to"):
        model.predict(["waveform 1", one * 1e9])


def test_in_scope_entire_waveforms_adapt_the_upstream_too(shop, corpus):
    model = metaperser.load(shop.root / "entire/dev-best.ckpt", "cpu")
    files = sorted((corpus / "audio").glob("Ses02_0*.wav"))[:4]
    labels = ["sad", "angry", "neutral", "sad"]
    before = model.probabilities(files)
    mine, same = (model.adapt(wavs, labels, steps=2) for wavs in (files, [read_audio(file) for file in files]))
    assert any(name.startswith("upstream.") for name in mine.moved())
    np.testing.assert_array_equal(mine.probabilities(files), same.probabilities(files))
    np.testing.assert_array_equal(model.probabilities(files), before)


def test_a_personal_checkpoint_holds_adapted_weights_and_nothing_else_of_the_listener(shop, called, corpus, labels_csv):
    small, whole = shop.root / "held-small.ckpt", shop.root / "held-whole.ckpt"
    adapted(called, labels_csv, corpus, "frozen", small, "--folds", 0)
    adapted(called, labels_csv, corpus, "frozen", whole, "--folds", 0, "--standalone")
    parent, of_whole, of_small = (read_checkpoint(path) for path in (shop.root / "frozen/dev-best.ckpt", whole, small))
    moved = {f"learner.model.{layer}.{kind}" for layer in ("projector", "classifier") for kind in ("weight", "bias")}
    changed = {
        name
        for name, value in of_whole["Downstream"].items()
        if isinstance(value, torch.Tensor) and not torch.equal(value, parent["Downstream"][name])
    }
    assert changed == moved
    assert of_small["Downstream"].keys() == moved | {"_extra_state"}
    assert all(torch.equal(of_small["Downstream"][name], of_whole["Downstream"][name]) for name in moved)
    assert torch.equal(of_small["Featurizer"]["weights"], of_whole["Featurizer"]["weights"])
    assert not torch.equal(of_small["Featurizer"]["weights"], parent["Featurizer"]["weights"])
    assert set(of_whole) == {"Downstream", "Featurizer", "Args", "Config"}
    about = parent["Downstream"]["_extra_state"]
    assert of_whole["Downstream"]["_extra_state"] == about | {"training": "listener"}
    for content in (small.read_bytes(), whole.read_bytes()):
        assert b"Ses0" not in content, "names of clips"
        assert labels_csv.name.encode() not in content
        assert b"held-" not in content, "the file's own name, which may be the listener's"
    assert str(shop.root / "frozen").encode() not in small.read_bytes().replace(
        str(shop.root / "frozen/cache").encode(), b""
    )


def test_without_its_parent_a_small_checkpoint_says_what_to_do(shop, corpus, labels_csv, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    parent = shutil.copy(shop.root / "frozen/dev-best.ckpt", run / "dev-best.ckpt")
    clip = corpus / "audio/Ses05_03.wav"
    labels = read_labels(labels_csv, corpus)
    mine = metaperser.load(parent, "cpu").adapt(labels.paths, labels.emotions, steps=STEPS)
    heard = mine.probabilities([clip])
    mine.save(tmp_path / "me/me.ckpt")
    with pytest.raises(MetaPerSERError, match="already there; choose another name, or replace it with --overwrite"):
        mine.save(tmp_path / "me/me.ckpt")
    with pytest.raises(MetaPerSERError, match="is the checkpoint that was adapted"):
        mine.save(parent, overwrite=True)
    moved = (tmp_path / "elsewhere").resolve()
    moved.mkdir()
    shutil.move(run, moved / "run")
    shutil.move(tmp_path / "me", moved / "me")
    np.testing.assert_array_equal(metaperser.load(moved / "me/me.ckpt", "cpu").probabilities([clip]), heard)
    shutil.move(moved / "run/dev-best.ckpt", moved / "me/dev-best.ckpt")
    np.testing.assert_array_equal(metaperser.load(moved / "me/me.ckpt", "cpu").probabilities([clip]), heard)
    for other in (shop.root / "ssl/dev-best.ckpt", labels_csv):
        shutil.copy(other, moved / "run/dev-best.ckpt")
        np.testing.assert_array_equal(metaperser.load(moved / "me/me.ckpt", "cpu").probabilities([clip]), heard)
    shutil.copy(shop.root / "ssl/dev-best.ckpt", moved / "me/dev-best.ckpt")
    with pytest.raises(MetaPerSERError, match=r"run/dev-best\.ckpt is not a readable torch file"):
        metaperser.load(moved / "me/me.ckpt", "cpu")
    (moved / "run/dev-best.ckpt").unlink()
    with pytest.raises(MetaPerSERError, match=r"me/dev-best\.ckpt, which has other weights by now"):
        metaperser.load(moved / "me/me.ckpt", "cpu")
    (moved / "me/dev-best.ckpt").unlink()
    with pytest.raises(MetaPerSERError, match=r"put a copy of it beside .*me\.ckpt as dev-best\.ckpt"):
        metaperser.load(moved / "me/me.ckpt", "cpu")
    done = subprocess.run(
        [*STOCK, "-m", "inference", "-e", str(moved / "me/me.ckpt"), "-t", str(clip), "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: checkpoint" in done.stderr.splitlines()[-1]
    assert "which is not there" in done.stderr.splitlines()[-1]


def test_a_model_is_saved_from_wherever_python_has_gone_meanwhile(shop, corpus, labels_csv, tmp_path, monkeypatch):
    labels = read_labels(labels_csv, corpus)
    monkeypatch.chdir(shop.root)
    mine = metaperser.load("frozen/dev-best.ckpt", "cpu").adapt(labels.paths, labels.emotions, steps=1)
    monkeypatch.chdir(tmp_path)
    mine.save("me.ckpt")
    clip = [corpus / "audio/Ses05_03.wav"]
    np.testing.assert_array_equal(metaperser.load("me.ckpt", "cpu").probabilities(clip), mine.probabilities(clip))


def test_a_checkpoint_that_changed_meanwhile_is_not_mixed_with_what_was_adapted(shop, corpus, labels_csv, tmp_path):
    parent = shutil.copy(shop.root / "frozen/dev-best.ckpt", tmp_path / "dev-best.ckpt")
    labels = read_labels(labels_csv, corpus)
    mine = metaperser.load(parent, "cpu").adapt(labels.paths, labels.emotions, steps=1)
    shutil.copy(shop.root / "frozen/states-2.ckpt", parent)
    with pytest.raises(MetaPerSERError, match="has changed since it was adapted"):
        mine.save(tmp_path / "me.ckpt")
    assert not (tmp_path / "me.ckpt").exists()


def test_what_python_users_get_wrong_is_said_in_words(shop, corpus):
    model = metaperser.load(shop.root / "frozen/dev-best.ckpt", "cpu")
    clip = corpus / "audio/Ses01_00.wav"
    other = corpus / "audio/Ses01_01.wav"
    for call, message in (
        (lambda: model.predict(str(clip)), "put it into brackets"),
        (lambda: model.predict(read_audio(clip)), "put it into brackets"),
        (lambda: model.predict(["gone.wav"]), "gone.wav: no such recording"),
        (lambda: model.predict([]), "no recordings are given"),
        (lambda: model.predict([np.zeros((2, 16000))]), r"shape \(2, 16000\)"),
        (lambda: model.adapt([clip, clip], ["sad", "angry"]), "is labelled twice"),
        (lambda: model.adapt([clip, other], ["sad"]), "2 recordings and 1 as labels"),
        (lambda: model.adapt([clip, other], "sad"), "a single text as labels"),
        (lambda: model.adapt([clip], ["sda"]), "did you mean 'sad'"),
        (lambda: model.adapt([clip], ["sad"], steps=0), "steps 0; expected a whole number"),
        (lambda: model.judge([clip, other], ["sad", "sad"], steps=2.5), "steps 2.5"),
        (lambda: model.judge([clip], ["sad"]), "at least two"),
        (lambda: metaperser.load(shop.root / "frozen/dev-best.ckpt", 0), "device '0': torch cannot use it here"),
        (lambda: model.adapt([clip], ["sad"], lr=-1), "rate -1; expected a number above 0"),
        (lambda: model.adapt([clip], ["sad"], lr="x"), "rate 'x'; expected a number above 0"),
        (lambda: model.adapt([clip], ["sad"], steps=True), "steps True; expected a whole number"),
        (lambda: model.judge([clip, other], ["sad", "sad"], folds=2.5), "folds 2.5; expected a whole number"),
        (lambda: model.adapt([clip], [None]), r"label 0 \(None\): expected text"),
        (lambda: model.adapt([clip], [b"sad"]), r"label 0 \(b'sad'\): expected text"),
        (lambda: model.adapt([clip], None), "None as labels"),
        (lambda: model.predict(None), "None as recordings"),
        (lambda: model.predict([clip, None]), "waveform 1: is of type NoneType"),
        (lambda: model.predict([clip.with_name("a" * 300)]), "aaa: no such recording"),
        (lambda: model.predict([clip, np.zeros(10, np.float32)]), "waveform 1: lasts 0.0006 s"),
        (lambda: model.predict([np.full(32000, 1e300)]), "waveform 0: has .* expected finite"),
    ):
        with pytest.raises(MetaPerSERError, match=message):
            call()


@pytest.mark.parametrize("run", ["frozen", "entire"])
def test_samples_of_another_scale_are_no_answer(shop, corpus, run):
    """The kin of wav2vec 2.0 normalise what they hear, other upstreams do not: what they answer is of nothing."""
    model = metaperser.load(shop.root / run / "dev-best.ckpt", "cpu")
    clip = read_audio(corpus / "audio/Ses01_00.wav")
    for peak, said in ((32768, "32,768"), (1e38, r"1e\+38")):
        with pytest.raises(MetaPerSERError, match=f"^waveform 1: holds samples of up to {said}; expected .* -1 to 1$"):
            model.predict([clip, clip / clip.abs().max() * peak])


def test_numpys_arrays_and_numbers_are_taken_as_they_come(shop, corpus):
    model = metaperser.load(shop.root / "frozen/dev-best.ckpt", torch.device("cpu"))
    clips = [corpus / f"audio/Ses01_0{index}.wav" for index in range(4)]
    backwards = read_audio(clips[0]).numpy()[::-1].copy()
    given = [backwards[::-1], backwards[::-1].astype(">f4"), backwards[::-1].astype(">f8"), clips[0]]
    heard = model.predict(wav for wav in given)
    assert max(difference(one.probabilities, heard[3].probabilities) for one in heard) < TOLERANCE
    labels = np.array(["sad", "angry", "sad", "happy"])
    mine = model.adapt(iter(clips), labels, steps=np.int64(2))
    again = model.adapt(clips, list(labels), steps=2)
    assert all(torch.equal(tensor, again.adaptation.params[name]) for name, tensor in mine.adaptation.params.items())
    assert model.judge(iter(clips), labels, steps=2) == model.judge(clips, list(labels), steps=np.int32(2))


def test_clips_that_cannot_be_read_are_left_out_of_suggestions_and_named_together(called, corpus, tmp_path):
    root = tmp_path / "clips"
    shutil.copytree(corpus / "audio", root)
    (root / "a.wav").write_text("no audio")
    (root / "b.wav").write_bytes((root / "Ses01_00.wav").read_bytes()[:2000])
    soundfile.write(root / "c.wav", np.zeros(100), 16000)
    soundfile.write(root / "d.wav", np.zeros(100_000), 1_000_003)
    given = ("--checkpoint", "frozen/dev-best.ckpt", "--device", "cpu")
    done = called("suggest", *given, "--audio-root", root, "--n", 100)
    assert not {"a.wav", "b.wav", "c.wav", "d.wav"} & set(done.stdout.splitlines())
    assert "4 of 64 recordings are left out, such as" in done.stderr
    done = called("predict", *given, root, check=False)
    refused(
        done,
        ["a.wav: is not a readable recording", "b.wav: is cut off", "c.wav: lasts 0.006 s", "d.wav: has 1,000,003 s"],
    )


def test_names_that_no_csv_of_labels_holds_are_not_suggested_and_shown_escaped(called, corpus, tmp_path):
    root = tmp_path / "clips"
    shutil.copytree(corpus / "audio", root)
    for name in ("esc\x1b[31m.wav", "line\nbreak.wav", "tab\t.wav"):
        shutil.copy(root / "Ses01_00.wav", root / name)
    given = ("--checkpoint", "frozen/dev-best.ckpt", "--device", "cpu")
    blank = tmp_path / "suggested.csv"
    done = called("suggest", *given, "--audio-root", root, "--n", 100, "--out", blank)
    assert "1 of 63 recordings are left out, such as 'esc\\x1b[31m.wav', which holds a control char" in done.stderr
    blank.write_text(blank.read_text().replace("Ses01_00.wav,", "Ses01_00.wav,sad"))
    assert read_labels(blank, root).audio == ("Ses01_00.wav",)
    table = called("predict", *given, root / "esc\x1b[31m.wav", root / "line\nbreak.wav").stdout.splitlines()
    assert [line.split()[0] for line in table] == ["recording", "esc\\x1b[31m.wav", "line\\nbreak.wav"]


def test_a_half_filled_csv_of_suggestions_is_adapted_to(called, corpus, tmp_path):
    half = tmp_path / "half.csv"
    half.write_text(
        "audio,emotions,notes\naudio/Ses01_00.wav,sad,loud\naudio/Ses01_01.wav,,\naudio/Ses01_02.wav,Anger,\n"
    )
    out = tmp_path / "half.ckpt"
    given = ("--checkpoint", "frozen/dev-best.ckpt", "--labels", half, "--audio-root", corpus, "--out", out)
    done = called("adapt", *given, "--device", "cpu")
    assert "adapted to 2 clips" in done.stdout
    assert "too few clips to judge" in done.stdout
    assert "1 clips without a label are left out" in done.stderr


def test_ssl_e_adapts_at_a_rate_that_is_given(shop, corpus, labels_csv):
    labels = read_labels(labels_csv, corpus)
    given = labels.paths, labels.emotions
    ssl_e, meta = (metaperser.load(shop.root / run / "dev-best.ckpt", "cpu") for run in ("ssl", "frozen"))
    with pytest.raises(MetaPerSERError, match="SSL-E, which has learned no rates"):
        ssl_e.adapt(*given)
    with pytest.raises(MetaPerSERError, match="has learned its own rates"):
        meta.adapt(*given, lr=0.1)
    mine = ssl_e.adapt(*given, lr=0.1, steps=3)
    assert mine.adaptation.losses[-1] < mine.adaptation.losses[0]
    with pytest.raises(MetaPerSERError, match="already one listener's"):
        mine.adapt(*given)
    with pytest.raises(MetaPerSERError, match="diverged at step"):
        ssl_e.adapt(*given, lr=1e30, steps=5)


def test_what_is_heard_in_a_clip_does_not_depend_on_the_clips_given_with_it(shop, corpus):
    """To the last bit, on the CPU."""
    model = metaperser.load(shop.root / "frozen/dev-best.ckpt", "cpu")
    clips = sorted((corpus / "audio").glob("*.wav"))
    together = model.probabilities(clips)
    for number in (1, 3, 7):
        np.testing.assert_array_equal(model.probabilities(clips[-number:]), together[-number:])


def test_predict_takes_files_folders_patterns_and_a_pipe(called, corpus):
    model = "frozen/dev-best.ckpt"
    audio = corpus / "audio"

    def heard(*names, form="json", given=None):
        return called("predict", "--checkpoint", model, *names, "--format", form, given=given).stdout

    named = json.loads(heard(audio / "Ses01_03.wav", f"{audio}/Ses02_0[1-3].wav", audio / "Ses01_03.wav"))
    assert [Path(one["audio"]).stem for one in named] == ["Ses01_03", "Ses02_01", "Ses02_02", "Ses02_03"]
    below = json.loads(heard(corpus))
    assert [Path(one["audio"]).name for one in below] == sorted(path.name for path in audio.glob("*.wav"))
    chosen = [one for one in below if Path(one["audio"]).stem == "Ses02_01"]
    assert chosen[0]["probabilities"] == named[1]["probabilities"], "whatever is given with it"
    piped = heard("-", form="csv", given=f"{audio}/Ses02_03.wav\n\n{audio}/Ses02_01.wav\n")
    rows = list(csv.DictReader(piped.splitlines()))
    assert [Path(row["audio"]).stem for row in rows] == ["Ses02_03", "Ses02_01"]
    assert float(rows[1]["sad"]) == pytest.approx(named[1]["probabilities"]["sad"], abs=TOLERANCE)
    assert rows[1]["emotions"].split(";") == named[1]["emotions"]
    probabilities = np.array([list(one["probabilities"].values()) for one in below])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    emotions = list(below[0]["probabilities"])
    for one, chosen_row in zip(below, decide(probabilities), strict=True):
        assert one["emotions"] == [emotion for emotion, is_it in zip(emotions, chosen_row, strict=True) if is_it]
    table = heard(audio / "Ses01_03.wav", form="table").splitlines()
    assert table[0].split() == ["recording", "hears", *emotions]
    assert table[1].startswith("Ses01_03.wav")


def test_suggested_clips_are_labelled_and_adapted_to(shop, called, corpus, tmp_path):
    """`suggest`, a csv filled in by a listener, `adapt` from it; what is labelled is not suggested again."""
    given = ("--checkpoint", "frozen/dev-best.ckpt", "--audio-root", corpus, "--device", "cpu")
    printed = called("suggest", *given, "--n", 6).stdout.splitlines()
    assert len(set(printed)) == 6
    assert set(printed) <= set(find_recordings(corpus))
    blank = tmp_path / "suggested.csv"
    called("suggest", *given, "--n", 6, "--out", blank)
    assert blank.read_text().splitlines() == ["audio,emotions", *(f"{audio}," for audio in printed)]
    mine = tmp_path / "mine.csv"
    called("labels", "--corpus", corpus, "--annotator", "E1", "--only", blank, "--out", mine)
    labels = read_labels(mine, corpus)
    assert list(labels.audio) == printed
    frame = load_corpus(corpus).annotations
    said = frame[(frame["annotator"] == "E1") & (frame["audio"] == printed[0])]["emotions"].item()
    assert list(labels.emotions[0]) == sorted(said.split(";"), key=metaperser.load(shop.root / given[1]).emotions.index)
    more = called("suggest", *given, "--n", 100, "--labels", mine)
    assert set(more.stdout.splitlines()) == set(find_recordings(corpus)) - set(printed)
    assert "only 54 recordings" in more.stderr
    other = more.stdout.splitlines()[0]
    mine.write_text(f"{mine.read_text()}{other},other\n")
    again = called("suggest", *given, "--n", 100, "--labels", mine)
    assert set(again.stdout.splitlines()) == set(find_recordings(corpus)) - {*printed, other}


BAD = {
    "no such column": ("audio,emotion\na.wav,sad\n", ["bad.csv:1", "missing column 'emotions'", "audio, emotion;"]),
    "a ragged row": ("audio,emotions\na.wav,sad,happy\n", ["bad.csv:2", "3 cells", "expected 2"]),
    "unknown emotion": ("audio,emotions\n{clip},sda\n", ["bad.csv:2", "'sda'", "did you mean 'sad'"]),
    "semicolons": ("audio;emotions\n{clip};sad\n", ["bad.csv:1", "parted by semicolons", "by commas"]),
    "semicolons and quotes": ('"audio";"emotions"\n"{clip}";"sad"\n', ["bad.csv:1", "parted by semicolons"]),
    "tabs": ("audio\temotions\n{clip}\tsad\n", ["bad.csv:1", "parted by tabs", "expected audio,emotions"]),
    "nothing ticked": ("audio,emotions\n{clip},\n", ["bad.csv: no labelled clip"]),
    "nothing but other": (
        "audio,emotions\n{clip},other\n",
        ["bad.csv", "every line that is filled in says only 'other'"],
    ),
    "no rows": ("audio,emotions\n", ["bad.csv", "no labelled clip"]),
    "no such clip": ("audio,emotions\naudio/gone.wav,sad\n", ["bad.csv:2", "audio/gone.wav", "--audio-root"]),
    "twice": ("audio,emotions\n{clip},sad\n\n./{clip},angry\n", ["bad.csv:4", "a second time", "bad.csv:2"]),
    "outside": ("audio,emotions\n../secret.wav,sad\n", ["bad.csv:2", "leads outside the audio root"]),
    "absolute": ("audio,emotions\n/etc/passwd,sad\n", ["bad.csv:2", "absolute path"]),
    "no audio at all": ("audio,emotions\n,\n,sad\n", ["bad.csv:3", "is empty", "of a recording (audio root "]),
    "not text": ("audio,emotions\n\udcff,sad\n", ["bad.csv", "UTF-8"]),
    "no recording": ("audio,emotions\nannotations.csv,sad\n", ["annotations.csv", "not a readable recording"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_labels_are_refused_by_line(called, corpus, tmp_path, case):
    text, expected = BAD[case]
    path = tmp_path / "bad.csv"
    path.write_bytes(text.format(clip="audio/Ses01_00.wav").encode(errors="surrogateescape"))
    out = tmp_path / "me.ckpt"
    given = ("--checkpoint", "frozen/dev-best.ckpt", "--labels", path, "--audio-root", corpus, "--out", out)
    done = called("adapt", *given, check=False)
    refused(done, expected)
    assert not out.exists()


def refused(done, expected):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("metaperser: error: "), line
    assert all(part in line for part in expected), line


ARGUMENTS = {
    "no checkpoint": ("predict --checkpoint gone.ckpt {clip}", ["gone.ckpt", "does not exist"]),
    "no torch file": ("predict --checkpoint mine.csv {clip}", ["mine.csv", "not a readable torch file"]),
    "an upstream's": ("predict --checkpoint {upstream} {clip}", ["was not made by -d metaperser"]),
    "no such clip": ("predict --checkpoint frozen/dev-best.ckpt gone.wav", ["gone.wav", "no such recording"]),
    "no match": ("predict --checkpoint frozen/dev-best.ckpt gone*.wav", ["gone*.wav", "no file fits"]),
    "an empty pipe": ("predict --checkpoint frozen/dev-best.ckpt -", ["no recording is named"]),
    "a folder without": ("predict --checkpoint frozen/dev-best.ckpt {empty}", ["holds no recording"]),
    "no audio": ("predict --checkpoint frozen/dev-best.ckpt mine.csv", ["mine.csv", "not a readable recording"]),
    "no device": ("predict --checkpoint frozen/dev-best.ckpt --device gpu {clip}", ["'gpu'", "expected cpu"]),
    "no upstream": (
        "predict --checkpoint frozen/dev-best.ckpt --upstream-ckpt gone.pt {clip}",
        ["-k gone.pt", "no such file"],
    ),
    "a folder as out": (
        "adapt --checkpoint frozen/dev-best.ckpt --labels mine.csv --out {empty}",
        ["is a folder", "expected a file"],
    ),
    "what is there": (
        "adapt --checkpoint frozen/dev-best.ckpt --labels mine.csv --out ssl/dev-best.ckpt",
        ["--overwrite"],
    ),
    "its own labels": (
        "adapt --checkpoint frozen/dev-best.ckpt --labels mine.csv --out mine.csv --overwrite",
        ["mine.csv is what the result is made from"],
    ),
    "labels that are known": (
        "suggest --checkpoint frozen/dev-best.ckpt --audio-root {corpus} --labels mine.csv --out mine.csv --overwrite",
        ["mine.csv is what the result is made from"],
    ),
    "its own checkpoint": (
        "adapt --checkpoint frozen/dev-best.ckpt --labels mine.csv --out frozen/dev-best.ckpt --overwrite",
        ["dev-best.ckpt is what the result is made from"],
    ),
    "a clip that is labelled": (
        "adapt --checkpoint frozen/dev-best.ckpt --labels mine.csv --audio-root {corpus} --out {labelled} --overwrite",
        [".wav is what the result is made from"],
    ),
    "the checkpoint that suggests": (
        "suggest --checkpoint frozen/dev-best.ckpt --audio-root {corpus} --out frozen/dev-best.ckpt --overwrite",
        ["dev-best.ckpt is what the result is made from"],
    ),
    "a clip that may be suggested": (
        "suggest --checkpoint frozen/dev-best.ckpt --audio-root {corpus} --out {clip} --overwrite",
        ["Ses01_00.wav is what the result is made from"],
    ),
    "the corpus that suggests": (
        "suggest --checkpoint frozen/dev-best.ckpt --audio-root {corpus} --out {corpus}/corpus.json --overwrite",
        ["corpus.json is what the result is made from"],
    ),
    "the corpus that is labelled": (
        "labels --corpus {corpus} --annotator E1 --out {corpus}/annotations.csv --overwrite",
        ["annotations.csv is what the result is made from"],
    ),
    "a clip that would be listened to": (
        "calibrate --checkpoint frozen/dev-best.ckpt --audio-root {corpus} --out {clip} --overwrite",
        ["Ses01_00.wav is what the result is made from"],
    ),
    "a device that is not here": (
        "predict --checkpoint frozen/dev-best.ckpt --device meta {clip}",
        ["device 'meta'", "torch cannot use it here"],
    ),
    "no audio root": (
        "adapt --checkpoint frozen/dev-best.ckpt --labels mine.csv --audio-root gone --out me.ckpt",
        ["gone: no such folder"],
    ),
    "no corpus": (
        "suggest --checkpoint frozen/dev-best.ckpt --audio-root {corpus} --corpus gone",
        ["gone", "no such corpus folder"],
    ),
    "no annotator": ("labels --corpus {corpus} --annotator E11 --out e.csv", ["E11", "did you mean 'E1'"]),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments_are_refused_in_one_line(shop, called, corpus, labels_csv, small_wavlm, tmp_path, case):
    line, expected = ARGUMENTS[case]
    places = {"clip": corpus / "audio/Ses01_00.wav", "upstream": small_wavlm, "empty": tmp_path, "corpus": corpus}
    places["labelled"] = read_labels(labels_csv, corpus).paths[0]

    def found():
        files = [path for place in (corpus, shop.root) for path in place.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files if "cache" not in path.parts}

    before = found()
    refused(called(*line.format(**places).split(), given="", check=False), expected)
    assert found() == before


@pytest.mark.parametrize(
    "line",
    [
        "predict --checkpoint a.ckpt NOTHING",
        "predict --checkpoint NOTHING a.wav",
        "predict --checkpoint a.ckpt --upstream-ckpt NOTHING a.wav",
        "suggest --checkpoint a.ckpt --audio-root NOTHING",
        "suggest --checkpoint a.ckpt --audio-root . --corpus NOTHING",
        "adapt --checkpoint a.ckpt --out b.ckpt --labels NOTHING",
        "labels --corpus NOTHING --annotator E1 --out a.csv",
    ],
)
def test_empty_text_is_not_the_working_folder(capfd, line):
    with pytest.raises(SystemExit, match="2"):
        main(["" if word == "NOTHING" else word for word in line.split()])
    assert capfd.readouterr().err.endswith(": is given as empty text; is a variable of the shell not set?\n")


@pytest.mark.skipif(sys.platform != "linux", reason="takes the rights of Linux away")
class TestWhatMayNotBeLookedInto:
    @pytest.fixture
    def locked(self, tmp_path):
        folder = tmp_path / "clips/locked"
        folder.mkdir(parents=True)
        soundfile.write(folder / "a.wav", np.zeros(16000), 16000)
        folder.chmod(0)
        with bound_by_file_modes():
            yield folder
        folder.chmod(0o700)

    def test_a_folder_of_recordings(self, locked, capfd):
        with pytest.raises(MetaPerSERError, match=r"locked: cannot be read \(Permission denied\); get the right"):
            find_recordings(locked)
        soundfile.write(locked.parent / "b.wav", np.zeros(16000), 16000)
        assert find_recordings(locked.parent) == ("b.wav",)
        said = f"metaperser: a file or folder is left out: {locked}: cannot be read (Permission denied)\n"
        assert capfd.readouterr().err == said

    def test_a_folder_whose_files_are_seen_only(self, locked):
        locked.chmod(0o400)
        with pytest.raises(MetaPerSERError, match=r"a\.wav: cannot be read \(Permission denied\)"):
            find_recordings(locked)

    def test_a_labelled_clip(self, locked):
        path = locked.parent / "mine.csv"
        path.write_text("audio,emotions\nlocked/a.wav,sad\n")
        with pytest.raises(MetaPerSERError, match=r"mine\.csv:2: .*a\.wav cannot be read \(Permission denied\)"):
            read_labels(path)


def test_clips_outside_the_folder_are_not_found(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "a/.hidden", outside):
        folder.mkdir(parents=True)
    for path in (
        inside / "b.FLAC",
        inside / "a/c.wav",
        inside / "a/._c.wav",
        inside / "a/.hidden/d.wav",
        outside / "e.wav",
    ):
        path.write_bytes(b"x")
    (inside / "notes.txt").write_text("x")
    (inside / "leaves.wav").symlink_to(outside / "e.wav")
    (inside / "stays.wav").symlink_to(inside / "b.FLAC")
    assert find_recordings(inside) == ("a/c.wav", "b.FLAC", "stays.wav")
