"""The rows of Table 1 against small cases worked out by hand, and the proof that all of them meet the same episodes."""

import math
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
import torch
from runner_stand_in import arguments, saved
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer
from tensorboardX import SummaryWriter

from s3prl_metaperser.corpus.manifest import load_corpus
from s3prl_metaperser.datasets import AnnotationBatches
from s3prl_metaperser.episodes import Episode, Examples, make_split
from s3prl_metaperser.expert import DownstreamExpert
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.multi_task import AnnotatorHeads, fresh_heads
from s3prl_metaperser.prediction import Prediction
from s3prl_metaperser.results_file import TUNED_FOR
from s3prl_metaperser.settings import AdaptationSettings, DataSettings, read_settings
from s3prl_metaperser.similarity import emotion_centres, similarity_probabilities
from s3prl_metaperser.systems import DISPLAY_NAMES, EntireSim, MultiFew, Reference, coinciding_systems
from s3prl_metaperser.tuning import Candidate, tune
from s3prl_metaperser.upstream.features import FeatureTable

CPU = torch.device("cpu")
FEW = DataSettings(min_annotations=4)


def bound(given):
    expert = DownstreamExpert(**given)
    upstream = fbank_no_cmvn()
    expert.bind(upstream, Featurizer(upstream, upstream_device="cpu"))
    return expert


def evaluated(expert, split="test"):
    records = defaultdict(list)
    for _, batch in expert.get_dataloader(split):
        expert(split, [], batch, records=records)
    return records["episodes"]


def few_shot(settings=None, classes=3, dim=2, width=2, annotators=0, system="entire_zero"):
    """A learner on one layer of ``dim`` features."""
    torch.manual_seed(0)
    given = {"corpus": "unused", "system": system, "model": {"projector_dim": width}} | (settings or {})
    learner = Learner(read_settings(given), dim, torch.linspace(0.5, 1.5, classes), annotators)
    learner.bind_layer_weights(None, 1)
    return learner


def table(features):
    """Features of utterances named by their index; (n, dim)."""
    return FeatureTable([str(index) for index in range(len(features))], features.unsqueeze(1), torch.ones(1), CPU)


def examples(rows, targets):
    return Examples(tuple(str(row) for row in rows), np.asarray(targets, dtype=np.float32))


# Entire-Sim.

A, B, C = [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]


def softmax(*values):
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def test_entire_sim_by_hand():
    """Centres are plain means, a clip of two emotions is in both, an emotion nobody ticked has probability 0."""
    features = torch.tensor([[1.0, 0], [0, 1], [0, -2], [3, 4], [4, 3], [0, 0], [-1, 0]])
    first = Episode("X", 0, examples([0, 1, 2], [A, [0.5, 0.5, 0], B]), examples([3, 4, 5], [A, A, A]))
    second = Episode("Y", 0, examples([6], [C]), examples([0, 1, 6], [A, A, A]))
    learner = few_shot()
    learner.model.projector.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
    probabilities = EntireSim().predict(learner, table(features), [first, second]).probabilities

    # Support (1, 0): a; (0, 1): a and b; (0, −2): b. Centres a = (½, ½), b = (0, −½); nobody said c.
    r = math.sqrt(0.5)
    np.testing.assert_allclose(
        probabilities[0],
        [
            [*softmax(0.6 * r + 0.8 * r, -0.8), 0],
            [*softmax(0.8 * r + 0.6 * r, -0.6), 0],
            [0.5, 0.5, 0],  # the zero vector is similar to nothing
        ],
        atol=1e-6,
    )
    # One clip in the support, padded to three: its emotion is all there is.
    np.testing.assert_allclose(probabilities[1], [[0, 0, 1]] * 3, atol=1e-6)


def test_padding_is_in_no_centre_and_a_centre_at_the_origin_is_similar_to_nothing():
    embeddings = torch.tensor([[[1.0, 0], [-1, 0], [0, 2], [7, 7], [7, 7]]])
    weights = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0, 0]])
    centres, present = emotion_centres(embeddings, torch.tensor([[A, A, B, A, C]]), weights)
    torch.testing.assert_close(centres, torch.tensor([[[0.0, 0], [0, 2], [0, 0]]]))
    assert present.tolist() == [[True, True, False]]
    probabilities = similarity_probabilities(torch.tensor([[[0.0, 5]]]), centres, present)
    np.testing.assert_allclose(probabilities[0, 0], [*softmax(0, 1), 0], atol=1e-6)


