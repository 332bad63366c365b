"""Who trains, who chooses, who is tested; and what an episode draws."""

import dataclasses
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from scipy.stats import kstest

from s3prl_metaperser import episodes
from s3prl_metaperser.corpus.emotions import EMOTIONS
from s3prl_metaperser.corpus.manifest import COLUMNS, build_corpus, load_corpus
from s3prl_metaperser.episodes import (
    LONG_TASK,
    Examples,
    Task,
    draw_episode,
    draw_training_episode,
    fold_count,
    make_split,
    meta_test_episodes,
    tasks_of_step,
)
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.settings import DataSettings

FEW = DataSettings(min_annotations=4)


@pytest.fixture
def corpus(small_corpus):
    return load_corpus(small_corpus)


def names(tasks):
    return [task.annotator for task in tasks]


@pytest.mark.parametrize("scenario", ["seen", "unseen"])
@pytest.mark.parametrize("fold", [1, 2, 3])
def test_no_label_of_test_or_dev_and_no_test_session_reaches_training(corpus, scenario, fold):
    split = make_split(corpus, scenario, fold, FEW)
    external = ["E1", "E2", "E3"]
    assert names(split.test) == [external[fold - 1]]
    assert names(split.dev) == [external[fold % 3]], "the next one is dev"
    assert names(split.train) == sorted({*external, "F1", "M2"} - {*names(split.test), *names(split.dev)})
    assert split.left_out.keys() == {"E9"}

    def sessions(task):
        return {int(utterance[3:5]) for utterance in task.examples.utterances}

    reserved = {5} if scenario == "unseen" else set()
    for task in (*split.train, *split.dev):
        assert not sessions(task) & reserved
    assert sessions(split.test[0]) == ({5} if scenario == "unseen" else {1, 2, 3, 4, 5})
    assert set(split.aggregated.utterances) == {u for task in split.train for u in task.examples.utterances}
    assert split.kept_sessions == reserved

    # The aggregated target is the mean over the training annotators alone, worked out from the rows.
    frame, targets = corpus.annotations, corpus.targets()
    utterance = split.aggregated.utterances[0]
    rows = (frame["utterance"] == utterance).to_numpy() & np.isin(frame["annotator"].astype(str), names(split.train))
    np.testing.assert_allclose(split.aggregated.targets[0], targets[rows].mean(axis=0), rtol=1e-6)
    assert len(split.annotation_targets()) == sum(map(len, split.train))


def test_a_leak_is_caught_whatever_dealt_the_rows(corpus, monkeypatch):
    """The assertion looks at the corpus's rows itself; here the code that deals them is broken in two ways."""
    honest_tasks, honest_aggregate = episodes._tasks, episodes._aggregate
    everything = np.ones(len(corpus.annotations), dtype=bool)
    monkeypatch.setattr(episodes, "_tasks", lambda frame, targets, rows: honest_tasks(frame, targets, everything))
    with pytest.raises(AssertionError, match="leak"):
        make_split(corpus, "seen", 1, FEW)
    monkeypatch.undo()
    monkeypatch.setattr(
        episodes, "_aggregate", lambda frame, targets, rows: honest_aggregate(frame, targets, everything)
    )
    with pytest.raises(AssertionError, match="no training annotator labelled"):
        make_split(corpus, "unseen", 1, FEW)


