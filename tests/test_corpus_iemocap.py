"""IEMOCAP as it is distributed: every quirk of its label files, and files that are damaged."""

from pathlib import Path

import pytest

from s3prl_metaperser.corpus import iemocap
from s3prl_metaperser.corpus.iemocap import prepare_iemocap
from s3prl_metaperser.corpus.manifest import load_corpus, write_corpus
from s3prl_metaperser.corpus.report import summary
from s3prl_metaperser.errors import MetaPerSERError

REAL_SPEECH = Path(__file__).resolve().parents[2] / "shared" / "real_speech"


def header(utterance):
    return f"[6.2901 - 8.2357]\t{utterance}\tneu\t[2.5000, 2.5000, 2.5000]"


class Release:
    """A release with one dialog and one utterance a session, to be spoilt."""

    def __init__(self, root):
        self.root = root
        for session in range(1, 6):
            self.write(session, f"{header(f'Ses0{session}F_impro01_F000')}\nC-E2:\tNeutral;\t()\n")
            self.record(session, f"Ses0{session}F_impro01", f"Ses0{session}F_impro01_F000")

    def labels(self, session, dialog="Ses0{}F_impro01"):
        return self.root / f"Session{session}" / "dialog" / "EmoEvaluation" / f"{dialog.format(session)}.txt"

    def write(self, session, text, dialog="Ses0{}F_impro01"):
        path = self.labels(session, dialog)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def record(self, session, dialog, utterance, content=b"RIFF"):
        folder = self.root / f"Session{session}" / "sentences" / "wav" / dialog
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{utterance}.wav").write_bytes(content)

    def prepare(self):
        return prepare_iemocap(self.root)


@pytest.fixture
def release(tmp_path):
    return Release(tmp_path / "IEMOCAP_full_release")


def labels_of(corpus, session=1):
    rows = corpus.annotations[corpus.annotations["session"] == session]
    return dict(zip(rows["annotator"], rows["emotions"], strict=True))


def session_one(release, lines):
    release.write(1, header("Ses01F_impro01_F000") + "\n" + lines)
    return release.prepare()


def test_a_block_gives_a_row_for_each_annotator(release):
    text = "\r\n".join(
        [
            "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]",
            "",
            header("Ses01M_script01_1b_FXX0"),
            "C-E2:\tNeutral;\t()",
            "C-E4:\tAnger; Frustration;\t(angry; then (almost) calm)",
            "C-F1:\tHappiness;\t()",
            "C-M3:\tSurprise; \t()",
            "A-E3:\tval 3; act 2; dom  2;\t()",
            "A-F1:\tval 3; act 2; dom  ;\t()",
            "",
        ]
    )
    release.write(1, text, "Ses01M_script01_1b")
    release.labels(1).unlink()
    release.record(1, "Ses01M_script01_1b", "Ses01M_script01_1b_FXX0")
    corpus, report = release.prepare()
    rows = corpus.annotations[corpus.annotations["session"] == 1]
    assert set(rows["utterance"]) == {"Ses01M_script01_1b_FXX0"}
    assert set(rows["speaker"]) == {"Ses01F"}
    assert set(rows["audio"]) == {"Session1/sentences/wav/Ses01M_script01_1b/Ses01M_script01_1b_FXX0.wav"}
    assert labels_of(corpus) == {"E2": "neutral", "E4": "frustrated;angry", "F1": "happy", "M3": "surprise"}
    assert list(rows["kind"]) == ["external", "external", "self", "self"]
    assert report.lines() == []


@pytest.mark.parametrize(
    ("written", "emotion"),
    [
        ("Neutral state", "neutral"),
        ("NEUTRAL", "neutral"),
        ("Angry", "angry"),
        ("Anger", "angry"),
        ("Sadness", "sad"),
        ("sad", "sad"),
        ("Happiness", "happy"),
        ("Happy", "happy"),
        ("Excited", "excited"),
        ("Excitement", "excited"),
        ("Frustrated", "frustrated"),
        ("Frustration", "frustrated"),
        ("Fear", "fear"),
        ("Surprised", "surprise"),
        ("Surprise", "surprise"),
        ("Disgusted", "disgust"),
        ("Disgust", "disgust"),
    ],
)
@pytest.mark.parametrize("layout", ["C-E2:\t{};\t()", "C-E2: {} ; ()", "C-E2:{}()", "C-E2:\t{}; {};\t()"])
def test_every_spelling_and_spacing_is_read(release, written, emotion, layout):
    corpus, _ = session_one(release, layout.format(written, written))
    assert labels_of(corpus) == {"E2": emotion}