# Multi-Few


def test_each_annotation_is_judged_by_its_own_annotators_head():
    """Against a loop over the annotations, a ``nn.Linear`` an annotator."""
    learner = few_shot(classes=3, dim=5, width=4, annotators=6, system="multi_few")
    statistics, annotators = torch.randn(8, 1, 5), torch.tensor([0, 3, 3, 5, 0, 1, 3, 5])
    targets = torch.rand(8, 3)
    targets /= targets.sum(-1, keepdim=True)
    loss = learner.annotator_loss(statistics, targets, annotators)
    by_hand = []
    for clip, target, annotator in zip(statistics[:, 0], targets, annotators, strict=True):
        head = torch.nn.Linear(4, 3)
        head.weight.data, head.bias.data = learner.model.heads.weight[annotator], learner.model.heads.bias[annotator]
        logits = head(learner.model.projector(clip))
        weight = sum(float(t * w) for t, w in zip(target, learner.class_weights, strict=True))
        by_hand.append(weight * torch.nn.functional.cross_entropy(logits, target).item())
    assert loss.item() == pytest.approx(np.mean(by_hand), rel=1e-6)

    loss.backward()
    for gradient in (learner.model.heads.weight.grad, learner.model.heads.bias.grad):
        touched = {head for head, own in enumerate(gradient) if own.abs().max() > 0}
        assert touched == {0, 1, 3, 5}, "heads 2 and 4 belong to nobody in this batch"
    assert learner.model.projector.weight.grad.abs().min() > 0, "the body belongs to all"


def test_annotators_who_disagree_are_learned_apart():
    """Two annotators name the same clips in opposite ways; one classifier could not follow both."""
    learner = few_shot(classes=2, dim=2, width=4, annotators=2, system="multi_few")
    clips = torch.tensor([[1.0, 0.5], [-1.0, 0.5]]).repeat(2, 1).unsqueeze(1)
    targets = torch.eye(2)[[0, 1, 1, 0]]
    annotators = torch.tensor([0, 0, 1, 1])
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        learner.annotator_loss(clips, targets, annotators).backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(learner.model(clips[:, 0], annotators).argmax(-1), targets.argmax(-1))


def test_a_crowd_of_annotators_has_a_head_each():
    heads = AnnotatorHeads(2000, 256, 9)
    annotators = torch.tensor([1999, 0, 1999])
    heads(torch.randn(3, 256), annotators).square().sum().backward()
    assert heads.weight.grad.flatten(1).abs().amax(1).nonzero().flatten().tolist() == [0, 1999]