LISTENERS = ["Eva", "Zoë", "adam", "b", "10", "9"]
RATINGS = st.lists(
    st.tuples(
        st.sampled_from([f"u{number}" for number in range(12)]),
        st.sampled_from(LISTENERS),
        st.lists(st.sampled_from(EMOTIONS), min_size=1, max_size=4, unique=True),
    ),
    min_size=12,
    unique_by=lambda rating: rating[:2],
)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(RATINGS, st.sampled_from(["seen", "unseen"]), st.sampled_from([1, 2, 3]), st.booleans())
def test_a_split_is_the_rows_dealt_one_by_one(ratings, scenario, fold, filtered):
    """Against loops over single rows, on any corpus: whoever labelled one clip, four emotions or the test session."""
    sessions = {f"u{number}": number % 3 + 1 for number in range(12)}
    rows = [(u, f"{u}.wav", sessions[u], "s", who, "external", ";".join(said)) for u, who, said in ratings]
    others = [("v", "v.wav", 1, "s", "aaa", "external", "sad"), ("v", "v.wav", 1, "s", "zzz", "external", "sad")]
    corpus = build_corpus("any", Path("/"), pd.DataFrame(rows + others * filtered, columns=list(COLUMNS)))
    if filtered:  # a corpus of some rows keeps the names of all
        kept = corpus.annotations[corpus.annotations["utterance"] != "v"]
        corpus = dataclasses.replace(corpus, annotations=kept.reset_index(drop=True))
    enough = sorted(who for who in LISTENERS if sum(row[4] == who for row in rows) >= 2)
    hypothesis.assume(len(enough) >= 3)
    test, dev = enough[(fold - 1) % len(enough)], enough[fold % len(enough)]
    last = max(row[2] for row in rows)
    held_back = {last} if scenario == "unseen" else set()

    def labels(who, sessions):
        own = {row[0]: row[6].split(";") for row in rows if row[4] == who and row[2] in sessions}
        return {u: [1 / len(said) if emotion in said else 0 for emotion in EMOTIONS] for u, said in sorted(own.items())}

    everywhere, heard = {1, 2, 3}, {1, 2, 3} - held_back
    train = {who: labels(who, heard) for who in enough if who not in (test, dev)}
    expected = {
        "train": {who: own for who, own in train.items() if len(own) > 1},
        "dev": {dev: labels(dev, heard)},
        "test": {test: labels(test, held_back or everywhere)},
        "listeners": {who: labels(who, heard if who == dev else everywhere) for who in sorted({dev, test})},
    }
    data = DataSettings(min_annotations=2)
    if not all(any(expected[role].values()) for role in ("train", "dev", "test")):
        with pytest.raises(MetaPerSERError, match="no annotator is left"):
            make_split(corpus, scenario, fold, data)
        return
    split = make_split(corpus, scenario, fold, data)
    for role, tasks in expected.items():
        dealt = getattr(split, role)
        assert names(dealt) == list(tasks)
        for task, own in zip(dealt, tasks.values(), strict=True):
            assert task.examples.utterances == tuple(own)
            np.testing.assert_allclose(task.examples.targets, list(own.values()), rtol=1e-6)
    said = {}
    for own in expected["train"].values():
        for utterance, distribution in own.items():
            said.setdefault(utterance, []).append(distribution)
    assert split.aggregated.utterances == tuple(sorted(said))
    means = [np.mean(said[utterance], axis=0) for utterance in sorted(said)]
    np.testing.assert_allclose(split.aggregated.targets, means, rtol=1e-6)
    assert split.left_out.keys() == {row[4] for row in rows} - {*expected["train"], dev, test}


@pytest.mark.parametrize(
    ("scenario", "sessions", "left_out"),
    [
        (
            "unseen",
            {"a": [2], "b": [1], "c": [1, 1], "d": [1], "e": [2], "f": [1, 2], "g": [2], "h": [1], "i": [2, 2]},
            {
                "d": "no labels in the test sessions",
                "e": "no labels outside the test sessions",
                "f": "fewer than 2 labels outside the test sessions",
                "i": "no labels outside the test sessions",
            },
        ),
        ("seen", {"a": [2], "b": [1], "c": [1, 2], "d": [1], "e": [2], "f": [1]}, {"f": "fewer than 2 labels"}),
    ],
)
def test_why_an_annotator_takes_no_part_is_said(scenario, sessions, left_out):
    """Of three groups the first is tested (in ``unseen`` in session 2), the second chooses, and the third trains."""
    rows = [
        (f"{who}{number}", "a.wav", session, "s", who, "external", "sad")
        for who, own in sessions.items()
        for number, session in enumerate(own)
    ]
    corpus = build_corpus("any", Path("/"), pd.DataFrame(rows, columns=list(COLUMNS)))
    assert make_split(corpus, scenario, 1, DataSettings(min_annotations=1, fold_count=3)).left_out == left_out


