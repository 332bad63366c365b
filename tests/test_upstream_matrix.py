"""Every kind of upstream under s3prl's stock runner: SSL-E, Meta-PerSER from it, evaluated, and resumed.

What ``docs/upstreams.md`` says was run is run here. The commands are those of ``test_runner.py``; as there are many of
them and each would import torch and s3prl for seconds, they are forked from one process that has.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_upstreams import WRITERS, write_upstream
from workshop import LAUNCHER, Workshop, downstream_state, same_weights

from s3prl_metaperser.preflight_upstream import upstream_names

FRONT_END = "feature_extractor"
REACHES_NO_FEATURE = re.compile("quantizer|project_q|final_proj|label_embs_concat|mask_emb|masked_spec_embed")
"""Tensors that s3prl keeps from pre-training and that change no feature."""

# Imports what runs import; then, for each line on stdin, forks a process that runs a module as ``python -m`` would.
FORKING = """
import json, os, runpy, sys
import s3prl_metaperser.experiments.preloaded
for line in sys.stdin:
    order = json.loads(line)
    if (child := os.fork()) == 0:
        os.chdir(order["folder"])
        for number, name in (1, "stdout"), (2, "stderr"):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = order["arguments"]
        sys.modules.pop(sys.argv[0], None)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forking():
    """The process that commands are forked from."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", FORKING], **pipes) as process:
        yield process


class ForkedWorkshop(Workshop):
    """A workshop of one upstream that gives its commands to the process that forks."""

    def __init__(self, root: Path, corpus: Path, upstream: str, forking: subprocess.Popen) -> None:
        weights = ["-k", str(write_upstream(upstream, root / "upstream"))] if upstream in WRITERS else []
        super().__init__(root, corpus, ["-u", upstream, *weights])
        self.forking = forking

    def launch(self, command: list[str]) -> subprocess.CompletedProcess:
        _, _, *arguments = command
        self.forking.stdin.write(json.dumps({"folder": str(self.root), "arguments": arguments}) + "\n")
        self.forking.stdin.flush()
        code = int(self.forking.stdout.readline())
        said = ((self.root / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(command, code, *said)


@pytest.fixture
def workshop(tmp_path, small_corpus, forking):
    return lambda upstream: ForkedWorkshop(tmp_path, small_corpus, upstream, forking)


RUNNER = {"total_steps": 4, "gradient_accumulate_steps": 2, "eval_step": 4, "save_step": 2}
FEW = {"episodes": {"queries": 4}}
FEW_STEPS = {"meta": {"inner_steps": 2}, "adaptation": {"steps": [2, 3]}}


def train_evaluate_resume(shop: ForkedWorkshop, ssl_e: str, meta_perser: str, *flags: str) -> None:
    """SSL-E to step 4, Meta-PerSER from it to step 4, its best evaluated again, its step 2 resumed to step 4."""
    shop.upstream += flags
    shop.train("ssl", shop.config(ssl_e, RUNNER, **FEW))
    start = str(shop.root / "ssl/dev-best.ckpt")
    shop.train("meta", shop.config(meta_perser, RUNNER, init_from=start, **FEW, **FEW_STEPS))

    shop.evaluate(shop.root / "meta/dev-best.ckpt", "again")
    for name in ("results.csv", "predictions.csv", "tuning.csv"):
        assert (shop.root / "again" / name).read_text() == (shop.root / "meta" / name).read_text()

    half, whole = (shop.root / f"meta/states-{step}.ckpt" for step in (2, 4))
    shop.run("-m", "train", "-e", half, "-o", f"args.expdir='{shop.root / 'resumed'}'", program=LAUNCHER)
    assert same_weights(whole, shop.root / "resumed/states-4.ckpt")
    assert not same_weights(whole, half)


def scored(results: Path) -> list[list[str]]:
    return pd.read_csv(results)[["upstream", "scope"]].drop_duplicates().to_numpy().tolist()


def of_the_upstream(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in downstream_state(checkpoint).items() if name.startswith("upstream.")}


@pytest.mark.parametrize("upstream", ["fbank_no_cmvn", *WRITERS])
def test_frozen_it_trains_evaluates_and_resumes(workshop, upstream):
    shop = workshop(upstream)
    train_evaluate_resume(shop, "ssl_e_paper", "meta_perser_paper")
    assert scored(shop.root / "meta/results.csv") == [[upstream, "linear"]]
    assert of_the_upstream(shop.root / "meta/states-4.ckpt") == {}, "it is not trained"


@pytest.mark.parametrize("upstream", WRITERS)
def test_with_f_it_trains_evaluates_and_resumes(workshop, upstream):
    """The whole network: what reaches the features is trained by both loops, the front end by none."""
    shop = workshop(upstream)
    train_evaluate_resume(shop, "ssl_e_entire", "meta_perser_entire", "-f")
    assert scored(shop.root / "meta/results.csv") == [[upstream, "entire"]]
    start, end = (of_the_upstream(shop.root / path) for path in ("ssl/dev-best.ckpt", "meta/states-4.ckpt"))
    moved = {name for name in end if not torch.equal(start[name], end[name])}
    kept = end.keys() - moved
    assert all(FRONT_END in name or REACHES_NO_FEATURE.search(name) for name in kept), sorted(kept)
    assert not any(FRONT_END in name for name in moved)
    encoder = {name for name in end if ".encoder." in name}
    assert encoder
    assert encoder <= moved, "every tensor of every layer is trained"
    rates = downstream_state(shop.root / "meta/states-4.ckpt")["learner.rates.rates"]
    assert rates.shape[1] > len(encoder), "and adapted, with learned rates of its own"


def test_mfcc_is_stopped_with_the_reason(workshop):
    """s3prl brings each clip's coefficients to mean 0, deviation 1: pooled, all clips are the same."""
    shop = workshop("mfcc")
    done = shop.train("ssl", shop.config("ssl_e_paper", RUNNER), check=False)
    assert done.returncode == 2
    (error,) = (line for line in done.stderr.splitlines() if "rror" in line)
    assert "do not vary between utterances" in error
    assert "normalises each utterance" in error
    assert "-u fbank_no_cmvn" in error
    assert not list((shop.root / "ssl").glob("*.ckpt"))


def test_an_upstream_without_parameters_cannot_adapt(workshop):
    """Filterbanks have nothing that -f could train."""
    shop = workshop("fbank_no_cmvn")
    shop.upstream.append("-f")
    done = shop.train("ssl", shop.config("ssl_e_entire", RUNNER), check=False)
    assert done.returncode == 2
    (error,) = (line for line in done.stderr.splitlines() if "rror" in line)
    assert "scope' has the value 'entire'" in error
    assert "no parameters that could adapt" in error
    assert not list((shop.root / "ssl").glob("*.ckpt"))


def test_the_table_has_every_upstream_of_s3prl_and_what_is_run_here():
    from s3prl import hub

    table = (Path(__file__).parents[1] / "docs/upstreams.md").read_text()
    names = upstream_names(hub).keys()
    assert set(re.findall(r"`(\w+)`", table.partition("## The names")[2])) >= names
    assert f"All {len(names)} upstreams" in table
    assert set(re.findall(r"\| run as `(\w+)`", table)) == {"mfcc", "fbank_no_cmvn", *WRITERS}