def test_minibatches_are_single_annotations_with_their_annotator(small_corpus):
    corpus = load_corpus(small_corpus)
    split = make_split(corpus, "unseen", 1, FEW)
    settings = read_settings({"corpus": "unused", "multi_task": {"batch_size": 9}})
    names = [task.annotator for task in split.train]
    frame, targets = corpus.annotations, corpus.targets()
    said = {(row.utterance, row.annotator): target for row, target in zip(frame.itertuples(), targets, strict=True)}
    total = sum(map(len, split.train))
    batches = AnnotationBatches(split, settings, 1, 0, 2 * (total // 9))
    epochs = [[], []]
    for index in range(len(batches)):
        batch = batches[index][1]
        for utterance, target, annotator in zip(
            batch.examples.utterances, batch.examples.targets, batch.annotators, strict=True
        ):
            np.testing.assert_array_equal(target, said[utterance, names[annotator]])
            epochs[index * 9 // (total // 9 * 9)].append((utterance, names[annotator]))
    assert len(set(epochs[0])) == len(set(epochs[1])) == total // 9 * 9, "once an epoch each, bar the last few"
    assert epochs[0] != epochs[1]
    resumed = AnnotationBatches(split, settings, 1, 3, 4)
    assert len(resumed) == 1
    assert resumed[0][1].examples.utterances == batches[3][1].examples.utterances


def episode(annotator, index, support, query):
    rng = np.random.default_rng(index)
    return Episode(
        annotator, index, *(examples(rows, rng.dirichlet(np.ones(3), len(rows))) for rows in (support, query))
    )


def test_multi_few_adapts_a_new_head_and_nothing_else():
    """Against torch's own SGD on a ``nn.Linear`` over frozen embeddings, episode by episode."""
    learner = few_shot(classes=3, dim=5, width=4, annotators=2, system="multi_few")
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    features = torch.randn(12, 5)
    episodes = [episode("X", 0, [0, 1, 2, 3], [4, 5]), episode("X", 1, [6, 7], [8, 9])]
    system = MultiFew(AdaptationSettings(lr=0.5, steps=7), "miF1", seed=3)
    prediction = system.predict(learner, table(features), episodes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())
    assert prediction.support_losses.shape == (7,)

    heads = fresh_heads(3, episodes, 4, 3, CPU)
    for place, own in enumerate(episodes):
        head = torch.nn.Linear(4, 3)
        head.weight.data, head.bias.data = heads["weight"][place].clone(), heads["bias"][place].clone()
        optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
        embedded = learner.model.projector(features).detach()
        targets = torch.from_numpy(own.support.targets)
        for _ in range(7):
            optimizer.zero_grad()
            logits = head(embedded[[int(name) for name in own.support.utterances]])
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            (losses * (targets @ learner.class_weights)).mean().backward()
            optimizer.step()
        expected = head(embedded[[int(name) for name in own.query.utterances]]).softmax(-1).detach()
        np.testing.assert_allclose(prediction.probabilities[place], expected, atol=1e-6)


def test_a_new_head_is_drawn_for_its_episode_alone_and_as_torch_draws_one():
    episodes = [episode("X", 0, [0], [1]), episode("X", 1, [0], [1]), episode("Y", 0, [0], [1])]
    together = fresh_heads(3, episodes, 64, 9, CPU)
    for place, own in enumerate(episodes):
        alone = fresh_heads(3, [own], 64, 9, CPU)
        assert torch.equal(alone["weight"][0], together["weight"][place])
    heads = [*together["weight"], fresh_heads(4, episodes[:1], 64, 9, CPU)["weight"][0]]
    assert all(not torch.equal(a, b) for i, a in enumerate(heads) for b in heads[:i])
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 9)
    for ours, torchs in ((together["weight"], linear.weight), (AnnotatorHeads(3, 64, 9).weight, linear.weight)):
        assert ours.abs().max() <= 1 / 8
        assert ours.std().item() == pytest.approx(torchs.std().item(), rel=0.1)


# Reference


@pytest.mark.parametrize("scenario", ["seen", "unseen"])
def test_the_reference_has_all_of_the_listeners_labels_but_the_query(small_corpus, scenario):
    split = make_split(load_corpus(small_corpus), scenario, 1, FEW)
    reference = Reference(AdaptationSettings(), "miF1", split.listeners)
    (test,), (dev,) = split.test, split.dev
    assert len(reference.labels["E1"]) == 60, "the test listener's labels of every session"
    assert len(reference.labels["E2"]) == (60 if scenario == "seen" else 48), "dev's never from the test session"
    for task in (test, dev):
        query = task.examples.take(np.arange(8))
        own = reference.labels[task.annotator]
        support = reference.support(Episode(task.annotator, 0, query, query))
        assert set(support.utterances) == set(own.utterances) - set(query.utterances)
        assert len(support) == len(own) - 8
        rows = [own.utterances.index(utterance) for utterance in support.utterances]
        np.testing.assert_array_equal(support.targets, own.targets[rows])
    assert {task.annotator for task in split.train}.isdisjoint(reference.labels)
    foreign = Examples(("elsewhere",), test.examples.targets[:1])
    with pytest.raises(AssertionError, match="do not part"):
        reference.support(Episode("E1", 0, foreign, foreign))


# Tuning


def scripted(scores):
    """A system whose score at (lr, steps) is given: the share of its two queries that it gets right, in percent."""
    asked = []

    def predict(episodes, lr, steps):
        asked.append((lr, tuple(steps)))
        right = {100: [[0.9, 0.1], [0.1, 0.9]], 50: [[0.9, 0.1], [0.9, 0.1]], 0: [[0.1, 0.9], [0.9, 0.1]]}
        return {n: Prediction(np.array([right[scores[lr, n]]] * len(episodes)), np.zeros(n)) for n in steps}

    return predict, asked


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({(0.1, 5): 0, (0.1, 9): 50, (0.3, 5): 100, (0.3, 9): 50}, Candidate(0.3, 5)),
        ({(0.1, 5): 0, (0.1, 9): 100, (0.3, 5): 100, (0.3, 9): 100}, Candidate(0.1, 9)),
        ({(0.1, 5): 50, (0.1, 9): 50, (0.3, 5): 50, (0.3, 9): 50}, Candidate(0.1, 5)),
    ],
)
def test_the_best_rate_and_steps_on_dev_are_chosen_and_of_equals_the_first(scores, best):
    dev = [Episode("D", index, examples([0], [[1, 0]]), examples([1, 2], [[1, 0], [0, 1]])) for index in range(70)]
    predict, asked = scripted(scores)
    tuning = tune(predict, [0.1, 0.3], [5, 9], dev, "UA")
    assert tuning.best == best
    assert dict(zip([(one.lr, one.steps) for one in tuning.candidates], tuning.scores, strict=True)) == scores
    assert asked == [(lr, (5, 9)) for lr in (0.1, 0.3) for _ in range(2)], "one adaptation a rate and batch of episodes"
    assert [len(one.support_losses) for one in tuning.predictions.values()] == [best.steps] * 2
    assert tuning.predictions.keys() == {("D", 0), ("D", 64)}
    assert f"S adapts at {best}, best dev UA of {{lr 0.1: " in tuning.line("S")


