"""What is expressed and what a listener calls it, against formulas written out by hand.

The hand-written ones share no code with the package but its constants: Dawid and Skene's estimate in loops, the inner
gradient of a naming from its responsibilities, the smooth F1 in loops, and the whole outer loss of recipe ``best`` in
numpy, whose finite differences the meta-gradient must agree with.
"""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from s3prl_metaperser import expressed, naming, objective
from s3prl_metaperser.adaptation.rates import FixedRate
from s3prl_metaperser.batches import TaskBatch
from s3prl_metaperser.episodes import Annotations, Examples
from s3prl_metaperser.expressed import estimate_expressed
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.naming import Naming, name_emotions
from s3prl_metaperser.objective import smooth_f1_loss
from s3prl_metaperser.settings import read_settings


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


# The naming


def test_naming_by_hand():
    """75% of the first emotion, which is called the other one time in ten, and 25% of the second, one in five."""
    own = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    listener = Naming(2)
    listener.teach(own)
    clips = torch.tensor([[0.75, 0.25], [0.0, 1.0]]).log()
    named = name_emotions(clips, listener.weight).exp()
    expected = [[0.75 * 0.9 + 0.25 * 0.2, 0.75 * 0.1 + 0.25 * 0.8], [0.2, 0.8]]
    torch.testing.assert_close(named, torch.tensor(expected))
    swapped = torch.stack([listener.weight, listener.weight.flip(1)])
    of_two_listeners = name_emotions(clips.expand(2, 2, 2), swapped).exp()
    torch.testing.assert_close(of_two_listeners, torch.tensor([expected, [row[::-1] for row in expected]]))


def test_what_is_taught_is_what_is_said():
    taught = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(4), 4)).float()
    listener = Naming(4)
    sure = torch.full((4, 4), -1e4).fill_diagonal_(0.0)
    untaught = torch.full((4, 4), 1 / (math.exp(naming.UNTAUGHT) + 3))
    torch.testing.assert_close(
        name_emotions(sure, listener.weight).exp(), untaught.fill_diagonal_(1 - 3 * untaught[0, 0].item())
    )
    listener.teach(taught)
    torch.testing.assert_close(name_emotions(sure, listener.weight).exp(), taught)


def test_a_listener_may_always_slip():
    never = torch.tensor([[0.0, -100.0], [0.0, -100.0]], requires_grad=True)
    named = name_emotions(torch.zeros(1, 2), never)
    assert named[0, 1].item() == pytest.approx(math.log(naming.FLOOR))
    named[0, 1].backward()
    assert torch.isfinite(never.grad).all()


def test_sharpened_probabilities_are_powers():
    probabilities = np.array([0.5, 0.3, 0.2])
    listener = Naming(3)
    for sharpness in (naming.INITIAL_SHARPNESS, 0.7):
        sharpened = listener.sharpen(torch.tensor(probabilities).log()).softmax(-1)
        powers = probabilities**sharpness
        np.testing.assert_allclose(sharpened.detach().numpy(), powers / powers.sum(), rtol=1e-6)
        listener.log_sharpness.data.fill_(math.log(0.7))


# What is expressed


def dawid_skene_in_loops(rows, clips, annotators, classes):
    """Posterior of each clip and the average naming, from (annotator, clip, distribution) rows."""
    total = [[sum(t[c] for a, i, t in rows if i == clip) for c in range(classes)] for clip in clips]
    posterior = {clip: [mass / sum(masses) for mass in masses] for clip, masses in zip(clips, total, strict=True)}

    def counted():
        counts = np.zeros((annotators, classes, classes))
        for a, clip, t in rows:
            for z in range(classes):
                for c in range(classes):
                    counts[a, z, c] += posterior[clip][z] * t[c]
        average = np.zeros((classes, classes))
        for z in range(classes):
            mass = [sum(counts[a, z, c] for a in range(annotators)) + expressed.SMOOTHING for c in range(classes)]
            average[z] = [one / sum(mass) for one in mass]
        return counts, average

    for _ in range(expressed.ITERATIONS):
        counts, average = counted()
        own = np.zeros_like(counts)
        for a in range(annotators):
            for z in range(classes):
                mass = [counts[a, z, c] + expressed.SHRINKAGE * classes * average[z, c] for c in range(classes)]
                own[a, z] = [one / sum(mass) for one in mass]
        prior = [counts[:, z].sum() + 1 for z in range(classes)]
        updated = {}
        for clip in clips:
            log_joint = [math.log(prior[z] / sum(prior)) for z in range(classes)]
            for a, heard, t in rows:
                if heard == clip:
                    for z in range(classes):
                        log_joint[z] += sum(t[c] * math.log(own[a, z, c]) for c in range(classes))
            joint = [math.exp(one - max(log_joint)) for one in log_joint]
            updated[clip] = [one / sum(joint) for one in joint]
        posterior = updated
    return [posterior[clip] for clip in clips], counted()[1]


