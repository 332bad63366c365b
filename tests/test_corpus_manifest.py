"""The manifest: what is written is what is loaded, and every broken rule is named in one line."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3prl_metaperser.corpus.emotions import EMOTIONS, parse_emotions
from s3prl_metaperser.corpus.manifest import COLUMNS, build_corpus, load_corpus, write_corpus
from s3prl_metaperser.corpus.report import PreparationReport, summary
from s3prl_metaperser.errors import MetaPerSERError

ROWS = [
    ("u2", "b.wav", 2, "Ses02F", "E1", "external", "sad"),
    ("u1", "a.wav", 1, "Ses01M", "E2", "external", "angry;neutral"),
    ("u1", "a.wav", 1, "Ses01M", "E1", "external", "happy"),
    ("u2", "b.wav", 2, "Ses02F", "F2", "self", "frustrated"),
]


def corpus_of(rows, root="/speech"):
    return build_corpus("toy", Path(root), pd.DataFrame(rows, columns=list(COLUMNS)))


@pytest.fixture
def written(tmp_path):
    write_corpus(corpus_of(ROWS), tmp_path / "corpus")
    return tmp_path / "corpus"


def test_rows_are_sorted_by_utterance_and_annotator_and_survive_the_disk(written):
    loaded = load_corpus(written)
    assert list(loaded.annotations["utterance"]) == ["u1", "u1", "u2", "u2"]
    assert list(loaded.annotations["annotator"]) == ["E1", "E2", "E1", "F2"]
    assert loaded.annotations["session"].dtype == np.int64
    pd.testing.assert_frame_equal(loaded.annotations, corpus_of(ROWS).annotations)
    assert (loaded.name, loaded.root, loaded.emotions) == ("toy", Path("/speech"), EMOTIONS)


def test_text_columns_compare_with_strings(written):
    rows = load_corpus(written).annotations
    assert (rows["annotator"] == "E1").sum() == 2


def test_two_ticks_share_the_probability(written):
    targets = load_corpus(written).targets()
    assert targets.dtype == np.float32
    assert targets.shape == (4, 9)
    assert targets[1].tolist() == [0, 0.5, 0, 0, 0, 0, 0.5, 0, 0]
    assert targets[2].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_every_utterance_has_one_absolute_path(written):
    assert load_corpus(written).audio_paths() == {"u1": Path("/speech/a.wav"), "u2": Path("/speech/b.wav")}


def test_a_corpus_beside_its_audio_can_be_moved(tmp_path):
    write_corpus(corpus_of(ROWS, tmp_path / "old"), tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert load_corpus(tmp_path / "new").audio_paths()["u1"] == tmp_path / "new" / "a.wav"


def test_a_corpus_is_replaced_only_when_told_to(written):
    before = (written / "annotations.csv").read_bytes()
    with pytest.raises(MetaPerSERError, match="--overwrite"):
        write_corpus(corpus_of(ROWS[:1]), written)
    assert (written / "annotations.csv").read_bytes() == before
    write_corpus(corpus_of(ROWS[:1]), written, overwrite=True)
    assert len(load_corpus(written).annotations) == 1
    assert {path.name for path in written.iterdir()} == {"annotations.csv", "corpus.json"}


def test_an_invalid_corpus_is_not_written(tmp_path):
    with pytest.raises(MetaPerSERError, match="leads outside"):
        write_corpus(corpus_of([("u", "../a.wav", 1, "s", "E1", "external", "sad")]), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


cells = st.text(alphabet="abcäß ,\"';\n.-_0", min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(names=st.lists(st.tuples(cells, cells), min_size=1, max_size=6, unique=True), data=st.data())
def test_any_names_survive_the_disk(names, data, tmp_path_factory):
    rows = [
        (utterance, f"{utterance}.wav", 1, "s", annotator, "external", data.draw(st.sampled_from(EMOTIONS)))
        for utterance, annotator in names
    ]
    folder = tmp_path_factory.mktemp("any")
    corpus = corpus_of(rows)
    write_corpus(corpus, folder)
    pd.testing.assert_frame_equal(load_corpus(folder).annotations, corpus.annotations)


HEADER = ",".join(COLUMNS)
GOOD = "u1,a.wav,1,Ses01M,E1,external,happy"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["annotations.csv:1", "no header", HEADER]),
        (HEADER, ["no annotation at all"]),
        (HEADER.replace("emotions", "emotion") + f"\n{GOOD}", [":1", "'emotion'", "did you mean 'emotions'?"]),
        (HEADER.replace(",kind", "") + "\nu1,a.wav,1,s,E1,happy", [":1", "missing column 'kind'"]),
        (HEADER + ",mood\n" + GOOD + ",x", [":1", "unknown column 'mood'"]),
        (HEADER + ",kind\n" + GOOD + ",self", [":1", "'kind' stands twice"]),
        (f"{HEADER}\n{GOOD}\n{GOOD},x", [":3", "8 cells, expected 7"]),
        (f"{HEADER}\n{GOOD}\nu2,b.wav", [":3", "2 cells, expected 7"]),
        (f"{HEADER}\n{GOOD}\n\nu2,,1,s,E1,external,sad", [":4", "audio", "is empty"]),
        (f"{HEADER}\n{GOOD}\nu2,b.wav,1,s, ,external,sad", [":3", "annotator", "is empty"]),
        (f"{HEADER}\n{GOOD}\nu2,b.wav,1,s,E1,external,angri", [":3", "emotions", "'angri'", "did you mean 'angry'?"]),
        (f"{HEADER}\n{GOOD}\nu2,b.wav,1,s,E1,external,sad;", [":3", "unknown emotion ''"]),
        (f"{HEADER}\n{GOOD}\nu2,b.wav,1,s,E1,external,sad;sad", [":3", "names an emotion twice"]),
        (f"{HEADER}\n{GOOD}\nu2,b.wav,1,s,E1,extern,sad", [":3", "kind 'extern'", "did you mean 'external'?"]),
        (f"{HEADER}\n{GOOD}\nu2,b.wav,one,s,E1,external,sad", [":3", "session 'one'", "integer"]),
        (f"{HEADER}\n{GOOD}\nu2,b.wav,1.0,s,E1,external,sad", [":3", "session '1.0'"]),
        (f"{HEADER}\n{GOOD}\n{GOOD}", [":3", "'u1'", "'E1'", "second time", ":2"]),
        (f"{HEADER}\n{GOOD}\nu1,b.wav,1,Ses01M,E2,external,sad", [":3", "audio 'b.wav'", "'a.wav'", ":2"]),
        (f"{HEADER}\n{GOOD}\nu1,a.wav,2,Ses01M,E2,external,sad", [":3", "session '2'"]),
        (f"{HEADER}\n{GOOD}\nu1,a.wav,1,Ses01F,E2,external,sad", [":3", "speaker 'Ses01F'"]),
        (f"{HEADER}\n{GOOD}\nu2,./a.wav,1,s,E2,external,sad", [":3", "audio 'a.wav' has utterance 'u2'", "'u1'", ":2"]),
        (f"{HEADER}\n{GOOD}\nu2,b.wav,1,s,E1,self,sad", [":3", "annotator 'E1' has kind 'self'"]),
        (f"{HEADER}\n{GOOD}\nu2,/b.wav,1,s,E1,external,sad", [":3", "absolute path"]),
        (f"{HEADER}\n{GOOD}\nu2,C:\\b.wav,1,s,E1,external,sad", [":3", "absolute path"]),
        (f"{HEADER}\n{GOOD}\nu2,x/../../b.wav,1,s,E1,external,sad", [":3", "leads outside the audio root"]),
        (f'{HEADER}\n{GOOD}\n"u\n2",b.wav,1,s,E1,external,sad\nu3,c.wav,x,s,E1,external,sad', [":5", "session"]),
        (f"{HEADER}\n{GOOD}\nu2,b.wav,1,s,E1,external,sad", ["counts.utterances", "is 1", "holds 2"]),
        (f"{HEADER}\n{GOOD.replace('a.wav', 'ä.wav')}".encode("latin-1"), ["UTF-8"]),
    ],
)
def test_a_broken_rule_is_named_with_line_and_value(tmp_path, text, expected):
    write_corpus(corpus_of([("u1", "a.wav", 1, "Ses01M", "E1", "external", "happy")]), tmp_path)
    (tmp_path / "annotations.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MetaPerSERError) as caught:
        load_corpus(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_a_long_manifest_is_read_like_a_short_one(tmp_path):
    """Rows are read some at a time: the ends of a part make no difference, nor does what is wrong behind them."""
    rows = [(f"u{n:04}", f"{n}.wav", n % 5, "s", f"E{n % 7}", "external", EMOTIONS[n % 9]) for n in range(1000)]
    write_corpus(corpus_of(rows), tmp_path)
    loaded = load_corpus(tmp_path).annotations.astype(str)
    assert [tuple(row) for row in loaded.itertuples(index=False)] == [tuple(map(str, row)) for row in rows]
    path = tmp_path / "annotations.csv"
    lines = path.read_text().splitlines(keepends=True)
    for line, text, expected in (
        (2, "one,cell\n", "2 cells, expected 7"),
        (700, "one,cell\n", "2 cells, expected 7"),
        (1001, lines[1000].replace("frustrated", "frustated"), "unknown emotion 'frustated'"),
        (1001, lines[699], "second time, first at .*annotations.csv:700"),
    ):
        path.write_text("".join([*lines[: line - 1], text, *lines[line:]]))
        with pytest.raises(MetaPerSERError, match=rf"annotations.csv:{line}: .*{expected}"):
            load_corpus(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda about: "{", ["corpus.json:1", "not valid JSON"]),
        (lambda about: "[]", ["expected an object"]),
        (lambda about: about.pop("root") and None, ["missing key 'root'"]),
        (lambda about: about.update(emotion=[]), ["unknown key 'emotion'", "'emotions'"]),
        (lambda about: about.update(emotions="sad"), ["emotions is 'sad'", "expected a list"]),
        (lambda about: about.update(emotions=["sad", "sad"]), ["names 'sad' twice"]),
        (lambda about: about.update(emotions=["sad", 3]), ["expected a list of words"]),
        (lambda about: about.update(emotions=["sad", "happy"]), ["annotations.csv:3", "'angry'"]),
        (lambda about: about.update(name=7), ["name is 7"]),
        (lambda about: about.update(counts={"utterances": 2}), ["counts", "annotators"]),
        (lambda about: about["counts"].update(annotators=9), ["counts.annotators is 9", "holds 3", "--overwrite"]),
    ],
)
def test_a_broken_corpus_json_is_named(written, change, expected):
    path = written / "corpus.json"
    about = json.loads(path.read_text())
    text = change(about)
    path.write_text(text if isinstance(text, str) else json.dumps(about))
    with pytest.raises(MetaPerSERError) as caught:
        load_corpus(written)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("missing", ["annotations.csv", "corpus.json", None])
def test_a_missing_file_or_folder_tells_how_to_make_it(written, missing):
    if missing:
        (written / missing).unlink()
    with pytest.raises(MetaPerSERError, match="metaperser prepare") as caught:
        load_corpus(written if missing else written / "nowhere")
    assert (missing or "nowhere") in str(caught.value)


def test_the_order_of_columns_and_a_byte_order_mark_are_free(written):
    path, about = written / "annotations.csv", written / "corpus.json"
    pd.read_csv(path)[list(reversed(COLUMNS))].to_csv(path, index=False, encoding="utf-8-sig")
    with pytest.raises(MetaPerSERError, match=r"its sha256 does not match: it or annotations\.csv is not what was"):
        load_corpus(written)
    without = json.loads(about.read_text())
    del without["sha256"]
    about.write_text(json.dumps(without))
    pd.testing.assert_frame_equal(load_corpus(written).annotations, corpus_of(ROWS).annotations)


@pytest.mark.parametrize(
    ("text", "emotions"),
    [
        ("Neutral state;", ["neutral"]),
        (" ANGER ; Frustrated", ["frustrated", "angry"]),
        ("Other; Sadness", ["sad", "other"]),
        ("happiness;Happy", ["happy"]),
        (";;", []),
    ],
)
def test_emotions_are_read_in_any_spelling_and_given_in_one_order(text, emotions):
    assert parse_emotions(text) == emotions


def test_twelve_annotators_fit_a_terminal_and_show_what_was_left_out():
    rows = [
        (f"u{place}", "a.wav", 1, "s", f"a-rather-long-name-{place % 12:02d}", "external", EMOTIONS[place % 9])
        for place in range(36)
    ]
    report = PreparationReport()
    report.drop("annotations: only 'Other'", "Ses01F_impro01.txt:7")
    report.drop("annotations: only 'Other'", "later")
    lines = summary(corpus_of(rows), report).splitlines()
    assert max(map(len, lines)) <= 120
    assert "36 utterances in 1 session, 12 annotators, 36 annotations" in lines[0]
    assert lines[-1] == "  2 annotations: only 'Other', e.g. Ses01F_impro01.txt:7"


def test_thousands_of_annotators_are_summarised():
    rows = [(f"u{place}", "a.wav", 1, "s", f"{place % 2000}", "external", "sad") for place in range(3000)]
    text = summary(corpus_of(rows), PreparationReport())
    assert "2,000 external" in text
    assert len(text.splitlines()) < 15
    assert [line.split()[:2] for line in text.splitlines() if line.startswith(("min", "max"))] == [
        ["min", "1"],
        ["max", "2"],
    ]
