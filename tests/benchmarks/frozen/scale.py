"""How cost grows with annotators and annotations: reading a manifest, dealing it, a training step, memory.

- Manifest: ``load_corpus`` on 1,000,000 rows of 1,000 annotators, in a process of its own, with 100,000 utterances and
  with 1,000,000; then the work that a run does once with as many rows: the split, class weights, and recipe ``best``'s
  estimate of what is expressed. Memory is the resident set's peak over what Python and the imports hold.
- Training step: at 10, 100 and 1,000 annotators × 1,000, 100,000 and 1,000,000 annotations, as a ratio to the smallest.
  8 tasks, K = 32 and 32 query clips, 5 inner steps, second order, scope ``linear``; two labels an utterance. The whole
  step (episodes drawn, statistics of 13 × 768 gathered, meta-loss, backward pass) finds utterances' statistics as
  windows of one small tensor, since a million would fill 40 GB: the feature cache has lines of its own. What grows if
  anything does, drawing and gathering, is timed alone too, with 1 × 64 in a table. At 100 annotators × 1,000
  annotations and at 1,000 × 1,000 nobody has K = 32 clips.
- SSL-E and Multi-Few: one minibatch of 32, 13 × 768, with its backward pass and the step of its config's optimizer; the
  first steps of an epoch aside.
- Memory beside the manifest: what a split and a hundred meta-batches take, in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations, product
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor, nn

from frozen.measuring import Line, Memory, Options, Ratio, side_by_side
from s3prl_metaperser import configs
from s3prl_metaperser.corpus.emotions import EMOTIONS
from s3prl_metaperser.corpus.manifest import COLUMNS, Corpus, build_corpus, load_corpus, write_corpus
from s3prl_metaperser.datasets import AggregatedBatches, AnnotationBatches, Minibatches, TrainingEpisodes
from s3prl_metaperser.episodes import make_split
from s3prl_metaperser.expressed import estimate_expressed
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.objective import class_balanced_weights
from s3prl_metaperser.settings import DataSettings, Settings, read_settings
from s3prl_metaperser.systems import task_batch
from s3prl_metaperser.training import episodes_loss, minibatch_loss
from s3prl_metaperser.upstream.features import Features, FeatureTable, Transform

ROWS, LISTENERS = 1_000_000, 1000
ANNOTATORS, ANNOTATIONS = (10, 100, 1000), (1000, 100_000, 1_000_000)
TASKS, SHOTS, LAYERS, DIM = 8, 32, 13, 768
MOST_SECONDS, MOST_BYTES, FLAT = 10.0, 10**9, 1.1
LOADS = 3
"""Times that a manifest is read."""
DRAWS, MINIBATCHES = 20, 10
"""Steps that are timed together."""
MEGABYTE = 1e6
SEED = 1
CPU = torch.device("cpu")

T = TypeVar("T")
Size = tuple[int, int]
"""Annotators and annotations."""


def crowd(annotators: int, annotations: int, labels: int) -> Corpus:
    """Make a corpus in which each utterance is labelled by so many listeners, one or two emotions each."""
    rng = np.random.default_rng(SEED)
    count = annotations // labels
    utterances = np.repeat(np.arange(count), labels)
    whose = (rng.integers(annotators, size=count)[:, None] + np.arange(labels)).ravel() % annotators
    cells = [*EMOTIONS, *map(";".join, combinations(EMOTIONS, 2))]
    speakers = [f"Ses{session:02d}_{speaker}" for session in range(1, 6) for speaker in "FM"]
    columns = {
        "utterance": (utterances, [f"Ses{n % 5 + 1:02d}_impro{n % 50:02d}_{n:07d}" for n in range(count)]),
        "audio": (
            utterances,
            [f"Session{n % 5 + 1}/wav/impro{n % 50:02d}/utterance_{n:07d}.wav" for n in range(count)],
        ),
        "speaker": (2 * (utterances % 5) + utterances // 5 % 2, speakers),
        "annotator": (whose, [f"listener{n:04d}" for n in range(annotators)]),
        "kind": (np.zeros(annotations, dtype=np.int8), ["external"]),
        "emotions": (rng.integers(len(cells), size=annotations), cells),
    }
    texts = {
        name: pd.Categorical.from_codes(codes, pd.Index(texts, dtype=object))
        for name, (codes, texts) in columns.items()
    }
    return build_corpus("crowd", Path("/"), pd.DataFrame({**texts, "session": utterances % 5 + 1})[list(COLUMNS)])


def apart(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a process of its own, whose memory nothing else has used before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def clocked(program: Callable[[], T]) -> tuple[float, T]:
    """Give a program's seconds and its result."""
    begun = time.perf_counter()
    result = program()
    return time.perf_counter() - begun, result