def confused_labels(seed=3, clips=14, annotators=5, classes=3):
    """Some listeners of some clips, one of a single clip; one label in five is two ticks."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=clips)
    habits = rng.dirichlet(np.ones(classes), (annotators, classes)) * 0.4 + 0.6 * np.eye(classes)
    rows = []
    for clip in range(clips):
        for a in [*np.flatnonzero(rng.random(annotators - 1) < 0.7), *([annotators - 1] if clip == 5 else [])]:
            ticked = [rng.choice(classes, p=habits[a, truth[clip]])]
            if rng.random() < 0.2:
                ticked.append((ticked[0] + 1) % classes)
            rows.append((int(a), f"clip{clip:02d}", np.bincount(ticked, minlength=classes) / len(ticked)))
    return rows


def as_annotations(rows):
    annotators, clips, targets = zip(*rows, strict=True)
    return Annotations(Examples(tuple(clips), np.array(targets, dtype=np.float32)), np.array(annotators))


@pytest.mark.parametrize(("labels_a_clip", "annotators"), [(1, 90), (2, 10), (4, 9)])
def test_estimate_is_no_worse_than_the_labels_where_they_are_few_and_better_where_listeners_have_habits(
    labels_a_clip, annotators
):
    """One label a clip says nothing of habits: then the labels stand. Left to converge, the estimate would collapse."""
    rng = np.random.default_rng(0)
    classes, clips = 9, annotators * 60 // labels_a_clip
    truth = rng.integers(classes, size=clips)
    habits = [rng.permutation(classes) if a % 3 == 0 else np.arange(classes) for a in range(annotators)]
    rows = []
    for place, clip in enumerate(rng.permutation(np.repeat(np.arange(clips), labels_a_clip))):
        a = place % annotators
        said = habits[a][truth[clip]] if rng.random() < 0.8 else rng.integers(classes)
        rows.append((a, f"{clip:05d}", np.eye(classes)[said]))
    estimate = estimate_expressed(as_annotations(rows))
    right = estimate.examples.targets.argmax(axis=1) == truth
    counted = np.zeros((clips, classes))
    for _, clip, target in rows:
        counted[int(clip)] += target
    by_majority = counted.argmax(axis=1) == truth
    assert right.mean() > by_majority.mean() - 0.02
    if labels_a_clip == 4:
        assert right.mean() > by_majority.mean() + 0.05


def test_estimate_agrees_with_dawid_and_skene_in_loops():
    rows = confused_labels()
    assert any(0.5 in t for _, _, t in rows), "two ticks count half each"
    assert sum(a == 4 for a, _, _ in rows) == 1, "one listener labelled a single clip"
    clips = sorted({clip for _, clip, _ in rows})
    posterior, average = dawid_skene_in_loops(rows, clips, annotators=5, classes=3)
    estimate = estimate_expressed(as_annotations(rows))
    assert estimate.examples.utterances == tuple(clips)
    np.testing.assert_allclose(estimate.examples.targets, posterior, atol=1e-6)
    np.testing.assert_allclose(estimate.naming, average, atol=1e-6)
    means = [np.mean([t for _, heard, t in rows if heard == clip], axis=0) for clip in clips]
    assert np.abs(estimate.examples.targets - means).max() > 0.1, "the estimate is not just the mean of the labels"


def test_estimate_is_the_same_whatever_the_order_of_the_labels():
    rows = confused_labels()
    estimate, again = (estimate_expressed(as_annotations(rows)) for _ in range(2))
    assert np.array_equal(estimate.examples.targets, again.examples.targets)
    assert np.array_equal(estimate.naming, again.naming)
    mixed = estimate_expressed(
        as_annotations([rows[place] for place in np.random.default_rng(0).permutation(len(rows))])
    )
    assert mixed.examples.utterances == estimate.examples.utterances
    np.testing.assert_allclose(mixed.examples.targets, estimate.examples.targets, atol=1e-6)
    np.testing.assert_allclose(mixed.naming, estimate.naming, atol=1e-6)


def test_a_listener_who_swaps_two_names_is_understood():
    """Even of a clip that nobody else has labelled; the mean of its labels would say the opposite."""
    first, second = np.eye(2)
    rows = [(a, f"clip{i}", first if i % 2 else second) for a in range(4) for i in range(20)]
    rows += [(4, f"clip{i}", second if i % 2 else first) for i in range(20)]
    estimate = estimate_expressed(as_annotations([*rows, (4, "only", first), (4, "torn", (first + second) / 2)]))
    found = dict(zip(estimate.examples.utterances, estimate.examples.targets, strict=True))
    assert found["only"][1] > 0.9
    assert found["clip3"][0] > 0.99
    assert found["torn"] == pytest.approx([0.5, 0.5], abs=0.05)
    assert estimate.naming == pytest.approx(np.array([[0.8, 0.2], [0.2, 0.8]]), abs=0.02), "four of five say so"


def test_listeners_of_one_label_each_are_understood():
    """Six strangers a clip, five of whom agree."""
    labels = np.eye(3)
    heard = [(clip, labels[(clip + (stranger == 0)) % 3]) for clip in range(6) for stranger in range(6)]
    estimate = estimate_expressed(as_annotations([(a, f"clip{clip}", t) for a, (clip, t) in enumerate(heard)]))
    assert estimate.examples.targets == pytest.approx(labels[np.arange(6) % 3], abs=0.01)
    wrong = np.roll(np.eye(3), 1, axis=1) / 6
    assert estimate.naming == pytest.approx(np.eye(3) * 5 / 6 + wrong, abs=0.02)


# The smooth F1


def smooth_f1_in_loops(logits, targets, weights):
    tasks, clips, classes = logits.shape
    zeros = np.zeros((tasks, classes))
    right, said, wanted = zeros.copy(), zeros.copy(), zeros.copy()
    for t in range(tasks):
        for i in range(clips):
            for c, p in enumerate(softmax(logits[t, i])):
                decided = 1 / (1 + math.exp(-math.log(p * classes) / objective.F1_TEMPERATURE))
                ticked = targets[t, i, c] > 0
                right[t, c] += weights[t, i] * decided * ticked
                said[t, c] += weights[t, i] * decided
                wanted[t, c] += weights[t, i] * ticked
    micro = [2 * right[t].sum() / (said[t].sum() + wanted[t].sum()) for t in range(tasks)]
    macro = [2 * right[:, c].sum() / (said + wanted)[:, c].sum() for c in range(classes) if wanted[:, c].any()]
    return 1 - (sum(micro) / len(micro) + sum(macro) / len(macro)) / 2


def decisions(seed=0, tasks=2, clips=7, classes=5):
    """Logits, and label distributions of which none holds the last emotion."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((tasks, clips, classes))
    ticked = np.eye(classes)[rng.integers(classes - 1, size=(tasks, clips))]
    ticked[:, ::3] = (ticked[:, ::3] + np.roll(ticked[:, ::3], 1, axis=-1) * [1] * classes) / 2
    ticked[..., -1] = 0
    return logits, ticked / ticked.sum(-1, keepdims=True), np.full((tasks, clips), 1 / clips)


