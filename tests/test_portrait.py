"""``metaperser portrait``: numbers against corpora worked out by hand, the page against what it promises."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from workshop import Workshop

from s3prl_metaperser import cli
from s3prl_metaperser.corpus.emotions import EMOTIONS
from s3prl_metaperser.corpus.manifest import build_corpus, write_corpus
from s3prl_metaperser.portrait import agreement, likeness, naming_habits
from s3prl_metaperser.portrait.composition import compose
from s3prl_metaperser.portrait.crowd import Crowd
from s3prl_metaperser.portrait.drawing import short_names
from s3prl_metaperser.portrait.movement import Comparison, divergence, movement
from s3prl_metaperser.portrait.page import Part, Portrait, Shown, write_portrait

ANGRY, SAD, NEUTRAL, HAPPY = (EMOTIONS.index(name) for name in ("angry", "sad", "neutral", "happy"))


def corpus_of(labels, root, kinds=None):
    """A corpus from ``{annotator: {clip: "angry;sad"}}``."""
    rows = [
        (clip, f"{clip}.wav", 1, "S", annotator, (kinds or {}).get(annotator, "external"), emotions)
        for annotator, own in labels.items()
        for clip, emotions in own.items()
    ]
    columns = ["utterance", "audio", "session", "speaker", "annotator", "kind", "emotions"]
    return build_corpus("by hand", root, pd.DataFrame(rows, columns=columns))


def crowd_of(labels, kinds=None):
    return Crowd.of(corpus_of(labels, "/nowhere", kinds))


# Agreement

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: four observers, twelve units, five
# categories, missing data; its nominal alpha is 0.743.
OBSERVERS = {
    "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    "C": [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
}


def observed():
    return {
        name: {f"u{unit:02d}": EMOTIONS[value] for unit, value in enumerate(values) if value}
        for name, values in OBSERVERS.items()
    }


def test_alpha_of_single_labels_is_krippendorffs_published_one():
    crowd = crowd_of(observed())
    found = agreement.agreement(crowd, np.arange(4), seed=0)
    assert found.of == ("all annotators",)
    assert found.overall.value[0] == pytest.approx(0.743, abs=5e-4)
    assert found.overall.low[0] < 0.743 < found.overall.high[0]
    assert (found.clips[0], found.labels[0]) == (11, 40)  # the twelfth unit has one observer


def test_weighed_by_labels_each_ones_part_makes_alpha():
    crowd = crowd_of(observed())
    found = agreement.agreement(crowd, np.arange(4), seed=0)
    pairable = np.bincount(crowd.annotator[np.bincount(crowd.clip)[crowd.clip] > 1])
    assert (found.each.value * pairable).sum() / pairable.sum() == pytest.approx(found.overall.value[0])


def test_masi_distance_of_sets():
    """Passonneau (2006): 1 − J·M with M of 1, 2/3, 1/3 and 0 for equal, nested, overlapping and disjoint sets."""
    sets = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=bool)
    nested, overlapping = 1 - 1 / 2 * 2 / 3, 1 - 1 / 3 * 1 / 3
    assert agreement.masi_distances(sets) == pytest.approx(
        np.array([[0, nested, 1, 1], [nested, 0, overlapping, 1], [1, overlapping, 0, 1], [1, 1, 1, 0]])
    )


def test_alpha_of_sets_by_hand():
    """Two clips, (angry | angry;sad) and (sad | sad): D_o = (2/3 + 0)/2; D_e over 12 ordered pairs of four labels."""
    crowd = crowd_of({"A": {"1": "angry", "2": "sad"}, "B": {"1": "angry;sad", "2": "sad"}})
    expected = 2 * (2 / 3 + 2 * 1 + 2 * 2 / 3 + 0) / 12
    found = agreement.agreement(crowd, np.arange(2), seed=0)
    assert found.overall.value[0] == pytest.approx(1 - (1 / 3) / expected)


def test_pairs_with_few_shared_clips_are_left_blank():
    enough = {f"{n}": "angry" if n % 2 else "sad" for n in range(agreement.LEAST_SHARED)}
    crowd = crowd_of({"A": enough | {"x": "fear"}, "B": enough, "C": dict(list(enough.items())[1:])})
    found = agreement.agreement(crowd, np.arange(3), seed=0)
    assert found.shared.tolist() == [[0, 20, 19], [20, 0, 19], [19, 19, 0]]
    assert found.pairs.value[0, 1] == found.pairs.value[1, 0] == 1
    assert np.isnan(found.pairs.value[2]).all()


def test_the_interval_is_of_clips_and_narrows_with_their_number():
    """Half of the clips agree: alpha's bootstrap deviation falls as one over the square root of their number."""
    widths = []
    for clips in (50, 450):
        first = {f"{n}": "angry" if n % 2 else "sad" for n in range(clips)}
        second = {f"{n}": "angry" if n % 4 < 2 else "sad" for n in range(clips)}
        overall = agreement.agreement(crowd_of({"A": first, "B": second}), np.arange(2), seed=0).overall
        widths.append(overall.high[0] - overall.low[0])
    assert widths[0] / widths[1] == pytest.approx(3, rel=0.15)
    assert widths[0] == pytest.approx(2 * 1.96 / np.sqrt(50), rel=0.15)  # alpha is close to 2·(share agreeing) − 1


