"""What dropout is drawn from is seeded where it is computed."""

from contextlib import contextmanager

import pytest
import torch

from s3prl_metaperser.dropout import seed_dropout


def test_on_the_cpu_it_is_what_torch_itself_would_seed():
    torch.manual_seed(2**40 + 7)
    expected = torch.rand(5)
    seed_dropout(2**40 + 7, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_the_gpu_of_the_run_is_seeded_and_no_other(monkeypatch, device):
    current, seeded = [torch.device("cuda:0")], []

    @contextmanager
    def on(chosen):
        before, current[0] = current[0], chosen
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeded.append((current[0], seed)))
    seed_dropout(3, torch.device(device))
    assert seeded == [(torch.device(device), 3)]
    assert current == [torch.device("cuda:0")]
