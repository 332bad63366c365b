"""The synthetic corpus: in IEMOCAP's layout, the same for the same seed, with listeners worth learning."""

import hashlib
from collections import Counter

import numpy as np
import pytest
import soundfile

from s3prl_metaperser.corpus import synthetic
from s3prl_metaperser.corpus.iemocap import prepare_iemocap
from s3prl_metaperser.corpus.synthetic import plan_utterances, write_demo_corpus
from s3prl_metaperser.errors import MetaPerSERError


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "corpus"
    write_demo_corpus(out, seed=3)
    return out


def digest(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_the_iemocap_reader_reads_all_of_it(demo):
    corpus, report = prepare_iemocap(demo)
    assert corpus.counts()["utterances"] == 654
    assert set(corpus.annotations["annotator"]) == {f"E{number}" for number in range(1, 7)} | {
        *("F1", "F2", "M3", "F4", "M4", "M5")
    }
    assert set(report.dropped) <= {"annotations: only 'Other'", "utterances: no label left"}


def test_there_are_labels_enough_for_every_scenario(demo):
    rows = prepare_iemocap(demo)[0].annotations
    last = rows[rows["session"] == 5]["annotator"].value_counts()
    everywhere = rows["annotator"].value_counts()
    assert all(last[f"E{number}"] >= 32 + 128 for number in range(1, 6))
    assert everywhere["E6"] <= 20
    assert all(everywhere[actor] >= 50 for actor in ("F1", "F2", "M3", "F4", "M4", "M5"))


def test_recordings_are_speech_like_in_form(demo):
    for path in sorted(demo.rglob("*.wav"))[::40]:
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert 1.0 <= info.duration <= 2.0
        samples, _ = soundfile.read(path)
        assert 0.001 < np.sqrt(np.mean(samples**2)) < 0.5


def test_the_same_seed_gives_the_same_files(demo, tmp_path):
    write_demo_corpus(tmp_path / "again", seed=3)
    assert digest(tmp_path / "again") == digest(demo)


def test_another_seed_gives_other_listeners():
    assert plan_utterances(3) == plan_utterances(3)
    assert plan_utterances(3) != plan_utterances(4)


@pytest.mark.parametrize("seed", range(5))
def test_knowing_a_listeners_habit_pays(seed):
    """One who knows the latent emotion and the habit agrees far more often than the best constant answer."""
    constant, latent, habit = [], [], []
    utterances = plan_utterances(seed)
    for annotator in ("E1", "E2", "E3", "E4", "E5"):
        named = [(u.emotion, u.labels[annotator]) for u in utterances if annotator in u.labels]
        usual = Counter(name for _, names in named for name in names).most_common(1)[0][0]
        own = {
            emotion: Counter(name for heard, names in named if heard == emotion for name in names).most_common(1)[0][0]
            for emotion in synthetic.EMOTIONS
        }
        constant.append(np.mean([usual in names for _, names in named]))
        latent.append(np.mean([emotion in names for emotion, names in named]))
        habit.append(np.mean([own[emotion] in names for emotion, names in named]))
    assert np.mean(habit) > 0.75
    assert np.mean(habit) > np.mean(latent) + 0.25 > np.mean(constant) + 0.25


def test_sessions_are_replaced_when_told_and_only_those_of_a_demo_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_UTTERANCES", {1: 4, 5: 40})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MetaPerSERError, match="holds no demo corpus; give a folder that is new or empty"):
        write_demo_corpus(tmp_path)
    (tmp_path / "Session1").mkdir()
    (tmp_path / "Session1/mine.wav").write_text("a recording")
    with pytest.raises(MetaPerSERError, match="holds no demo corpus"):
        write_demo_corpus(tmp_path, overwrite=True)
    assert (tmp_path / "Session1/mine.wav").read_text() == "a recording"

    demo = tmp_path / "demo"
    write_demo_corpus(demo)
    (demo / "notes.txt").write_text("mine")
    (demo / "Session1" / "stale").mkdir()
    with pytest.raises(MetaPerSERError, match="pass --overwrite to replace the demo corpus there"):
        write_demo_corpus(demo)
    write_demo_corpus(demo, overwrite=True)
    assert sorted(path.name for path in demo.iterdir()) == ["Session1", "Session5", "demo-corpus.txt", "notes.txt"]
    assert not (demo / "Session1" / "stale").exists()
    (demo / "Session5").rename(tmp_path / "elsewhere")
    (demo / "Session5").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MetaPerSERError, match="Session5: is a link"):
        write_demo_corpus(demo, overwrite=True)


def test_a_file_or_a_negative_seed_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MetaPerSERError, match="is a file"):
        write_demo_corpus(tmp_path / "file")
    with pytest.raises(MetaPerSERError, match="--seed is -1"):
        write_demo_corpus(tmp_path / "new", seed=-1)
    assert not (tmp_path / "new").exists()
