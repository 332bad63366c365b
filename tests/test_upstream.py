"""Features of a frozen upstream: exact, independent of batch-mates, and made once."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import soundfile
import torch
from s3prl.upstream.baseline.hubconf import fbank, fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer
from s3prl.upstream.wavlm.hubconf import wavlm_local
from safetensors.torch import load_file

from s3prl_metaperser.audio import read_audio
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.fingerprint import fingerprint
from s3prl_metaperser.model import Moments, Standardization, combine_layers
from s3prl_metaperser.upstream import extraction
from s3prl_metaperser.upstream.cache import FeatureCache, FileHashes, UpstreamIdentity
from s3prl_metaperser.upstream.extraction import READ_AHEAD_SECONDS, extract, extract_on_all_cores, lengths_of
from s3prl_metaperser.upstream.features import FeatureTable, cached_features, check_features_vary
from s3prl_metaperser.upstream.pooling import PooledClip, PooledUpstream

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
    before = fingerprint(wavlm.state_dict())
    assert fingerprint(wavlm.state_dict()) == before
    next(wavlm.parameters()).data.view(-1)[0] += 1e-6
    assert fingerprint(wavlm.state_dict()) != before


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


def test_recordings_that_change_places_are_heard_where_they_are_now(tmp_path, recordings):
    """Of one size, and written at one moment: what differs is when they got their names."""
    first, second = recordings["0"], recordings["1"]
    for path in (first, second):
        soundfile.write(path, noise(0.5, int(path.stem)).numpy(), 16000)
        os.utime(path, ns=(10**18, 10**18))
    hashes = FileHashes(tmp_path / "cache", tmp_path).of([first, second])
    time.sleep(0.05)  # a file system's clock may tick every few milliseconds
    for source, target in ((first, tmp_path / "x"), (second, first), (tmp_path / "x", second)):
        source.rename(target)
    assert FileHashes(tmp_path / "cache", tmp_path).of([first, second]) == hashes[::-1]


def test_hashes_of_a_version_that_remembered_less_are_made_again(tmp_path, recordings):
    path = recordings["0"]
    hashes = FileHashes(tmp_path / "cache", tmp_path)
    state = path.stat()
    content = json.dumps({str(path): [state.st_size, state.st_mtime_ns, "of another"]})
    hashes.path.parent.mkdir(parents=True)
    hashes.path.write_text(f"{zlib.crc32(content.encode()):08x}\n{content}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert FileHashes(tmp_path / "cache", tmp_path).of([path]) == [digest]


def in_order(batches):
    return [(index, clip.statistics, clip.frame_deviation) for batch in batches for index, clip in batch.items()]


def test_features_and_their_order_are_the_same_however_many_processes_there_are(wavlm, recordings):
    pooled, paths = pooled_upstream(wavlm), list(recordings.values())
    lengths = lengths_of(paths)
    assert lengths == [len(read_audio(path)) for path in paths]
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    runs = [in_order(extract_on_all_cores(pooled, paths, lengths, processes)) for processes in (1, 2, 3)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert [index for index, _, _ in runs[0]] == [0, 1, 2, 3, 4]
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert one[0] == other[0]
            assert torch.equal(one[1], other[1])
            assert one[2] == other[2]
    for index, statistics, _ in runs[0]:
        torch.testing.assert_close(statistics, pooled([read_audio(paths[index])])[0].statistics)


@pytest.mark.parametrize("lengths", [[0.5] * 6, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]], ids=["equal", "different"])
def test_on_a_cpu_a_clips_features_are_the_same_to_the_bit_whatever_else_is_extracted(wavlm, tmp_path, lengths):
    """So a cache that other commands have filled in part holds what a cold one would."""
    pooled, audio = pooled_upstream(wavlm), {}
    for number, seconds in enumerate(lengths):
        audio[str(number)] = tmp_path / f"{number}.wav"
        soundfile.write(audio[str(number)], noise(seconds, number).numpy(), 16000)
    own_cache = FeatureCache(tmp_path / "cold", IDENTITY)
    at_once = cached_features(own_cache, FileHashes(tmp_path / "cold", tmp_path), pooled, audio, CPU)
    hashes = FileHashes(tmp_path / "warm", tmp_path)
    for some in (["4"], ["1", "2", "5"], list(audio)):
        cache = FeatureCache(tmp_path / "warm", IDENTITY)
        by_parts = cached_features(cache, hashes, pooled, {name: audio[name] for name in some}, CPU)
    assert torch.equal(by_parts.gather(list(audio)), at_once.gather(list(audio)))
    waveforms = [read_audio(path) for path in audio.values()]
    with extraction._one_thread():
        alone = torch.stack([pooled([wav])[0].statistics for wav in waveforms])
    assert torch.equal(alone, at_once.gather(list(audio)))
    assert "padding_is_harmless" not in vars(pooled), "nothing to compare where no clips share a forward pass"


def test_how_many_processes_extract_may_be_said(monkeypatch, recordings):
    """As experiments do, whose runs have a thread each and wait for the one that extracts."""
    pooled, paths = pooled_upstream(fbank_no_cmvn()), list(recordings.values())
    asked = []

    def in_processes(batches, processes):
        asked.append(processes)
        yield from ()

    monkeypatch.setattr(extraction, "_in_processes", in_processes)
    monkeypatch.setattr(extraction.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("METAPERSER_EXTRACTION_PROCESSES", "3")
    list(extract_on_all_cores(pooled, paths, lengths_of(paths)))
    assert asked == [3]
    monkeypatch.setenv("METAPERSER_EXTRACTION_PROCESSES", "all")
    with pytest.raises(MetaPerSERError, match=r"METAPERSER_EXTRACTION_PROCESSES is 'all'; expected a number"):
        list(extract_on_all_cores(pooled, paths, lengths_of(paths)))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_file_in_order_that_cannot_be_extracted_is_named(tmp_path, recordings, processes):
    pooled, paths = pooled_upstream(fbank_no_cmvn()), list(recordings.values())
    lengths = lengths_of(paths)
    for path in (paths[2], paths[3]):
        path.write_bytes(path.read_bytes()[:1000])
    got = []
    with pytest.raises(MetaPerSERError) as caught:  # noqa: PT012
        for batch in extract_on_all_cores(pooled, paths, lengths, processes):
            got.extend(batch)
    assert got == [0, 1], "what came before it has been extracted"
    assert str(caught.value).startswith(f"{paths[2]}: is cut off")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("processes", [1, 2])
def test_nothing_is_left_of_an_extraction_that_is_not_gone_through(recordings, processes):
    pooled, paths = pooled_upstream(fbank_no_cmvn()), list(recordings.values())
    threads = torch.get_num_threads()
    batches = extract_on_all_cores(pooled, paths, lengths_of(paths), processes)
    next(batches)
    batches.close()
    assert multiprocessing.active_children() == []
    assert [thread.name for thread in threading.enumerate() if "reader" in thread.name] == []
    assert torch.get_num_threads() == threads


def test_files_are_read_ahead_by_so_many_seconds(tmp_path, monkeypatch):
    read, clips = [], int(READ_AHEAD_SECONDS) + 8
    monkeypatch.setattr("s3prl_metaperser.upstream.extraction.read_audio", lambda path: read.append(path) or noise(1))
    batches = extract(pooled_upstream(Framewise()), [tmp_path] * clips, [16000] * clips, batch_seconds=1)
    next(batches)
    deadline = time.monotonic() + 10
    while len(read) < READ_AHEAD_SECONDS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert READ_AHEAD_SECONDS <= len(read) <= READ_AHEAD_SECONDS + 1
    assert len(in_order(batches)) == clips - 1


INTERRUPTED = """
import signal, sys, torch
from pathlib import Path
# A shell's background jobs, and what they start, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
from s3prl.upstream.interfaces import Featurizer
from s3prl_metaperser.upstream.extraction import extract_on_all_cores
from s3prl_metaperser.upstream.pooling import PooledUpstream
upstream = fbank_no_cmvn()
pooled = PooledUpstream(upstream, Featurizer(upstream, upstream_device="cpu"), "mean", torch.device("cpu"))
for batch in extract_on_all_cores(pooled, [Path(sys.argv[1])] * 10**6, [8000] * 10**6, int(sys.argv[2])):
    print("going", flush=True)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_extraction_ends_with_all_its_processes(recordings, processes):
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(recordings["0"]), str(processes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.stdout.readline() != "going\n":
        pass
    os.killpg(process.pid, signal.SIGINT)
    # Ends only when no process is left that has it open.
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1
    assert errors.endswith("KeyboardInterrupt\n")


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


def clip_of(number):
    return PooledClip(torch.full((2, 3), float(number)), number / 10)


@pytest.fixture
def cache(tmp_path):
    """Nine clips in three shards; clip number n, named "n", is full of n."""
    cache = FeatureCache(tmp_path / "cache", IDENTITY)
    for begin in (0, 3, 6):
        cache.add({str(number): clip_of(number) for number in range(begin, begin + 3)})
    return cache


def test_rows_come_from_their_shards_in_the_order_asked_for(cache):
    statistics, deviations = cache.stored([str(number) for number in range(9)])
    asked = [7, 0, 8, 0, 4]
    assert statistics.shape == (9, 2, 3)
    assert statistics.nbytes == 9 * 2 * 3 * 4
    assert statistics[torch.tensor(asked)][:, 1, 2].tolist() == asked
    assert deviations[torch.tensor(asked)].tolist() == pytest.approx([number / 10 for number in asked])


def test_a_run_reads_only_the_shards_that_hold_what_it_asks_for(cache):
    opened = FeatureCache(cache.folder.parent.parent, IDENTITY)
    opened.refresh()
    names = [str(number) for number in range(9)]
    table = FeatureTable(names, *opened.stored(names), CPU)
    (last,) = [path for path in cache.folder.glob("shard-*") if 8 in load_file(path)["statistics"]]
    last.unlink()
    assert table.gather(["5", "0", "3"])[:, 0, 0].tolist() == [5, 0, 3]


class Counted:
    """Statistics that note which of their rows are read."""

    def __init__(self, statistics):
        self.statistics, self.read = statistics, []
        self.shape, self.dtype = statistics.shape, statistics.dtype

    def __getitem__(self, asked):
        self.read += (asked[0] if isinstance(asked, tuple) else asked).tolist()
        return self.statistics[asked]


@pytest.mark.parametrize("keeps", [True, False])
def test_a_table_gives_what_transforming_the_whole_would_give(keeps):
    whole = torch.randn(50, 3, 5, generator=torch.Generator().manual_seed(0))
    standardization = Standardization()
    standardization.fit(Moments.of(whole.unbind(1)), 3)
    statistics, deviations = Counted(whole), torch.arange(50.0)
    names = [f"u{number}" for number in range(50)]
    table = FeatureTable(names, statistics, deviations, CPU, keeps)
    assert statistics.read == []
    asked = [3, 49, 3, 0, 17]
    raw, own = table.raw([names[row] for row in asked])
    assert torch.equal(torch.stack(list(raw), 1), whole[asked])
    assert own.tolist() == asked
    assert torch.equal(table.gather(["u3"]), whole[[3]]), "before a transform"
    table.transform(standardization)
    statistics.read.clear()
    for _ in range(2):
        assert torch.equal(table.gather([names[row] for row in asked]), standardization(whole)[asked])
    table.gather(["u17", "u20"])
    assert statistics.read == ([0, 3, 17, 49, 20] if keeps else [*asked, *asked, 17, 20])


def test_a_corpus_too_large_to_keep_gives_the_same_bits(tmp_path, recordings):
    pooled = pooled_upstream(fbank_no_cmvn())

    def gathered(most_bytes):
        cache, hashes = FeatureCache(tmp_path / "cache", IDENTITY), FileHashes(tmp_path / "cache", tmp_path)
        table = cached_features(cache, hashes, pooled, recordings, CPU, most_bytes)
        standardization = Standardization()
        standardization.fit(Moments.of(table.raw(list(recordings))[0]), 1)
        table.transform(standardization)
        return table.gather(["4", "1", "4"])

    assert torch.equal(gathered(most_bytes=10**9), gathered(most_bytes=0))


def test_features_that_do_not_vary_are_refused_with_the_cure():
    """s3prl's fbank normalises each utterance: pooled, every clip looks the same."""
    for upstream, fails in [(fbank(), True), (fbank_no_cmvn(), False)]:
        for pooling in ("mean", "mean_std", "mean_std_per_layer"):
            pooled = pooled_upstream(upstream, pooling)
            clips = [pooled([noise(0.5 + seed / 5, seed) * (1 + seed)])[0] for seed in range(4)]
            moments = Moments.of(torch.stack([clip.statistics for clip in clips], 1), with_roots=pooling == "mean_std")
            deviations = torch.tensor([clip.frame_deviation for clip in clips])
            if fails:
                with pytest.raises(MetaPerSERError, match=r"do not vary between utterances.*-u fbank_no_cmvn"):
                    check_features_vary(moments, deviations, pooled)
            else:
                check_features_vary(moments, deviations, pooled)
