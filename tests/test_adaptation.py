"""The meta-gradient, against an implementation written out by hand and against finite differences, in float64.

The hand-written one shares no code with the package: softmax regression with the inner gradient and the Hessian-vector
products in closed form, gone through backwards with numpy (dα_t = −⟨v, g_t⟩ per tensor, v ← v − H_t(α_t v)).
"""

import re

import numpy as np
import pytest
import torch

from s3prl_metaperser.adaptation.annealing import ALWAYS_SECOND_ORDER, DerivativeAnnealing
from s3prl_metaperser.adaptation.inner_loop import adapt
from s3prl_metaperser.adaptation.rates import LSLR, FixedRate
from s3prl_metaperser.adaptation.sgd import PerTensorSGD
from s3prl_metaperser.batches import TaskBatch
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.model import statistics_rows
from s3prl_metaperser.settings import read_settings, resolved_backend

STEPS, EXAMPLES, DIM, CLASSES = 5, 6, 4, 3


class SoftmaxRegressionByHand:
    """Cross-entropy of softmax(xW + b) against distributions y, mean over examples, with exact derivatives."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def probabilities(self, w, b):
        z = self.x @ w + b
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    def loss(self, w, b):
        return -(self.y * np.log(self.probabilities(w, b))).sum(axis=1).mean()

    def gradient(self, w, b):
        d = (self.probabilities(w, b) - self.y) / len(self.x)
        return self.x.T @ d, d.sum(axis=0)

    def hessian_vector(self, w, b, vw, vb):
        p = self.probabilities(w, b)
        u = self.x @ vw + vb
        d = (p * u - p * (p * u).sum(axis=1, keepdims=True)) / len(self.x)
        return self.x.T @ d, d.sum(axis=0)


def by_hand(support, query, w, b, rates, second_order):
    """Meta-gradient of query(θ_T) with respect to θ_0 = (w, b) and rates[step, (w, b)]."""
    path = [(w, b)]
    for alpha_w, alpha_b in rates:
        gw, gb = support.gradient(*path[-1])
        path.append((path[-1][0] - alpha_w * gw, path[-1][1] - alpha_b * gb))
    vw, vb = query.gradient(*path[-1])
    rate_gradient = np.zeros_like(rates)
    for step in reversed(range(len(rates))):
        gw, gb = support.gradient(*path[step])
        rate_gradient[step] = -(vw * gw).sum(), -(vb * gb).sum()
        if second_order(step):
            hw, hb = support.hessian_vector(*path[step], rates[step, 0] * vw, rates[step, 1] * vb)
            vw, vb = vw - hw, vb - hb
    return query.loss(*path[-1]), vw, vb, rate_gradient


def annealed(annealing, progress):
    return lambda step: annealing.second_order(step, STEPS, progress)


ANNEALINGS = {
    "off": (ALWAYS_SECOND_ORDER, 0.0, [True] * 5),
    "inner_steps": (DerivativeAnnealing(0.3, "inner_steps"), 0.0, [False, False, True, True, True]),
    "training, early": (DerivativeAnnealing(0.3, "training"), 0.1, [False] * 5),
    "training, late": (DerivativeAnnealing(0.3, "training"), 0.3, [True] * 5),
    "first order": (DerivativeAnnealing(1.0, "inner_steps"), 0.9, [False] * 5),
}


@pytest.fixture
def problem():
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((EXAMPLES, DIM)), rng.dirichlet(np.ones(CLASSES), EXAMPLES)
    x2, y2 = rng.standard_normal((EXAMPLES, DIM)), rng.dirichlet(np.ones(CLASSES), EXAMPLES)
    w, b = rng.standard_normal((DIM, CLASSES)), rng.standard_normal(CLASSES)
    rates = rng.uniform(-0.2, 0.9, (STEPS, 2))  # a learned rate may be negative
    return (x, y), (x2, y2), w, b, rates


@pytest.mark.parametrize("backend", ["higher", "checkpointed"])
@pytest.mark.parametrize("query", ["combined", "resampled", "disjoint"])
@pytest.mark.parametrize("annealing", ANNEALINGS)
def test_meta_gradient_agrees_with_the_formula_by_hand(problem, query, annealing, backend):
    (x, y), other, w, b, rates = problem
    half = EXAMPLES // 2
    x2, y2 = {
        "combined": (x, y),
        "resampled": tuple(np.concatenate([a[:half], b[:half]]) for a, b in zip((x, y), other, strict=True)),
        "disjoint": other,
    }[query]
    schedule, progress, expected_orders = ANNEALINGS[annealing]
    second_order = annealed(schedule, progress)
    assert [second_order(step) for step in range(STEPS)] == expected_orders

    expected = by_hand(SoftmaxRegressionByHand(x, y), SoftmaxRegressionByHand(x2, y2), w, b, rates, second_order)

    def objective(inputs, targets):
        inputs, targets = torch.tensor(inputs), torch.tensor(targets)
        return lambda p: -(targets * (inputs @ p["w"] + p["b"]).log_softmax(1)).sum(1).mean()

    theta = {"w": torch.tensor(w, requires_grad=True), "b": torch.tensor(b, requires_grad=True)}
    lslr = LSLR(["w", "b"], STEPS, 0.1).double()
    lslr.rates.data = torch.tensor(rates)
    adapted = adapt(objective(x, y), theta, lslr, STEPS, second_order, backend=backend)
    loss = objective(x2, y2)(adapted.params)
    gradients = torch.autograd.grad(loss, [theta["w"], theta["b"], lslr.rates])

    assert loss.item() == pytest.approx(expected[0], rel=1e-12)
    for ours, by_formula in zip(gradients, expected[1:], strict=True):
        np.testing.assert_allclose(ours.numpy(), by_formula, rtol=1e-9, atol=1e-12)


def test_the_order_of_a_step_changes_the_gradient(problem):
    """Guards the test above: were first and second order alike here, it would prove nothing."""
    (x, y), (x2, y2), w, b, rates = problem
    support, query = SoftmaxRegressionByHand(x, y), SoftmaxRegressionByHand(x2, y2)
    gradients = [by_hand(support, query, w, b, rates, annealed(*ANNEALINGS[name][:2]))[1] for name in ANNEALINGS]
    for first, second in [(0, 1), (0, 2), (1, 2)]:
        assert np.abs(gradients[first] - gradients[second]).max() > 1e-3


def settings(scope, lslr, annealing, pooling="mean"):
    return read_settings(
        {
            "corpus": "unused",
            "scope": scope,
            "model": {"projector_dim": 3, "pooling": pooling},
            "meta": {"inner_steps": 3, "lslr": lslr, "inner_lr": 0.3, "annealing": annealing},
        }
    )


def learner_and_tasks(scope, lslr, annealing, pooling="mean", layers=3, tasks=2, dim=4):
    torch.manual_seed(0)
    learner = Learner(settings(scope, lslr, annealing, pooling), dim, class_weights=torch.tensor([0.5, 1.0, 1.5]))
    layer_weights = torch.nn.Parameter(torch.randn(layers, dtype=torch.float64))
    learner.double().bind_layer_weights(layer_weights, layers)
    rows = statistics_rows(layers, pooling)

    def batch(seed, weights):
        rng = torch.Generator().manual_seed(seed)
        statistics = torch.randn(tasks, 5, rows, dim, generator=rng, dtype=torch.float64)
        if pooling == "mean_std":
            frames = torch.randn(tasks, 5, layers, dim, 9, generator=rng, dtype=torch.float64)
            first, second = torch.triu_indices(layers, layers)
            statistics[:, :, layers:] = (frames[:, :, first] * frames[:, :, second]).mean(-1)
        targets = torch.rand(tasks, 5, 3, generator=rng, dtype=torch.float64)
        return TaskBatch(statistics, targets / targets.sum(-1, keepdim=True), weights)

    # The second task has two clips fewer; the padding must not matter.
    weights = torch.tensor([[0.2] * 5, [1 / 3] * 3 + [0.0] * 2], dtype=torch.float64)
    return learner, layer_weights, batch(1, weights), batch(2, weights)


ANALYTIC = [(scope, pooling) for scope in ("head", "linear") for pooling in ("mean", "mean_std_per_layer")]
ANALYTIC.append(("head", "mean_std"))
WITH_BACKENDS = [
    *[
        (backend, s, p)
        for backend in ("higher", "checkpointed")
        for s in ("head", "linear")
        for p in ("mean", "mean_std")
    ],
    *[("analytic", scope, pooling) for scope, pooling in ANALYTIC],
]


@pytest.mark.parametrize("query", ["combined", "disjoint"])
@pytest.mark.parametrize(("backend", "scope", "pooling"), WITH_BACKENDS)
def test_meta_gradient_agrees_with_finite_differences(backend, scope, query, pooling):
    """Second order throughout, through the whole model: both layers, the weighted sum, and every learned rate."""
    learner, layer_weights, support, other = learner_and_tasks(scope, True, None, pooling)
    learner.backend = backend
    outer = support if query == "combined" else other
    parameters = [*learner.parameters(), layer_weights]
    names = [*(name for name, _ in learner.named_parameters()), "layer_weights"]
    gradients = torch.autograd.grad(learner.meta_loss(support, outer, 0.0).loss, parameters)
    step = 1e-6
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        flat = parameter.data.view(-1)
        for index in range(0, flat.numel(), max(1, flat.numel() // 7)):
            values = []
            for sign in (1, -1):
                flat[index] += sign * step
                values.append(learner.meta_loss(support, outer, 0.0).loss.item())
                flat[index] -= sign * step
            numerical = (values[0] - values[1]) / (2 * step)
            assert gradient.view(-1)[index].item() == pytest.approx(numerical, rel=2e-5, abs=1e-8), (name, index)
    rate_gradient = gradients[names.index("rates.rates")]
    assert rate_gradient.abs().min() > 0, "every rate of every adapted tensor and step is learned"


def gradients_by(backend, learner, layer_weights, support, query, progress):
    learner.backend = backend
    parameters = [*learner.parameters(), *([] if layer_weights is None else [layer_weights])]
    meta = learner.meta_loss(support, query, progress)
    return meta, torch.autograd.grad(meta.loss, parameters, allow_unused=True)


@pytest.mark.parametrize("annealing", [None, ("inner_steps", 0.0), ("training", 0.0), ("training", 0.9)])
@pytest.mark.parametrize("lslr", [True, False])
@pytest.mark.parametrize(("scope", "pooling"), ANALYTIC)
def test_the_analytic_backend_is_the_reference(scope, pooling, lslr, annealing):
    """In every order of derivatives, with negative rates too, and with clips that only pad."""
    over, progress = annealing or ("", 0.0)
    section = {"fraction": 0.5, "over": over} if annealing else None
    learner, layer_weights, support, query = learner_and_tasks(scope, lslr, section, pooling)
    if lslr:
        learner.rates.rates.data = torch.linspace(-0.2, 0.9, learner.rates.rates.numel()).view_as(learner.rates.rates)
        learner.double()
    given = learner, layer_weights, support, query, progress
    (reference, expected), (ours, gradients) = gradients_by("higher", *given), gradients_by("analytic", *given)
    assert ours.loss.item() == pytest.approx(reference.loss.item(), rel=1e-12)
    torch.testing.assert_close(ours.support, reference.support, rtol=1e-12, atol=0)
    assert sum(gradient is not None for gradient in gradients) == (6 if lslr else 5)
    for own, other in zip(gradients, expected, strict=True):
        if own is None or other is None:
            assert own is other
        else:
            assert (own - other).norm() <= 1e-10 * other.norm()


@pytest.mark.parametrize("scope", ["head", "linear"])
def test_the_analytic_backend_in_float32_is_as_exact_as_the_reference(scope):
    """At the sizes of a base model; both against the reference in float64."""
    torch.manual_seed(0)
    section = {"corpus": "unused", "scope": scope, "meta": {"inner_lr": 0.05, "annealing": None}}
    learner = Learner(read_settings(section), dim=768, class_weights=torch.rand(9) + 0.5)
    layer_weights = torch.nn.Parameter(torch.randn(13))
    learner.bind_layer_weights(layer_weights, 13)
    targets = torch.rand(2, 3, 32, 9) ** 4
    targets /= targets.sum(-1, keepdim=True)
    support, query = (TaskBatch(torch.randn(3, 32, 13, 768), own, torch.full((3, 32), 1 / 32)) for own in targets)
    _, ours = gradients_by("analytic", learner, layer_weights, support, query, 0.0)
    learner.double()
    layer_weights.data = layer_weights.data.double()
    doubles = [TaskBatch(*(own.double() for own in vars(batch).values())) for batch in (support, query)]
    _, exact = gradients_by("higher", learner, layer_weights, *doubles, 0.0)
    for own, other in zip(ours, exact, strict=True):
        assert (own - other).norm() <= 2e-6 * other.norm()


@pytest.mark.parametrize("dim", [4, 20], ids=["more rows than dimensions", "fewer rows than dimensions"])
@pytest.mark.parametrize(("scope", "pooling"), ANALYTIC)
def test_the_analytic_backend_at_meta_test_is_the_reference(scope, pooling, dim, monkeypatch):
    learner, _, support, query = learner_and_tasks(scope, True, None, pooling, dim=dim)
    learner.rates.rates.data = torch.linspace(-0.1, 0.5, learner.rates.rates.numel()).view_as(learner.rates.rates)
    learner.double()
    ours = learner.adapt_to(support, learner.rates, 50, keep=[5, 50])
    monkeypatch.setattr(learner, "_by_formulas", False)
    reference = learner.adapt_to(support, learner.rates, 50, keep=[5, 50])
    torch.testing.assert_close(ours.losses, reference.losses, rtol=1e-12, atol=0)
    assert ours.kept.keys() == {5, 50}
    for own, other in [(ours.params, reference.params), (ours.kept[5], reference.kept[5])]:
        assert own.keys() == other.keys()
        for name, tensor in own.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-9, atol=1e-12)
            assert not tensor.requires_grad
    torch.testing.assert_close(
        learner.probabilities(query.statistics, ours.params), learner.probabilities(query.statistics, reference.params)
    )


@pytest.mark.parametrize("naming", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "mean_std"])
def test_a_layer_adapts_by_its_clips_gram_matrix_as_by_gradient_descent(pooling, naming, monkeypatch):
    """A model that the analytic backend has no formula for, on features that stay."""
    section = {
        "corpus": "unused",
        "scope": "head",
        "model": {"projector_dim": 6, "pooling": pooling, "activation": "relu", "naming": naming, "dropout": 0.5},
    }
    learner = Learner(read_settings(section), dim=4, class_weights=torch.tensor([0.5, 1.0, 1.5]))
    _, layer_weights, support, _ = learner_and_tasks("head", True, None, pooling)
    learner.double().bind_layer_weights(layer_weights, 3)
    rates = LSLR(learner.linear_names, 7, 0.0)
    rates.rates.data = torch.linspace(-0.1, 0.6, rates.rates.numel()).view_as(rates.rates)
    ours = learner.adapt_to(support, rates.double(), 20, keep=[3])
    monkeypatch.setattr(learner, "_by_formulas", False)
    reference = learner.adapt_to(support, rates, 20, keep=[3])
    torch.testing.assert_close(ours.losses, reference.losses, rtol=1e-12, atol=0)
    for own, other in [(ours.params, reference.params), (ours.kept[3], reference.kept[3])]:
        assert own.keys() == other.keys() == set(learner.linear_names)
        for name, tensor in own.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-9, atol=1e-12)
            assert not tensor.requires_grad
    assert not torch.equal(ours.params["projector.weight"][0], learner.model.projector.weight)


def test_an_upstream_of_one_layer_has_no_weighted_sum_to_adapt():
    learner, _, support, query = learner_and_tasks("linear", True, None, layers=1)
    learner.bind_layer_weights(None, 1)
    given = learner, None, support, query, 0.0
    (reference, expected), (ours, gradients) = gradients_by("higher", *given), gradients_by("analytic", *given)
    assert ours.loss.item() == pytest.approx(reference.loss.item(), rel=1e-12)
    for own, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


def settings_of(**changes):
    section = {"corpus": "unused"}
    for key, value in changes.items():
        room, _, name = key.rpartition("_in_")
        section |= {name: {**section.get(name, {}), room: value}} if room else {key: value}
    return section


NOT_ANALYTIC = {
    "meta.adapts: naming": {"adapts_in_meta": "naming", "naming_in_model": True},
    "scope: entire": {"scope": "entire"},
    "model.naming: true": {"naming_in_model": True},
    "model.activation: relu": {"activation_in_model": "relu"},
    "model.dropout: 0.1": {"dropout_in_model": 0.1},
    "model.pooling: mean_std with scope: linear": {"pooling_in_model": "mean_std"},
}


def test_the_quickest_backend_that_applies_is_chosen():
    assert resolved_backend(read_settings(settings_of())) == "analytic"
    assert resolved_backend(read_settings(settings_of(scope="head", pooling_in_model="mean_std"))) == "analytic"
    assert resolved_backend(read_settings(settings_of(backend_in_meta="higher"))) == "higher"
    assert resolved_backend(read_settings(settings_of(recipe="best"))) == "higher"
    for obstacle, changes in NOT_ANALYTIC.items():
        backend = resolved_backend(read_settings(settings_of(**changes)))
        assert backend == ("checkpointed" if obstacle == "scope: entire" else "higher")


@pytest.mark.parametrize("obstacle", NOT_ANALYTIC)
def test_the_analytic_backend_refuses_by_name_where_it_has_no_formula(obstacle):
    with pytest.raises(MetaPerSERError, match=f"meta.backend.*'analytic'.*not for {re.escape(obstacle)};"):
        read_settings(settings_of(backend_in_meta="analytic", **NOT_ANALYTIC[obstacle]))


def test_tasks_adapt_side_by_side_as_they_would_alone():
    learner, _, support, query = learner_and_tasks("linear", True, None)
    together = learner.meta_loss(support, query, 0.0).loss.item()

    def task(batch, index):
        clips = 5 if index == 0 else 3
        own = TaskBatch(
            batch.statistics[[index], :clips], batch.targets[[index], :clips], batch.weights[[index], :clips]
        )
        return own

    alone = [learner.meta_loss(task(support, index), task(query, index), 0.0).loss.item() for index in range(2)]
    assert together == pytest.approx(np.mean(alone), rel=1e-12)


def test_first_order_step_never_builds_the_gradients_graph():
    graphs_built = []

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            graphs_built.append(torch.is_grad_enabled())
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    theta = torch.tensor([1.0], requires_grad=True)
    rates = LSLR(["theta"], 1, 0.1)
    for second_order, to_theta in [(False, 1.0), (True, 1.0 - 0.1 * 6)]:
        adapted = adapt(
            lambda p: Cube.apply(p["theta"]).sum(), {"theta": theta}, rates, 1, lambda step, o=second_order: o
        )
        gradients = torch.autograd.grad(adapted.params["theta"].sum(), [theta, rates.rates])
        assert graphs_built.pop(0) is second_order
        assert [gradient.item() for gradient in gradients] == pytest.approx([to_theta, -3.0])


def test_adaptation_at_meta_test_is_plain_gradient_descent():
    """Against torch's own SGD, and with the last learned rate reused beyond the learned steps."""
    learner, _, support, _ = learner_and_tasks("head", False, None)
    reference = learner.model.projector.weight.detach().clone()
    adapted = learner.adapt_to(support, FixedRate(0.05).double(), steps=20).params
    single = TaskBatch(support.statistics[:1], support.targets[:1], support.weights[:1])
    optimizer = torch.optim.SGD(learner.model.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        learner.aggregated_loss(single.statistics[0], single.targets[0]).backward()
        optimizer.step()
    torch.testing.assert_close(adapted["projector.weight"][0], learner.model.projector.weight.detach())
    assert not torch.equal(reference, learner.model.projector.weight)

    rates = LSLR(["theta"], 2, 0.0)
    rates.rates.data = torch.tensor([[0.5], [0.25]])
    theta = {"theta": torch.tensor([1.0])}
    after = adapt(lambda p: p["theta"].square().sum() / 2, theta, rates, steps=4).params["theta"]
    assert after.item() == pytest.approx(0.5 * 0.75**3)
    assert not after.requires_grad


def test_parameters_kept_on_the_way_are_those_of_shorter_adaptations():
    learner, _, support, _ = learner_and_tasks("linear", True, None)
    learner.rates.rates.data = torch.linspace(-0.1, 0.5, learner.rates.rates.numel()).view_as(learner.rates.rates)
    kept = learner.adapt_to(support, learner.rates.double(), 7, keep=[2, 5, 7]).kept
    assert kept.keys() == {2, 5, 7}
    for steps, params in kept.items():
        alone = learner.adapt_to(support, learner.rates, steps).params
        assert params.keys() == alone.keys()
        for name, tensor in alone.items():
            assert torch.equal(params[name], tensor)
            assert not params[name].requires_grad
    for impossible in ([0], [8]):
        with pytest.raises(ValueError, match="not within 1 to 7"):
            learner.adapt_to(support, learner.rates, 7, keep=impossible)


def test_only_the_named_tensors_adapt():
    learner, _, support, query = learner_and_tasks("linear", True, None)
    names = ["classifier.weight", "layer_weights"]
    adapted = learner.adapt_to(support, FixedRate(0.5).double(), 3, names=names).params
    assert set(adapted) == set(names)
    whole = {name: tensor.expand(2, *tensor.shape) for name, tensor in learner.initialisation().items()} | adapted
    torch.testing.assert_close(
        learner.probabilities(query.statistics, adapted), learner.probabilities(query.statistics, whole)
    )


def test_plain_and_differentiable_optimizer_take_the_same_step():
    values, rates = [torch.randn(3), torch.randn(2, 2)], [0.1, -0.4]
    plain = [value.clone().requires_grad_() for value in values]
    optimizer = PerTensorSGD(plain, rates)
    sum((p**3).sum() for p in plain).backward()
    optimizer.step()

    class Given:
        def at(self, step, names):
            return [torch.tensor(rate) for rate in rates]

    start = {"a": values[0], "b": values[1]}
    adapted = adapt(lambda p: sum((t**3).sum() for t in p.values()), start, Given(), 1)
    torch.testing.assert_close(list(adapted.params.values()), [p.detach() for p in plain])
