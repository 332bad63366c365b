"""What s3prl's runner does with the expert, in-process: for tests that look at one call."""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
import yaml
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer

from s3prl_metaperser import configs
from s3prl_metaperser.expert import DownstreamExpert


def arguments(corpus_folder: Path, folder: Path, system="meta_perser", recipe="paper", **expert):
    """What the runner passes for ``-m train -d metaperser -u fbank_no_cmvn -c CONFIG -p FOLDER``."""
    name = system if system in ("multi_few", "meta_perser") else "ssl_e"
    name += "_paper" if recipe == "paper" and name != "multi_few" else ""
    config = yaml.safe_load(configs.find(name).read_text())
    own = config["downstream_expert"]
    own |= {"corpus": str(corpus_folder), "feature_cache": str(folder / "cache"), "init_from": None, "system": system}
    own["recipe"] = recipe
    own["data"]["min_annotations"] = 4
    own["episodes"] |= {"shots": 4, "queries": 8, "number": 2}
    for key, value in expert.items():
        own[key] = own.get(key, {}) | value if isinstance(value, dict) else value
    command_line = {
        "mode": "train",
        "seed": 1,
        "device": "cpu",
        "upstream": "fbank_no_cmvn",
        "upstream_trainable": False,
        "downstream_variant": None,
        "init_ckpt": None,
        "past_exp": None,
        "upstream_model_config": None,
    }
    return {"upstream_dim": 240, "upstream_rate": 160, "expdir": str(folder / "run"), **config, **command_line}


def one_training_step(given, upstream=fbank_no_cmvn):
    """Do what the runner does for its first batch."""
    expert = DownstreamExpert(**given)
    model = upstream()
    featurizer = Featurizer(model, upstream_device="cpu")
    expert.bind(model, featurizer)
    (wavs, batch) = next(iter(expert.get_dataloader("train")))
    return expert("train", featurizer(wavs, model(wavs)), batch, records=defaultdict(list))


def saved(expert, path):
    torch.save({"Downstream": expert.state_dict(), "Args": argparse.Namespace()}, path)
    return str(path)