def test_labels_kept_for_the_reference_are_checked_too(corpus):
    """A dev annotator's never come from the test session, and a training annotator has none there."""
    split = make_split(corpus, "unseen", 1, FEW)
    frame = corpus.annotations
    everything = episodes._tasks(frame, corpus.targets(), np.ones(len(frame), dtype=bool))
    for annotator, expected in (("E2", "reference of dev E2 holds utterances of test sessions"), ("E3", "neither")):
        broken = dataclasses.replace(split, listeners=tuple(t for t in everything if t.annotator == annotator))
        with pytest.raises(AssertionError, match=expected):
            episodes._assert_no_leak(frame, broken, {"E1"}, {"E2"})
    assert names(split.listeners) == ["E1", "E2"]


def test_the_test_annotator_can_be_named(corpus):
    split = make_split(corpus, "seen", 1, dataclasses.replace(FEW, test_annotator="E3"))
    assert (names(split.test), split.fold) == (["E3"], 3)
    with pytest.raises(MetaPerSERError, match=r"test_annotator 'E33'.*did you mean 'E3'"):
        make_split(corpus, "seen", 1, dataclasses.replace(FEW, test_annotator="E33"))


def test_crowds_are_dealt_into_groups(corpus):
    split = make_split(corpus, "seen", 1, dataclasses.replace(FEW, fold_count=2))
    assert (names(split.test), names(split.dev), names(split.train)) == (["E1", "E3"], ["E2"], ["F1", "M2"])
    assert fold_count(corpus, FEW) == 3


def test_draws_depend_on_seed_annotator_and_episode_only(corpus):
    (task,) = make_split(corpus, "seen", 1, FEW).test
    episode = draw_episode(task, 4, 8, seed=1, index=0)
    assert draw_episode(task, 4, 8, seed=1, index=0).support.utterances == episode.support.utterances
    others = [draw_episode(task, 4, 8, seed=2, index=0), draw_episode(task, 4, 8, seed=1, index=1)]
    assert all(other.query.utterances != episode.query.utterances for other in others)
    assert not set(episode.support.utterances) & set(episode.query.utterances)
    more = draw_episode(task, 16, 8, seed=1, index=0)
    assert more.query.utterances == episode.query.utterances, "other K, same query"
    assert more.support.utterances[:4] == episode.support.utterances
    for utterance, target in zip(episode.query.utterances, episode.query.targets, strict=True):
        row = task.examples.utterances.index(utterance)
        np.testing.assert_array_equal(target, task.examples.targets[row])


def test_training_draws_by_query_setting(corpus):
    task = make_split(corpus, "seen", 1, FEW).train[0]
    assert len(task) == 60
    drawn = {q: draw_training_episode(task, 20, 30, q, seed=1, index=3) for q in ("combined", "resampled", "disjoint")}
    support = drawn["combined"].support.utterances
    assert all(episode.support.utterances == support for episode in drawn.values())
    assert drawn["combined"].query is drawn["combined"].support
    assert 0 < len(set(drawn["resampled"].query.utterances) & set(support)) < 20, "a fresh draw overlaps by chance"
    assert not set(drawn["disjoint"].query.utterances) & set(support)
    assert {q: len(episode.query) for q, episode in drawn.items()} == {"combined": 20, "resampled": 30, "disjoint": 30}
    small = draw_training_episode(task, 40, 80, "disjoint", seed=1, index=0)
    assert (len(small.support), len(small.query)) == (20, 40), "too few clips are shared in proportion"
    for shots, queries, shared in ((640, 1, (59, 1)), (1, 640, (1, 59))):
        uneven = draw_training_episode(task, shots, queries, "disjoint", seed=1, index=0)
        assert (len(uneven.support), len(uneven.query)) == shared, "neither is ever empty"