TUNED = {"lr": [0.01, 0.3], "steps": [1, 3]}


@pytest.mark.parametrize("system", ["linear_few", "entire_few", "multi_few", "meta_perser", "reference"])
def test_every_adapting_system_is_tuned_alike(tmp_path, small_corpus, system):
    given = arguments(small_corpus, tmp_path, system, adaptation=TUNED, reference=TUNED)
    expert = bound(given | {"mode": "evaluate", "init_ckpt": "given.ckpt"})
    calls = []
    adapt_and_predict = expert.run.system.adapt_and_predict
    expert.run.system.adapt_and_predict = lambda *a: calls.append(a) or adapt_and_predict(*a)
    records = defaultdict(list)
    for _, batch in expert.get_dataloader("dev"):
        expert("dev", [], batch, records=records)
    rates = [None] if system == "meta_perser" else [0.01, 0.3]
    assert [(call[3], call[4]) for call in calls] == [(lr, [1, 3]) for lr in rates], "dev adapts to choose, and no more"
    chosen = expert.run.system.chosen

    expert.log_records("dev", records, SummaryWriter(str(tmp_path / "tb")), 0, [], 1)
    tuning = pd.read_csv(tmp_path / "run/tuning.csv")
    assert list(tuning.columns) == [*TUNED_FOR, "lr", "steps", "miF1", "chosen"]
    assert set(tuning["system"]) == {DISPLAY_NAMES[system]}
    assert tuning["steps"].tolist() == [1, 3] * len(rates)
    assert tuning["lr"].isna().all() if system == "meta_perser" else tuning["lr"].tolist() == [0.01, 0.01, 0.3, 0.3]
    (row,) = tuning[tuning["chosen"]].itertuples()
    assert row.miF1 == tuning["miF1"].max()
    assert row.steps == chosen.steps
    dev = pd.read_csv(tmp_path / "run/results-dev.csv")
    assert dev["miF1"].mean() == pytest.approx(row.miF1, abs=1e-3), "dev's result is the tuned one"

    adapted = [one.probabilities for one in evaluated(expert)]
    fixed = {"lr": chosen.lr or 0.1, "steps": chosen.steps}
    untuned = arguments(small_corpus, tmp_path, system, adaptation=fixed, reference=fixed)
    other = bound(untuned | {"mode": "evaluate", "init_ckpt": "given.ckpt"})
    other.learner.load_state_dict(expert.learner.state_dict())
    np.testing.assert_array_equal(adapted, [one.probabilities for one in evaluated(other)])