# Habits and confusions


def test_shares_and_ticks_by_hand():
    crowd = crowd_of({"A": {"1": "angry;sad", "2": "angry", "3": "fear"}, "B": {"1": "sad"}})
    found = naming_habits.habits(crowd, np.array([0]), seed=0)
    assert {EMOTIONS[e]: share for e, share in enumerate(found.shares.value[0]) if share} == pytest.approx(
        {"angry": 0.5, "sad": 1 / 6, "fear": 1 / 3}
    )
    assert found.ticked.value[0] == pytest.approx(4 / 3)
    assert found.all_shares[SAD] == pytest.approx(1.5 / 4)
    # Of three clips none is happy: Clopper and Pearson's upper end is 1 − 0.025^(1/3).
    assert found.shares.high[0, HAPPY] == pytest.approx(1 - 0.025 ** (1 / 3))


def test_the_majority_leaves_the_annotator_out_and_shares_ties():
    crowd = crowd_of(
        {
            "A": {"1": "angry", "2": "sad", "3": "fear"},
            "B": {"1": "angry", "2": "angry;sad"},
            "C": {"1": "sad", "2": "angry"},
        }
    )
    majority, others = naming_habits.majority_of_others(crowd)
    found = {
        (crowd.names[crowd.annotator[row]], crowd.utterances[crowd.clip[row]]): (
            {EMOTIONS[e]: share for e, share in enumerate(majority[row]) if share},
            others[row],
        )
        for row in range(len(majority))
    }
    assert found == {
        ("A", "1"): ({"angry": 0.5, "sad": 0.5}, 2),
        ("B", "1"): ({"angry": 0.5, "sad": 0.5}, 2),
        ("C", "1"): ({"angry": 1}, 2),
        ("A", "2"): ({"angry": 1}, 2),  # 1.5 votes against 0.5
        ("B", "2"): ({"angry": 0.5, "sad": 0.5}, 2),
        ("C", "2"): ({"sad": 1}, 2),
        ("A", "3"): ({}, 0),
    }