def test_smooth_f1_by_hand():
    """Two tasks, of which the second has fewer clips: padding has no weight and must not matter."""
    logits, targets, weights = decisions()
    weights[1] = [1 / 4] * 4 + [0] * 3
    given = [torch.tensor(array) for array in (logits, targets, weights)]
    loss = smooth_f1_loss(*given).item()
    assert loss == pytest.approx(smooth_f1_in_loops(logits, targets, weights), rel=1e-10)
    given[0][1, 4:], given[1][1, 4:] = 9.0, 1.0
    assert smooth_f1_loss(*given).item() == pytest.approx(loss, rel=1e-12)
    logits = torch.tensor(logits, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: smooth_f1_loss(x, *map(torch.tensor, (targets, weights))), logits)


def test_smooth_f1_is_the_f1_of_hard_decisions_where_they_are_hard(monkeypatch):
    monkeypatch.setattr(objective, "F1_TEMPERATURE", 1e-4)
    logits, targets, weights = decisions()
    decided, ticked = softmax(logits) > 1 / 5, targets > 0
    assert np.abs(np.log(5 * softmax(logits))).min() > 1e-3, "no decision hangs in the balance"
    micro = np.mean([f1_score(t, d, average="micro") for t, d in zip(ticked, decided, strict=True)])
    held = [c for c in range(5) if ticked[..., c].any()]
    assert held == [0, 1, 2, 3]
    macro = f1_score(ticked.reshape(-1, 5), decided.reshape(-1, 5), labels=held, average="macro")
    loss = smooth_f1_loss(*map(torch.tensor, (logits, targets, weights))).item()
    assert loss == pytest.approx(1 - (micro + macro) / 2, abs=1e-6)


