"""A checkpoint as a training run writes it, made in this process, for tests that change something in it."""

import copy

import torch
from runner_stand_in import arguments
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer

from s3prl_metaperser import preflight_arguments, run_downstream
from s3prl_metaperser.expert import DownstreamExpert
from s3prl_metaperser.personal_checkpoint import checkpoint_fingerprint


def whole_checkpoint(corpus, folder, system="meta_perser"):
    """Give all that s3prl's runner saves but the optimizer, of a model that has learned nothing yet."""
    run_downstream.make_ready()
    given = arguments(corpus, folder, system=system)
    expert, upstream = DownstreamExpert(**given), fbank_no_cmvn()
    featurizer = Featurizer(upstream, upstream_device="cpu")
    expert.bind(upstream, featurizer)
    flags = f"-m train -d metaperser -u fbank_no_cmvn --device cpu -p {folder / 'run'} -c gone.yaml".split()
    sections = ("runner", "optimizer", "downstream_expert")
    return {
        "Downstream": dict(expert.state_dict()),
        "Featurizer": dict(featurizer.state_dict()),
        "Args": preflight_arguments.parse(flags).namespace,
        "Config": {name: copy.deepcopy(given[name]) for name in sections},
        "Step": 1,
        "Epoch": 0,
    }


def personal(parent, place):
    """Give a small personal checkpoint that moved nothing, whose parent is said to be at a place."""
    content = copy.deepcopy(parent)
    about = content["Downstream"]["_extra_state"]
    about |= {
        "training": "listener",
        "parent": {"fingerprint": checkpoint_fingerprint(parent), "places": [place, place]},
    }
    content["Downstream"] = {"_extra_state": about, "learner.model.projector.bias": torch.zeros(256)}
    content["Config"]["downstream_expert"] |= {"system": "personal", "init_from": None}
    return content
