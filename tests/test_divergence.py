"""Inner loops that leave the finite numbers: named where they do, counted as failed, and left out of meta-training."""

import shutil
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from runner_stand_in import arguments, one_training_step
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer

from s3prl_metaperser.adaptation.rates import FixedRate
from s3prl_metaperser.episodes import Examples
from s3prl_metaperser.expert import DownstreamExpert
from s3prl_metaperser.reporting import EvaluatedEpisode
from s3prl_metaperser.systems import task_batch
from s3prl_metaperser.training import differentiated

ABSURD = 1e30
LARGE = 500.0
"""A rate at which losses stay finite, and the norm of the meta-gradient does not."""


def bound(given):
    expert = DownstreamExpert(**given)
    upstream = fbank_no_cmvn()
    expert.bind(upstream, Featurizer(upstream, upstream_device="cpu"))
    return expert


@pytest.mark.parametrize(("rate", "where"), [(ABSURD, "at inner step"), (LARGE, "after 5 steps")])
@pytest.mark.parametrize("backend", ["analytic", "higher"])
def test_too_high_a_rate_is_named_by_annotator_episode_and_step(tmp_path, small_corpus, capfd, backend, rate, where):
    torch.manual_seed(0)
    meta = {"inner_lr": rate, "backend": backend, "on_divergence": "stop"}
    expert = bound(arguments(small_corpus, tmp_path, meta=meta))
    (_, episodes) = next(iter(expert.get_dataloader("train")))
    with pytest.raises(SystemExit) as exit_:
        expert("train", [], episodes, records=defaultdict(list))
    assert exit_.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    for episode in episodes:
        assert f"adaptation to {episode.annotator}, episode {episode.index}, diverged {where}" in line
    assert "meta.on_divergence: skip" in line


@pytest.mark.parametrize(
    ("weight", "rate", "where"), [(3e38, {}, "at inner step 0 of 5"), (1e12, {"inner_lr": 1e-30}, "after 5 steps")]
)
@pytest.mark.parametrize("model", [{}, {"recipe": "best"}, {"model": {"dropout": 0.7}}])
def test_training_goes_on_with_the_episodes_that_are_sound(tmp_path, small_corpus, capfd, model, weight, rate, where):
    """One annotator's labels weigh so much that the loss, or its gradient alone, overflows; the others' are taken."""
    given = arguments(small_corpus, tmp_path, meta={"query": "combined", **rate}, **model)
    expert, alone = bound(given), bound(given)
    alone.load_state_dict(expert.state_dict())
    (_, (first, *sound)) = next(iter(expert.get_dataloader("train")))
    heavy = Examples(first.support.utterances, first.support.targets * np.float32(weight))
    sick = replace(first, support=heavy, query=heavy)
    records = defaultdict(list)
    loss, expected = (
        expert("train", [], [sick, *sound], records=records),
        alone("train", [], sound, records=defaultdict(list)),
    )
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    own, others = dict(expert.named_parameters()), dict(alone.named_parameters())
    assert any(parameter.grad is not None for parameter in own.values())
    assert all(torch.equal(own[name].grad, others[name].grad) for name in own if own[name].grad is not None)
    assert np.isfinite(records["query_loss"]).all()
    warning = capfd.readouterr().err
    assert f"adaptation to {sick.annotator}, episode {sick.index}, diverged {where}" in warning
    assert "training goes on without" in warning
    assert not any(episode.annotator in warning for episode in sound)


def gradient(expert, batches):
    """Accumulate the losses of some batches as s3prl does, and give the gradient by name, with every loss."""
    losses = [expert("train", [], batch, records=defaultdict(list)) for batch in batches]
    for loss in losses:
        loss.backward()
    return {name: one.grad for name, one in expert.named_parameters() if one.grad is not None}, losses


def test_a_batch_that_diverged_adds_nothing_to_the_outer_step_of_others(tmp_path, small_corpus):
    """Scope entire accumulates an annotator a batch: one of them must not take the step from all."""
    given = arguments(small_corpus, tmp_path, meta={"query": "combined"})
    given["runner"]["gradient_accumulate_steps"] = 3
    (_, (first, *sound)) = next(iter(bound(given).get_dataloader("train")))
    heavy = Examples(first.support.utterances, first.support.targets * np.float32(3e38))
    sick = [replace(first, support=heavy, query=heavy)]
    torch.manual_seed(0)
    expert, alone, none = bound(given), bound(given), bound(given)
    alone.load_state_dict(expert.state_dict())
    own, losses = gradient(expert, [sick, *([one] for one in sound)])
    assert losses[0] == 0
    expected, _ = gradient(alone, [[one] for one in sound])
    assert set(expected) <= set(own)
    for name, one in own.items():
        assert torch.equal(one, expected.get(name, torch.zeros_like(one)))
    _, losses = gradient(none, [sick, sick, sick, sick])
    assert [bool(loss.isfinite()) for loss in losses] == [True, True, False, True], "a step of nothing is not taken"


def test_no_step_is_taken_where_no_episode_is_sound(tmp_path, small_corpus):
    """Whether only gradients overflow, which clipping would turn into a step of zeros, or only support losses."""
    torch.manual_seed(0)
    expert = bound(arguments(small_corpus, tmp_path, meta={"inner_lr": LARGE}))
    (_, batch) = next(iter(expert.get_dataloader("train")))
    tiny = {"inner_lr": 1e-38, "inner_steps": 1, "query": "disjoint"}
    other = bound(arguments(small_corpus, tmp_path / "other", meta=tiny))
    (_, (first, *_)) = next(iter(other.get_dataloader("train")))
    heavy = Examples(first.support.utterances, first.support.targets * np.float32(5e19))
    for own, episodes in ((expert, batch), (other, [replace(first, support=heavy)])):
        gradient(own, [episodes])
        assert torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0).isnan(), "s3prl's runner takes no such step"


