"""Features of a frozen upstream: exact, independent of batch-mates, and made once."""

import dataclasses
import random
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from s3prl.upstream.baseline.hubconf import fbank, fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer
from s3prl.upstream.wavlm.hubconf import wavlm_local

from s3prl_metaperser.audio import read_audio
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.model import combine_layers
from s3prl_metaperser.upstream.cache import FeatureCache, FileHashes, UpstreamIdentity, weights_fingerprint
from s3prl_metaperser.upstream.features import cached_features, check_features_vary
from s3prl_metaperser.upstream.pooling import PooledUpstream

CPU = torch.device("cpu")
IDENTITY = UpstreamIdentity("fbank_no_cmvn", "w", "", "", "s3prl 0.4.18", "hidden_states", None, False, "mean")


def pooled_upstream(upstream, pooling="mean", normalize=False):
    featurizer = Featurizer(upstream, upstream_device="cpu", normalize=normalize)
    if hasattr(featurizer, "weights"):
        featurizer.weights.data = torch.randn(len(featurizer.weights), generator=torch.Generator().manual_seed(3))
    return PooledUpstream(upstream, featurizer, pooling, CPU)


@pytest.fixture
def wavlm(small_wavlm):
    return wavlm_local(str(small_wavlm))


def noise(seconds, seed=0):
    return torch.randn(int(16000 * seconds), generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "mean_std"])
def test_pooled_clip_is_what_the_runners_featurizer_gives(wavlm, pooling, normalize):
    pooled = pooled_upstream(wavlm, pooling, normalize)
    wav = noise(0.83)
    with torch.no_grad():
        frames = pooled.featurizer([wav], wavlm([wav]))[0]
    expected = frames.mean(0)
    if pooling == "mean_std":
        expected = torch.cat([expected, frames.std(0, correction=0)])
    ours = combine_layers(pooled([wav])[0].statistics, pooled.featurizer.weights, pooled.layers, pooling)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


class Framewise(torch.nn.Module):
    """An upstream that looks at each frame alone, so that padding cannot matter."""

    def get_downsample_rates(self, key):
        return 100

    def forward(self, wavs):
        padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
        whole = torch.nn.functional.pad(padded, (0, -padded.shape[1] % 100))
        return {"hidden_states": [whole.reshape(len(wavs), -1, 100)]}


