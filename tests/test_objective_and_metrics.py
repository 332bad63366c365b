"""Numbers that must mean the same as in the paper, against small cases worked out by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, hamming_loss

from s3prl_metaperser.metrics import decide, score
from s3prl_metaperser.objective import class_balanced_weights, example_losses
from s3prl_metaperser.reporting import summary_line


def test_class_weights_by_hand():
    """N = 4 so β = 3/4; mass 2.5, 1.5 and none: (1−β)/(1−β^n), none counting as one, scaled to sum 3."""
    targets = torch.tensor([[1, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [0, 1, 0]])
    raw = [0.25 / (1 - 0.75**2.5), 0.25 / (1 - 0.75**1.5), 0.25 / (1 - 0.75)]
    expected = [3 * value / sum(raw) for value in raw]
    assert class_balanced_weights(targets).tolist() == pytest.approx(expected, rel=1e-6)


def test_loss_by_hand():
    """Two ticks: half the mass each; the example's weight is the target-weighted mean of class weights."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    targets = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    weights = torch.tensor([2.0, 0.5, 0.5])
    expected = [1.25 * (0.5 * math.log(2) + 0.5 * math.log(4)), 0.5 * -math.log(0.8)]
    assert example_losses(logits, targets, weights).tolist() == pytest.approx(expected, rel=1e-6)


def test_decision_is_strictly_above_chance():
    ninth = np.full((1, 9), 1 / 9)
    assert not decide(ninth).any()
    assert decide(np.array([[0.12, 0.11] + [0.11] * 7])).tolist() == [[True] + [False] * 8]


def test_scores_by_hand():
    """Three classes, two queries. Decided: {0, 1}, {2}; ticked: {0}, {1}.

    Class 0: F1 1; class 1: one false alarm, one miss, F1 0; class 2: one false alarm, F1 0 (zero_division).
    Pooled: 1 hit, 2 false alarms, 1 miss: F1 = 2/5. Of 6 binary decisions 3 are right.
    """
    probabilities = np.array([[0.5, 0.4, 0.1], [0.3, 0.1, 0.6]])
    targets = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    scores = score(probabilities, targets)
    assert (scores.maF1, scores.miF1, scores.UA) == pytest.approx((100 / 3, 40.0, 50.0))


def test_a_class_that_nobody_names_or_ticks_counts_zero():
    """maF1 is over all nine classes, as in the paper, whatever an episode happens to hold."""
    probabilities, targets = np.zeros((1, 9)), np.zeros((1, 9))
    probabilities[0, 0] = targets[0, 0] = 1
    scores = score(probabilities, targets)
    assert (scores.maF1, scores.miF1, scores.UA) == pytest.approx((100 / 9, 100.0, 100.0))


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    for _ in range(50):
        probabilities = rng.dirichlet(np.full(9, 0.5), 64)
        targets = rng.dirichlet(np.full(9, 0.2), 64) * (rng.random((64, 9)) > 0.7)
        targets[:, : rng.integers(3)] = 0
        ticked, decided = (targets > 0).astype(int), decide(probabilities).astype(int)
        scores = score(probabilities, targets)
        assert scores.maF1 == pytest.approx(100 * f1_score(ticked, decided, average="macro", zero_division=0))
        assert scores.miF1 == pytest.approx(100 * f1_score(ticked, decided, average="micro", zero_division=0))
        assert pytest.approx(100 * (1 - hamming_loss(ticked, decided))) == scores.UA


def test_random_scores_as_in_table_1():
    """Random guesses tick about 3 of 9 emotions; with one emotion ticked, chance gives the paper's 17 / 61."""
    from s3prl_metaperser.episodes import Episode, Examples
    from s3prl_metaperser.reporting import EvaluatedEpisode
    from s3prl_metaperser.systems import Random

    rng = np.random.default_rng(0)
    targets = np.eye(9, dtype=np.float32)[rng.integers(9, size=500)]
    # As in the paper's corpus, some clips carry a second emotion.
    second = rng.random(500) < 0.2
    targets[second] = (targets[second] + np.roll(targets[second], 1, axis=1)) / 2
    clips = Examples(tuple(map(str, range(500))), targets)
    episodes = [Episode("E1", index, clips, clips) for index in range(3)]
    prediction = Random(seed=1).predict(None, None, episodes)
    assert decide(prediction.probabilities[0]).sum(axis=1).mean() == pytest.approx(3.0, abs=0.3)
    scores = [score(p, targets) for p in prediction.probabilities]
    assert np.mean([s.miF1 for s in scores]) == pytest.approx(17.4, abs=3)
    assert np.mean([s.UA for s in scores]) == pytest.approx(60.7, abs=3)
    evaluated = [EvaluatedEpisode(e, p, s) for e, p, s in zip(episodes, prediction.probabilities, scores, strict=True)]
    assert "Random on test (E1, 3 episodes): maF1" in summary_line(evaluated, "Random", "test")