def test_a_confusion_by_hand():
    """X says happy for five of six angry clips and sad for the other; a tie of the others shares a clip."""
    angry = {f"a{n}": "angry" for n in range(6)}
    said = {f"a{n}": "happy" for n in range(5)} | {"a5": "sad", "t": "neutral"}
    crowd = crowd_of({"A": angry | {"t": "angry"}, "B": angry | {"t": "sad"}, "X": said})
    shown = np.array([crowd.names.index("X")])
    found = naming_habits.confusions(crowd, shown, *naming_habits.majority_of_others(crowd), seed=0)
    expected = np.zeros((9, 9))
    expected[ANGRY, [HAPPY, SAD, NEUTRAL]] = 5, 1, 0.5
    expected[SAD, NEUTRAL] = 0.5
    assert found.mass[0] == pytest.approx(expected)
    assert (found.clips[0], found.others[0], found.agreeing.value[0]) == (7, 2, 0)
    (departure,) = found.departures
    assert (departure.majority, departure.said, departure.clips) == (ANGRY, HAPPY, 6.5)
    assert departure.share.value == pytest.approx(5 / 6.5)


# The map


def test_three_annotators_lie_as_far_apart_as_their_profiles():
    """Three points span a plane, so the map keeps their Hellinger distances exactly."""
    clips = [f"{n}" for n in range(30)]
    heard = {
        "A": ["angry" if n % 2 else "sad" for n in range(30)],
        "B": ["angry" if n % 3 else "sad" for n in range(30)],
        "C": ["happy" if n % 5 == 0 else "angry" for n in range(30)],
    }
    crowd = crowd_of({name: dict(zip(clips, own, strict=True)) for name, own in heard.items()})
    majority, others = naming_habits.majority_of_others(crowd)
    found = likeness.annotator_map(crowd, np.arange(3), majority, others, seed=0)
    pairs = [np.outer(of_others, own) for of_others, own in zip(majority, crowd.named, strict=True)]
    mass = np.stack([np.sum(pairs[30 * a : 30 * a + 30], axis=0) for a in range(3)])
    total = mass.sum(axis=0)
    average = total / np.maximum(total.sum(axis=1, keepdims=True), 1e-300)
    smoothed = mass + likeness.PRIOR * average
    rates = smoothed / np.maximum(smoothed.sum(axis=2, keepdims=True), 1e-300)
    joint = rates * (total.sum(axis=1) / total.sum())[:, None]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        hellinger = np.sqrt(((np.sqrt(joint[a]) - np.sqrt(joint[b])) ** 2).sum())
        assert np.linalg.norm(found.places[a] - found.places[b]) == pytest.approx(hellinger)
    assert found.variance.sum() == pytest.approx(1)


