"""Which clips are suggested, on cases where the right answer is evident, and against the criterion computed naively."""

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from s3prl_metaperser.corpus.manifest import Corpus, load_corpus
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.personalize.suggest import DISAGREEMENT, NOISE, choose, suggest
from s3prl_metaperser.settings import read_settings

HAPPY, SAD, ANGRY, FRUSTRATED = range(4)


def sure_of(*heard: int, classes: int = 4) -> np.ndarray:
    """Probabilities of an annotator who hears these emotions, one a clip, with a little doubt."""
    return np.full((len(heard), classes), 0.02) + 0.92 * np.eye(classes)[list(heard)]


def random_problem(seed: int, clips: int = 9, annotators: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(5, 0.4), size=(annotators, clips))


def left_to_guess(probabilities: np.ndarray, labelled: list[int]) -> float:
    """The sum of all clips' variances once some are labelled, from the definition of their covariance."""
    clips = probabilities.shape[1]
    covariance = np.zeros((clips, clips))
    for one, other in itertools.product(range(clips), repeat=2):
        for emotion in range(probabilities.shape[2]):
            said = probabilities[:, [one, other], emotion]
            covariance[one, other] += said.mean(axis=0).prod() + DISAGREEMENT * np.cov(said.T, ddof=0)[0, 1]
    known = covariance[np.ix_(labelled, labelled)] + NOISE * np.eye(len(labelled))
    across = covariance[:, labelled]
    return float(np.trace(covariance - across @ np.linalg.solve(known, across.T)))


@pytest.mark.parametrize("seed", range(5))
def test_every_step_takes_the_clip_that_leaves_least_to_guess(seed):
    probabilities = random_problem(seed)
    labelled = [3, 7] if seed % 2 else []
    chosen = choose(probabilities, 4, labelled)
    for step, clip in enumerate(chosen):
        known = labelled + chosen[:step]
        left = {one: left_to_guess(probabilities, [*known, one]) for one in range(9) if one not in known}
        assert clip == min(left, key=left.__getitem__)


def test_what_annotators_disagree_on_comes_first():
    # Two types of listener: what one calls angry, the other calls frustrated; all else they name alike.
    one = sure_of(HAPPY, SAD, HAPPY, ANGRY, SAD, ANGRY)
    other = sure_of(HAPPY, SAD, HAPPY, FRUSTRATED, SAD, FRUSTRATED)
    assert choose(np.stack([one, other, one]), 1) == [3]


def test_what_annotators_are_merely_unsure_of_comes_last():
    unsure = np.full((1, 4), 0.25)
    one = np.concatenate([unsure, sure_of(SAD, ANGRY)])
    other = np.concatenate([unsure, sure_of(SAD, FRUSTRATED)])
    assert choose(np.stack([one, other]), 3) == [2, 1, 0]


def test_a_clip_that_stands_for_many_comes_first_and_its_copies_wait():
    for annotators in (1, 3):
        agreeing = np.stack([sure_of(SAD, HAPPY, HAPPY, ANGRY)] * annotators)
        assert choose(agreeing, 1) == [1]
        # Its copy is left for last: what is told of one is told of both.
        assert choose(agreeing, 4) == [1, 0, 3, 2]
    # Disputed clips, of which two are one recording, and another is disputed by others.
    disputes = [(ANGRY, HAPPY), (ANGRY, HAPPY), (ANGRY, SAD), (FRUSTRATED, HAPPY), (FRUSTRATED, HAPPY)]
    assert choose(np.stack([sure_of(first, first, second) for first, second in disputes]), 2) == [0, 2]


def test_what_is_labelled_is_not_chosen_and_is_known():
    one = sure_of(ANGRY, ANGRY, HAPPY, HAPPY)
    other = sure_of(FRUSTRATED, FRUSTRATED, SAD, SAD)
    third = sure_of(ANGRY, ANGRY, SAD, SAD)
    probabilities = np.stack([one, other, third, one])
    about_anger, about_joy = {0, 1}, {2, 3}
    first = choose(probabilities, 1, labelled=[0])
    assert set(first) <= about_joy
    assert set(choose(probabilities, 1, labelled=[2])) <= about_anger
    # Asking for more at once or in two turns is the same.
    at_once = choose(probabilities, 3, labelled=[0])
    assert at_once == first + choose(probabilities, 2, labelled=[0, *first])
    assert 0 not in at_once


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_clips_does_not_matter(seed):
    probabilities = random_problem(seed, clips=12)
    order = np.random.default_rng(seed + 100).permutation(12)
    place = np.argsort(order)
    chosen = choose(probabilities, 5, [2, 4])
    shuffled = choose(probabilities[:, order], 5, place[[2, 4]].tolist())
    assert [int(order[clip]) for clip in shuffled] == chosen


def test_of_clips_that_are_alike_the_first_is_taken():
    probabilities = np.repeat(np.stack([sure_of(ANGRY), sure_of(SAD)]), 7, axis=1)
    assert choose(probabilities, 7) == list(range(7))