def test_tuning_is_of_the_weights_as_they_are(tmp_path, small_corpus):
    """After a step of training, another rate may be best."""
    expert = bound(arguments(small_corpus, tmp_path, "entire_few", adaptation=TUNED))
    tunings = []
    tune_system = expert.run.system.tune
    expert.run.system.tune = lambda *a: tunings.append(0) or tune_system(*a)
    evaluated(expert, "dev")
    evaluated(expert, "test")
    assert len(tunings) == 1
    expert("train", [], next(iter(expert.get_dataloader("train")))[1], records=defaultdict(list))
    evaluated(expert, "dev")
    assert len(tunings) == 2


def test_tuning_of_several_systems_and_settings_shares_a_file(tmp_path, small_corpus):
    """Each keeps its scores until it is tuned again; an older file's rows do not say what they are for."""
    (tmp_path / "run").mkdir()
    older = "system,lr,steps,miF1,chosen\nEntire-Few,0.1,1,40.0,True\nLinear-Few,0.1,1,40.0,True\n"
    (tmp_path / "run/tuning.csv").write_text(older)
    for system, shots, fold in (
        *(("entire_few", 4, 1), ("entire_few", 2, 1), ("multi_few", 4, 1)),
        *(("entire_few", 4, 2), ("entire_few", 4, 1)),
    ):
        given = arguments(small_corpus, tmp_path, system, adaptation={"lr": 0.1, "steps": [1, 2]})
        given["downstream_expert"] |= {"fold": fold}
        given["downstream_expert"]["episodes"] |= {"shots": shots}
        expert = bound(given | {"mode": "evaluate", "init_ckpt": "given.ckpt"})
        evaluated(expert, "dev")
        expert.run.report.write_tuning(expert.run._tuning, fold)
    tuning = pd.read_csv(tmp_path / "run/tuning.csv").fillna({"shots": 0, "fold": 0})
    of_rows = list(tuning[["system", "shots", "fold"]].itertuples(index=False, name=None))
    kept = [("Entire-Few", 2, 1), ("Multi-Few", 4, 1), ("Entire-Few", 4, 2), ("Entire-Few", 4, 1)]
    assert of_rows == [("Linear-Few", 0, 0), *(one for one in kept for _ in range(2))]


# All systems

FIXED = {"lr": 0.1, "steps": 2}


