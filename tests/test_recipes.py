"""Recipes: what the one line presets, what it leaves to the config, and recipe ``best`` from recordings to results."""

import dataclasses
import json
import shutil
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
import torch
from runner_stand_in import arguments, saved
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer
from s3prl.upstream.wavlm.hubconf import wavlm_local
from test_runner import LAUNCHER, Workshop, downstream_state, same_weights

from s3prl_metaperser.corpus.manifest import load_corpus
from s3prl_metaperser.episodes import make_split
from s3prl_metaperser.expert import DownstreamExpert
from s3prl_metaperser.expressed import estimate_expressed
from s3prl_metaperser.naming import SCALE
from s3prl_metaperser.settings import DataSettings, read_settings


def flat(settings, above=""):
    """Every setting by its dotted name."""
    named = {}
    for name, value in dataclasses.asdict(settings).items() if dataclasses.is_dataclass(settings) else settings.items():
        named |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return named


def test_the_papers_recipe_is_the_defaults_and_best_differs_in_these():
    defaults = flat(read_settings({"corpus": "unused"}))
    assert flat(read_settings({"corpus": "unused", "recipe": "paper"})) == defaults
    best = flat(read_settings({"corpus": "unused", "recipe": "best"}))
    assert {name for name in best if best[name] != defaults[name]} == {
        "recipe",
        "model.pooling",
        "model.activation",
        "model.dropout",
        "model.naming",
        "model.class_balanced",
        "ssl.targets",
        "meta.adapts",
        "meta.outer_loss",
        "meta.query",
    }


def test_what_a_config_gives_itself_wins_over_its_recipe():
    preset = flat(read_settings({"corpus": "unused", "recipe": "best"}))
    given = {"model": {"pooling": "mean", "dropout": 0.25}, "meta": {"query": "resampled", "inner_lr": 0.5}}
    chosen = flat(read_settings({"corpus": "unused", "recipe": "best", **given}))
    changed = {name: value for name, value in chosen.items() if value != preset[name]}
    assert changed == {
        "model.pooling": "mean",
        "model.dropout": 0.25,
        "meta.query": "resampled",
        "meta.inner_lr": 0.5,
    }


def refused_line(capfd, function):
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        function()
    assert exit_.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    return line


def test_one_recipes_checkpoint_is_refused_by_the_other_by_name(capfd, tmp_path, small_corpus):
    """Each difference by its own name, one after the other is made up for by hand."""
    ssl = {
        recipe: DownstreamExpert(**arguments(small_corpus, tmp_path, system="entire_zero", recipe=recipe))
        for recipe in ("paper", "best")
    }
    paths = {recipe: saved(expert, tmp_path / f"{recipe}.ckpt") for recipe, expert in ssl.items()}
    paper = {"pooling": "mean", "activation": "none", "naming": False, "class_balanced": True}
    best = flat(read_settings({"corpus": "unused", "recipe": "best"}))
    for own, other in (("best", "paper"), ("paper", "best")):
        as_other = {}
        for name, of_paper in paper.items():
            here, there = (of_paper if recipe == "paper" else best[f"model.{name}"] for recipe in (own, other))
            meta = {"adapts": "all"} if as_other.get("naming") is False else {}
            ssl_of = {"targets": "mean"} if meta else {}
            made_up_for = {"recipe": own, "model": as_other.copy(), "meta": meta, "ssl": ssl_of}
            given = arguments(small_corpus, tmp_path, init_from=paths[other], **made_up_for)
            line = refused_line(capfd, lambda given=given: DownstreamExpert(**given))
            assert f"{other}.ckpt was made with {name} {there!r}, this run has {here!r}" in line
            as_other[name] = there
        line = refused_line(capfd, lambda own=own, other=other: ssl[own].load_state_dict(ssl[other].state_dict()))
        assert "was made with pooling" in line


def relabelled(corpus, folder, change):
    """A copy of a corpus with some annotations changed."""
    shutil.copytree(corpus, folder)
    frame = pd.read_csv(folder / "annotations.csv")
    before = frame["emotions"].copy()
    change(frame)
    assert (frame["emotions"] != before).any()
    frame.to_csv(folder / "annotations.csv", index=False)
    return folder


def batches(given):
    expert = DownstreamExpert(**given)
    taught = expert.learner.model.naming.weight.detach().clone()
    return taught, [batch for _, batch in expert.get_dataloader("train")]


