"""Pooled statistics are exactly an utterance: the model on them equals the model on frames."""

import pytest
import torch

from s3prl_metaperser.model import Moments, Standardization, combine_layers, pool_frames, statistics_rows

LAYERS, DIM = 4, 6


def frames_of(seed, frames):
    return torch.randn(LAYERS, frames, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 2


def by_frames(hidden_states, layer_weights, pooling, standardization=None):
    """Weighted sum frame by frame, then pooling: what the runner's featurizer followed by a pooling layer does."""
    if standardization is not None:
        hidden_states = (hidden_states - standardization.mean[:, None]) / standardization.scale[:, None]
    summed = (layer_weights.softmax(0)[:, None, None] * hidden_states).sum(0)
    mean = summed.mean(0)
    return mean if pooling == "mean" else torch.cat([mean, summed.std(0, correction=0)])


@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "mean_std"])
def test_pooling_first_and_summing_layers_later_is_exact(pooling, standardized):
    clips = [frames_of(seed, 20 + seed) for seed in range(5)]
    statistics = torch.stack([pool_frames(clip, pooling) for clip in clips])
    assert statistics.shape == (5, statistics_rows(LAYERS, pooling), DIM)
    standardization = Standardization()
    if standardized:
        standardization.double().fit(Moments.of(statistics.unbind(1)), LAYERS)
        means = standardization(statistics)[:, :LAYERS]
        torch.testing.assert_close(means.mean(0), torch.zeros(LAYERS, DIM, dtype=torch.float64))
        torch.testing.assert_close(means.std(0, correction=0), torch.ones(LAYERS, DIM, dtype=torch.float64))
    weights = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    pooled = combine_layers(standardization(statistics), weights, LAYERS, pooling)
    expected = torch.stack([by_frames(c, weights, pooling, standardization if standardized else None) for c in clips])
    torch.testing.assert_close(pooled, expected, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(out.square().sum(), weights)[0] for out in (pooled, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_pooling_layer_by_layer_commutes_with_the_weighted_sum_and_is_standardised_row_by_row():
    clips = [frames_of(seed, 20 + seed) for seed in range(5)]
    statistics = torch.stack([pool_frames(clip, "mean_std_per_layer") for clip in clips])
    assert statistics.shape == (5, statistics_rows(LAYERS, "mean_std_per_layer"), DIM) == (5, 2 * LAYERS, DIM)
    standardization = Standardization()
    standardization.double().fit(Moments.of(statistics.unbind(1)), 2 * LAYERS)
    standardised = standardization(statistics)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(2 * LAYERS, DIM, dtype=torch.float64))
    weights = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)
    share = weights.softmax(0)
    for clip, pooled in zip(clips, combine_layers(statistics, weights, LAYERS, "mean_std_per_layer"), strict=True):
        by_layer = [sum(share[k] * f(clip[k]) for k in range(LAYERS)) for f in (mean_of, deviation_of)]
        torch.testing.assert_close(pooled, torch.cat(by_layer))


def mean_of(frames):
    return sum(frames) / len(frames)


def deviation_of(frames):
    return (sum((frame - mean_of(frames)) ** 2 for frame in frames) / len(frames)).sqrt()


@pytest.mark.parametrize("pooling", ["mean", "mean_std", "mean_std_per_layer"])
def test_a_single_layer_needs_no_weights(pooling):
    clip = frames_of(0, 9)[:1]
    pooled = combine_layers(pool_frames(clip, pooling), None, 1, pooling)
    torch.testing.assert_close(pooled, by_frames(clip, torch.zeros(1, dtype=torch.float64), pooling))


def test_constant_dimensions_are_left_alone():
    statistics = torch.cat([torch.randn(5, 1, 3), torch.full((5, 1, 1), 7.0).expand(5, 1, 1)], dim=2)
    standardization = Standardization()
    standardization.fit(Moments.of(statistics.unbind(1)), 1)
    assert standardization(statistics)[:, 0, 3].abs().max() == 0


def test_standardisation_is_loaded_whatever_the_number_of_layers():
    fitted = Standardization()
    fitted.fit(Moments.of(torch.randn(LAYERS, 5, DIM)), LAYERS)
    loaded = Standardization()
    assert not loaded.fitted
    loaded.load_state_dict(fitted.state_dict())
    torch.testing.assert_close(loaded.scale, fitted.scale)
    assert loaded.fitted