def test_without_shared_clips_the_map_is_of_how_often_emotions_are_named():
    labels = {name: {f"{name}{n}": emotion for n in range(9)} for name, emotion in zip("ABC", EMOTIONS, strict=False)}
    crowd = crowd_of(labels)
    found = likeness.annotator_map(crowd, np.arange(3), *naming_habits.majority_of_others(crowd), seed=0)
    assert found.by == "shares"
    distances = [np.linalg.norm(found.places[a] - found.places[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert distances == pytest.approx([distances[0]] * 3)


# Personal models


def test_divergence_by_hand():
    """Half of KL([1,0] ‖ [3/4,1/4]) and half of KL([1/2,1/2] ‖ [3/4,1/4]), in bits."""
    expected = (np.log2(4 / 3) + (np.log2(2 / 3) + np.log2(2)) / 2) / 2
    assert divergence(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(expected)
    assert divergence(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1


class Echo:
    """A model that says everything is neutral and, adapted, that everything is what it was adapted on."""

    def __init__(self, said=("neutral",)):
        self.said, self.calls = said, []

    def probabilities(self, wavs, progress=False):
        ticked = np.isin(EMOTIONS, self.said).astype(float)
        return np.tile(ticked / ticked.sum(), (len(wavs), 1))

    def adapt(self, wavs, labels, steps=50, lr=None):
        self.calls.append((tuple(wav.name for wav in wavs), labels, lr))
        return Echo(labels[0])

    def moved(self):
        return {"still": 0.0, "far": float(len(self.said))}


def compared(tmp_path, **given):
    labels = {
        "A": {f"{n}": "angry" for n in range(10)},
        "B": {f"{n}": "neutral" for n in range(3)},
        "C": {f"{n}": "neutral;sad" for n in range(10)},
    }
    corpus = corpus_of(labels, tmp_path)
    crowd = Crowd.of(corpus)
    model = Echo()
    asked = {"shots": 4, "draws": 2, "clips": 5, "lr": 0.5} | given
    return crowd, model, movement(corpus, crowd, np.arange(3), Comparison(model, "m", frozenset("A"), **asked), seed=0)


def test_personal_models_are_compared_with_the_generic_one_on_the_same_clips(tmp_path):
    crowd, _, found = compared(tmp_path)
    assert crowd.names == ("A", "C", "B")
    between = divergence(np.array([1.0, 0.0]), np.array([0.5, 0.5]))
    assert found.divergence.value == pytest.approx([1, between, 0])
    assert found.shift.value[0, [ANGRY, NEUTRAL]].tolist() == [100, -100]
    assert found.shift.value[1, [SAD, NEUTRAL]] == pytest.approx([50, -50])
    assert not found.shift.value[2].any()
    assert (found.clips, found.shots.tolist()) == (5, [4, 4, 3])
    assert found.tensors == ("far", "still")
    assert found.moved.value[:, 0].tolist() == [1, 2, 1]
    assert found.same.value == 0  # of A and C; B's draws are all it has
    assert found.other.value == pytest.approx((1 + 1 + between) / 3)


def test_the_draws_of_labels_are_the_annotators_own_and_differ(tmp_path):
    _, model, _ = compared(tmp_path)
    assert [len(wavs) for wavs, _, _ in model.calls] == [4, 4, 4, 4, 3, 3]
    assert {lr for _, _, lr in model.calls} == {0.5}
    assert model.calls[0][0] != model.calls[1][0]
    assert set(model.calls[4][0]) == {"0.wav", "1.wav", "2.wav"}
    assert model.calls[2][1] == [["sad", "neutral"]] * 4
    _, again, _ = compared(tmp_path)
    assert again.calls == model.calls


# The page


class Reader(HTMLParser):
    """Collects a page's tags with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text += text

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def portrait_command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "s3prl_metaperser.cli", "portrait", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_command_writes_a_page_that_loads_nothing_and_the_same_bytes_each_time(small_corpus, tmp_path):
    one, two = (tmp_path / name / "p.html" for name in ("one", "two"))
    done = portrait_command("--corpus", small_corpus, "--out", one, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == f"written: {one}, and 13 files in {one.parent / 'p_figures'}"
    assert cli.main(["portrait", "--corpus", str(small_corpus), "--out", str(two)]) == 0
    written = [
        {path.relative_to(out.parent).as_posix(): path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
        for out in (one, two)
    ]
    assert written[0] == written[1]
    figures = {"habits", "agreement", "confusions", "map"}
    assert {f"p_figures/{name}.{ending}" for name in figures for ending in ("png", "pdf", "csv")} <= written[0].keys()
    page = written[0]["p.html"].decode()
    assert "http" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
    reader = Reader(page)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in reader.tags}
    images = reader.all("img")
    assert len(images) == len(figures)
    assert all(image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 60 for image in images)
    ids = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    assert {link["href"].removeprefix("#") for link in reader.all("a")} <= ids
    assert not re.search(r"url\(|@import", page)
    # 60 clips of three external annotators, the first twelve and the next of a self-reporting one, two of E9.
    assert "206 labels of 60 clips by 4 external annotators and 2 self-reporting annotators" in reader.text


def test_a_portrait_is_not_overwritten_unless_asked_and_leaves_other_files_alone(tmp_path, capsys):
    write_corpus(corpus_of({"A": {"1": "angry"}}, tmp_path), tmp_path / "corpus")
    out = tmp_path / "p.html"
    given = ["portrait", "--corpus", str(tmp_path / "corpus"), "--out", str(out)]
    assert cli.main(given) == 0
    before = out.read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(given)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"metaperser: error: {out} is already there; pass --overwrite to replace the portrait\n"
    )
    assert out.read_bytes() == before
    folder = tmp_path / "p_figures"
    (folder / "movement.png").write_bytes(b"of an earlier portrait with a checkpoint")
    (folder / "notes.txt").write_text("mine")
    assert cli.main([*given, "--overwrite"]) == 0
    assert out.read_bytes() == before
    assert not (folder / "movement.png").exists()
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--corpus": "nowhere"}, "nowhere: no such corpus folder"),
        ({"--out": "p.png"}, "p.png is no page; expected a name that ends in .html"),
        ({"--out": "folder.html"}, "folder.html: is a folder; expected a file"),
        ({"--out": "link.html"}, "link.html: a link to gone.html, which is not there; expected a file"),
        ({"--out": "file/p.html"}, "file/p.html: the portrait cannot be written there"),
        ({"--seed": "-1"}, "--seed -1; expected 0 or more"),
        ({"--most": "0"}, "argument --most: '0' is no positive whole number"),
        ({"--checkpoint": "no.ckpt"}, "no.ckpt does not exist"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(small_corpus, tmp_path, monkeypatch, capsys, changed, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link.html").symlink_to("gone.html")
    given = {"--corpus": str(small_corpus), "--out": "p.html"} | changed
    with pytest.raises(SystemExit) as ended:
        cli.main(["portrait", *(word for pair in given.items() for word in pair)])
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html", "link.html"]


NOBODY = "No clip was labelled by two annotators"


@pytest.mark.parametrize(
    ("labels", "figures", "said"),
    [
        ({"A": {"1": "angry", "2": "sad"}}, ["habits"], [NOBODY, "A map needs 3 annotators"]),
        ({"A": {"1": "angry"}}, ["habits"], ["Nobody named frustrated, sad, disgust"]),
        (
            {name: {f"{name}{n}": e for n, e in enumerate(EMOTIONS[:k])} for k, name in enumerate("ABC", start=1)},
            ["habits", "map"],
            [NOBODY, "no clips are shared, so a profile is"],
        ),
        (
            {name: {"1": "sad", "2": "sad"} for name in "ABC"},
            ["habits", "confusions"],
            ["α of all annotators is not defined: all labels of shared clips are the same", "are not all alike"],
        ),
        (
            {name: {"1": "sad", "2": "angry", name: "fear"} for name in ("A", "B", "C")} | {"D": {"x": "happy"}},
            ["habits", "agreement", "confusions"],
            ["No two of the annotators shown share 20 clips", "D shares no clip with anyone and is left out"],
        ),
    ],
)
def test_what_cannot_be_shown_is_said_in_words(labels, figures, said, tmp_path):
    corpus = corpus_of(labels, tmp_path)
    write_portrait(compose(corpus, most=24, seed=0), tmp_path / "p.html")
    assert {path.stem for path in (tmp_path / "p_figures").glob("*.png")} == set(figures)
    reader = Reader((tmp_path / "p.html").read_text())
    for words in said:
        assert words in reader.text
    assert "nan" not in reader.text


def test_names_fit_into_figures_and_stand_in_full_in_the_tables(tmp_path):
    long = [f"annotator-with-a-very-long-name-{n:03d}" for n in range(2)]
    names = [*long, "$x_{1}$", "安娜", "<b>", "a-name-begun-alike-0", "a-name-begun-other-0"]
    crowd = crowd_of({name: {"1": "angry", "2": EMOTIONS[place]} for place, name in enumerate(names)})
    short = dict(zip(crowd.names, short_names(crowd, np.arange(len(names))), strict=True))
    assert all(len(name) <= 14 for name in short.values())
    assert len(set(short.values())) == len(names)
    assert short[long[0]] == "annota…ame-000"
    assert short["$x_{1}$"] == r"\$x_{1}\$"
    assert short["安娜"] == f"no. {crowd.names.index('安娜') + 1}"
    page = write_portrait(compose(corpus_of({n: {"1": "angry"} for n in names}, tmp_path), 24, 0), tmp_path / "p.html")
    text = Reader(page[0].read_text()).text
    assert all(name in text for name in names)


def test_of_many_annotators_those_with_most_labels_are_shown_and_all_are_on_the_map(tmp_path):
    rng = np.random.default_rng(0)
    labels = {f"{n:02d}": {f"{clip}": EMOTIONS[rng.integers(9)] for clip in range(20 + n)} for n in range(30)}
    written = write_portrait(compose(corpus_of(labels, tmp_path), most=4, seed=0), tmp_path / "p.html")
    tables = {path.stem: pd.read_csv(path, dtype={"annotator": str}) for path in written if path.suffix == ".csv"}
    for name in ("habits", "confusions"):
        assert set(tables[name]["annotator"]) == {"26", "27", "28", "29"}
    assert len(tables["map"]) == 30
    assert tables["map"]["component_1_low"].notna().sum() == 4
    text = Reader(written[0].read_text()).text
    assert "Figures of single annotators show the 4 with most labels (46 or more) of 30" in text


def test_a_portrait_that_cannot_be_drawn_leaves_the_old_one_whole(tmp_path):
    out = tmp_path / "p.html"
    write_portrait(Portrait("old", ["An old one."], []), out)
    before = out.read_bytes()

    broken = Part("habits", "Broken", [], [Shown("habits", lambda: 1 / 0, "", "")])
    with pytest.raises(ZeroDivisionError):
        write_portrait(Portrait("new", [], [broken]), out, overwrite=True)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.html", "p_figures"]


def test_with_a_checkpoint_personal_models_are_shown_and_known_annotators_marked(
    small_corpus, tmp_path, monkeypatch, capsys
):
    shop = Workshop(tmp_path, small_corpus, ["-u", "fbank_no_cmvn"])
    shop.train("run", shop.config("meta_perser_paper", {"total_steps": 2, "eval_step": 2}, init_from=None))
    monkeypatch.chdir(tmp_path)
    given = ["--checkpoint", "run/dev-best.ckpt", "--shots", "4", "--clips", "10", "--draws", "2"]
    assert cli.main(["portrait", "--corpus", str(small_corpus), *given, "--out", "p.html"]) == 0
    numbers = pd.read_csv("p_figures/movement.csv").set_index("annotator")
    # Fold 1 tests on E1, and E9's two labels are too few to train on; the others were trained or chosen on.
    assert numbers["trained_on"].to_dict() == {"E1": False, "E2": True, "E3": True, "E9": False, "F1": True, "M2": True}
    assert numbers["shots"].to_dict() == {"E1": 4, "E2": 4, "E3": 4, "E9": 2, "F1": 4, "M2": 4}
    assert (numbers["divergence_value"].between(0, 1) & (numbers["divergence_value"] > 0)).all()
    shifts = numbers[[f"shift_{emotion}_value" for emotion in EMOTIONS]]
    assert shifts.sum(axis=1).to_numpy() == pytest.approx(0, abs=1e-3)
    moved = pd.read_csv("p_figures/tensors.csv")
    assert {"classifier.weight", "classifier.bias"} <= set(moved["tensor"])
    assert (moved["lowest"] <= moved["change"]).all()
    assert len(Reader((tmp_path / "p.html").read_text()).all("img")) == 6
    # A corpus whose recordings are not there.
    write_corpus(corpus_of({"E2": {"1": "angry"}, "E3": {"1": "sad"}}, tmp_path), tmp_path / "other")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["portrait", "--corpus", "other", *given, "--out", "q.html"])
    assert ended.value.code == 2
    assert "1.wav" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "q.html").exists()
