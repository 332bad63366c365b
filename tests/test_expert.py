"""The expert in the hands of a runner: what one training step takes from each part of the method."""

import pytest
import torch
from runner_stand_in import arguments, one_training_step, saved
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer

from s3prl_metaperser.adaptation.rates import LSLR, FixedRate
from s3prl_metaperser.expert import DownstreamExpert


def bound(given):
    expert = DownstreamExpert(**given)
    upstream = fbank_no_cmvn()
    expert.bind(upstream, Featurizer(upstream, upstream_device="cpu"))
    return expert


def second_order_steps(expert, progress):
    return [expert.learner.annealing.second_order(step, 5, progress) for step in range(5)]


def test_each_part_of_the_method_is_switched_off_alone(tmp_path, small_corpus):
    """INI, CSMT, DA and LSLR (Table 2), one at a time, all else as in the paper."""
    ssl = DownstreamExpert(**arguments(small_corpus, tmp_path, system="entire_zero"))
    with torch.no_grad():
        ssl.learner.model.classifier.bias.fill_(0.125)
    upstream = fbank_no_cmvn()
    ssl.bind(upstream, Featurizer(upstream, upstream_device="cpu"))
    path = saved(ssl, tmp_path / "ssl.ckpt")
    off = {
        "nothing": {},
        "INI": {"init_from": None},
        "CSMT": {"meta": {"query": "disjoint"}},
        "DA": {"meta": {"query": "combined", "annealing": None}},
        "LSLR": {"meta": {"query": "combined", "lslr": False}},
    }
    for part, change in off.items():
        settings = {"init_from": path, "meta": {"query": "combined"}} | change
        given = arguments(small_corpus, tmp_path, **settings)
        assert torch.isfinite(one_training_step(given)), part
        expert = bound(given)
        initialised = bool((expert.learner.model.classifier.bias == 0.125).all())
        assert initialised == (part != "INI")
        (_, episodes) = next(iter(expert.get_dataloader("train")))
        combined = all(episode.query is episode.support for episode in episodes)
        assert combined == (part != "CSMT")
        annealed = second_order_steps(expert, 0.0) == [False, False, True, True, True]
        assert annealed == (part != "DA")
        assert isinstance(expert.learner.rates, FixedRate if part == "LSLR" else LSLR)


def test_annealing_over_training_follows_the_position_in_training(tmp_path, small_corpus):
    given = arguments(small_corpus, tmp_path, meta={"annealing": {"fraction": 0.3, "over": "training"}})
    expert = bound(given)
    assert second_order_steps(expert, 0.29) == [False] * 5
    assert second_order_steps(expert, 0.3) == [True] * 5
    seen = []
    original = expert.learner.meta_loss
    expert.learner.meta_loss = lambda *a: seen.append(a[2]) or original(*a)
    expert.batches_seen.fill_(250)
    dataloader = expert.get_dataloader("train")
    assert len(dataloader) == 250, "a resumed run goes on with the next batch"
    expert(
        "train",
        [],
        next(iter(dataloader))[1],
        records={"query_loss": [], **{f"support_loss/step{i}": [] for i in range(5)}},
    )
    assert seen == [0.5]
    assert int(expert.batches_seen) == 251


def test_the_hook_catches_the_runners_modules_and_goes(tmp_path, small_corpus):
    """As the stock runner does it: nobody calls bind; the first forward of upstream and featurizer does."""
    from torch.nn.modules import module as registry

    hooks = len(registry._global_forward_pre_hooks)
    upstream = fbank_no_cmvn()
    featurizer = Featurizer(upstream, upstream_device="cpu")
    expert = DownstreamExpert(**arguments(small_corpus, tmp_path))
    assert len(registry._global_forward_pre_hooks) == hooks + 1
    wavs, _ = next(iter(expert.get_dataloader("train")))
    features = upstream(wavs)
    assert not expert.is_bound
    featurizer(wavs, features)
    assert expert.is_bound
    assert len(registry._global_forward_pre_hooks) == hooks
    assert not any(name.startswith(("upstream", "featurizer")) for name, _ in expert.named_modules())


@pytest.mark.parametrize("scope", ["head", "linear"])
def test_only_the_rooms_own_parameters_are_trained(tmp_path, small_corpus, scope):
    expert = bound(arguments(small_corpus, tmp_path, scope=scope))
    names = {name for name, _ in expert.named_parameters()}
    model = {f"learner.model.{layer}.{kind}" for layer in ("projector", "classifier") for kind in ("weight", "bias")}
    assert names == model | {"learner.rates.rates"}
    assert expert.learner.rates.rates.shape == (5, 4 if scope == "head" else 5)
