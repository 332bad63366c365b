"""Hard to break: what is damaged is named and made again or refused, what is killed goes on, what is full says so."""

import ctypes
import fcntl
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
import yaml
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer
from workshop import LAUNCHER, Workshop, same_weights

from s3prl_metaperser import cli, configs, resuming, run_downstream, torch_files
from s3prl_metaperser.atomic import hold, remove_leftovers, write_text
from s3prl_metaperser.checksums import CheckedFolder
from s3prl_metaperser.corpus.manifest import load_corpus, write_corpus
from s3prl_metaperser.episodes import Episode, Examples
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments.runs import Run, Upstream
from s3prl_metaperser.metrics import Scores
from s3prl_metaperser.reporting import EvaluatedEpisode, Report, Weights
from s3prl_metaperser.settings import read_settings
from s3prl_metaperser.state_files import states
from s3prl_metaperser.upstream.cache import FeatureCache, FileHashes, UpstreamIdentity, default_cache
from s3prl_metaperser.upstream.features import cached_features
from s3prl_metaperser.upstream.pooling import PooledUpstream

CPU = torch.device("cpu")
IDENTITY = UpstreamIdentity("fbank_no_cmvn", "w", "", "", "s3prl 0.4.18", "hidden_states", None, False, "mean")


def flipped(content, place, rng):
    """The same bytes with one of them changed."""
    return content[:place] + bytes([content[place] ^ rng.randrange(1, 256)]) + content[place + 1 :]


@pytest.fixture(scope="module")
def audio(small_corpus):
    return {path.stem: path for path in sorted((small_corpus / "audio").glob("*.wav"))[:8]}


@pytest.fixture(scope="module")
def pooled():
    upstream = fbank_no_cmvn()
    return PooledUpstream(upstream, Featurizer(upstream, upstream_device="cpu"), "mean", CPU)


def read_all(folder, pooled, audio):
    """Statistics and frame deviations of all clips, by way of the cache in a folder."""
    hashes = FileHashes(folder, next(iter(audio.values())).parent)
    rows, deviations = cached_features(FeatureCache(folder, IDENTITY), hashes, pooled, audio, CPU, progress=False).raw(
        sorted(audio)
    )
    return torch.cat([torch.stack(list(rows), 1).flatten(1), deviations[:, None]], 1)


def test_a_flipped_byte_in_a_feature_cache_is_never_used(tmp_path, pooled, audio, capsys):
    """All is made again to the same bytes, but where the header's parser passes over what was changed."""
    as_extracted, rng = read_all(tmp_path, pooled, audio), random.Random(0)
    (shard,) = tmp_path.rglob("shard-*.safetensors")
    whole = shard.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(8), *rng.sample(range(8, header), 20), *rng.sample(range(header, len(whole)), 20)]
    for place in places:
        shard.write_bytes(flipped(whole, place, rng))
        assert torch.equal(read_all(tmp_path, pooled, audio), as_extracted)
        said = capsys.readouterr().err
        is_mended = said.startswith(f"[metaperser] feature cache file {shard} is damaged; it is deleted, and its clips")
        assert is_mended or (place < header and not said)
        assert (shard.read_bytes() == whole) == is_mended


def test_a_shard_that_is_deleted_under_a_run_is_made_again(tmp_path, pooled, audio):
    hashes = FileHashes(tmp_path, next(iter(audio.values())).parent)
    table = cached_features(FeatureCache(tmp_path, IDENTITY), hashes, pooled, audio, CPU, progress=False)
    (shard,) = tmp_path.rglob("shard-*.safetensors")
    whole = shard.read_bytes()
    shard.unlink()
    table.gather(sorted(audio))
    assert shard.read_bytes() == whole


def test_a_flipped_byte_in_a_checkpoint_is_never_used(tmp_path):
    """It is named, or torch refuses it, or it is where nothing is kept."""
    content = {"weights": torch.arange(35.0).view(5, 7), "step": 4, "config": {"rate": [0.5, 1e-3]}}
    path, rng = tmp_path / "states-4.ckpt", random.Random(0)
    torch_files.save(content, path)
    whole, said = path.read_bytes(), Counter()
    directory = whole.index(b"PK\x01\x02")
    for place in [*rng.sample(range(directory), 200), *range(directory, len(whole), 2)]:
        path.write_bytes(flipped(whole, place, rng))
        if torch_files.damage(path) is not None:
            said["named"] += 1
            continue
        try:
            loaded = torch.load(path, weights_only=True)
        except Exception:
            said["refused"] += 1
            continue
        said["harmless"] += 1
        assert torch.equal(loaded.pop("weights"), content["weights"]), place
        assert loaded == {"step": 4, "config": content["config"]}, place
    assert said["named"] > 2 * said["refused"]
    path.write_bytes(whole)
    assert torch_files.damage(path) is None
    assert torch.equal(torch.load(path, weights_only=True)["weights"], content["weights"])


