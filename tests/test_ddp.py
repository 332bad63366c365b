"""Training on two processes, launched as s3prl's documentation says: the same training as on one.

s3prl means two GPUs. Here are two processes on the CPU, so that what it hard-codes for CUDA, and our refusal for that
reason, is patched, and only that.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from small_upstreams import write_upstream
from workshop import Workshop, downstream_state, same_weights

# Runs s3prl's runner. Each process leaves the gradients of each step, and how long the clips were that its upstream
# saw; all but rank 0 get a folder of their own for whatever they write.
SCRIPT = """
import os, sys, torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from s3prl_metaperser.run_downstream import install_stand_ins, main
install_stand_ins()
from s3prl.downstream import runner
from s3prl_metaperser import preflight

preflight._check_device = lambda device, local_rank: None
torch.cuda.set_device = lambda device: None
runner.DDP = lambda module, device_ids, **settings: DistributedDataParallel(module, **settings)

steps, clips = [], []
def record_gradients(optimizer, *_):
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    steps.append([torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in tensors])
def record_clips(module, arguments):
    if hasattr(module, "get_downsample_rates") and not isinstance(module, DistributedDataParallel):
        clips.extend(len(wav) for wav in arguments[0])
register_optimizer_step_pre_hook(record_gradients)
register_module_forward_pre_hook(record_clips)

place = sys.argv.index("-p") + 1 if "-p" in sys.argv else None
rank = int(os.environ.get("RANK", 0))
folder = f"{sys.argv[place]}-rank{rank}" if place else ""
if place and rank > 0:
    sys.argv[place] = folder
try:
    main()
finally:
    if place:
        torch.save({"steps": steps, "clips": clips}, f"{folder}.pt")
"""
LONGEST_SECONDS = 150
RUNNER = {"total_steps": 2, "eval_step": 1, "save_step": 1, "gradient_clipping": 1.0e6}


class Ranks(Workshop):
    """A workshop whose runs are of one process or of two, and never hang for ever."""

    def __init__(self, root: Path, corpus: Path, upstream: list[str]) -> None:
        super().__init__(root, corpus, upstream)
        self.script = root / "script.py"
        self.script.write_text(SCRIPT)

    def on_two(self, launcher: str = "torch.distributed.launch") -> list[str]:
        two = ["--standalone", "--nproc_per_node", "2"]
        return [sys.executable, "-m", launcher, *two, str(self.script), "--backend", "gloo"]

    def launch(self, command: list[str]) -> subprocess.CompletedProcess:
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            said = process.communicate(timeout=LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # torch's launcher then ends its own
            said = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, *said)

    def plain_descent(self, config: Path, batches: int) -> Path:
        """The config with an optimizer that does not blow rounding up, as Adam does, and some batches a step."""
        settings = yaml.safe_load(config.read_text())
        settings["optimizer"] = {"name": "TorchOptim", "torch_optim_name": "SGD", "lr": 0.05}
        settings["runner"]["gradient_accumulate_steps"] = batches
        path = config.with_stem(f"{config.stem}-{batches}")
        path.write_text(yaml.safe_dump(settings))
        return path

    def train_on_two_and_one(self, config: Path) -> "Ranks":
        """Two batches a step on each of two ranks, and then four on one process."""
        done = self.train("two", self.plain_descent(config, 2), program=self.on_two())
        self.said = done.stdout + done.stderr
        self.train("one", self.plain_descent(config, 4), program=[sys.executable, str(self.script)])
        return self

    def recorded(self, run: str, rank: int = 0) -> dict:
        return torch.load(self.root / f"{run}-rank{rank}.pt")


@pytest.fixture(scope="module")
def new_ranks(tmp_path_factory, small_corpus):
    def new(upstream: str, *flags: str) -> Ranks:
        root = tmp_path_factory.mktemp("ranks")
        weights = write_upstream(upstream, root / "upstream")
        return Ranks(root, small_corpus, ["-u", upstream, "-k", str(weights), *flags])

    return new


@pytest.fixture(scope="module")
def meta_entire(new_ranks):
    """Meta-PerSER through the upstream, with annealing by what all ranks have trained."""
    shop = new_ranks("wavlm_local", "-f")
    config = shop.config(
        "meta_perser_entire",
        RUNNER,
        init_from=None,
        meta={"inner_steps": 2, "annealing": {"fraction": 0.3, "over": "training"}},
        adaptation={"steps": [1, 2]},
    )
    return shop.train_on_two_and_one(config)


@pytest.fixture(scope="module")
def ssl_entire(new_ranks):
    """SSL-E through the upstream, with its dropout and masks, on one layer of three.

    DDP waits for the other layers' gradients all the same, and knows nothing of the mask's embedding.
    """
    shop = new_ranks("hf_wav2vec2_custom", "-f", "-l", "1")
    return shop.train_on_two_and_one(shop.config("ssl_e_entire", RUNNER))


@pytest.fixture(scope="module")
def meta_linear(new_ranks):
    """Meta-PerSER on cached features, two annotators a batch."""
    shop = new_ranks("wavlm_local")
    few = {"meta": {"inner_steps": 2, "tasks_per_batch": 2}, "adaptation": {"steps": [1, 2]}}
    return shop.train_on_two_and_one(shop.config("meta_perser_paper", RUNNER, init_from=None, **few))


@pytest.mark.parametrize("name", ["meta_entire", "ssl_entire", "meta_linear"])
def test_two_ranks_take_the_steps_of_one_process(request, name):
    """Before each step of the optimizer the same gradients, and after the last one the same weights."""
    shop = request.getfixturevalue(name)
    two, other, one = (shop.recorded(*run)["steps"] for run in [("two",), ("two", 1), ("one",)])
    assert len(two) == len(other) == len(one) == 2
    for number, expected in enumerate(one):
        whole = torch.cat([tensor.flatten() for tensor in expected]).norm()
        assert whole > 0.1
        # Before any step the two differ by the order of summation; later, their weights do too.
        smallest = 1e-7 if number == 0 else 1e-2 * whole
        for gradient, same, tensor in zip(two[number], other[number], expected, strict=True):
            assert torch.equal(gradient, same)
            assert (gradient - tensor).norm() <= 1e-6 * max(tensor.norm(), smallest)
    weights, expected = (downstream_state(shop.root / run / "states-2.ckpt") for run in ("two", "one"))
    assert (weights.pop("batches_seen"), expected.pop("batches_seen")) == (4, 8)
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(weights[key], tensor, rtol=1e-6, atol=1e-6)


def test_rank_0_alone_evaluates_writes_and_speaks(meta_entire):
    """After each of two steps, while the other rank waits; and both come to an end."""
    root = meta_entire.root
    assert list((root / "two-rank1").iterdir()) == []
    written = {path.name for path in (root / "two").iterdir()}
    assert {"dev-best.ckpt", "states-1.ckpt", "states-2.ckpt", "results.csv", "tuning.csv"} <= written
    assert meta_entire.said.count("] seen fold1: test E1") == 1
    assert meta_entire.said.count("] Meta-PerSER on test") == 2


def test_a_checkpoint_of_two_ranks_is_evaluated_by_one_process(meta_entire):
    root = meta_entire.root
    meta_entire.evaluate(root / "two/dev-best.ckpt", "again")
    for name in ("results.csv", "predictions.csv"):
        assert (root / "again" / name).read_text() == (root / "two" / name).read_text()


def test_two_ranks_resume_to_the_same_bits(meta_entire):
    root = meta_entire.root
    elsewhere = f"args.expdir='{root / 'resumed'}'"
    program = meta_entire.on_two("torch.distributed.run")
    meta_entire.run("-m", "train", "-e", root / "two/states-1.ckpt", "-o", elsewhere, program=program)
    assert same_weights(root / "two/states-2.ckpt", root / "resumed/states-2.ckpt")


def test_one_rank_fills_the_feature_cache_for_both(meta_linear, small_corpus):
    lengths = sorted(len(soundfile.read(path)[0]) for path in (small_corpus / "audio").iterdir())
    seen = [meta_linear.recorded("two", rank)["clips"] for rank in (0, 1)]
    real = [sorted(length for length in own if length in lengths) for own in seen]
    assert sorted(real, key=len) == [[], lengths]


# From the second outer step on, the losses of all of a rank's episodes overflow, where it is one of those named.
DIVERGE = """
from s3prl_metaperser.run import Run
training_loss = Run.training_loss
def diverging(self, batch, batches_seen, records):
    if batches_seen >= 2 and str(rank) in os.environ["DIVERGING_RANKS"]:
        self.learner.class_weights.fill_(3e38)
    return training_loss(self, batch, batches_seen, records)
