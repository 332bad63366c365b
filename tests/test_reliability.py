"""Hard to break: what is damaged is named and made again or refused, what is killed goes on, what is full says so."""

import fcntl
import os
import random
import resource
import signal
from collections import Counter

import pytest
import torch
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer

from s3prl_metaperser import torch_files
from s3prl_metaperser.atomic import write_text
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.upstream.cache import FeatureCache, FileHashes, UpstreamIdentity
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


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """RLIMIT_FSIZE stands in for the disk: the kernel refuses what goes beyond."""
    path = tmp_path / "states-2.ckpt"
    torch_files.save({"step": 2}, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(MetaPerSERError, match=r"states-2\.ckpt cannot be written: File too large; what was there"):
            torch_files.save({"step": 4, "weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_has_left_is_removed_and_what_another_writes_is_not(tmp_path):
    path = tmp_path / "results.csv"
    killed, writing, young = (tmp_path / f".results.csv.{name}" for name in ("killed_1", "writing1", "young__1"))
    for leftover in (killed, writing, young):
        leftover.write_text("half a fi")
    for old in (killed, writing):
        os.utime(old, (0, 0))
    with writing.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_text(path, "whole")
    assert {one.name for one in tmp_path.iterdir()} == {"results.csv", writing.name, young.name}
