"""CREMA-D: the voice-only ratings of its public repository."""

import csv

import pytest

from s3prl_metaperser.corpus import crema_d
from s3prl_metaperser.corpus.crema_d import prepare_crema_d
from s3prl_metaperser.errors import MetaPerSERError

COLUMNS = [
    *("", "localid", "pos", "ans", "ttr", "queryType", "numTries", "clipNum", "questNum", "subType", "clipName"),
    *("sessionNums", "respEmo", "respLevel", "dispEmo", "dispVal", "dispLevel"),
]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:c6f94b\nsize 72862\n"


def write_clone(root, responses, audio="AudioWAV", suffix=".wav", clips=None):
    """Write a clone; responses are (rater, query type, clip, emotion)."""
    (root / audio).mkdir(parents=True, exist_ok=True)
    for clip in clips if clips is not None else {response[2] for response in responses}:
        (root / audio / f"{clip}{suffix}").write_bytes(b"RIFF" + bytes(300))
    with (root / "finishedResponses.csv").open("w", newline="", encoding="latin-1") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(COLUMNS)
        for place, (rater, query, clip, emotion) in enumerate(responses):
            row = [
                place,
                rater,
                place,
                f"{emotion}_é,50",
                4000,
                query,
                0,
                1,
                1,
                4,
                clip,
                7,
                emotion,
                "50",
                "A",
                "XX",
                50,
            ]
            writer.writerow(row)
    return root


def test_voice_only_responses_become_annotations(tmp_path):
    root = write_clone(
        tmp_path,
        [
            ("30", 1, "1001_DFA_ANG_XX", "A"),
            ("30", 2, "1001_DFA_ANG_XX", "D"),
            ("30", 3, "1001_DFA_ANG_XX", "D"),
            ("5", 1, "1001_DFA_ANG_XX", "N"),
            ("5", 1, "1002_IEO_SAD_LO", "S"),
            ("6", 1, "1002_IEO_SAD_LO", "F"),
            ("7", 1, "1002_IEO_SAD_LO", "H"),
            ("8", 1, "1002_IEO_SAD_LO", "D"),
        ],
    )
    corpus, report = prepare_crema_d(root)
    rows = corpus.annotations
    assert list(zip(rows["utterance"], rows["annotator"], rows["emotions"], strict=True)) == [
        ("1001_DFA_ANG_XX", "30", "angry"),
        ("1001_DFA_ANG_XX", "5", "neutral"),
        ("1002_IEO_SAD_LO", "5", "sad"),
        ("1002_IEO_SAD_LO", "6", "fear"),
        ("1002_IEO_SAD_LO", "7", "happy"),
        ("1002_IEO_SAD_LO", "8", "disgust"),
    ]
    assert set(rows["kind"]) == {"external"}
    assert set(rows["speaker"]) == {"1001", "1002"}
    assert rows["audio"][0] == "AudioWAV/1001_DFA_ANG_XX.wav"
    assert len(corpus.emotions) == 9
    assert report.count(crema_d.FACE) == 2


def test_actors_are_dealt_out_to_five_sessions(tmp_path):
    clips = [f"{1001 + actor}_DFA_ANG_XX" for actor in range(12)]
    corpus, _ = prepare_crema_d(write_clone(tmp_path, [("1", 1, clip, "A") for clip in reversed(clips)]))
    sessions = corpus.annotations.groupby("speaker")["session"].unique().map(list)
    assert list(sessions) == [[place % 5 + 1] for place in range(12)]


def test_what_is_left_out_is_counted(tmp_path):
    root = write_clone(
        tmp_path,
        [
            ("1", 1, "1001_DFA_ANG_XX", "A"),
            ("1", 1, "1001_DFA_ANG_XX", "D"),
            ("2", 1, "1001_DFA_ANG_XX", "NA"),
            ("2", 1, "1076_MTI_SAD_XX", "S"),
            ("2", 1, "1002_DFA_ANG_XX", "S"),
            ("2", 1, "ANG_HI_practice", "A"),
        ],
        clips=["1001_DFA_ANG_XX", "1076_MTI_SAD_XX"],
    )
    corpus, report = prepare_crema_d(root)
    assert list(corpus.annotations["emotions"]) == ["disgust"]
    assert report.lines() == [
        "1 responses: to a practice clip",
        "1 responses: no emotion given, e.g. finishedResponses.csv:4",
        "1 responses: replaced by a later one of the same rater, e.g. 1001_DFA_ANG_XX by 1",
        "1 utterances: no audio file, or an empty one, e.g. 1002_DFA_ANG_XX",
        "1 utterances: known to hold no sound, e.g. 1076_MTI_SAD_XX",
    ]


def test_mp3_serves_where_there_is_no_wav(tmp_path):
    root = write_clone(tmp_path, [("1", 1, "1001_DFA_ANG_XX", "A")], audio="AudioMP3", suffix=".mp3")
    corpus, _ = prepare_crema_d(root)
    assert corpus.annotations["audio"][0] == "AudioMP3/1001_DFA_ANG_XX.mp3"


def leave_pointer(root):
    (root / "AudioWAV" / "1001_DFA_ANG_XX.wav").write_text(POINTER)


def rewrite(old, new):
    def spoil(root):
        path = root / "finishedResponses.csv"
        path.write_text(path.read_text(encoding="latin-1").replace(old, new), encoding="latin-1")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (leave_pointer, ["1001_DFA_ANG_XX.wav", "git-lfs pointer", "git lfs pull"]),
        (lambda root: (root / "finishedResponses.csv").unlink(), ["finishedResponses.csv: no such file"]),
        (lambda root: (root / "AudioWAV").rename(root / "Audio"), ["AudioWAV/*.wav"]),
        (
            lambda root: (root / "AudioWAV" / "1001_DFA_ANG_XX.wav").rename(root / "AudioWAV" / "x.wav"),
            ["none of the 1 rated clips", "1001_DFA_ANG_XX.wav"],
        ),
        (rewrite("respEmo", "response"), ["finishedResponses.csv:1", "missing column 'respEmo'"]),
        (rewrite('4,"1001_DFA_ANG_XX"', '4,"1001"'), ["finishedResponses.csv:2", "clipName is '1001'"]),
        (rewrite('"A","50"', '"Q","50"'), ["finishedResponses.csv:2", "respEmo is 'Q'", "A, D, F, H, N, S"]),
        (rewrite("4000,1,", "4000,9,"), ["finishedResponses.csv:2", "queryType is '9'"]),
        (rewrite("4000,1,", "4000,2,"), ["no response to a voice alone"]),
    ],
)
def test_a_faulty_clone_is_named(tmp_path, spoil, expected):
    root = write_clone(tmp_path, [("1", 1, "1001_DFA_ANG_XX", "A")])
    spoil(root)
    with pytest.raises(MetaPerSERError) as caught:
        prepare_crema_d(root)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_responses_of_which_none_is_left_are_refused(tmp_path):
    root = write_clone(tmp_path, [("30", 1, "1001_DFA_ANG_XX", "NA")])
    with pytest.raises(MetaPerSERError, match="none of its voice-only responses names an emotion of a clip"):
        prepare_crema_d(root)
