"""Hard to break: what is damaged is named and made again or refused, what is killed goes on, what is full says so."""

import random

import pytest
import torch
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer

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