@pytest.mark.parametrize("scenario", ["seen", "unseen"])
def test_what_is_expressed_is_learned_from_training_labels_alone(tmp_path, small_corpus, scenario):
    """E1 is the test listener and E2 dev; in unseen nobody's labels of session 5 may count. Others' do."""

    def not_for_training(frame):
        kept_back = frame["annotator"].isin(["E1", "E2"])
        if scenario == "unseen":
            kept_back |= frame["session"] == 5
        frame.loc[kept_back, "emotions"] = "happy"

    def for_training(frame):
        frame.loc[(frame["annotator"] == "E3") & (frame["session"] < 3), "emotions"] = "happy"

    def learned(corpus, folder):
        change = {"scenario": scenario, "episodes": {"queries": 4}, "data": {"min_annotations": 4}}
        return batches(arguments(corpus, folder, system="entire_zero", recipe="best", **change))

    naming, items = learned(small_corpus, tmp_path)
    same_naming, same_items = learned(relabelled(small_corpus, tmp_path / "same", not_for_training), tmp_path)
    assert torch.equal(naming, same_naming)
    assert len(items) > 2
    for item, same in zip(items, same_items, strict=True):
        assert item.utterances == same.utterances
        assert np.array_equal(item.targets, same.targets)
    other_naming, other_items = learned(relabelled(small_corpus, tmp_path / "other", for_training), tmp_path)
    assert not torch.equal(naming, other_naming)
    assert not all(np.array_equal(a.targets, b.targets) for a, b in zip(items, other_items, strict=True))


def test_ssl_e_is_trained_on_what_is_expressed_and_its_naming_is_what_listeners_call_it(tmp_path, small_corpus):
    taught, items = batches(arguments(small_corpus, tmp_path, system="entire_zero", recipe="best"))
    split = make_split(load_corpus(small_corpus), "seen", 1, DataSettings(min_annotations=4))
    estimate = estimate_expressed(split.annotations())
    rows = torch.from_numpy(estimate.naming)
    torch.testing.assert_close((SCALE * taught).softmax(-1), rows)
    expected = dict(zip(estimate.examples.utterances, estimate.examples.targets, strict=True))
    assert all(
        np.array_equal(target, expected[utterance])
        for item in items
        for utterance, target in zip(item.utterances, item.targets, strict=True)
    )
    by_mean, mean_items = batches(
        arguments(small_corpus, tmp_path, system="entire_zero", recipe="best", ssl={"targets": "mean"})
    )
    assert torch.equal(by_mean, taught)
    means = dict(zip(split.aggregated.utterances, split.aggregated.targets, strict=True))
    assert np.array_equal(mean_items[0].targets[0], means[mean_items[0].utterances[0]])


@pytest.mark.parametrize("system", ["entire_zero", "meta_perser"])
def test_dropout_is_drawn_by_the_position_in_training_alone(tmp_path, small_corpus, system):
    """Not by what the runner or an evaluation has drawn before; nor does it change what they draw next."""
    expert = DownstreamExpert(**arguments(small_corpus, tmp_path, system=system, recipe="best"))
    upstream = fbank_no_cmvn()
    expert.bind(upstream, Featurizer(upstream, upstream_device="cpu"))
    _, batch = next(iter(expert.get_dataloader("train")))

    def loss(position, drawn):
        torch.manual_seed(drawn)
        before = torch.get_rng_state()
        expert.batches_seen.fill_(position)
        value = expert("train", [], batch, records=defaultdict(list)).item()
        assert torch.equal(torch.get_rng_state(), before)
        return value

    assert loss(3, drawn=1) == loss(3, drawn=2)
    assert loss(3, drawn=1) != loss(4, drawn=1)
    expert.eval()
    assert loss(3, drawn=1) == loss(4, drawn=1), "and dropout is all that the position decides here"