@contextmanager
def on_a_full_disk():
    """Files end at 50,000 bytes: the kernel refuses more, as it does on a full disk."""
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_what_is_written_goes_through_links_and_replaces_nothing_but_files(tmp_path):
    (tmp_path / "target.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("target.csv")
    (tmp_path / "dangling.csv").symlink_to("nowhere/gone.csv")
    os.mkfifo(tmp_path / "pipe")
    write_text(tmp_path / "link.csv", "new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "target.csv").read_text() == "new"
    for name, said in (
        ("dangling.csv", "a link to nowhere/gone.csv, which is not there"),
        ("pipe", "a pipe or a device"),
    ):
        with pytest.raises(MetaPerSERError, match=said):
            write_text(tmp_path / name, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling.csv", "link.csv", "pipe", "target.csv"]


def test_a_user_without_a_home_is_told_where_the_cache_may_be(monkeypatch):
    monkeypatch.setenv("METAPERSER_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(MetaPerSERError, match=r"no home folder is known for this user; .*METAPERSER_CACHE"):
        default_cache()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    path = tmp_path / "states-2.ckpt"
    torch_files.save({"step": 2}, path)
    before = path.read_bytes()
    with (
        on_a_full_disk(),
        pytest.raises(MetaPerSERError, match=r"states-2\.ckpt cannot be written: File too large; what was there"),
    ):
        torch_files.save({"step": 4, "weights": torch.zeros(100_000)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def bound_by_file_modes():
    """This thread, even of root, may read and write only what file modes allow it to."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    given = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, given) == 0
    fewer = (ctypes.c_uint32 * 6)(*given)
    fewer[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of those in effect
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, given) == 0


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A folder beside one that may not be searched, where this process is."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "locked"
    folder.mkdir()
    (tmp_path / "table.csv").write_text("audio,annotator,emotions\na.wav,me,sad\n")
    folder.chmod(0)
    with bound_by_file_modes():
        yield folder
    folder.chmod(0o700)


@pytest.mark.parametrize(
    "line",
    [
        "metaperser predict --checkpoint locked/x.ckpt --device cpu locked/a.wav",
        "metaperser adapt --checkpoint locked/x.ckpt --labels locked/mine.csv --out new.ckpt",
        "metaperser labels --corpus locked/corpus --annotator E1 --out new.csv",
        "metaperser portrait --corpus locked/corpus --out new.html",
        "metaperser prepare table table.csv --out locked/new",
        "metaperser prepare table table.csv --audio-root locked --out new",
        "metaperser prepare iemocap locked --out new",
        "metaperser demo-corpus --out locked/new",
        "metaperser link-s3prl --s3prl locked",
        "metaperser export-s3prl locked",
        "metaperser experiment table1 --corpus locked/corpus -u fbank_no_cmvn --out new",
        "run_downstream -m train -d metaperser -u fbank_no_cmvn --device cpu -c locked/a.yaml -p new",
        "run_downstream -m train -d metaperser -u wavlm_local -k locked/x.pt --device cpu -c ssl_e -p new",
        "run_downstream -m train -d metaperser -u fbank_no_cmvn --device cpu -c ssl_e -p locked/new",
        "run_downstream -m evaluate -e locked/states-2.ckpt --device cpu",
        "run_downstream -m evaluate -e locked --device cpu",
    ],
)
def test_what_may_not_be_searched_is_named_in_a_line(locked, capfd, monkeypatch, line):
    program, *arguments = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments) if program == "metaperser" else run_downstream.main()
    said = capfd.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"{program}: error: ")
    assert said.count("\n") == 1
    assert "locked" in said
    assert {path.name for path in locked.parent.iterdir()} == {"locked", "table.csv"}


def test_what_fails_at_exit_for_the_reason_that_was_told_says_nothing_more():
    """As TensorBoard does on a full disk, once in its thread and once at exit."""
    script = "import atexit, sys, threading; from s3prl_metaperser import run_downstream\n"
    script += "def fails(): raise OSError(28, 'No space left on device')\n"
    script += "atexit.register(fails); {}; threading.Thread(target=fails).start(); sys.exit(2)"
    for silenced, tracebacks in (("run_downstream._keep_to_the_line()", 0), ("pass", 2)):
        ended = subprocess.run([sys.executable, "-c", script.format(silenced)], capture_output=True, text=True)
        assert (ended.returncode, ended.stderr.count("Traceback")) == (2, tracebacks)


def test_a_standard_output_that_is_full_is_named_in_a_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "s3prl_metaperser.cli", "config"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("metaperser: error: standard output cannot be written: No space left on device;")
    assert ended.stderr.count("\n") == 1


class TestWhatMayNotBeReadIsNotDamaged:
    """It may be sound: it is named, and left as it is."""

    def test_a_checkpoint(self, tmp_path, capfd, monkeypatch):
        for step in (2, 4):
            torch_files.save({"step": step}, tmp_path / f"states-{step}.ckpt")
        newest = tmp_path / "states-4.ckpt"
        newest.chmod(0)
        arguments = ["run_downstream", "-m", "train", "-e", str(tmp_path), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", arguments)
        with bound_by_file_modes(), pytest.raises(SystemExit, match="2"):
            run_downstream.main()
        assert f"error: {newest} cannot be read (Permission denied)" in capfd.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["states-2.ckpt", "states-4.ckpt"]

    def test_a_checkpoint_that_another_rank_has_set_aside(self, tmp_path):
        torch_files.save({"step": 2}, tmp_path / "states-2.ckpt")
        found = [tmp_path / "states-4.ckpt", *states(tmp_path)]
        assert resuming.newest_sound(found) == (tmp_path / "states-2.ckpt", [])

    def test_a_shard_of_a_shared_cache(self, tmp_path, pooled, audio):
        read_all(tmp_path, pooled, audio)
        (shard,) = tmp_path.rglob("shard-*.safetensors")
        whole = shard.read_bytes()
        shard.chmod(0)
        named = re.escape(f"feature cache file {shard} cannot be read: Permission denied; ")
        with bound_by_file_modes(), pytest.raises(MetaPerSERError, match=f"{named}.*METAPERSER_CACHE"):
            read_all(tmp_path, pooled, audio)
        shard.chmod(0o600)
        assert shard.read_bytes() == whole

    def test_a_shard_that_is_dropped_while_the_folder_is_listed(self, tmp_path, pooled, audio, capfd):
        as_extracted = read_all(tmp_path, pooled, audio)
        (shard,) = tmp_path.rglob("shard-*.safetensors")
        (shard.parent / f"shard-{'0' * 20}.safetensors").symlink_to("gone")  # listed, and not there when it is opened
        capfd.readouterr()
        assert torch.equal(read_all(tmp_path, pooled, audio), as_extracted)
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize("name", ["results.csv", "checksums.sha256"])
    def test_results(self, tmp_path, name):
        folder = CheckedFolder(tmp_path)
        folder.replace({"results.csv": "system,miF1\n"})
        (tmp_path / name).chmod(0)
        with bound_by_file_modes(), pytest.raises(MetaPerSERError, match=rf"{name} cannot be read \(Permission denied"):
            folder.check("results.csv")


def test_what_a_killed_writer_has_left_is_removed_and_what_another_writes_is_not(tmp_path):
    path = tmp_path / "results.csv"
    killed, writing, young = (tmp_path / f".results.csv.{name}.part" for name in ("killed_1", "writing1", "young__1"))
    for leftover in (killed, writing, young):
        leftover.write_text("half a fi")
    for old in (killed, writing):
        os.utime(old, (0, 0))
    with writing.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_text(path, "whole")
        assert {one.name for one in tmp_path.iterdir()} == {"results.csv", writing.name, young.name}
        remove_leftovers(tmp_path, "*.csv")
        assert {one.name for one in tmp_path.iterdir()} == {"results.csv", writing.name}


def test_a_flipped_byte_in_a_corpus_is_refused_by_name(tmp_path, small_corpus):
    """In corpus.json some bytes say nothing: spaces between values may become others."""
    corpus = load_corpus(small_corpus)
    write_corpus(corpus, tmp_path)
    rng, refused = random.Random(0), []
    for name, most in (("annotations.csv", 60), ("corpus.json", 200)):
        path = tmp_path / name
        whole = path.read_bytes()
        for place in rng.sample(range(len(whole)), most):
            path.write_bytes(flipped(whole, place, rng))
            try:
                loaded = load_corpus(tmp_path)
            except MetaPerSERError as error:
                refused.append(str(error))
                continue
            assert name == "corpus.json"
            assert loaded.annotations.equals(corpus.annotations)
            assert (loaded.name, loaded.root, loaded.emotions) == (corpus.name, corpus.root, corpus.emotions)
        path.write_bytes(whole)
    assert len(refused) > 0.8 * 260
    assert all(str(tmp_path) in line for line in refused)
    assert load_corpus(tmp_path).annotations.equals(corpus.annotations)


class TestResults:
    """Files that are replaced together, with their checksums beside them."""

    def test_any_flipped_byte_is_named(self, tmp_path):
        folder, rng = CheckedFolder(tmp_path), random.Random(0)
        folder.replace({"results.csv": "system,miF1\nSSL-E,40.6\n", "predictions.csv": "p\n0.25\n"})
        for name in ("results.csv", "predictions.csv"):
            whole = (tmp_path / name).read_bytes()
            for place in range(len(whole)):
                (tmp_path / name).write_bytes(flipped(whole, place, rng))
                with pytest.raises(MetaPerSERError, match=rf"{name} is not what was written there"):
                    folder.check(name)
            (tmp_path / name).write_bytes(whole)
        whole = (tmp_path / "checksums.sha256").read_bytes()
        named, in_names = [], len(b"results.csv\npredictions.csv\n")
        for place in range(len(whole)):
            (tmp_path / "checksums.sha256").write_bytes(flipped(whole, place, rng))
            try:
                for name in ("results.csv", "predictions.csv"):
                    folder.check(name)
            except MetaPerSERError as error:
                named.append(str(error))
        assert len(named) >= len(whole) - in_names, (
            "where a name is changed, its checksum is of a file that is not there"
        )
        assert all(str(tmp_path) in line for line in named)

    @pytest.mark.parametrize(
        "name", ["results.csv", "predictions-dev.csv", "failures.csv", "failures-dev.csv", "tuning.csv"]
    )
    def test_what_a_run_could_not_add_to_stops_it_at_its_start(self, tmp_path, small_corpus, name):
        """Edited, or never written by a run; what else there is in the folder is the user's own."""
        settings = read_settings({"corpus": str(small_corpus)})
        (tmp_path / "results_notes.csv").write_text("mine")
        Report(tmp_path, settings, "fbank_no_cmvn", ["sad", "angry"])
        (tmp_path / name).write_text("note\nmine\n")
        with pytest.raises(MetaPerSERError, match=rf"{name}:1: unknown column 'note'"):
            Report(tmp_path, settings, "fbank_no_cmvn", ["sad", "angry"])
        CheckedFolder(tmp_path).replace({name: "as it was\n"})
        (tmp_path / name).write_text("edited\n")
        with pytest.raises(MetaPerSERError, match=rf"{name} is not what was written there"):
            Report(tmp_path, settings, "fbank_no_cmvn", ["sad", "angry"])

    def test_rows_are_replaced_by_those_of_the_same_weights_alone(self, tmp_path, small_corpus):
        """Or where nobody knows whose they are; those of a training are replaced as it moves on."""

        def report(system, folder="run"):
            settings = read_settings({"corpus": str(small_corpus), "system": system})
            return Report(tmp_path / folder, settings, "fbank_no_cmvn", ["sad", "angry"])

        def episode(shots):
            clips = Examples(("a", "b", "c"), np.eye(2, dtype=np.float32)[[0, 1, 1]])
            support = Examples(clips.utterances[:shots], clips.targets[:shots])
            return EvaluatedEpisode(Episode("E1", 0, support, clips), np.full((3, 2), 0.5), Scores(1, 2, 3))

        best, last = (Weights(tmp_path / "run" / name, name) for name in ("dev-best.ckpt", "states-6.ckpt"))
        for weights in (last, best):
            report("meta_perser").write("test", [episode(1)], replace(weights, in_training=True))
        report("meta_perser").write("test", [episode(1)], best)
        report("meta_perser").write("test", [episode(2)], last)
        report("entire_few").write("test", [episode(1)], last)
        report("random").write("test", [episode(1)])
        before = {path.name: path.read_text() for path in (tmp_path / "run").glob("*.*s*")}
        of_weights = [line.split(",")[0::5] for line in before["checkpoints.csv"].splitlines()[1:]]
        assert of_weights == [["Meta-PerSER", "1"], ["Meta-PerSER", "2"], ["Entire-Few", "1"]]
        for system, shots, weights in (("meta_perser", 1, last), ("meta_perser", 2, best), ("entire_few", 1, best)):
            again = report(system)
            with pytest.raises(MetaPerSERError, match=rf"{weights.checkpoint.name}.* replace those of other weights"):
                again.refuse_others("test", [episode(shots).episode], weights)
            with pytest.raises(MetaPerSERError, match=r"give another folder with -o \"args\.expdir"):
                again.write("test", [episode(shots)], weights)
        assert {path.name: path.read_text() for path in (tmp_path / "run").glob("*.*s*")} == before

        for name in ("results.csv", "checkpoints.csv"):
            shutil.copytree(tmp_path / "run", tmp_path / f"without {name}")
            (tmp_path / f"without {name}" / name).unlink()
            report("meta_perser", f"without {name}").write("test", [episode(1)], last)

    def test_killed_anywhere_while_it_replaces_each_file_is_one_of_the_two(self, tmp_path, monkeypatch):
        folder, rename = CheckedFolder(tmp_path), os.replace
        for renames in range(4):
            monkeypatch.undo()
            folder.replace({"results.csv": "old\n", "predictions.csv": "old\n"})
            left = [rename] * renames
            monkeypatch.setattr(os, "replace", lambda *paths, left=left: left.pop()(*paths))
            with pytest.raises(IndexError):
                folder.replace({"results.csv": "new\n", "predictions.csv": "new\n"})
            for name in ("results.csv", "predictions.csv"):
                folder.check(name)

    def test_a_full_disk_leaves_all_of_them(self, tmp_path):
        folder = CheckedFolder(tmp_path)
        folder.replace({"results.csv": "old\n", "predictions.csv": "old\n"})
        with on_a_full_disk(), pytest.raises(MetaPerSERError, match=r"predictions\.csv cannot be written"):
            folder.replace({"results.csv": "new\n", "predictions.csv": "new\n" * 100_000})
        for name in ("results.csv", "predictions.csv"):
            folder.check(name)
            assert (tmp_path / name).read_text() == "old\n"

    def test_a_run_whose_files_are_damaged_is_made_again(self, tmp_path, small_corpus, capsys):
        config = yaml.safe_load(configs.find("ssl_e").read_text())
        config["downstream_expert"]["corpus"] = str(small_corpus)
        run = Run("fold1/ssl_e", tmp_path, "train", config, Upstream("fbank_no_cmvn", None, "cpu"), 1, 1)
        files = {"dev-best.ckpt": "weights", "results-dev.csv": "miF1\n40.6\n", "tuning.csv": "lr\n0.1\n"}
        run.begin()
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        now = datetime.now(timezone.utc)
        run.finish(now, now)
        assert run.is_done()
        rng = random.Random(0)
        for name in (*files, "done.json"):
            path = tmp_path / name
            whole = path.read_bytes()
            damaged = [flipped(whole, place, rng) for place in (0, len(whole) // 2, len(whole) - 2)]
            damaged += [whole.replace(b'"sha256"', b'"sha257"')] if name == "done.json" else []
            for place, content in enumerate(damaged):
                path.write_bytes(content)
                os.utime(path, ns=(place, place))
                assert not run.is_done()
                assert name == "done.json" or f"{path} is not what its run has left" in capsys.readouterr().err
            path.write_bytes(whole)
        assert run.is_done()


def test_a_second_training_into_a_folder_is_refused_until_the_first_has_ended(tmp_path):
    """Even if the first was killed and a process that it had forked lives on."""
    holds = "import os, sys, time; from s3prl_metaperser.atomic import hold; from pathlib import Path\n"
    holds += "hold(Path(sys.argv[1]), 'taken')\nif os.fork() == 0: time.sleep(60)\nprint(os.getpid(), flush=True)\n"
    first = subprocess.Popen(
        [sys.executable, "-c", holds + "time.sleep(60)", tmp_path / "lock"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    first.stdout.readline()
    with pytest.raises(MetaPerSERError, match="taken"):
        hold(tmp_path / "lock", "taken")
    first.kill()
    first.wait()
    hold(tmp_path / "lock", "taken")
    hold(tmp_path / "lock", "taken")
    os.killpg(first.pid, signal.SIGKILL)


def test_a_killed_training_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, small_corpus):
    shop = Workshop(tmp_path, small_corpus, ["-u", "fbank_no_cmvn"])
    config = shop.config("meta_perser_paper", init_from=None)
    shop.train("whole", config, program=LAUNCHER)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    newest = tmp_path / "killed/states-6.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    (tmp_path / "killed/dev-best.ckpt").unlink()
    options = f"args.expdir='{tmp_path / 'killed'}'"
    again = shop.run("-m", "train", "-e", tmp_path / "killed", "-o", options, program=LAUNCHER)
    assert "states-6.ckpt is damaged" in again.stderr
    assert same_weights(newest, tmp_path / "whole/states-6.ckpt")
    assert (tmp_path / "killed/results-dev.csv").read_bytes() == (tmp_path / "whole/results-dev.csv").read_bytes()