def loading(folder: Path, times: int) -> tuple[list[float], int]:
    """Give the seconds of reading a manifest some times, and the first time's peak bytes."""
    memory = Memory()
    seconds = [clocked(lambda: load_corpus(folder))[0]]
    peak = memory.peak()
    return seconds + [clocked(lambda: load_corpus(folder))[0] for _ in range(times - 1)], peak


def once(folder: Path) -> tuple[dict[str, float], int]:
    """Give the seconds of what a run does once with a corpus, and the peak bytes beside the manifest."""
    corpus = load_corpus(folder)
    memory = Memory()
    seconds: dict[str, float] = {}
    seconds["split"], split = clocked(lambda: make_split(corpus, "unseen", 1, DataSettings()))
    seconds["class weights"], _ = clocked(lambda: class_balanced_weights(torch.from_numpy(split.annotation_targets())))
    seconds["what is expressed"], _ = clocked(lambda: estimate_expressed(split.annotations()))
    return seconds, memory.peak()


def measure_manifest(options: Options) -> Iterator[Line]:
    """Read, check and deal a million rows."""
    for labels in (10, 1):
        count = ROWS // labels
        corpus = crowd(LISTENERS, ROWS, labels)
        folder = options.scratch / str(labels)
        write_corpus(corpus, folder)
        del corpus
        seconds, peak = apart(loading, folder, min(options.rounds, LOADS))
        taken = statistics.median(seconds)
        yield Line(
            f"manifest of {ROWS:,} rows, {count:,} utterances, {LISTENERS:,} annotators: load and validate",
            f"≤ {MOST_SECONDS:g} s, ≤ {MOST_BYTES / MEGABYTE:,.0f} MB",
            f"{taken:.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), {peak / MEGABYTE:,.0f} MB",
            taken <= MOST_SECONDS and peak <= MOST_BYTES,
        )
        parts, peak = apart(once, folder)
        each = ", ".join(f"{name} {value:.1f} s" for name, value in parts.items())
        yield Line(
            f"once a run, {count:,} utterances", "", f"{each}; {peak / MEGABYTE:,.0f} MB beside the manifest", None
        )


class Windows(Features):
    """Statistics of the usual size for any number of utterances, each a window of one random tensor.

    Args:
        utterances: ids.
    """

    def __init__(self, utterances: Sequence[str]) -> None:
        self._row_of = {utterance: row for row, utterance in enumerate(utterances)}
        values = torch.randn(len(utterances) + LAYERS * DIM, generator=torch.Generator().manual_seed(SEED))
        self._statistics = values.as_strided((len(utterances), LAYERS, DIM), (1, DIM, 1))

    def raw(self, utterances: Sequence[str]) -> tuple[Iterator[Tensor], Tensor]:
        """See :class:`Features`."""
        return iter(self.gather(utterances).unbind(1)), torch.ones(len(utterances))

    def gather(self, utterances: Sequence[str]) -> Tensor:
        """See :class:`Features`."""
        return self._statistics[[self._row_of[utterance] for utterance in utterances]]

    def transform(self, transform: Transform) -> None:
        """See :class:`Features`."""
        raise NotImplementedError("windows share their values")


