"""The plugin under s3prl's stock runner, as a subprocess, exactly as a user calls it."""

import re
import shutil
import sys

import pandas as pd
import pytest
import torch
from workshop import LAUNCHER, STOCK, Workshop, downstream_state, same_weights, scalars

RESULT_COLUMNS = "system,scenario,upstream,scope,test_annotator,episode,shots,queries,maF1,miF1,UA"

# Runs a module and reports on stderr how long the clips were that the upstream saw, forward by forward.
COUNTING = """
import runpy, sys
from torch.nn.modules.module import register_module_forward_pre_hook
def count(module, arguments):
    if hasattr(module, "get_downsample_rates"):
        print("FORWARD", *(len(wav) for wav in arguments[0]), file=sys.stderr)
register_module_forward_pre_hook(count)
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


# Runs a module and reports on stderr a digest of the upstream's weights before its first forward, and at the end.
FINGERPRINTING = """
import hashlib, runpy, sys
from torch.nn.modules.module import register_module_forward_pre_hook
upstreams = []
def digest(module):
    whole = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        whole.update(name.encode() + tensor.numpy().tobytes())
    print("UPSTREAM", len(module.state_dict()), whole.hexdigest(), file=sys.stderr)
def catch(module, arguments):
    if hasattr(module, "get_downsample_rates") and not upstreams:
        upstreams.append(module)
        digest(module)
