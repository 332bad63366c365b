"""Scope ``entire``: the meta-gradient through a speech model, its backends, its chunks, and what is left out of it."""

from contextlib import nullcontext

import numpy as np
import pytest
import soundfile
import torch
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer
from small_upstreams import write_upstream
from torch import nn

from s3prl_metaperser.episodes import Examples
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.settings import EntireSettings, read_settings
from s3prl_metaperser.upstream.exact_weight_norm import ExactWeightNorm
from s3prl_metaperser.upstream.features import TrainableFeatures
from s3prl_metaperser.upstream.pooling import PooledUpstream
from s3prl_metaperser.upstream.trainable import TrainableUpstream
from s3prl_metaperser.whole_network import WholeNetwork

CPU = torch.device("cpu")
CLASSES = 3
ORDERS = {"first": {"fraction": 1.0}, "second": None, "annealed": {"fraction": 0.4}}


class CountingConv(nn.Conv1d):
    passes = 0

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


class Tiny(nn.Module):
    """Two layers over frames, behind a front end; smooth, in any precision, and blind to its batch-mates."""

    def __init__(self):
        super().__init__()
        self.feature_extractor = CountingConv(1, 3, kernel_size=320, stride=320)
        self.position = torch.nn.utils.weight_norm(nn.Conv1d(3, 3, kernel_size=1), dim=2)
        self.mixing = nn.Linear(3, 3)
        self.unused = nn.Linear(2, 2)

    def get_downsample_rates(self, key):
        return 320

    def forward(self, wavs):
        padded = nn.utils.rnn.pad_sequence(wavs, batch_first=True)
        first = torch.tanh(self.position(3 * self.feature_extractor(padded.unsqueeze(1)))).transpose(1, 2)
        return {"hidden_states": [first, torch.tanh(self.mixing(first))]}


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """Nine clips of three lengths, loud and soft."""
    folder, rng = tmp_path_factory.mktemp("audio"), np.random.default_rng(0)
    for number in range(9):
        samples = (0.1 + 0.05 * number) * rng.standard_normal([4800, 6400, 8000][number % 3])
        soundfile.write(folder / f"c{number}.wav", samples.clip(-1, 1), 16000, subtype="FLOAT")
    return {f"c{number}": folder / f"c{number}.wav" for number in range(9)}


def examples(*numbers):
    targets = np.random.default_rng(numbers[0]).dirichlet(np.ones(CLASSES), len(numbers)).astype(np.float32)
    return Examples(tuple(f"c{number}" for number in numbers), targets)


SUPPORT, QUERY = examples(0, 1, 2, 3, 4), examples(5, 6, 7, 8)


def network_of(upstream, audio, meta=None, dtype=torch.float32, seed=0, **entire):
    """A learner with random head and rates on an upstream, in scope entire."""
    torch.manual_seed(seed)
    featurizer = Featurizer(upstream, upstream_device="cpu")
    featurizer.weights.data.normal_()
    section = {"corpus": "unused", "scope": "entire", "model": {"projector_dim": 4}}
    settings = read_settings(section | {"entire": entire, "meta": {"inner_steps": 3} | (meta or {})})
    upstream, featurizer = upstream.to(dtype), featurizer.to(dtype)
    learner = Learner(settings, featurizer.output_dim, torch.tensor([0.5, 1.0, 1.5])).to(dtype)
    pooled = PooledUpstream(upstream, featurizer, "mean", CPU)
    if dtype == torch.float64:
        pooled.padding_is_harmless = True  # it is compared in float32
    trainable = TrainableUpstream(pooled, settings.entire)
    learner.bind_layer_weights(featurizer.weights, featurizer.layer_num)
    learner.bind_upstream(list(trainable.adapted))
    learner.to(dtype)
    rates = 0.05 + 0.1 * torch.rand(learner.rates.rates.shape, generator=torch.Generator().manual_seed(seed))
    learner.rates.rates.data = rates.to(dtype)
    features = TrainableFeatures(trainable, audio, CPU)
    read = features._waveforms.of
    features._waveforms.of = lambda utterances: [wav.to(dtype) for wav in read(utterances)]
    return WholeNetwork(learner, features)


def learned(network):
    """Everything that the outer loop learns, by name."""
    held = {f"held.{number}": tensor for number, tensor in enumerate(network.upstream.held)}
    rates = {"rates": network.learner.rates.rates}
    return {**network.initialisation(network.learner.meta_names), **held, **rates}


def meta_gradient(network, progress=0.0):
    loss = network.meta_loss(network.clips(SUPPORT), network.clips(QUERY), progress).loss
    tensors = learned(network)
    return loss, dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


@pytest.fixture
def new_wavlm(small_wavlm):
    from s3prl.hub import wavlm_local

    return lambda: wavlm_local(str(small_wavlm))