class Training:
    """The training steps of a corpus of some size.

    Args:
        size: annotators and annotations.
    """

    def __init__(self, size: Size) -> None:
        torch.manual_seed(SEED)
        self.split = make_split(crowd(*size, labels=2), "seen", 1, DataSettings())
        utterances = self.split.aggregated.utterances
        self.windows = Windows(utterances)
        self.table = FeatureTable(utterances, torch.randn(len(utterances), 1, 64), torch.ones(len(utterances)), CPU)
        self.table.gather(utterances)
        self.settings = training_settings("meta_perser")
        self.learner = learner(self.settings)
        last = 10**9
        self.episodes = TrainingEpisodes(self.split, self.settings, SEED, 0, last)
        self.aggregated = AggregatedBatches(self.split, self.settings, SEED, 0, last)
        self.single = AnnotationBatches(self.split, self.settings, SEED, 0, last)
        self.shared = learner(training_settings("entire_zero"))
        self.headed = learner(training_settings("multi_few"), heads=len(self.split.train))
        self.of_shared, self.of_headed = optimizer("ssl_e", self.shared), optimizer("multi_few", self.headed)
        self.step = 0

    def draw(self) -> None:
        """Draw episodes and gather their small statistics, for some steps."""
        for _ in range(DRAWS):
            self.step += 1
            _, episodes = self.episodes[self.step]
            task_batch([episode.support for episode in episodes], self.table, CPU)
            task_batch([episode.query for episode in episodes], self.table, CPU)

    def meta_step(self) -> None:
        """Take a whole meta-training step, up to the gradient."""
        self.step += 1
        _, episodes = self.episodes[self.step]
        episodes_loss(self.learner, self.windows, episodes, "disjoint", 1.0).loss.backward()

    def shared_steps(self) -> None:
        """Take some of SSL-E's steps."""
        self._minibatches(self.aggregated, self.shared, self.of_shared)

    def headed_steps(self) -> None:
        """Take some of Multi-Few's steps."""
        self._minibatches(self.single, self.headed, self.of_headed)

    def _minibatches(self, batches: Minibatches, of: Learner, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(MINIBATCHES):
            self.step = (self.step + 1) % batches.per_epoch
            optimizer.zero_grad()
            minibatch_loss(of, self.windows, batches[self.step][1], 0).backward()
            optimizer.step()


def training_settings(system: str) -> Settings:
    """Give the settings of a system's training."""
    meta = {"tasks_per_batch": TASKS, "query": "disjoint", "annealing": None}
    return read_settings({"corpus": "none", "system": system, "episodes": {"shots": SHOTS}, "meta": meta})


def learner(settings: Settings, heads: int = 0) -> Learner:
    """Make what is trained, with random weights."""
    made = Learner(settings, DIM, torch.ones(len(EMOTIONS)), heads)
    made.bind_layer_weights(nn.Parameter(torch.zeros(LAYERS)), LAYERS)
    return made


def optimizer(config: str, of: Learner) -> torch.optim.Optimizer:
    """Make the optimizer of an example config, as s3prl does."""
    section = yaml.safe_load(configs.find(config).read_text(encoding="utf-8"))["optimizer"]
    arguments = {name: value for name, value in section.items() if name not in ("name", "torch_optim_name")}
    made: torch.optim.Optimizer = getattr(torch.optim, section["torch_optim_name"])(of.parameters(), **arguments)
    return made


def named(size: Size) -> str:
    """Say how large a corpus is."""
    return f"{size[0]:,} annotators, {size[1]:,} annotations"


def growth(
    what: str,
    programs: dict[Size, Callable[[], None]],
    rounds: int,
    steps: int = 1,
    judged: bool = True,
    note: str = "",
) -> Iterator[Line]:
    """Give each size's seconds as a ratio to the smallest's.

    Args:
        what: is timed.
        programs: one a size; the first is the smallest.
        rounds: how often each is timed.
        steps: that a program takes.
        judged: whether it should be flat.
        note: what limits it.
    """
    seconds = side_by_side({named(size): program for size, program in programs.items()}, rounds)
    milliseconds = {name: statistics.median(taken) / steps * 1e3 for name, taken in seconds.items()}
    base, *others = seconds
    yield Line(f"{what}, {base}", "", f"{milliseconds[base]:.3g} ms", None)
    for name in others:
        ratio = Ratio.of(seconds[name], seconds[base])
        reached = f"{ratio}, {milliseconds[name]:.3g} ms"
        if judged:
            yield Line(f"{what}, {name}", f"≤ {FLAT} × the first", reached, ratio.median <= FLAT, note)
        else:
            yield Line(f"{what}, {name}", "", reached, None, note)


def measure_steps(options: Options) -> Iterator[Line]:
    """Compare training steps over all sizes at which each annotator has clips for an episode."""
    sizes = [size for size in product(ANNOTATORS, ANNOTATIONS) if size[1] // size[0] > 2 * SHOTS]
    training = {size: Training(size) for size in sizes}
    yield from growth("meta-training step", {size: one.meta_step for size, one in training.items()}, options.rounds)
    yield from growth(
        "of it, drawing and gathering",
        {size: one.draw for size, one in training.items()},
        options.rounds,
        DRAWS,
        judged=False,
        note="part of the line above; look-ups that miss the processor's caches",
    )
    most = ANNOTATIONS[-1]
    ends = {size: one for size, one in training.items() if size == sizes[0] or size[1] == most}
    shared = {size: one.shared_steps for size, one in ends.items()}
    yield from growth("SSL-E's step", shared, options.rounds, MINIBATCHES)
    headed = {size: one.headed_steps for size, one in ends.items()}
    note = "the optimizer moves every training annotator's head at every step"
    yield from growth("Multi-Few's step", headed, options.rounds, MINIBATCHES, note=note)


def held(size: Size) -> tuple[int, int, int]:
    """Give the bytes that a manifest holds, and what a split and meta-batches take beside it: at most, and to stay."""
    before = Memory()
    corpus = crowd(*size, labels=2)
    beside = Memory()
    split = make_split(corpus, "seen", 1, DataSettings())
    episodes = TrainingEpisodes(split, training_settings("meta_perser"), SEED, 0, 100)
    for step in range(100):
        episodes[step]
    peak = beside.peak()
    return beside.held - before.held, peak, Memory().held - beside.held


def measure_memory() -> Iterator[Line]:
    """Compare memory over annotators, and over annotations."""
    least, most = ANNOTATORS[0], ANNOTATORS[-1]
    few, many = ANNOTATIONS[0], ANNOTATIONS[-1]
    _, small, _ = apart(held, (least, few))
    manifest, large, stays = apart(held, (least, many))
    _, crowded, _ = apart(held, (most, many))
    yield Line(
        f"memory beside the manifest, {named((most, many))}",
        f"≤ {FLAT} × that of {least} annotators",
        f"{crowded / large:.2f} × ({crowded / MEGABYTE:,.0f} MB)",
        crowded <= FLAT * large,
    )
    yield Line(
        f"memory beside the manifest, {named((least, few))} → {many:,}",
        "flat",
        f"{small / MEGABYTE:,.0f} → {large / MEGABYTE:,.0f} MB while dealing, {stays / MEGABYTE:,.0f} MB to stay; the "
        f"manifest itself {manifest / MEGABYTE:,.0f} MB",
        large <= FLAT * small,
        f"{stays / many:.0f} bytes an annotation: its distribution over emotions, and where its utterance's name is",
    )


def measure(options: Options) -> Iterator[Line]:
    """Give this part's lines."""
    yield from measure_manifest(options)
    yield from measure_steps(options)
    yield from measure_memory()