def test_other_is_dropped_and_what_is_left_kept(release):
    corpus, report = session_one(
        release, "C-E1:\tOther;\t(tired)\nC-E2:\tSadness; Other;\t()\nC-E4:\t\t()\nC-E5:\t;\t()\n"
    )
    assert labels_of(corpus) == {"E2": "sad"}
    assert report.count(iemocap.ONLY_OTHER) == 1
    assert report.count(iemocap.EMPTY) == 2
    assert "1 annotations: only 'Other', e.g. Ses01F_impro01.txt:2" in summary(corpus, report)


def test_an_utterance_with_no_label_left_is_counted(release):
    corpus, report = session_one(release, "C-E1:\tOther;\t()\n")
    assert labels_of(corpus) == {}
    assert report.count(iemocap.UNLABELLED) == 1


def test_of_two_labels_by_one_annotator_the_last_that_names_an_emotion_stands(release):
    corpus, report = session_one(
        release,
        "C-F1:\tAnger;\t()\nC-F1:\tFear;\t()\nC-F1:\tOther;\t()\n"
        f"{header('Ses01F_impro01_F000')}\nC-E1:\tAnger;\t()\nC-E1:\tSadness;\t()\n",
    )
    assert labels_of(corpus) == {"F1": "fear", "E1": "sad"}
    assert report.count(iemocap.REPEATED) == 2


@pytest.mark.parametrize(
    "comment",
    ["(d\xe9j\xe0 vu \x85)".encode("latin-1"), "(déjà vu…)".encode(), b"(she said\nhush; (aside)\nand left)", b"()"],
)
def test_comments_may_hold_anything(release, comment):
    text = header("Ses01F_impro01_F000").encode() + b"\nC-E2:\tFear;\t" + comment + b"\nC-E4:\tAnger;\t()\n"
    release.write(1, text)
    corpus, _ = release.prepare()
    assert labels_of(corpus) == {"E2": "fear", "E4": "angry"}


def test_files_that_are_no_labels_are_passed_over(release):
    folder = release.labels(1).parent
    (folder / "._Ses01F_impro01.txt").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    (folder / ".DS_Store").write_bytes(b"\x00\x01Bud1")
    for name in ("Categorical", "Attribute", "Self-evaluation"):
        (folder / name).mkdir()
        (folder / name / "Ses01F_impro01_e2_cat.txt").write_text("Ses01F_impro01_F000 :Nonsense; ()")
    wav = release.root / "Session1" / "sentences" / "wav"
    (wav / ".DS_Store").write_bytes(b"\x00")
    (wav / "Ses01F_impro01" / "._Ses01F_impro01_F000.wav").write_bytes(b"\x00")
    corpus, report = release.prepare()
    assert corpus.counts() == {"utterances": 5, "annotators": 1, "annotations": 5}
    assert report.lines() == []


def test_the_folder_that_holds_the_release_will_do(release):
    corpus, _ = prepare_iemocap(release.root.parent)
    assert corpus.root == release.root


@pytest.mark.parametrize("content", [None, b""])
def test_an_utterance_without_audio_is_dropped_and_counted(release, content):
    audio = release.root / "Session2/sentences/wav/Ses02F_impro01/Ses02F_impro01_F000.wav"
    audio.unlink()
    if content is not None:
        audio.write_bytes(content)
    corpus, report = release.prepare()
    assert corpus.counts()["utterances"] == 4
    assert "1 utterances: no audio file, or an empty one, e.g. Ses02F_impro01_F000" in report.lines()


def test_no_audio_at_all_is_an_error(release):
    for path in release.root.glob("Session*/sentences/wav/*/*.wav"):
        path.unlink()
    with pytest.raises(MetaPerSERError, match=r"none of the 5 .*Ses01F_impro01_F000\.wav"):
        release.prepare()


def remove_session_three(release):
    release.root.joinpath("Session3").rename(release.root / "elsewhere")