def test_smooth_f1_of_an_emotion_that_nobody_ticks_or_decides_for():
    logits = torch.tensor([[[1.0, 0.0, -1000.0], [0.0, 1.0, -1000.0]]], requires_grad=True)
    loss = smooth_f1_loss(logits, torch.eye(3)[None, :2], torch.full((1, 2), 0.5))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 0, 0] < 0


# The recipe's inner and outer loop

STEPS, LAYERS, DIM, CLASSES, TASKS, CLIPS = 3, 2, 3, 4, 2, 6
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 1.5, 1.0])


def best_learner(annealing=None, dropout=0.0):
    section = {
        "corpus": "unused",
        "recipe": "best",
        "model": {"projector_dim": 5, "dropout": dropout},
        "meta": {"inner_steps": STEPS, "annealing": annealing},
    }
    torch.manual_seed(0)
    learner = Learner(read_settings(section), DIM, CLASS_WEIGHTS)
    layer_weights = torch.nn.Parameter(torch.randn(LAYERS, dtype=torch.float64))
    learner.double().bind_layer_weights(layer_weights, LAYERS)
    with torch.no_grad():
        learner.rates.rates.copy_(torch.linspace(0.05, 0.2, STEPS).unsqueeze(1))
        learner.model.naming.weight.add_(0.1 * torch.randn(CLASSES, CLASSES))
        learner.model.naming.log_sharpness.fill_(0.3)
    return learner, layer_weights


def task_batch(seed):
    rng = torch.Generator().manual_seed(seed)
    statistics = torch.randn(TASKS, CLIPS, 2 * LAYERS, DIM, generator=rng, dtype=torch.float64)
    targets = torch.rand(TASKS, CLIPS, CLASSES, generator=rng, dtype=torch.float64)
    targets = torch.where(targets > 0.6, targets, 0.0) + 0.1 * torch.eye(CLASSES)[torch.arange(CLIPS) % CLASSES]
    # The second task has two clips fewer; the padding must not matter.
    weights = torch.tensor([[1 / 6] * 6, [1 / 4] * 4 + [0.0] * 2], dtype=torch.float64)
    return TaskBatch(statistics, targets / targets.sum(-1, keepdim=True), weights)


def expressed_by_hand(p, statistics):
    layers = softmax(p["layer_weights"])
    pooled = np.concatenate([layers @ statistics[..., :LAYERS, :], layers @ statistics[..., LAYERS:, :]], axis=-1)
    hidden = np.maximum(0, pooled @ p["projector.weight"].T + p["projector.bias"])
    return softmax(hidden @ p["classifier.weight"].T + p["classifier.bias"])