def test_a_gradient_is_handed_on_to_the_bit():
    first, second, unused = (torch.nn.Parameter(torch.randn(50, generator=torch.manual_seed(0))) for _ in range(3))
    loss = (first.exp() * second.sin()).sum().tanh()
    (loss / 3).backward()
    expected = [first.grad, second.grad]
    first.grad = second.grad = None
    loss = (first.exp() * second.sin()).sum().tanh()
    (differentiated(loss, [first, second, unused], 3) / 3).backward()
    assert all(map(torch.equal, [first.grad, second.grad], expected))
    assert unused.grad is None


def evaluated(expert):
    records = defaultdict(list)
    for _, episodes in expert.get_dataloader("test"):
        expert.run.evaluate("test", episodes, records)
    return records


class Log:
    def add_scalar(self, *args, **kwargs):
        pass

    def flush(self):
        pass


def test_an_episode_that_diverges_at_meta_test_has_failed_visibly(tmp_path, small_corpus, capfd):
    """Its row is there, with no score, and failures.csv names the step; once mended, none."""
    fixed = {"lr": 1e30, "steps": 4}
    given = arguments(small_corpus, tmp_path, "entire_few", adaptation=fixed) | {"mode": "evaluate", "init_ckpt": "x"}
    expert = bound(given)
    records = evaluated(expert)
    (first, second) = records["episodes"]
    assert isinstance(first, EvaluatedEpisode)
    assert first.divergence is not None
    expert.log_records("test", records, Log(), 0, [], 1)
    out, err = capfd.readouterr()
    assert "warning: adaptation to E1, episode 0, diverged at inner step" in err
    assert "2 failed (they diverged, and score 0)" in out
    folder = tmp_path / "run"
    failures = pd.read_csv(folder / "failures.csv")
    assert failures["episode"].tolist() == [0, 1]
    assert failures["diverged_at_step"].tolist() == [first.divergence.step, second.divergence.step]
    assert 0 < first.divergence.step < 4
    results = pd.read_csv(folder / "results.csv")
    assert (results[["maF1", "miF1", "UA"]] == 0).all(axis=None)
    assert pd.read_csv(folder / "predictions.csv")["predicted"].isna().all()

    mended = bound(given | {"downstream_expert": given["downstream_expert"] | {"adaptation": {"lr": 0.01, "steps": 4}}})
    mended.log_records("test", evaluated(mended), Log(), 0, [], 1)
    assert not (folder / "failures.csv").exists()
    assert (pd.read_csv(folder / "results.csv")["UA"] > 0).all()


def test_weights_that_are_not_finite_stop_training(tmp_path, small_corpus, capfd):
    for system in ("meta_perser", "entire_zero"):
        expert = bound(arguments(small_corpus, tmp_path / system, system))
        (_, batch) = next(iter(expert.get_dataloader("train")))
        with torch.no_grad():
            expert.learner.model.classifier.bias[0] = float("nan")
        with pytest.raises(SystemExit):
            expert("train", [], batch, records=defaultdict(list))
        error = capfd.readouterr().err
        assert "weights classifier.bias are no longer finite" in error
        assert "(-e) with a lower runner.gradient_clipping, or begin a new training" in error


def test_one_class_and_silence_are_no_reason_to_diverge(tmp_path, small_corpus):
    """A support of nothing but one emotion, and of clips that are all the same: the loss falls."""
    expert = bound(arguments(small_corpus, tmp_path, "entire_few"))
    learner, features = expert.learner, expert.run.features
    one_class = np.zeros((4, 9), dtype=np.float32)
    one_class[:, 2] = 1
    name = expert.run.split.train[0].examples.utterances[0]
    support = task_batch([Examples((name,) * 4, one_class)], features, learner.class_weights.device)
    adapted = learner.adapt_to(support, FixedRate(0.1), 50)
    assert torch.isfinite(adapted.losses).all()
    assert adapted.losses[-1] < adapted.losses[0]


def test_silent_and_clipped_recordings_train_like_any_other(tmp_path, small_corpus):
    corpus = shutil.copytree(small_corpus, tmp_path / "corpus")
    samples, rate = soundfile.read(corpus / "audio/Ses03_04.wav")
    soundfile.write(corpus / "audio/Ses03_04.wav", np.zeros(len(samples)), rate)
    soundfile.write(corpus / "audio/Ses03_05.wav", np.sign(samples), rate)
    assert torch.isfinite(one_training_step(arguments(corpus, tmp_path)))


def test_a_clip_whose_features_are_not_finite_is_named(tmp_path, small_corpus, capfd):
    def quiet_is_nothing():
        """An upstream that takes the logarithm of a clip's power without a floor."""
        upstream = fbank_no_cmvn()
        forward = upstream.forward

        def loudness(wavs):
            given = forward(wavs)
            own = [
                frames - wav.square().mean().log() for frames, wav in zip(given["hidden_states"][0], wavs, strict=True)
            ]
            return {"hidden_states": [torch.stack(own)]}

        upstream.forward = loudness
        return upstream

    corpus = shutil.copytree(small_corpus, tmp_path / "corpus")
    samples, rate = soundfile.read(corpus / "audio/Ses03_04.wav")
    soundfile.write(corpus / "audio/Ses03_04.wav", np.zeros(len(samples)), rate)
    with pytest.raises(SystemExit) as exit_:
        one_training_step(arguments(corpus, tmp_path), quiet_is_nothing)
    assert exit_.value.code == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "Ses03_04.wav" in error
    assert "features of it that are not finite" in error