register_module_forward_pre_hook(catch)
runpy.run_module(sys.argv.pop(1), run_name="__main__")
digest(upstreams[0])
"""


@pytest.fixture(scope="module")
def fbank(tmp_path_factory, small_corpus):
    """SSL-E and Meta-PerSER, trained by the stock runner on fbank_no_cmvn."""
    shop = Workshop(tmp_path_factory.mktemp("fbank"), small_corpus, ["-u", "fbank_no_cmvn"])
    shop.first = shop.train("ssl", shop.config("ssl_e_paper"))
    shop.meta_config = shop.config("meta_perser_paper", init_from=str(shop.root / "ssl/dev-best.ckpt"))
    shop.meta = shop.train("meta", shop.meta_config)
    return shop


def test_training_leaves_what_the_readme_promises(fbank):
    assert "chosen" in (fbank.root / "meta/tuning.csv").read_text()
    for folder in ("ssl", "meta"):
        assert {"dev-best.ckpt", "states-6.ckpt", "results.csv", "predictions.csv"} <= {
            path.name for path in (fbank.root / folder).iterdir()
        }
    logged = scalars(fbank.root / "meta")
    assert len(logged["metaperser/train-query_loss"]) == 6
    assert {f"metaperser/train-support_loss/step{step}" for step in range(5)} <= logged.keys()
    assert {f"metaperser/{split}-{metric}" for split in ("dev", "test") for metric in ("maF1", "miF1", "UA")} <= (
        logged.keys()
    )
    rates = logged["metaperser/lslr/classifier.weight/step4"]
    assert rates[0] != rates[-1], "the runner's optimizer moves LSLR's rates"


def test_results_have_the_fixed_columns_and_one_row_an_episode(fbank):
    results = (fbank.root / "meta/results.csv").read_text().splitlines()
    assert results[0] == RESULT_COLUMNS
    assert [line.split(",")[:8] for line in results[1:]] == [
        ["Meta-PerSER", "seen", "fbank_no_cmvn", "linear", "E1", str(episode), "4", "8"] for episode in range(2)
    ]
    predictions = pd.read_csv(fbank.root / "meta/predictions.csv")
    assert len(predictions) == 2 * 8
    probabilities = predictions.filter(like="p_")
    assert probabilities.shape[1] == 9
    assert probabilities.sum(axis=1).to_numpy() == pytest.approx(1.0, abs=1e-5)
    above = (probabilities > 1 / 9).apply(lambda row: ";".join(name[2:] for name in row.index[row]), axis=1)
    assert (predictions["predicted"].fillna("") == above).all()


def test_evaluating_a_checkpoint_gives_the_results_it_was_chosen_with(fbank):
    fbank.evaluate(fbank.root / "meta/dev-best.ckpt", "again")
    assert (fbank.root / "again/results.csv").read_text() == (fbank.root / "meta/results.csv").read_text()


def test_no_checkpoint_writes_over_what_another_has_scored(fbank):
    """A state of the same training, and a training that was moved from the folder that it says is its own."""
    place, moved = fbank.root / "meta", fbank.root / "moved.ckpt"
    before = {path: path.read_bytes() for path in place.iterdir() if path.is_file()}
    shutil.copy(place / "states-4.ckpt", moved)
    for checkpoint in (place / "states-4.ckpt", moved):
        refused = fbank.run("-m", "evaluate", "-e", checkpoint, program=LAUNCHER, check=False)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1] == (
            f"run_downstream: error: checkpoint {checkpoint}: its rows of Meta-PerSER would replace those of other "
            f"weights (of {place / 'dev-best.ckpt'}, as it was then) in {place / 'results-dev.csv'}; give another "
            "folder with -o \"args.expdir='FOLDER'\", or move the tables there away"
        )
        assert {path: path.read_bytes() for path in place.iterdir() if path.is_file()} == before
    shutil.copy(place / "dev-best.ckpt", moved)
    fbank.run("-m", "evaluate", "-e", moved, program=LAUNCHER)
    assert (place / "results.csv").read_bytes() == before[place / "results.csv"]


def test_systems_in_one_folder_add_up(fbank):
    """Several systems, from the checkpoints of one fold: rows add up, and the episodes are the same."""
    for system in ("random", "entire_few", "entire_sim"):
        override = f"config.downstream_expert.system='{system}'"
        done = fbank.evaluate(fbank.root / "ssl/dev-best.ckpt", "systems", override)
        assert ("best dev miF1" in done.stderr) == (system == "entire_few"), "who adapts is tuned, on dev"
    fbank.evaluate(fbank.root / "meta/dev-best.ckpt", "systems")
    tuning = pd.read_csv(fbank.root / "systems/tuning.csv")
    assert tuning.groupby("system").size().to_dict() == {"Entire-Few": 6 * 4, "Meta-PerSER": 4}
    predictions = pd.read_csv(fbank.root / "systems/predictions.csv")
    queries = predictions.groupby("system", sort=False).apply(
        lambda rows: rows[["test_annotator", "episode", "utterance", "labels"]].to_csv(index=False),
        include_groups=False,
    )
    assert list(queries.index) == ["Random", "Entire-Few", "Entire-Sim.", "Meta-PerSER"]
    assert queries.nunique() == 1
    before = (fbank.root / "systems/results.csv").read_text()
    fbank.evaluate(fbank.root / "meta/dev-best.ckpt", "systems")
    assert (fbank.root / "systems/results.csv").read_text() == before, "the same evaluation again replaces its rows"


def test_killed_training_resumes_to_the_same_bits(fbank):
    """SIGKILL in the middle, -e in the same folder: the same weights as an uninterrupted run."""
    long = {"total_steps": 120, "eval_step": 40, "save_step": 10}
    config = fbank.config("meta_perser_paper", long, init_from=str(fbank.root / "ssl/dev-best.ckpt"))
    whole, killed = fbank.root / "whole", fbank.root / "killed"
    fbank.train("whole", config)
    assert fbank.train_until_killed("killed", config) < 120
    fbank.run("-m", "train", "-e", killed, program=LAUNCHER)
    for name in ("states-120.ckpt", "dev-best.ckpt"):
        assert same_weights(whole / name, killed / name)
    assert (whole / "results.csv").read_text() == (killed / "results.csv").read_text()


def test_same_seed_same_bits_and_cache_makes_no_difference(fbank):
    """Cold cache, warm cache, no cache: the same losses (to 1e-5 without cache), and warm means a silent clip only."""
    config = fbank.config("meta_perser_paper", init_from=str(fbank.root / "ssl/dev-best.ckpt"))
    counting = [sys.executable, "-c", COUNTING, STOCK[-1]]
    again = fbank.train("again-meta", config, program=counting)
    assert same_weights(fbank.root / "meta/states-6.ckpt", fbank.root / "again-meta/states-6.ckpt")
    forwards = re.findall(r"FORWARD (\d+(?: \d+)*)", again.stderr)
    # The Featurizer's own 1 s probe; the silent clip of the first step, by which the expert gets to know the upstream;
    # and once more, to be remembered for the other 5 steps and for 2 × 2 evaluation batches.
    assert forwards == ["16000", "8000", "8000"]

    fbank.train(
        "no-cache",
        fbank.config("meta_perser_paper", init_from=str(fbank.root / "ssl/dev-best.ckpt"), feature_cache="off"),
    )
    cached, uncached = scalars(fbank.root / "meta"), scalars(fbank.root / "no-cache")
    for tag in ("metaperser/train-query_loss", "metaperser/train-support_loss/step4", "metaperser/test-UA"):
        assert uncached[tag] == pytest.approx(cached[tag], abs=1e-5)


def test_a_misspelt_key_stops_the_launcher_before_anything_is_written(fbank):
    done = fbank.train(
        "never", fbank.config("meta_perser_paper", init_from=None, scpoe="head"), program=LAUNCHER, check=False
    )
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "rror" in line] == [
        "run_downstream: error: config key 'downstream_expert.scpoe' is unknown; did you mean 'scope'?"
    ]
    assert not (fbank.root / "never").exists()


@pytest.mark.parametrize("program", [STOCK, LAUNCHER])
def test_a_training_is_replaced_by_no_other(fbank, program):
    place = fbank.root / "ssl"
    kept = {path: path.read_bytes() for pattern in ("*.ckpt", "*.csv", "*.sha256") for path in place.glob(pattern)}
    done = fbank.train("ssl", fbank.config("ssl_e_paper", {"total_steps": 2}), program=program, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"error: -p {place}: holds an earlier training (states-6.ckpt); go on with it by -a, give another folder, or "
        "delete this one"
    )
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_inference_names_the_emotions_of_one_file(fbank, small_corpus):
    clip = small_corpus / "audio/Ses01_00.wav"
    done = fbank.run("-m", "inference", "-e", fbank.root / "meta/dev-best.ckpt", "-t", clip, program=LAUNCHER)
    assert "Ses01_00" in done.stdout
    assert "angry" in done.stdout


def test_multi_few_trains_resumes_and_gives_the_same_results_again(fbank):
    config = fbank.config("multi_few_unseen")
    fbank.train("multi", config)
    fbank.train("half", fbank.config("multi_few_unseen", {"total_steps": 3}))
    fbank.run("-m", "train", "-e", fbank.root / "half", "-o", "config.runner.total_steps=6", program=LAUNCHER)
    assert same_weights(fbank.root / "multi/states-6.ckpt", fbank.root / "half/states-6.ckpt")
    state = downstream_state(fbank.root / "multi/states-6.ckpt")
    assert state["learner.model.heads.weight"].shape == (3, 9, 8)
    fbank.evaluate(fbank.root / "multi/dev-best.ckpt", "multi-again")
    for name in ("results.csv", "predictions.csv", "tuning.csv"):
        assert (fbank.root / "multi-again" / name).read_text() == (fbank.root / "multi" / name).read_text()


def test_linear_few_leaves_the_upstream_as_it_is(tmp_path, small_corpus, small_wavlm):
    """Bit by bit, from before the first forward to the end of training, and of adaptation."""
    shop = Workshop(tmp_path, small_corpus, ["-u", "wavlm_local", "-k", str(small_wavlm)])
    program = [sys.executable, "-c", FINGERPRINTING]
    trained = shop.train("linear", shop.config("ssl_e_paper", system="linear_few"), program=[*program, STOCK[-1]])
    best = tmp_path / "linear/dev-best.ckpt"
    adapted = shop.run("-m", "evaluate", "-e", best, program=[*program, LAUNCHER[-1]])
    digests = re.findall(r"UPSTREAM (\d+) (\w+)", trained.stderr + adapted.stderr)
    assert len(digests) == 4
    assert len(set(digests)) == 1
    assert int(digests[0][0]) > 20, "there are weights to compare"
    start, end = downstream_state(best), downstream_state(tmp_path / "linear/states-6.ckpt")
    assert not torch.equal(start["featurizer.weights"], end["featurizer.weights"]), "the weighted sum is trained"
    assert pd.read_csv(tmp_path / "linear/results.csv")["system"].unique().tolist() == ["Linear-Few"]


@pytest.mark.parametrize("pooling", ["mean", "mean_std"])
def test_wavlm_trains_evaluates_and_resumes(tmp_path, small_corpus, small_wavlm, pooling):
    """Several layers: the featurizer's weighted sum adapts, is meta-learned and is saved by the runner."""
    shop = Workshop(tmp_path, small_corpus, ["-u", "wavlm_local", "-k", str(small_wavlm)])
    model = {"pooling": pooling}
    shop.train("ssl", shop.config("ssl_e_paper", model=model, scenario="unseen"))
    best = tmp_path / "ssl/dev-best.ckpt"
    shop.train("meta", shop.config("meta_perser_paper", model=model, scenario="unseen", init_from=str(best)))
    start, end = downstream_state(best), downstream_state(tmp_path / "meta/states-6.ckpt")
    assert end["learner.rates.rates"].shape == (5, 5)
    assert not torch.equal(start["featurizer.weights"], end["featurizer.weights"])
    assert (end["learner.rates.rates"][:, -1] != 0.1).all(), "the weighted sum's own rates are learned"
    shop.evaluate(tmp_path / "meta/dev-best.ckpt", "again")
    assert (tmp_path / "again/results.csv").read_text() == (tmp_path / "meta/results.csv").read_text()
    resumed = shop.run("-m", "train", "-e", tmp_path / "meta", "-o", "config.runner.total_steps=8", program=LAUNCHER)
    assert (tmp_path / "meta/states-8.ckpt").exists(), resumed.stderr[-2000:]

    no_cache = shop.config(
        "meta_perser_paper", model=model, scenario="unseen", init_from=str(best), feature_cache="off"
    )
    shop.train("no-cache", no_cache)
    cached, uncached = scalars(tmp_path / "meta"), scalars(tmp_path / "no-cache")
    tag = "metaperser/train-query_loss"
    assert uncached[tag] == pytest.approx(cached[tag][:6], abs=1e-5)