def naming_gradient_by_hand(expressed_, weight, targets, clip_weights):
    """Responsibilities r_zc = Σ_i w_i t_ic e_iz N_zc / p_ic; d loss / d row logits = −(r_zc − N_zc Σ_c r_zc)."""
    rows = softmax(naming.SCALE * weight)
    share = clip_weights[:, None] * targets / (expressed_ @ rows)
    responsibilities = rows * (expressed_.T @ share)
    return -naming.SCALE * (responsibilities - rows * responsibilities.sum(axis=1, keepdims=True))


def meta_loss_by_hand(p, support, query, constant=()):
    """Outer loss and inner gradients [task][step]; ``constant`` holds, by step, gradients that are taken as given."""
    class_weights = CLASS_WEIGHTS.numpy().astype(np.float64)
    gradients, logits, loss = [], [], 0.0
    for task in range(TASKS):
        own, path = p["naming.weight"], []
        statistics, targets, weights = (array[task] for array in support)
        for step in range(STEPS):
            if step < len(constant):
                gradient = constant[step][task]
            else:
                heard = expressed_by_hand(p, statistics)
                gradient = naming_gradient_by_hand(heard, own, targets, weights * (targets @ class_weights))
            path.append(gradient)
            own = own - p["rates"][step, 0] * gradient
        gradients.append(path)
        statistics, targets, weights = (array[task] for array in query)
        named = expressed_by_hand(p, statistics) @ softmax(naming.SCALE * own)
        loss -= (weights * (targets @ class_weights) * (targets * np.log(named)).sum(1)).sum() / TASKS
        logits.append(np.exp(p["naming.log_sharpness"]) * np.log(named))
    return loss + smooth_f1_in_loops(np.stack(logits), query[1], query[2]), gradients


def by_name(learner, layer_weights):
    tensors = dict(learner.model.named_parameters())
    return tensors | {"layer_weights": layer_weights, "rates": learner.rates.rates}


def as_arrays(batch):
    return [tensor.numpy() for tensor in (batch.statistics, batch.targets, batch.weights)]


def test_inner_step_by_hand():
    learner, layer_weights = best_learner()
    support = task_batch(1)
    adapted = learner.adapt_to(support, FixedRate(0.25).double(), 1, names=learner.meta_names).params
    assert set(adapted) == {"naming.weight"}
    p = {name: tensor.detach().numpy() for name, tensor in by_name(learner, layer_weights).items()}
    statistics, targets, weights = as_arrays(support)
    for task in range(TASKS):
        clip_weights = weights[task] * (targets[task] @ CLASS_WEIGHTS.numpy())
        heard = expressed_by_hand(p, statistics[task])
        gradient = naming_gradient_by_hand(heard, p["naming.weight"], targets[task], clip_weights)
        np.testing.assert_allclose(adapted["naming.weight"][task], p["naming.weight"] - 0.25 * gradient, rtol=1e-9)


