"""Every kind of upstream under s3prl's stock runner: SSL-E, Meta-PerSER from it, evaluated, and resumed.

What ``docs/upstreams.md`` says was run is run here. The commands are those of ``test_runner.py``; as there are many of
them and each would import torch and s3prl for seconds, they are forked from one process that has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from small_upstreams import WRITERS, write_upstream
from workshop import LAUNCHER, Workshop, downstream_state, same_weights

FROZEN = ["fbank_no_cmvn", *WRITERS]

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


RUNNER = {"total_steps": 4, "eval_step": 2, "save_step": 2}


@pytest.mark.parametrize("upstream", FROZEN)
def test_frozen_it_trains_evaluates_and_resumes(workshop, upstream):
    shop = workshop(upstream)
    shop.train("ssl", shop.config("ssl_e_paper", RUNNER))
    few = {"meta": {"inner_steps": 2}, "adaptation": {"steps": [2, 3]}}
    shop.train("meta", shop.config("meta_perser_paper", RUNNER, init_from=str(shop.root / "ssl/dev-best.ckpt"), **few))
    results = shop.root / "meta/results.csv"
    assert pd.read_csv(results)[["upstream", "scope"]].drop_duplicates().to_numpy().tolist() == [[upstream, "linear"]]

    shop.evaluate(shop.root / "meta/dev-best.ckpt", "again")
    assert (shop.root / "again/results.csv").read_text() == results.read_text()

    half, whole = (shop.root / f"meta/states-{step}.ckpt" for step in (2, 4))
    shop.run("-m", "train", "-e", half, "-o", f"args.expdir='{shop.root / 'resumed'}'", program=LAUNCHER)
    assert same_weights(whole, shop.root / "resumed/states-4.ckpt")
    assert not same_weights(whole, half)
    assert not any(name.startswith("upstream.") for name in downstream_state(whole)), "the upstream is not trained"


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