@pytest.mark.parametrize("order", ORDERS)
def test_backends_and_chunks_give_one_meta_gradient_through_wavlm(new_wavlm, audio, order):
    """``higher`` on the whole support is the reference; the other backend and any chunks must agree."""
    expected: dict[str, torch.Tensor] = {}
    for backend in ("higher", "checkpointed"):
        for chunk_seconds in (100.0, 0.01):  # one chunk for each length of clip; each clip alone
            meta = {"annealing": ORDERS[order], "backend": backend}
            network = network_of(new_wavlm(), audio, meta, chunk_seconds=chunk_seconds)
            assert len(network.clips(SUPPORT).chunks) == (3 if chunk_seconds > 1 else 5)
            loss, gradients = meta_gradient(network)
            expected = expected or {"loss": loss, **gradients}
            assert expected.keys() - {"loss"} == gradients.keys()
            torch.testing.assert_close(loss, expected["loss"], rtol=1e-6, atol=0)
            for name, gradient in gradients.items():
                error = (gradient - expected[name]).norm() / expected[name].norm()
                # What cannot matter (a key's bias) has a gradient of rounding noise.
                assert error < 1e-5 or expected[name].norm() < 1e-7, (name, backend, chunk_seconds, error)


def agree_with_finite_differences(network, gradients, loss, step=1e-5):
    """Move some of the numbers of each tensor that is learned, there and back, and compare."""
    for name, tensor in learned(network).items():
        flat = tensor.data.view(-1)
        for index in range(0, flat.numel(), max(1, flat.numel() // 5)):
            values = []
            for sign in (1, -1):
                flat[index] += sign * step
                values.append(loss())
                flat[index] -= sign * step
            numerical = (values[0] - values[1]) / (2 * step)
            assert gradients[name].view(-1)[index].item() == pytest.approx(numerical, rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("backend", ["higher", "checkpointed"])
@pytest.mark.parametrize("chunk_seconds", [100.0, 0.01])
@pytest.mark.parametrize("not_adapted", [[], ["mixing.*"]])
def test_second_order_gradient_agrees_with_finite_differences(audio, backend, chunk_seconds, not_adapted):
    """Through weight norm, too, whose second derivative torch has wrong."""
    meta = {"annealing": None, "backend": backend}
    torch.manual_seed(1)
    network = network_of(Tiny(), audio, meta, torch.float64, not_adapted=not_adapted, chunk_seconds=chunk_seconds)
    assert ("upstream.mixing.weight" in network.learner.meta_names) == (not not_adapted)
    _, gradients = meta_gradient(network)
    agree_with_finite_differences(
        network, gradients, lambda: network.meta_loss(network.clips(SUPPORT), network.clips(QUERY), 0.0).loss.item()
    )


@pytest.mark.parametrize("backend", ["higher", "checkpointed"])
@pytest.mark.parametrize("order", ["first", "annealed"])
def test_first_order_steps_agree_with_finite_differences(audio, backend, order):
    """The loss whose derivative a first-order step takes: the step's gradient stays what it was at the centre."""
    torch.manual_seed(1)
    network = network_of(Tiny(), audio, {"annealing": ORDERS[order], "backend": backend}, torch.float64)
    _, gradients = meta_gradient(network)
    learner, support, query = network.learner, network.clips(SUPPORT), network.clips(QUERY)
    names = learner.meta_names
    objective = network.objective(support, names)
    constant: dict[int, list[torch.Tensor]] = {}

    def loss() -> float:
        current = {name: tensor.detach() for name, tensor in network.initialisation(names).items()}
        for number in range(learner.inner_steps):
            _, slopes = objective.gradient(current)
            if not learner.annealing.second_order(number, learner.inner_steps, 0.0):
                slopes = constant.setdefault(number, slopes)
            rates = learner.rates.at(number, names)
            moved = zip(current.items(), rates, slopes, strict=True)
            current = {name: tensor - rate.detach() * slope for (name, tensor), rate, slope in moved}
        return network_loss(network, query, current)

    loss()  # fixes the first-order steps' gradients
    agree_with_finite_differences(network, gradients, loss)


def network_loss(network, clips, params):
    logits = torch.cat([network.logits(chunk, params) for chunk in clips.chunks])
    weights = clips.targets.double() @ network.learner.class_weights
    return -(weights * (clips.targets * logits.log_softmax(-1)).sum(-1)).mean().item()


def test_the_front_end_is_left_out_and_runs_once_a_task(audio):
    upstream = Tiny()
    network = network_of(upstream, audio, {"backend": "checkpointed"}, chunk_seconds=100.0)
    names = network.learner.meta_names
    assert not any("feature_extractor" in name or "unused" in name for name in names)
    assert {"upstream.position.weight_g", "upstream.mixing.bias", "layer_weights"} <= set(names)
    assert not any(parameter.requires_grad for parameter in upstream.feature_extractor.parameters())
    _ = network.upstream.pooled.padding_is_harmless
    upstream.feature_extractor.passes = 0
    support, query = network.clips(SUPPORT), network.clips(QUERY)
    network.meta_loss(support, query, 0.0).loss.backward()
    chunks = len(support.chunks) + len(query.chunks)
    assert upstream.feature_extractor.passes == chunks, "3 inner steps, each gone through there and back"
    assert all(parameter.grad is None for parameter in upstream.feature_extractor.parameters())

    everything = network_of(Tiny(), audio, frozen=[], chunk_seconds=100.0)
    assert "upstream.feature_extractor.weight" in everything.learner.meta_names


def test_what_is_frozen_behind_what_is_trained_is_run_at_every_step(new_wavlm, audio):
    """Self-attention here, which fairseq's layers call by keyword."""
    network = network_of(new_wavlm(), audio, frozen=["*feature_extractor.*", "*self_attn.*"], chunk_seconds=100.0)
    chunk = network.clips(SUPPORT).chunks[0]
    moved = {name: tensor.detach() * 1.1 for name, tensor in network.upstream.adapted.items()}
    first, second = (network.upstream.statistics(chunk, params) for params in (None, moved))
    chunk.constants.clear()
    torch.testing.assert_close(network.upstream.statistics(chunk, moved), second, rtol=0, atol=0)
    assert not torch.equal(first, second)


def test_a_layer_that_is_used_twice_is_adapted_in_both_places_and_put_back(audio):
    """As AudioALBERT's; torch's functional_call, left to itself, leaves what it had swapped in."""

    class Shared(Tiny):
        def __init__(self):
            super().__init__()
            self.again = nn.ModuleList([self.mixing])

        def forward(self, wavs):
            first, second = super().forward(wavs)["hidden_states"]
            return {"hidden_states": [first, torch.tanh(self.again[0](second))]}

    upstream = Shared()
    network = network_of(upstream, audio, dtype=torch.float64)
    before = dict(upstream.named_parameters(remove_duplicate=False))
    chunk = network.clips(SUPPORT).chunks[0]
    moved = {name: tensor.detach() * 1.5 for name, tensor in network.upstream.adapted.items()}
    adapted = network.upstream.statistics(chunk, moved)
    assert all(tensor is before[name] for name, tensor in upstream.named_parameters(remove_duplicate=False))
    for name, tensor in network.upstream.adapted.items():
        tensor.data.copy_(moved[name])
    torch.testing.assert_close(adapted, network.upstream.statistics(chunk), rtol=1e-12, atol=1e-12)


def test_meta_test_adaptation_is_gradient_descent_on_the_real_modules(new_wavlm, audio):
    """Against torch's own SGD on a copy of the runner's modules, for every tensor, and the prediction after it."""
    network = network_of(new_wavlm(), audio, chunk_seconds=0.01)
    clips, query = network.clips(SUPPORT), network.clips(QUERY)
    names, learner = network.learner.adapting_names, network.learner
    before = {name: tensor.detach().clone() for name, tensor in network.initialisation(names).items()}

    class Rate:
        def at(self, step, names):
            return [torch.tensor(0.05)] * len(names)

    losses, params = zip(*network.descend(clips, Rate(), 4, names), strict=True)
    predicted = network.probabilities(query, params[-1])
    for name, tensor in network.initialisation(names).items():
        assert torch.equal(tensor, before[name]), "adaptation leaves the shared model as it is"

    own = list(network.initialisation(names).values())
    optimizer = torch.optim.SGD(own, lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        with torch.enable_grad():
            statistics = network.features.gather([f"c{number}" for number in range(5)])
            loss = learner.aggregated_loss(statistics, torch.from_numpy(SUPPORT.targets))
        assert loss.item() == pytest.approx(losses[step].item(), rel=1e-5)
        loss.backward()
        optimizer.step()
    try:
        for name, tensor in network.initialisation(names).items():
            torch.testing.assert_close(params[-1][name], tensor.detach(), rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            statistics = network.features.gather(QUERY.utterances)
        torch.testing.assert_close(predicted, learner.probabilities(statistics.unsqueeze(0))[0], rtol=1e-4, atol=1e-6)
    finally:
        for name, tensor in network.initialisation(names).items():
            tensor.data.copy_(before[name])


def test_gathered_statistics_have_one_gradient_in_any_chunks_and_the_same_dropout_going_back(new_wavlm, audio):
    utterances = [f"c{number}" for number in (4, 0, 8, 1)]
    gradients = []
    for chunk_seconds, seed in [(100.0, None), (0.01, None), (0.01, 7), (0.01, 7), (0.01, 8)]:
        network = network_of(new_wavlm(), audio, chunk_seconds=chunk_seconds)
        state = torch.random.get_rng_state()
        statistics = network.features.gather(utterances, dropout_seed=seed)
        assert torch.equal(state, torch.random.get_rng_state())
        weights = torch.randn(statistics.shape, generator=torch.Generator().manual_seed(3))
        tensors = list(network.upstream.adapted.values())
        gradients.append(torch.autograd.grad((statistics * weights).sum(), tensors))
        assert not network.upstream.pooled.upstream.training
    for first, second in zip(gradients[0], gradients[1], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(first, second) for first, second in zip(gradients[2], gradients[3], strict=True))
    for one, other in [(0, 2), (3, 4)]:
        largest = max((a - b).norm() / a.norm() for a, b in zip(gradients[one], gradients[other], strict=True))
        assert largest > 1e-2, "dropout draws by its seed"


def test_layers_are_never_left_out_and_the_runners_pass_draws_nothing(tmp_path, audio):
    """DistilHuBERT keeps LayerDrop in train(), and s3prl's weighted sum fails when a layer is missing."""
    from s3prl.hub import distiller_local

    upstream = distiller_local(str(write_upstream("distiller_local", tmp_path)))
    network = network_of(upstream, audio)
    featurizer = network.upstream.pooled.featurizer
    states = []
    for _ in range(6):
        upstream.train()
        silence = [torch.zeros(8000)]
        states.append((torch.random.get_rng_state(), np.random.get_state()[2]))
        assert len(featurizer(silence, upstream(silence))) == 1
        with torch.enable_grad():
            assert network.features.gather(["c0", "c1"], dropout_seed=len(states)).shape[:2] == (
                2,
                featurizer.layer_num,
            )
    assert all(torch.equal(states[0][0], torch_state) and states[0][1] == place for torch_state, place in states)


def test_bfloat16_leaves_weights_rates_and_losses_in_float32(new_wavlm, audio):
    network = network_of(new_wavlm(), audio)
    loss, gradients = meta_gradient(network)
    network.upstream.pooled.precision = "bfloat16"
    rough_loss, rough = meta_gradient(network)
    assert rough_loss.dtype == torch.float32
    assert rough_loss.item() != loss.item()
    assert rough_loss.item() == pytest.approx(loss.item(), rel=0.02)
    for name, gradient in rough.items():
        assert gradient.dtype == torch.float32, name
    flat, rough_flat = (torch.cat([g.flatten() for g in given.values()]) for given in (gradients, rough))
    assert torch.cosine_similarity(flat, rough_flat, dim=0) > 0.99


def test_bfloat16_within_the_runners_own_autocast_has_every_gradient(new_wavlm, audio):
    """s3prl's step is within ``autocast(enabled=False)``; in the first one, padding is judged without a graph."""
    gradients = []
    for in_step in (False, True):
        network = network_of(new_wavlm(), audio, chunk_seconds=100.0)
        network.upstream.pooled.precision = "bfloat16"
        with torch.autocast("cpu", enabled=False) if in_step else nullcontext():
            statistics = network.features.gather(SUPPORT.utterances, dropout_seed=7)
        gradients.append(torch.autograd.grad(statistics.square().sum(), list(network.upstream.adapted.values())))
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_what_cannot_adapt_is_refused_by_name(audio):
    with pytest.raises(
        MetaPerSERError, match=r"entire\.frozen.*'encoder\.\*'.*expected a whole name such as 'feature_ex"
    ):
        network_of(Tiny(), audio, frozen=["encoder.*"])
    with pytest.raises(MetaPerSERError, match="no trainable parameter of this upstream reaches the features"):
        network_of(Tiny(), audio, frozen=["*"])
    fbank = fbank_no_cmvn()
    pooled = PooledUpstream(fbank, Featurizer(fbank, upstream_device="cpu"), "mean", CPU)
    with pytest.raises(MetaPerSERError, match="this upstream has no parameters"):
        TrainableUpstream(pooled, EntireSettings())
    short = {"c0": audio["c0"].parent / "short.wav"}
    soundfile.write(short["c0"], np.zeros(100), 16000)
    with pytest.raises(MetaPerSERError, match=r"short\.wav: 100 samples.*at least 640"):
        network_of(Tiny(), short).clips(examples(0))


def test_weight_norm_is_right_to_second_order():
    """torch's own fails this check; when it passes one day, ours can go."""
    v = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    g = torch.rand(1, 1, 4, dtype=torch.float64, requires_grad=True)

    def normalised(v, g):
        with ExactWeightNorm():
            return torch._weight_norm(v, g, 2)

    torch.testing.assert_close(normalised(v, g), torch._weight_norm(v, g, 2))
    assert torch.autograd.gradgradcheck(normalised, (v, g))
    assert not torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, 2), (v, g), raise_exception=False)