def test_all_systems_meet_the_same_support_and_query(tmp_path, small_corpus):
    """What each one asks the features for, and what it is scored on, as s3prl's runner would have it."""
    heard, scored = {}, {}
    for system in [name for name in DISPLAY_NAMES if name != "personal"]:
        given = arguments(small_corpus, tmp_path, system, adaptation=FIXED, reference=FIXED, scenario="unseen")
        expert = bound(given | {"mode": "evaluate", "init_ckpt": "given.ckpt"})
        own = heard[system] = []
        gather = expert.run.features.gather
        expert.run.features.gather = lambda names, gather=gather, own=own: own.append(list(names)) or gather(names)
        scored[system] = evaluated(expert)

    (first, second) = scored["random"]
    assert (first.episode.annotator, first.episode.index, second.episode.index) == ("E1", 0, 1)
    support = [*first.episode.support.utterances, *second.episode.support.utterances]
    query = [*first.episode.query.utterances, *second.episode.query.utterances]
    assert (len(support), len(query)) == (2 * 4, 2 * 8)
    few = [support, query]
    reference = heard.pop("reference")
    assert heard == {
        "random": [],
        "entire_zero": [query],
        **dict.fromkeys(["linear_few", "entire_few", "multi_few", "entire_sim", "meta_perser"], few),
    }
    assert reference[1] == query
    labelled = {f"Ses{session:02d}_{number:02d}" for session in range(1, 6) for number in range(12)}
    for place, one in enumerate((first, second)):
        others = reference[0][place * 52 : (place + 1) * 52]
        assert set(others) == labelled - set(one.episode.query.utterances), "all labels but the query's"
    for episodes in scored.values():
        for one, expected in zip(episodes, (first, second), strict=True):
            assert one.episode.query.utterances == expected.episode.query.utterances
            np.testing.assert_array_equal(one.episode.query.targets, expected.episode.query.targets)
            np.testing.assert_array_equal(one.episode.support.targets, expected.episode.support.targets)
            assert one.probabilities.shape == (8, 9)
            np.testing.assert_allclose(one.probabilities.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("scope", ["head", "linear"])
def test_systems_that_coincide_say_the_same(tmp_path, small_corpus, scope):
    predictions = {}
    for system in ("linear_few", "entire_few", "entire_zero"):
        given = arguments(small_corpus, tmp_path, system, scope=scope, adaptation=FIXED)
        torch.manual_seed(0)
        expert = bound(given | {"mode": "evaluate", "init_ckpt": "given.ckpt"})
        predictions[system] = np.stack([one.probabilities for one in evaluated(expert)])
    for system, other in coinciding_systems(scope).items():
        np.testing.assert_array_equal(predictions[system], predictions[other])
    assert coinciding_systems(scope) == {"linear_few": "entire_few"}
    assert not np.array_equal(predictions["entire_few"], predictions["entire_zero"])


def test_heads_of_other_annotators_are_refused(tmp_path, small_corpus, capfd):
    """A head means nothing without its annotator: order and names are saved, and compared."""
    multi = bound(arguments(small_corpus, tmp_path, "multi_few"))
    path = saved(multi, tmp_path / "multi.ckpt")
    state = multi.state_dict()
    assert state["_extra_state"]["contract"]["heads"] == ["E3", "F1", "M2"]
    again = bound(arguments(small_corpus, tmp_path, "multi_few", init_from=path))
    torch.testing.assert_close(again.learner.model.heads.weight, torch.as_tensor(state["learner.model.heads.weight"]))
    again.load_state_dict(state)

    def refused(function, *expected):
        with pytest.raises(SystemExit) as exit_:
            function()
        assert exit_.value.code == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert all(part in error for part in expected), error

    fewer = arguments(small_corpus, tmp_path, "multi_few", data={"min_annotations": 20})
    refused(lambda: DownstreamExpert(**fewer).load_state_dict(state), "heads E3, F1, M2", "this run has E3;")
    swapped = {**state, "_extra_state": {**state["_extra_state"]}}
    swapped["_extra_state"]["contract"] = state["_extra_state"]["contract"] | {"heads": ["F1", "E3", "M2"]}
    refused(lambda: again.load_state_dict(swapped), "heads F1, E3, M2")
    few = DownstreamExpert(**arguments(small_corpus, tmp_path, "entire_few") | {"mode": "evaluate", "init_ckpt": "x"})
    refused(lambda: few.load_state_dict(state), "trained on annotators", "needs one trained on aggregated")
    guess = arguments(small_corpus, tmp_path, "random") | {"mode": "evaluate", "init_ckpt": "x"}
    refused(lambda: DownstreamExpert(**guess).load_state_dict(state), "Multi-Few's", "leave -e and -i out")
    meta = arguments(small_corpus, tmp_path, init_from=path)
    refused(lambda: DownstreamExpert(**meta), "multi.ckpt has a head for each annotator", "SSL-E")
    hearing = arguments(small_corpus, tmp_path, "multi_few") | {"mode": "inference", "init_ckpt": path}
    refused(lambda: DownstreamExpert(**hearing), "no head for a listener without labels", "-m evaluate")


def test_multi_few_takes_its_body_from_ssl_e(tmp_path, small_corpus):
    ssl = bound(arguments(small_corpus, tmp_path, "entire_zero"))
    path = saved(ssl, tmp_path / "ssl.ckpt")
    torch.manual_seed(5)
    multi = bound(arguments(small_corpus, tmp_path, "multi_few", init_from=path))
    assert torch.equal(multi.learner.model.projector.weight, ssl.learner.model.projector.weight)