Run.training_loss = diverging
"""


@pytest.mark.parametrize(("diverging", "taken"), [("01", 1), ("1", 2)])
def test_a_step_is_taken_unless_nothing_is_left_of_it_in_any_process(
    tmp_path, small_corpus, monkeypatch, diverging, taken
):
    """Zeros in place of no gradient would let Adam's momentum move the weights."""
    monkeypatch.setenv("DIVERGING_RANKS", diverging)
    shop = Ranks(tmp_path, small_corpus, ["-u", "fbank_no_cmvn"])
    shop.script.write_text(SCRIPT.replace("try:\n    main()", f"{DIVERGE}\ntry:\n    main()"))
    runner = RUNNER | {"eval_step": 9, "gradient_accumulate_steps": 2}
    few = {"meta": {"inner_steps": 2, "tasks_per_batch": 2}, "adaptation": {"steps": [1, 2]}}
    done = shop.train("two", shop.config("meta_perser_paper", runner, init_from=None, **few), program=shop.on_two())
    assert "training goes on without" in done.stderr
    assert [len(shop.recorded("two", rank)["steps"]) for rank in (0, 1)] == [taken, taken]
    before, after = (downstream_state(tmp_path / f"two/states-{step}.ckpt") for step in (1, 2))
    learned = [name for name in before if name.startswith(("learner.model.", "learner.rates."))]
    assert len(learned) > 4
    assert all(torch.equal(before[name], after[name]) for name in learned) == (taken == 1)


def test_two_ranks_without_a_gpu_each_are_refused_in_one_line(tmp_path):
    """Rank 0 says it, and none of them is killed before it has ended with code 2."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    apart = ["--log-dir", ".", "--redirects", "3"]
    run = ["-m", "s3prl_metaperser.run_downstream", "-m", "train", "-d", "metaperser", "-u", "fbank_no_cmvn"]
    flags = ["--device", "cpu", "--backend", "gloo", "-c", "ssl_e_paper", "-p", "run"]
    ended = subprocess.run(
        [sys.executable, *torchrun, *apart, *run, *flags],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
    )
    first, other = (next(tmp_path.glob(f"*/attempt_0/{rank}/stderr.log")).read_text() for rank in (0, 1))
    assert first.startswith("run_downstream: error: torchrun has started 2 processes here")
    assert (first.count("\n"), other) == (1, "")
    assert "exitcode  : 2" in ended.stderr
    assert not (tmp_path / "run").exists()