def test_fewer_clips_than_asked_for_are_all_given():
    probabilities = random_problem(0)
    assert sorted(choose(probabilities, 100)) == list(range(9))
    assert sorted(choose(probabilities, 100, [0, 5])) == [1, 2, 3, 4, 6, 7, 8]
    assert choose(probabilities, 3, list(range(9))) == []


class Checkpoint:
    """Stands in for a recogniser: a learner with random weights, and statistics that depend on a file's name."""

    is_personal = False
    known_annotators = ("E2", "E3", "F1", "M2")
    checkpoint = Path("run/dev-best.ckpt")

    def __init__(self, corpus: Corpus, **section):
        self.settings = read_settings(
            {
                "corpus": "data",
                "recipe": "best",
                "data": {"min_annotations": 4},
                "model": {"projector_dim": 8},
                **section,
            }
        )
        self.emotions = corpus.emotions
        torch.manual_seed(0)
        learner = Learner(self.settings, 4, torch.ones(9))
        learner.bind_layer_weights(None, 1)
        self.network = SimpleNamespace(learner=learner)
        self.asked: set[Path] = set()

    def statistics(self, wavs, progress=False):
        self.asked |= set(wavs)
        seeds = [int(hashlib.sha256(wav.name.encode()).hexdigest()[:8], 16) for wav in wavs]
        return torch.stack([torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@pytest.fixture(scope="module")
def corpus(small_corpus) -> Corpus:
    return load_corpus(small_corpus)


NEW = [Path(f"new/clip{number}.wav") for number in range(12)]


def with_labels(corpus: Corpus, annotators: list[str], emotions: str) -> Corpus:
    """The corpus as it would be if some annotators had named every clip alike."""
    frame = corpus.annotations
    said = frame["emotions"].astype(str).mask(frame["annotator"].isin(annotators), emotions)
    return replace(corpus, annotations=frame.assign(emotions=said.astype("category")))


@pytest.mark.parametrize("system", ["meta_perser", "entire_zero"])
def test_suggestions_rest_on_the_training_annotators_alone(corpus, system):
    model = Checkpoint(corpus, system=system)
    suggested = suggest(model, corpus, NEW, 6)
    assert len(set(suggested)) == 6
    # Fold 1 tests E1 and chooses on E2.
    assert suggest(model, with_labels(corpus, ["E1", "E2", "E9"], "disgust"), NEW, 6) == suggested
    assert suggest(model, with_labels(corpus, ["E3", "F1", "M2"], "disgust"), NEW, 6) != suggested


def test_in_unseen_recordings_that_were_kept_from_training_are_not_asked_for(corpus):
    model = Checkpoint(corpus, scenario="unseen")
    suggest(model, corpus, NEW, 2)
    assert {path.name[:5] for path in model.asked - set(NEW)} == {"Ses01", "Ses02", "Ses03", "Ses04"}


def test_labelled_recordings_count_wherever_they_are(corpus):
    model = Checkpoint(corpus)
    suggested = suggest(model, corpus, NEW, 6)
    told = [NEW[place] for place in suggested[:3]]
    assert suggest(model, corpus, NEW, 3, labelled=told) == suggested[3:]
    others = [path for path in NEW if path not in told]
    assert [others[place] for place in suggest(model, corpus, others, 3, labelled=told)] == [
        NEW[place] for place in suggested[3:]
    ]
    # The same file by another name, and twice among the candidates.
    elsewhere = [path.parent / ".." / path for path in told]
    assert suggest(model, corpus, NEW, 3, labelled=elsewhere) == suggested[3:]
    assert not {12, 13} & set(suggest(model, corpus, [*NEW, *told[:2]], 14, labelled=told))
    assert suggest(model, corpus, told, 5, labelled=told) == []
    assert sorted(suggest(model, corpus, NEW, 50)) == list(range(12))


def test_what_cannot_suggest_is_refused(corpus):
    model = Checkpoint(corpus)
    model.known_annotators = ("E2", "E3", "F1")
    with pytest.raises(MetaPerSERError, match="annotator 'M2'"):
        suggest(model, corpus, NEW, 2)
    model.is_personal = True
    with pytest.raises(MetaPerSERError, match="one listener's model"):
        suggest(model, corpus, NEW, 2)


def test_an_annotator_whom_adaptation_diverges_for_is_left_out(corpus):
    model = Checkpoint(corpus)
    learner = model.network.learner
    adapt_to = learner.adapt_to

    def diverging(support, *given):
        adapted = adapt_to(support, *given)
        if support.targets.shape[1] < 60:  # only E3 labelled everything
            return adapted
        lost = {name: tensor * torch.nan for name, tensor in adapted.kept[50].items()}
        return replace(adapted, kept={50: lost})

    learner.adapt_to = diverging
    without = with_labels(corpus, ["E3"], "disgust")
    assert suggest(model, corpus, NEW, 5) == suggest(model, without, NEW, 5)
    learner.probabilities = lambda statistics, params: torch.full((1, statistics.shape[1], 9), torch.nan)
    with pytest.raises(MetaPerSERError, match="diverges"):
        suggest(model, corpus, NEW, 5)
