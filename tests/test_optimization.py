"""Names of optimizers and schedules, which s3prl evaluates as Python, and their settings."""

import copy

import pytest
import torch
import yaml

from s3prl_metaperser import configs, preflight
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.optimization import check_optimization

CONFIG = yaml.safe_load(configs.find("ssl_e").read_text())
CODE = "optimizer and 0 or open('ran', 'w')"


def changed(**sections):
    return copy.deepcopy(CONFIG) | sections


def test_every_config_of_ours_passes_and_draws_nothing():
    before = torch.get_rng_state()
    for path in configs.available().values():
        check_optimization(yaml.safe_load(path.read_text()))
    check_optimization(changed(scheduler={"name": "linear_schedule_with_warmup", "num_warmup_steps": 2}))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optimizer": {"name": CODE}}, "'optimizer.name' is .* which s3prl does not have: known: "),
        ({"optimizer": {"name": "Adm", "lr": 0.1}}, "did you mean 'Adam'"),
        ({"optimizer": {"lr": 0.1}}, "'optimizer.name' is None, .* expected one of Adam, AdamW"),
        ({"optimizer": {"name": "optimizer", "lr": 0.1}}, "which s3prl does not have"),
        ({"optimizer": [1]}, "should be a mapping"),
        ({"optimizer": {"name": ["Adam"], "lr": 0.1}}, "'optimizer.name' is .*, which s3prl does not have"),
        ({"optimizer": {"name": "Adam", "lr": -1.0}}, "'optimizer.lr' has the value -1.0: a number above 0"),
        ({"optimizer": {"name": "Adam", "lr": float("nan")}}, "'optimizer.lr' has the value nan"),
        ({"optimizer": {"name": "Adam", "lr": "1e-3"}}, "'optimizer.lr' has the value '1e-3'"),
        ({"optimizer": {"name": "TorchOptim", "torch_optim_name": "Adamm", "lr": 0.1}}, "no attribute 'Adamm'"),
        ({"optimizer": {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 0.1, "betta": 3}}, "'betta'"),
        ({"scheduler": {"name": "linear"}}, "did you mean 'linear_schedule|which s3prl does not have"),
        ({"scheduler": {"name": "scheduler and 0"}}, "which s3prl does not have"),
        ({"scheduler": {"name": "linear_schedule_with_warmup"}}, "num_warmup_steps"),
    ],
)
def test_what_s3prl_has_not_or_does_not_take_is_refused(sections, said):
    with pytest.raises(MetaPerSERError, match=said):
        check_optimization(changed(**sections))


@pytest.mark.parametrize("downstream", ["metaperser", "example"])
def test_a_name_that_is_code_does_not_run(tmp_path, monkeypatch, downstream):
    monkeypatch.chdir(tmp_path)
    for section in ("optimizer", "scheduler"):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed(**{section: {"name": CODE}})))
        command = f"-m train -d {downstream} -u fbank_no_cmvn --device cpu -p run -c config.yaml".split()
        with pytest.raises(MetaPerSERError, match=f"'{section}.name'"):
            preflight.check(command)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