def remove_label_folder(release):
    folder = release.labels(2).parent
    folder.rename(folder.with_name("Labels"))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (remove_session_three, ["Session3: no such folder", "Session1 to Session5"]),
        (remove_label_folder, ["Session2/dialog/EmoEvaluation", "no such folder"]),
        (lambda release: release.labels(2).unlink(), ["Session2/dialog/EmoEvaluation", "no label file"]),
        (lambda release: release.write(2, ""), ["Ses02F_impro01.txt", "holds no utterance"]),
        (
            lambda release: release.write(2, "C-E2:\tAnger;\t()\n" + header("Ses02F_impro01_F000")),
            ["Ses02F_impro01.txt:1", "before any utterance"],
        ),
        (
            lambda release: release.write(
                2, f"{header('Ses02F_impro01_F000')}\nC-E2:\tAnger;\t()\n[5.0 - 7.0]\tSes02F_i"
            ),
            ["Ses02F_impro01.txt:3", "no whole utterance line", "cut off"],
        ),
        (
            lambda release: release.write(2, f"{header('Ses02F_impro01_F000')[:-6]}\nC-E2:\tAnger;\t()\n"),
            ["Ses02F_impro01.txt:1", "no whole utterance line"],
        ),
        (
            lambda release: release.write(2, f"{header('Ses02F_impro01_F000')}\n\n"),
            ["Ses02F_impro01.txt:1", "without any label", "cut off"],
        ),
        (
            lambda release: release.write(2, f"{header('Ses02F_impro01_F000')}\nC-E2:\tAnger;\t("),
            ["Ses02F_impro01.txt:2", "ends in the middle of a label"],
        ),
        (
            lambda release: release.write(2, f"{header('Ses02F_impro01_F000')}\nC-E2:\tAnger; ()\nC-E4:\tAng"),
            ["Ses02F_impro01.txt:3", "ends in the middle of a label"],
        ),
        (
            lambda release: release.write(2, f"{header('Ses02F_impro01_F000')}\nA-E3:\tval 3; act"),
            ["Ses02F_impro01.txt:2", "ends in the middle of a label"],
        ),
        (
            lambda release: release.write(2, f"{header('Ses02F_impro01_F000')}\nC-E2:\tAngr; Sad;\t()\n"),
            ["Ses02F_impro01.txt:2", "C-E2", "'angr'", "did you mean", "'angry'"],
        ),
        (
            lambda release: release.write(2, f"{header('Ses02F_impro01_F000')}\nC-Q2:\tAnger;\t()\n"),
            ["Ses02F_impro01.txt:2", "is no label"],
        ),
        (
            lambda release: release.write(2, f"{header('Ses02F_impro01_F000')}\nhello\n"),
            ["Ses02F_impro01.txt:2", "'hello'"],
        ),
        (
            lambda release: release.write(2, f"{header('Ses03F_impro01_F000')}\nC-E2:\tAnger;\t()\n"),
            ["Ses02F_impro01.txt:1", "belongs to Session3", "in Session2"],
        ),
        (
            lambda release: release.write(2, f"{header('turn7')}\nC-E2:\tAnger;\t()\n"),
            ["Ses02F_impro01.txt:1", "'turn7'"],
        ),
    ],
)
def test_a_damaged_release_is_named_with_file_and_line(release, spoil, expected):
    spoil(release)
    with pytest.raises(MetaPerSERError) as caught:
        release.prepare()
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_a_source_that_is_no_release_is_named(tmp_path):
    with pytest.raises(MetaPerSERError, match="nowhere: no such folder"):
        prepare_iemocap(tmp_path / "nowhere")
    with pytest.raises(MetaPerSERError, match="holds no folder Session1"):
        prepare_iemocap(tmp_path)
    (tmp_path / "IEMOCAP.tar.gz").write_bytes(b"x")
    with pytest.raises(MetaPerSERError, match="unpack"):
        prepare_iemocap(tmp_path / "IEMOCAP.tar.gz")


@pytest.mark.skipif(not REAL_SPEECH.is_dir(), reason="the real recordings are not here")
def test_real_recordings_in_this_layout(tmp_path):
    corpus, report = prepare_iemocap(REAL_SPEECH, name="real speech")
    assert corpus.counts() == {"utterances": 535, "annotators": 12, "annotations": 2772}
    assert report.count(iemocap.ONLY_OTHER) == 53
    assert all(path.is_file() for path in corpus.audio_paths().values())
    write_corpus(corpus, tmp_path / "corpus")
    assert load_corpus(tmp_path / "corpus").annotations.equals(corpus.annotations)
