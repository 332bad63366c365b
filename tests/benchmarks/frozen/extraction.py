"""Feature extraction against the bare upstream, and the feature cache of 100,000 utterances.

Extraction is ``cached_features`` on an empty cache, from hashing the files to the finished shards; the bare upstream is
s3prl's module called on the same clips, in memory, in ``eval()`` and without gradients, by all of torch's threads, in
batches of 8 s where clips are of equal length, with which one core is quickest. Extraction takes each clip alone, for
the sake of its last bits. Throughput is in seconds of audio per second. The upstreams are WavLM in the base model's
architecture with random weights, where padding changes features and so only clips of equal length can share a forward
pass, and ``fbank_no_cmvn``. Recordings are those of ``--real-speech``, else noise of the same rate and lengths; once
they are all of one length, and once cut to lengths of which no two are equal, as in most corpora.

The cache holds 13 × 768 floats an utterance in shards of 256: 4 GB in the scratch folder.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import soundfile
import torch
from s3prl.hub import fbank_no_cmvn, wavlm_local
from s3prl.upstream.interfaces import Featurizer
from torch import Tensor, nn
from whole_network import Case, checkpoint_file

from frozen.measuring import Line, Memory, Options, Ratio, side_by_side
from s3prl_metaperser.audio import read_audio
from s3prl_metaperser.upstream.cache import FeatureCache, FileHashes, UpstreamIdentity
from s3prl_metaperser.upstream.extraction import extract, lengths_of
from s3prl_metaperser.upstream.features import SHARD_CLIPS, FeatureTable, cached_features
from s3prl_metaperser.upstream.pooling import SAMPLE_RATE, PooledClip, PooledUpstream, evaluating

CPU = torch.device("cpu")
CLIPS_A_THREAD, MANY_CLIPS, RATE, SECONDS = 32, 535, 22_050, 2.0
"""So many that the fifth of a second that forking and a new cache take once is small."""
SLOW_ROUNDS = 3
"""At most, of what takes ten seconds and more."""
BARE_SECONDS = 8.0
UTTERANCES, STATISTICS = 100_000, (13, 768)
BATCH = 288
"""Clips of a meta-training step of 9 tasks of 32."""
TARGET_THROUGHPUT, TARGET_OPENING = 0.95, 1.0


def measure(options: Options) -> Iterator[Line]:
    """See the module's docstring."""
    recordings = options.scratch / "recordings"
    if options.real_speech is None:
        paths = [_noise(recordings / f"{number}.wav", number, SECONDS) for number in range(MANY_CLIPS)]
    else:
        paths = sorted(options.real_speech.rglob("*.wav"))
    few = paths[: CLIPS_A_THREAD * options.threads]
    cut = [_cut(path, recordings / f"cut{number}.wav", number) for number, path in enumerate(few)]
    wavlm = _pooled(wavlm_local(str(checkpoint_file(Case(), options.scratch))))
    what = "feature extraction, WavLM base, {} clips {}: throughput / the bare upstream's"
    target = f"≥ {TARGET_THROUGHPUT}"
    ratio, _, note = _throughput(wavlm, few, options)
    yield Line(what.format(len(few), "all of one length"), target, str(ratio), ratio.median >= TARGET_THROUGHPUT, note)
    ratio, in_one, note = _throughput(wavlm, cut, options)
    name = what.format(len(cut), "no two of one length")
    yield Line(name, target, str(ratio), ratio.median >= TARGET_THROUGHPUT, note)
    name = f"the same in one process with {options.threads} threads, not in {options.threads} with one each"
    yield Line(name, "", str(in_one), None, "what the number of processes is chosen by")
    ratio, _, note = _throughput(_pooled(fbank_no_cmvn()), paths, options)
    yield Line(f"feature extraction, fbank_no_cmvn, {len(paths)} clips: the same", "", str(ratio), None, note)
    yield from _cache(options)


def _noise(path: Path, seed: int, seconds: float) -> Path:
    path.parent.mkdir(exist_ok=True)
    samples = 0.1 * np.random.default_rng(seed).standard_normal(round(RATE * seconds))
    soundfile.write(path, samples, RATE)
    return path