def test_several_layers_are_standardised_row_by_row_and_come_back(tmp_path, small_corpus, small_wavlm):
    """Three hidden states of a WavLM: three rows of means and three of deviations."""
    upstream = wavlm_local(ckpt=str(small_wavlm)).eval()
    given = arguments(small_corpus, tmp_path, recipe="best", meta={"annealing": None})
    given |= {"upstream": "wavlm_local", "upstream_ckpt": str(small_wavlm), "upstream_dim": 32}

    def bound(**change):
        expert = DownstreamExpert(**given | change)
        featurizer = Featurizer(upstream, upstream_device="cpu")
        expert.bind(upstream, featurizer)
        return expert, featurizer

    def predictions(expert):
        records = defaultdict(list)
        ((_, episodes),) = expert.get_dataloader("test")
        expert("test", [], episodes, records=records)
        return np.stack([episode.probabilities for episode in records["episodes"]])

    expert, featurizer = bound()
    _, episodes = next(iter(expert.get_dataloader("train")))
    expert("train", [], episodes, records=defaultdict(list)).backward()
    assert featurizer.weights.grad.abs().min() > 0, "the weighted sum is meta-learned, though it does not adapt"
    assert expert.learner.rates.rates.shape == (5, 1)

    training = expert.run.features.gather(expert.run.split.aggregated.utterances)
    assert training.shape[1:] == (6, 32)
    torch.testing.assert_close(training.mean(0), torch.zeros(6, 32), atol=1e-4, rtol=0)
    torch.testing.assert_close(training.std(0, correction=0), torch.ones(6, 32), atol=1e-4, rtol=0)

    again, _ = bound(mode="evaluate", init_ckpt="of the expert above")
    again.load_state_dict(expert.state_dict())
    assert torch.equal(again.run.features.gather(expert.run.split.aggregated.utterances), training)
    assert np.array_equal(predictions(again), predictions(expert))


# Under the stock runner

LONG = {"total_steps": 300, "eval_step": 100, "save_step": 10}


@pytest.fixture(scope="module")
def shop(tmp_path_factory, small_corpus):
    """SSL-E, Meta-PerSER from it, trained by the stock runner."""
    shop = Workshop(tmp_path_factory.mktemp("best"), small_corpus, ["-u", "fbank_no_cmvn"])
    shop.ssl_config = shop.config("ssl_e", LONG)
    shop.train("ssl", shop.ssl_config)
    shop.train("meta", shop.config("meta_perser", init_from=str(shop.root / "ssl/dev-best.ckpt")))
    return shop


def test_killed_ssl_e_with_dropout_resumes_to_the_same_bits(shop):
    killed = shop.root / "killed"
    assert shop.train_until_killed("killed", shop.ssl_config) < LONG["total_steps"]
    shop.run("-m", "train", "-e", killed, program=LAUNCHER)
    for name in (f"states-{LONG['total_steps']}.ckpt", "dev-best.ckpt"):
        assert same_weights(shop.root / "ssl" / name, killed / name)
    assert (shop.root / "ssl/results.csv").read_text() == (killed / "results.csv").read_text()


def test_meta_training_moves_the_body_the_naming_and_its_one_rate_a_step(shop):
    start, end = (downstream_state(shop.root / path) for path in ("ssl/dev-best.ckpt", "meta/states-6.ckpt"))
    learned = {
        name.removeprefix("learner.model.")
        for name in start
        if name.startswith("learner.model.") and not torch.equal(start[name], end[name])
    }
    layers = {f"{layer}.{kind}" for layer in ("projector", "classifier") for kind in ("weight", "bias")}
    assert learned == layers | {"naming.weight", "naming.log_sharpness"}
    assert end["learner.rates.rates"].shape == (5, 1)
    assert (end["learner.rates.rates"] != 0.1).all()
    for name in ("mean", "scale"):
        assert torch.equal(start[f"learner.standardization.{name}"], end[f"learner.standardization.{name}"])
        assert start[f"learner.standardization.{name}"].shape == (2, 240), "means and deviations, each to one scale"


def test_evaluating_the_checkpoint_gives_the_results_it_was_chosen_with(shop):
    shop.evaluate(shop.root / "meta/dev-best.ckpt", "again")
    for name in ("results.csv", "predictions.csv"):
        assert (shop.root / "again" / name).read_text() == (shop.root / "meta" / name).read_text()
    probabilities = pd.read_csv(shop.root / "again/predictions.csv").filter(like="p_").to_numpy()
    assert probabilities.sum(axis=1) == pytest.approx(1.0, abs=1e-5)


def test_inference_prints_probabilities_and_what_is_above_chance(shop, small_corpus):
    clip = small_corpus / "audio/Ses01_00.wav"
    done = shop.run("-m", "inference", "-e", shop.root / "meta/dev-best.ckpt", "-t", clip, program=LAUNCHER)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    heard = json.loads(line)
    assert sum(heard["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
    assert heard["emotions"] == [name for name, p in heard["probabilities"].items() if p > 1 / 9]