@pytest.mark.parametrize("first_order_steps", [0, 1, 2])
def test_meta_gradient_agrees_with_finite_differences(first_order_steps):
    """Everything is meta-learned: body, weighted sum, population naming, sharpness, rates.

    A first-order step takes its inner gradient as given, whatever the parameters: so do the differences.
    """
    annealing = {"fraction": first_order_steps / STEPS} if first_order_steps else None
    learner, layer_weights = best_learner(annealing)
    support, query = task_batch(1), task_batch(2)
    tensors = by_name(learner, layer_weights)
    loss = learner.meta_loss(support, query, 0.0).loss
    gradients = torch.autograd.grad(loss, list(tensors.values()))

    p = {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
    given = as_arrays(support), as_arrays(query)
    value, inner = meta_loss_by_hand(p, *given)
    assert loss.item() == pytest.approx(value, rel=1e-10)
    constant = [[inner[task][step] for task in range(TASKS)] for step in range(first_order_steps)]
    h = 1e-6
    for (name, array), gradient in zip(p.items(), gradients, strict=True):
        assert gradient.abs().max() > 1e-6, f"{name} is meta-learned"
        flat = array.reshape(-1)
        for index in range(0, flat.size, max(1, flat.size // 7)):
            values = []
            for change in (h, -2 * h):
                flat[index] += change
                values.append(meta_loss_by_hand(p, *given, constant)[0])
            flat[index] += h
            numerical = (values[0] - values[1]) / (2 * h)
            assert gradient.reshape(-1)[index].item() == pytest.approx(numerical, rel=2e-5, abs=1e-8), (name, index)


def test_the_order_of_a_step_changes_the_gradient():
    """Guards the test above: were first and second order alike here, it would prove nothing."""

    def gradient(fraction):
        learner, _ = best_learner({"fraction": fraction})
        loss = learner.meta_loss(task_batch(1), task_batch(2), 0.0).loss
        return torch.autograd.grad(loss, learner.model.projector.weight)[0]

    first, second, third = (gradient(steps / STEPS) for steps in range(3))
    assert min((first - second).abs().max(), (second - third).abs().max(), (first - third).abs().max()) > 1e-4


def test_the_inner_loop_moves_the_naming_alone():
    learner, layer_weights = best_learner()
    assert learner.rates.rates.shape == (STEPS, 1)
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    weighted_sum = layer_weights.detach().clone()
    support, query = task_batch(1), task_batch(2)
    adapted = learner.adapt_to(support, learner.rates, 10, names=learner.meta_names).params
    assert set(adapted) == {"naming.weight"}
    assert not torch.equal(adapted["naming.weight"][0], adapted["naming.weight"][1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())
    assert torch.equal(layer_weights, weighted_sum)

    # A namesake of every tensor, adapted or not: the short cut through the shared body is exact.
    whole = {name: tensor.expand(TASKS, *tensor.shape) for name, tensor in learner.initialisation().items()} | adapted
    torch.testing.assert_close(
        learner.probabilities(query.statistics, adapted), learner.probabilities(query.statistics, whole)
    )
    with torch.no_grad():
        learner.model.naming.log_sharpness.add_(1.0)
    sharper = learner.adapt_to(support, learner.rates, 10, names=learner.meta_names).params
    assert torch.equal(sharper["naming.weight"], adapted["naming.weight"]), "sharpness is no part of the likelihood"


def test_ssl_e_learns_what_is_expressed_whatever_it_is_called():
    learner, layer_weights = best_learner()
    statistics, targets, _ = (array[0] for array in as_arrays(task_batch(1)))
    loss = learner.aggregated_loss(torch.tensor(statistics), torch.tensor(targets))
    p = {name: tensor.detach().numpy() for name, tensor in by_name(learner, layer_weights).items()}
    by_hand = -(targets * np.log(expressed_by_hand(p, statistics))).sum(1) * (targets @ CLASS_WEIGHTS.numpy())
    assert loss.item() == pytest.approx(by_hand.mean(), rel=1e-10)
    gradients = torch.autograd.grad(loss, [*learner.model.naming.parameters()], allow_unused=True)
    assert gradients == (None, None)


def test_dropout_acts_in_training_and_nowhere_else():
    """Adaptation, prediction and embeddings are the same in whichever mode the module is, and leave it in its mode."""
    learner, _ = best_learner(dropout=0.7)
    support, query = task_batch(1), task_batch(2)

    def given(names):
        adapted = learner.adapt_to(support, FixedRate(0.1).double(), 4, names=names)
        everything = [learner.embeddings(query.statistics), learner.probabilities(query.statistics), adapted.losses]
        return [*everything, *adapted.params.values(), learner.probabilities(query.statistics, adapted.params)]

    def losses():
        torch.manual_seed(1)
        aggregated = learner.aggregated_loss(support.statistics[0], support.targets[0])
        return aggregated.item(), learner.meta_loss(support, query, 0.0).loss.item()

    for names in (learner.meta_names, ["classifier.weight", "naming.weight"]):
        learner.eval()
        evaluated = given(names)
        learner.train()
        assert all(torch.equal(one, other) for one, other in zip(evaluated, given(names), strict=True))
        assert all(module.training for module in learner.modules())
    dropping = losses()
    assert dropping == losses()
    learner.eval()
    assert all(abs(one - other) > 1e-3 for one, other in zip(dropping, losses(), strict=True))
