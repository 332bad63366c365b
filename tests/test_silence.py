"""What a frozen upstream makes of the runner's silent clip is computed once; nothing else is ever remembered."""

import pytest
import torch
from s3prl import hub
from torch import nn

from s3prl_metaperser.upstream.silence import recall_silence

SAMPLES = 800


class Upstream(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.computed = 0

    def forward(self, wavs):
        self.computed += 1
        return {"hidden_states": [torch.stack(wavs).unsqueeze(-1) + self.weight]}


@pytest.fixture
def upstream():
    module = Upstream().eval()
    recall_silence(module, SAMPLES)
    return module


def test_silence_is_computed_once(upstream):
    with torch.no_grad():
        first, again = upstream([torch.zeros(SAMPLES)]), upstream([torch.zeros(SAMPLES)])
        first.clear()
        third = upstream([torch.zeros(SAMPLES)])
    assert upstream.computed == 1
    torch.testing.assert_close(again, third)
    assert torch.equal(third["hidden_states"][0], torch.ones(1, SAMPLES, 1))


@pytest.mark.parametrize(
    "wavs",
    [
        [torch.zeros(SAMPLES - 1)],
        [torch.zeros(SAMPLES), torch.zeros(SAMPLES)],
        [torch.cat([torch.zeros(SAMPLES - 1), torch.tensor([1e-9])])],
    ],
    ids=["another length", "two clips", "a sound"],
)
def test_anything_else_is_computed(upstream, wavs):
    with torch.no_grad():
        upstream([torch.zeros(SAMPLES)])
        for count in (2, 3):
            assert torch.equal(upstream(wavs)["hidden_states"][0], torch.stack(wavs).unsqueeze(-1) + 1)
            assert upstream.computed == count


def test_an_upstream_that_learns_is_computed(upstream):
    upstream([torch.zeros(SAMPLES)])["hidden_states"][0].sum().backward()
    assert upstream.weight.grad is not None
    upstream.train()
    with torch.no_grad():
        upstream([torch.zeros(SAMPLES)])
        upstream([torch.zeros(SAMPLES)])
    assert upstream.computed == 3


def test_an_s3prl_upstream_stays_what_it_is(small_wavlm):
    module = hub.wavlm_local(ckpt=str(small_wavlm)).eval()
    own, state = type(module), module.state_dict().keys()
    silence = [torch.zeros(8000)]
    with torch.no_grad():
        expected = module(silence)["hidden_states"]
        recall_silence(module, 8000)
        module(silence)
        recalled = module(silence)["hidden_states"]
        sound = module([torch.ones(8000)])["hidden_states"]
    assert isinstance(module, own)
    assert type(module).__name__ == own.__name__
    assert module.state_dict().keys() == state
    assert len(recalled) == len(expected) > 1
    assert all(torch.equal(one, other) for one, other in zip(recalled, expected, strict=True))
    assert not torch.equal(sound[-1], expected[-1])
