"""Anyone's labels as a csv, and the command line around all readers."""

import argparse

import pytest

from s3prl_metaperser.corpus import commands, table
from s3prl_metaperser.corpus.manifest import load_corpus
from s3prl_metaperser.corpus.table import prepare_table
from s3prl_metaperser.errors import MetaPerSERError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.wav", "sub/b.wav"):
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"RIFF")
    return tmp_path / "mine"


def write(folder, text):
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_three_columns_are_enough(folder):
    corpus, report = prepare_table(
        write(folder, "audio,annotator,emotions\na.wav,me,Happiness\nsub/b.wav,me,Anger; Neutral state;\n")
    )
    assert corpus.annotations.astype(object).to_numpy().tolist() == [
        ["a.wav", "a.wav", 1, "unknown", "me", "external", "happy"],
        ["sub/b.wav", "sub/b.wav", 1, "unknown", "me", "external", "angry;neutral"],
    ]
    assert (corpus.name, corpus.root) == ("labels", folder)
    assert report.lines() == []


def test_given_columns_are_used_and_audio_may_lie_elsewhere(folder, tmp_path):
    path = write(
        tmp_path,
        "emotions,kind,annotator,speaker,session,audio,utterance\nsad,self,me,Ann,4,a.wav,u7\nfear,external,E1,Ann,4,a.wav,u7\n",
    )
    corpus, _ = prepare_table(path, audio_root=folder, name="mine")
    assert corpus.annotations.astype(object).to_numpy().tolist() == [
        ["u7", "a.wav", 4, "Ann", "E1", "external", "fear"],
        ["u7", "a.wav", 4, "Ann", "me", "self", "sad"],
    ]


def test_a_recording_has_one_path_and_a_listener_one_name_however_they_are_spelled(folder):
    path = write(folder, "audio,annotator,emotions\n./a.wav,me ,sad\na.wav,you,sad\nsub//b.wav,me,sad\n")
    corpus, _ = prepare_table(path)
    assert corpus.annotations[["utterance", "audio", "annotator"]].astype(object).to_numpy().tolist() == [
        ["a.wav", "a.wav", "me"],
        ["a.wav", "a.wav", "you"],
        ["sub/b.wav", "sub/b.wav", "me"],
    ]


def test_what_spreadsheets_leave_empty_is_passed_over(folder):
    corpus, _ = prepare_table(write(folder, "audio,annotator,emotions,\n,,,\na.wav,me,sad,\n,,,\n,,,\n"))
    assert corpus.annotations["audio"].tolist() == ["a.wav"]


def test_other_and_missing_recordings_are_left_out_and_counted(folder):
    corpus, report = prepare_table(
        write(
            folder,
            "audio,annotator,emotions\na.wav,me,Other\na.wav,you,sad;other\ngone.wav,me,sad\ngone.wav,you,happy\n",
        )
    )
    assert corpus.annotations["emotions"].tolist() == ["sad"]
    assert report.count(table.ONLY_OTHER) == 1
    assert report.count(table.NO_AUDIO) == 1


BAD = [
    ("audio,annotator,emotion\na.wav,me,sad\n", [":1", "'emotion'", "did you mean 'emotions'?"]),
    ("audio;annotator;emotions\na.wav;me;sad\n", [":1", "parted by semicolons; part them by commas"]),
    ("audio,annotator,emotions,\na.wav,me,sad,\na.wav,you,sad,x\n", [":3", "'x' stands in a column without a name"]),
    ("audio,annotator,emotions\n,,\na.wav,me,sda\n", [":3", "'sda'"]),
    ("audio,annotator\na.wav,me\n", [":1", "missing column 'emotions'"]),
    ("audio,annotator,emotions\na.wav,me,sda\n", [":2", "'sda'", "did you mean", "'sad'"]),
    ("audio,annotator,emotions\na.wav,me,\n", [":2", "emotions", "is empty"]),
    ("audio,annotator,emotions\n\na.wav,me,sad\na.wav,me,fear\n", [":4", "second time", ":3"]),
    ("audio,annotator,emotions\na.wav,me,sad\n./a.wav,me,fear\n", [":3", "'a.wav'", "second time", ":2"]),
    ("audio,annotator,emotions\na.wav,me,sad\na.wav,me ,fear\n", [":3", "'me'", "second time", ":2"]),
    (
        "utterance,audio,annotator,emotions\n1,a.wav,me,sad\n2,sub/../a.wav,you,sad\n",
        [":3", "audio 'a.wav' has utterance '2' here and '1' at", ":2", "expected one utterance for each audio"],
    ),
    ("audio,annotator,emotions\n../a.wav,me,sad\n", [":2", "leads outside"]),
    ("audio,annotator,emotions\n/a.wav,me,sad\n", [":2", "absolute"]),
    ("audio,annotator,emotions,session\na.wav,me,sad,two\n", [":2", "session 'two'", "integer"]),
    ("audio,annotator,emotions\na.wav,me,other\n", ["only 'Other'"]),
    ("audio,annotator,emotions\nx.wav,me,sad\n", ["none of its 1 utterances", "x.wav", "--audio-root"]),
    ("audio,annotator,emotions\na.wav,me,sad,happy\n", [":2", "4 cells, expected 3"]),
]


def run(*arguments):
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.run(args)


@pytest.mark.parametrize(("text", "expected"), BAD)
def test_a_faulty_table_is_named_and_nothing_written(folder, tmp_path, text, expected):
    path = write(folder, text)
    with pytest.raises(MetaPerSERError) as caught:
        run("prepare", "table", path, "--out", tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("labels.csv", *expected):
        assert part in message
    assert not (tmp_path / "out").exists()


def test_the_command_writes_the_corpus_and_describes_it(folder, tmp_path, capsys):
    path = write(folder, "audio,annotator,emotions\na.wav,me,Happiness\na.wav,you,Other\n")
    assert run("prepare", "table", path, "--out", tmp_path / "out", "--name", "mine") == 0
    printed = capsys.readouterr().out
    assert "mine: 1 utterances in 1 session, 1 annotators, 1 annotations" in printed
    assert "1 annotations: only 'Other', e.g. a.wav by you" in printed
    assert load_corpus(tmp_path / "out").annotations["emotions"].tolist() == ["happy"]
    with pytest.raises(MetaPerSERError, match="--overwrite"):
        run("prepare", "table", path, "--out", tmp_path / "out")
    assert run("prepare", "table", path, "--out", tmp_path / "out", "--overwrite") == 0


@pytest.mark.parametrize("reader", ["iemocap", "crema-d", "table"])
def test_a_source_that_is_not_there_is_named(tmp_path, reader):
    with pytest.raises(MetaPerSERError, match="nowhere"):
        run("prepare", reader, tmp_path / "nowhere", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_the_table_that_a_corpus_is_made_from_is_never_replaced(folder, overwrite):
    path = folder / "annotations.csv"
    path.write_text("audio,annotator,emotions\na.wav,me,sad\n")
    with pytest.raises(MetaPerSERError, match=r"its annotations\.csv is what the corpus is made from; choose another"):
        run("prepare", "table", path, "--out", folder, *overwrite)
    assert path.read_text() == "audio,annotator,emotions\na.wav,me,sad\n"
    assert not (folder / "corpus.json").exists()