def _cut(source: Path, path: Path, number: int) -> Path:
    """Leave out 10 ms more for each recording."""
    path.parent.mkdir(exist_ok=True)
    samples, rate = soundfile.read(source)
    soundfile.write(path, samples[: len(samples) - number * rate // 100], rate)
    return path


def _pooled(upstream: nn.Module) -> PooledUpstream:
    return PooledUpstream(upstream, Featurizer(upstream, upstream_device="cpu"), "mean", CPU)


def _identity(name: str) -> UpstreamIdentity:
    return UpstreamIdentity(name, "", "", "", "", "hidden_states", None, False, "mean")


def _bare(pooled: PooledUpstream, paths: Sequence[Path]) -> Callable[[], None]:
    wavs = [read_audio(path) for path in paths]
    plan = list(pooled.batches([len(wav) for wav in wavs], BARE_SECONDS))

    @torch.no_grad()
    def run() -> None:
        with evaluating(pooled.upstream):
            for batch in plan:
                pooled.upstream([wavs[index] for index in batch])

    return run


def _throughput(pooled: PooledUpstream, paths: Sequence[Path], options: Options) -> tuple[Ratio, Ratio, str]:
    """Compare with the bare upstream; give extraction's and a single process's ratio of throughput, and a note."""
    audio = {str(path): path for path in paths}
    lengths = lengths_of(paths)
    folder = options.scratch / "cold"

    def extraction() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with redirect_stderr(StringIO()):
            cached_features(FeatureCache(folder, _identity("cold")), FileHashes(folder, folder), pooled, audio, CPU)

    programs: Mapping[str, Callable[[], object]] = {
        "bare": _bare(pooled, paths),
        "extraction": extraction,
        "one process": lambda: list(extract(pooled, paths, lengths)),
    }
    seconds = side_by_side(programs, min(options.rounds, SLOW_ROUNDS) if len(paths) < MANY_CLIPS else options.rounds)
    heard = sum(lengths) / SAMPLE_RATE
    rates = {name: heard / float(np.median(own)) for name, own in seconds.items()}
    note = ", ".join(f"{name} {rate:.3g} s of audio per second" for name, rate in rates.items())
    in_processes, in_one = (Ratio.of(seconds["bare"], seconds[name]) for name in ("extraction", "one process"))
    return in_processes, in_one, note


def _content(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def _write_cache(folder: Path) -> None:
    cache = FeatureCache(folder, _identity("large"))
    statistics = torch.randn(SHARD_CLIPS, *STATISTICS, generator=torch.Generator().manual_seed(0))
    for begin in range(0, UTTERANCES, SHARD_CLIPS):
        numbers = range(begin, min(begin + SHARD_CLIPS, UTTERANCES))
        cache.add({_content(number): PooledClip(statistics[number - begin], 1.0) for number in numbers})


def _cache(options: Options) -> Iterator[Line]:
    folder = options.scratch / "large"
    _write_cache(folder)
    contents = [_content(number) for number in range(UTTERANCES)]
    utterances = [f"u{number}" for number in range(UTTERANCES)]

    def opened(keeps: bool) -> FeatureTable:
        cache = FeatureCache(folder, _identity("large"))
        cache.refresh()
        return FeatureTable(utterances, *cache.stored(contents), CPU, keeps)

    memory = Memory()
    table = opened(keeps=False)
    grown = memory.now() / 1e6
    seconds = side_by_side({"opening": lambda: opened(keeps=False)}, options.rounds)["opening"]
    size = f"{UTTERANCES:,} utterances of {STATISTICS[0]} × {STATISTICS[1]}"
    yield Line(
        f"opening a feature cache of {size}",
        f"< {TARGET_OPENING:g} s",
        f"{np.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})",
        float(np.median(seconds)) < TARGET_OPENING,
        f"{len(list(folder.rglob('shard-*')))} shards; takes {grown:.0f} MB",
    )
    rng = random.Random(0)
    batches = [rng.sample(utterances, BATCH) for _ in range(50)]
    # What a first batch allocates besides is no growth.
    table.gather(batches[0])
    memory = Memory()
    for batch in batches:
        table.gather(batch)
    grown = memory.now() / 1e6
    read = len({utterance for batch in batches for utterance in batch})
    total = UTTERANCES * STATISTICS[0] * STATISTICS[1] * 4 / 1e9
    yield Line(
        f"memory that {read:,} of these utterances add, in batches of {BATCH}, above the limit of what is kept",
        "not read whole",
        f"{grown:.0f} MB of {total * 1e3:.0f}",
        grown < 0.05 * total * 1e3,
        "batches are read and transformed anew",
    )
    kept = FeatureTable([str(number) for number in range(2000)], *_in_memory(2000), CPU)
    few = [rng.sample([str(number) for number in range(2000)], BATCH) for _ in range(20)]
    programs: Mapping[str, Callable[[], object]] = {
        "kept": lambda: [kept.gather(batch) for batch in few],
        "read": lambda: [table.gather(batch) for batch in batches[:20]],
    }
    seconds_of = {name: [1e3 * one / 20 for one in own] for name, own in side_by_side(programs, options.rounds).items()}
    reached = ", ".join(f"{name} {np.median(own):.1f} ms" for name, own in seconds_of.items())
    yield Line(f"gathering {BATCH} clips, kept in memory or read from {UTTERANCES:,}", "", reached, None)
    shutil.rmtree(folder)
    yield _hashing(options)


def _in_memory(clips: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(clips, *STATISTICS), torch.zeros(clips)


def _hashing(options: Options) -> Line:
    folder = options.scratch / "files"
    paths = [folder / str(number // 1000) / f"{number}.wav" for number in range(UTTERANCES)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(path).encode())
    FileHashes(options.scratch, folder).of(paths)
    seconds = side_by_side({"warm": lambda: FileHashes(options.scratch, folder).of(paths)}, options.rounds)["warm"]
    reached = f"{np.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
    note = "asks for the size and the time of change of each"
    return Line(f"knowing that none of {UTTERANCES:,} recordings has changed", "", reached, None, note)