class DroppingTheLastFrame(Framewise):
    """The same without the padding to whole frames: s3prl then takes a batch-mate's padding for a frame, or not."""

    def forward(self, wavs):
        padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
        return {"hidden_states": [padded[:, : padded.shape[1] // 100 * 100].reshape(len(wavs), -1, 100)]}


def test_a_clip_never_depends_on_its_batch_mates(wavlm):
    """Where padding changes features, only clips of equal length share a batch.

    WavLM-base's group norm sees the padding. fbank is made clip by clip, but s3prl rounds a clip's frames up and so
    takes padding for frames.
    """
    careful, carefree = pooled_upstream(wavlm), pooled_upstream(Framewise())
    assert not careful.padding_is_harmless
    assert not pooled_upstream(fbank_no_cmvn()).padding_is_harmless
    assert not pooled_upstream(DroppingTheLastFrame()).padding_is_harmless
    assert carefree.padding_is_harmless
    lengths = [8000, 9000, 8000, 8000, 9000]
    assert list(careful.batches(lengths, 10)) == [[0, 2, 3], [1, 4]]
    assert list(carefree.batches(lengths, 10)) == [[0, 2, 3, 1, 4]]
    assert list(carefree.batches(lengths, 1)) == [[0, 2], [3], [1], [4]], "1 s of audio a batch"
    for pooled, seconds in [(careful, (0.5, 0.5, 0.5)), (carefree, (0.5033, 0.5066, 0.5099))]:
        clips = [noise(length, seed) for seed, length in enumerate(seconds)]
        together = pooled(clips)
        for clip, beside in zip(clips, together, strict=True):
            torch.testing.assert_close(pooled([clip])[0].statistics, beside.statistics, rtol=1e-4, atol=1e-5)


def test_extraction_leaves_modes_and_random_state_alone(wavlm):
    pooled = pooled_upstream(wavlm)
    wavlm.train()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first, second = (pooled([noise(0.5)])[0].statistics for _ in range(2))
    assert torch.equal(first, second), "no dropout, although the upstream was in train()"
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()
    assert all(module.training for module in wavlm.modules())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("upstream", "hubert"),
        ("weights", "v"),
        ("model_config", "c"),
        ("ckpt", "k"),
        ("code", "s3prl 0.4.19"),
        ("feature_selection", "last_hidden_state"),
        ("layer_selection", 3),
        ("normalize", True),
        ("pooling", "mean_std"),
    ],
)
def test_everything_that_changes_features_changes_the_key(field, value):
    assert dataclasses.replace(IDENTITY, **{field: value}).key != IDENTITY.key
    assert {field.name for field in dataclasses.fields(IDENTITY)} == {
        *("upstream", "weights", "ckpt", "model_config", "code"),
        *("feature_selection", "layer_selection", "normalize", "pooling"),
    }


def test_one_changed_weight_changes_the_fingerprint(wavlm):
    before = weights_fingerprint(wavlm)
    assert weights_fingerprint(wavlm) == before
    next(wavlm.parameters()).data.view(-1)[0] += 1e-6
    assert weights_fingerprint(wavlm) != before


@pytest.fixture
def recordings(tmp_path):
    for number in range(5):
        soundfile.write(tmp_path / f"{number}.wav", noise(0.5 + number / 10, number).numpy(), 16000)
    return {str(number): tmp_path / f"{number}.wav" for number in range(5)}


def noting_lengths(upstream, file):
    """Note what goes through an upstream, in whichever process; give what reads it back."""

    def note(module, arguments, output):
        with file.open("a") as notes:
            notes.write("".join(f"{len(wav)}\n" for wav in arguments[0]))

    upstream.register_forward_hook(note)
    return lambda: [int(line) for line in file.read_text().splitlines()]


def test_each_recording_goes_through_the_upstream_once_until_it_changes(tmp_path, recordings):
    pooled = pooled_upstream(fbank_no_cmvn())
    seen = noting_lengths(pooled.upstream, tmp_path / "seen")

    def table():
        (tmp_path / "seen").write_text("")
        cache = FeatureCache(tmp_path / "cache", IDENTITY)
        return cached_features(cache, FileHashes(tmp_path / "cache", tmp_path), pooled, recordings, CPU)

    cold, extracted = table().gather(["3", "0", "3"]), len(seen())
    assert extracted >= 5
    assert torch.equal(table().gather(["3", "0", "3"]), cold)
    assert seen() == [], "warm: not even the padding is compared again"
    torch.testing.assert_close(cold[1], pooled([read_audio(recordings["0"])])[0].statistics, rtol=1e-5, atol=1e-5)
    soundfile.write(recordings["0"], noise(0.77).numpy(), 16000)
    changed = table().gather(["3", "0"])
    assert seen() == [int(0.77 * 16000)]
    assert torch.equal(changed[0], cold[0])
    assert not torch.equal(changed[1], cold[1])


EXTRACTOR = """
import sys, torch
from pathlib import Path
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer
from s3prl_metaperser.upstream.cache import *
from s3prl_metaperser.upstream.features import cached_features
from s3prl_metaperser.upstream.pooling import PooledUpstream
root = Path(sys.argv[1])
upstream = fbank_no_cmvn()
pooled = PooledUpstream(upstream, Featurizer(upstream, upstream_device="cpu"), "mean", torch.device("cpu"))
pooled.__dict__["padding_is_harmless"] = False
noted = root / sys.argv[2]
upstream.register_forward_hook(lambda m, i, o: print(*map(len, i[0]), file=noted.open("a")))
identity = UpstreamIdentity("fbank_no_cmvn", "w", "", "", "s3prl 0.4.18", "hidden_states", None, False, "mean")
audio = {path.stem: path for path in sorted(root.glob("*.wav"))}
print("ready", flush=True); sys.stdin.readline()
cache, hashes = FeatureCache(root / "cache", identity), FileHashes(root / "cache", root)
table = cached_features(cache, hashes, pooled, audio, torch.device("cpu"))
print(len(noted.read_text().split()) if noted.exists() else 0, float(table.gather(sorted(audio)).double().sum()))
"""


def test_processes_share_a_cache_without_repeating_work(tmp_path, recordings):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EXTRACTOR, str(tmp_path), f"noted-{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate()[0].split() for process in processes]
    assert sorted(int(count) for count, _ in results) == [0, 5], "one extracted, the other waited and read"
    assert results[0][1] == results[1][1]


def test_a_damaged_cache_file_is_named(tmp_path, recordings):
    pooled = pooled_upstream(fbank_no_cmvn())
    cached_features(FeatureCache(tmp_path / "c", IDENTITY), FileHashes(tmp_path, tmp_path), pooled, recordings, CPU)
    (shard,) = (tmp_path / "c").rglob("shard-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(MetaPerSERError, match=rf"{shard.name} is damaged; delete it"):
        FeatureCache(tmp_path / "c", IDENTITY).refresh()


def test_features_that_do_not_vary_are_refused_with_the_cure():
    """s3prl's fbank normalises each utterance: pooled, every clip looks the same."""
    for upstream, fails in [(fbank(), True), (fbank_no_cmvn(), False)]:
        for pooling in ("mean", "mean_std", "mean_std_per_layer"):
            pooled = pooled_upstream(upstream, pooling)
            clips = [pooled([noise(0.5 + seed / 5, seed) * (1 + seed)])[0] for seed in range(4)]
            statistics = torch.stack([clip.statistics for clip in clips])
            deviations = torch.tensor([clip.frame_deviation for clip in clips])
            if fails:
                with pytest.raises(MetaPerSERError, match=r"do not vary between utterances.*-u fbank_no_cmvn"):
                    check_features_vary(statistics, deviations, pooled)
            else:
                check_features_vary(statistics, deviations, pooled)