def test_a_listener_of_very_many_labels_gives_different_clips_too():
    """Where not all labels are shuffled for a draw: the same rules, and any clip as often as any other."""
    count = 100 * LONG_TASK
    task = Task("E1", Examples(tuple(map(str, range(count))), np.eye(9, dtype=np.float32)[np.arange(count) % 9]))
    drawn = {q: draw_training_episode(task, 20, 30, q, seed=1, index=3) for q in ("combined", "resampled", "disjoint")}
    assert all(episode.support.utterances == drawn["combined"].support.utterances for episode in drawn.values())
    assert drawn["combined"].query is drawn["combined"].support
    assert len({*drawn["disjoint"].support.utterances, *drawn["disjoint"].query.utterances}) == 50
    assert len(set(drawn["resampled"].query.utterances)) == 30
    again = draw_training_episode(task, 20, 30, "disjoint", seed=1, index=4)
    assert not set(again.support.utterances) & set(drawn["disjoint"].support.utterances)
    places = [
        float(utterance) / count
        for index in range(60)
        for utterance in draw_training_episode(task, 20, 30, "disjoint", seed=1, index=index).query.utterances
    ]
    assert kstest(places, "uniform").pvalue > 0.01
    few = draw_training_episode(task, 60_000, 60_000, "disjoint", seed=1, index=0)
    assert (len(few.support), len(few.query)) == (50_000, 50_000)
    assert len({*few.support.utterances, *few.query.utterances}) == count


def test_every_task_trains_once_before_any_trains_again(corpus):
    tasks = make_split(corpus, "seen", 1, FEW).train
    assert len(tasks) == 3
    visited = [task.annotator for step in range(3) for task in tasks_of_step(tasks, 2, seed=1, step=step)]
    assert sorted(visited[:3]) == sorted(visited[3:]) == names(tasks)
    assert tasks_of_step(tasks, 16, seed=1, step=0) == list(tasks)


def test_too_few_labels_say_how_many_there_are(corpus):
    (task,) = make_split(corpus, "unseen", 1, FEW).test
    with pytest.raises(MetaPerSERError, match=r"'E1' has 12 labelled utterances here; shots 8 \+ queries 8 need 16"):
        draw_episode(task, 8, 8, seed=1, index=0)
    tasks = make_split(corpus, "seen", 1, dataclasses.replace(FEW, fold_count=2)).train
    drawn, passed_over = meta_test_episodes([*tasks, task], 4, 8, number=2, seed=1)
    assert ([e.annotator for e in drawn], passed_over) == (["F1", "F1", "M2", "M2", "E1", "E1"], [])
    _, passed_over = meta_test_episodes([*make_split(corpus, "seen", 1, FEW).train, task], 10, 8, number=1, seed=1)
    assert passed_over == ["E1", "F1", "M2"], "in a crowd, those with too few are passed over"


@pytest.mark.parametrize(
    ("scenario", "fold", "change", "expected"),
    [
        ("seen", 4, {}, "fold 4 does not exist; this corpus has fold1 to fold3"),
        ("seen", 1, {"fold_count": 9}, "fold_count 9 does not fit 3 external annotators"),
        ("seen", 1, {"min_annotations": 500}, "at least 2 external annotators with enough labels, found 0"),
        ("unseen", 1, {"test_sessions": [7]}, r"test_sessions names session 7; this corpus has \[1, 2, 3, 4, 5\]"),
        ("unseen", 1, {"test_sessions": [1, 2, 3, 4, 5]}, "no annotator is left to train on"),
    ],
)
def test_impossible_splits_are_refused(corpus, scenario, fold, change, expected):
    with pytest.raises(MetaPerSERError, match=expected):
        make_split(corpus, scenario, fold, dataclasses.replace(FEW, **change))


def test_a_corpus_of_one_session_has_no_unseen_recordings(corpus):
    one = dataclasses.replace(corpus, annotations=corpus.annotations.assign(session=1))
    with pytest.raises(MetaPerSERError, match=r"is all of one session, .* or use scenario seen"):
        make_split(one, "unseen", 1, FEW)
    make_split(one, "seen", 1, FEW)
