"""Memory and time of meta-training through a whole speech model, side by side in one run.

    python tests/benchmarks/whole_network.py [--out RESULT] [PART ...]

The model is WavLM with random weights, in the base model's architecture (12 layers of 768), loaded by s3prl as
wavlm_local; on it the package's own downstream: weighted sum, mean pooling, a projector of 256, 9 emotions. Clips are
2 s of noise. A meta-step is one task's loss and its backward pass, as the runner makes them: 5 inner steps, second
order throughout, learned rates (LSLR), the outer loss on the support itself (combined set). Parts, by default all:

- steps: peak memory of backend checkpointed at 1, 3, 5 and 10 inner steps;
- clips: the same at K = 4, 8, 16 and 32, chunks of 2 clips;
- backends: memory and time at K = 12 of checkpointed (chunks of 2), of plain unrolling with the same code (higher) and
  of learn2learn's MAML on the same model;
- precision: the same of checkpointed in bfloat16 and float32;
- costs: what a clip costs, there and back, by its length, in WavLM base and large: what docs/scale.md goes by.

Every measurement is a process of its own, one after the other. Peak memory is the resident set's high-water mark during
the meta-step minus the resident set before it, when the model is loaded and a first small meta-step is done. For it
glibc is told to give back what is freed (GLIBC_RETURNS), so that memory is what is in use. Times are taken with glibc's
defaults, in turns (A B C A B C …), and are medians. Linux only.

pip cannot install learn2learn 0.2.0 on Python 3.11 and later, for which the C files that it ships are too old. Build
it:

    pip download --no-deps --no-binary :all: learn2learn && tar xf learn2learn-0.2.0.tar.gz && cd learn2learn-0.2.0
    pip install cython gym wheel "torchvision==0.23.*" && python setup.py build_ext bdist_wheel
    pip install --no-deps dist/*.whl
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import soundfile
import torch
from frozen.measuring import Memory, result_files
from s3prl.hub import wavlm_local
from s3prl.upstream.interfaces import Featurizer
from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from s3prl_metaperser.atomic import replacing, write_text
from s3prl_metaperser.audio import read_audio
from s3prl_metaperser.episodes import Episode, Examples
from s3prl_metaperser.errors import MetaPerSERError, exit_with, suggest
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.objective import example_losses
from s3prl_metaperser.settings import Precision, Settings, read_settings
from s3prl_metaperser.training import episodes_loss
from s3prl_metaperser.upstream.features import TrainableFeatures
from s3prl_metaperser.upstream.pooling import SAMPLE_RATE, PooledUpstream
from s3prl_metaperser.upstream.trainable import TrainableUpstream
from s3prl_metaperser.whole_network import WholeNetwork

How = Literal["checkpointed", "higher", "learn2learn", "costs"]
Model = Literal["base", "large"]
Row = dict[str, Any]

CPU = torch.device("cpu")
CLASSES = 9
RATE = 0.001
"""Of every tensor; learn2learn has one rate."""
WARMING, WARMING_SECONDS = "warming", 0.25
"""A clip for a small meta-step before the one that is measured."""

AS_PUBLISHED: dict[str, Any] = {"relative_position_embedding": True, "gru_rel_pos": True, "max_distance": 800}
ARCHITECTURES: dict[Model, dict[str, Any]] = {
    "base": {"encoder_layers": 12, **AS_PUBLISHED},
    "large": {
        "encoder_layers": 24,
        "encoder_embed_dim": 1024,
        "encoder_ffn_embed_dim": 4096,
        "encoder_attention_heads": 16,
        "extractor_mode": "layer_norm",
        "layer_norm_first": True,
        "normalize": True,
        **AS_PUBLISHED,
    },
}
"""What differs from the defaults of s3prl's WavLMConfig, which are the base model's sizes."""

GLIBC_RETURNS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**17),
    "MALLOC_TRIM_THRESHOLD_": str(2**17),
}
"""Environment in which glibc gives freed memory back to the system, so that the resident set is what is in use."""
MOST_BYTES = 21 * 10**9
"""A measurement's data may not grow beyond this, nor beyond what the machine has left."""
LEFT_FREE = 10**9
DOES_NOT_FIT = 3
"""Exit code of a measurement that met its limit."""

TARGET_GROWTH, TARGET_SPREAD, TARGET_PEAK, TARGET_TIME = 1.5, 0.10, 0.4, 1.35


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        how: the backend of a meta-step, or learn2learn's MAML; or the costs of one gradient and Hessian-vector product.
        steps: inner steps.
        clips: K.
        chunk_clips: how many go through the upstream at once; None: all.
        clip_seconds: of each clip.
        precision: of the upstream's forward passes.
        model: architecture.
        layers: of the transformer; None: as published.
        memory: whether memory is what the process is for, or time.
    """

    how: How = "checkpointed"
    steps: int = 5
    clips: int = 12
    chunk_clips: int | None = 2
    clip_seconds: float = 2.0
    precision: Precision = "float32"
    model: Model = "base"
    layers: int | None = None
    memory: bool = True


# What is measured, in its own process


def settings_of(case: Case) -> Settings:
    """Give the settings of a run that makes such meta-steps."""
    chunk_clips = case.clips if case.chunk_clips is None else case.chunk_clips
    meta = {"inner_steps": case.steps, "annealing": None, "inner_lr": RATE, "upstream_inner_lr": RATE}
    backend = "higher" if case.how == "higher" else "checkpointed"
    section = {"corpus": "unused", "scope": "entire", "recipe": "paper", "precision": case.precision}
    entire = {"chunk_seconds": chunk_clips * case.clip_seconds}
    return read_settings(section | {"meta": meta | {"backend": backend}, "entire": entire})


def checkpoint_file(case: Case, folder: Path) -> Path:
    """Give the file that s3prl's wavlm_local reads, written by the first process that needs it."""
    sizes = ARCHITECTURES[case.model] | ({} if case.layers is None else {"encoder_layers": case.layers})
    path = folder / f"{case.model}-{sizes['encoder_layers']}.pt"
    if not path.exists():
        config = WavLMConfig(sizes)
        torch.manual_seed(0)
        with replacing(path) as temporary:
            torch.save({"cfg": vars(config), "model": WavLM(config).state_dict()}, temporary)
    return path


def write_clips(case: Case, folder: Path) -> dict[str, Path]:
    """Write the support's clips, and a short one to warm up on."""
    rng = np.random.default_rng(0)
    audio = {}
    for name, seconds in [(WARMING, WARMING_SECONDS), *((f"clip{i}", case.clip_seconds) for i in range(case.clips))]:
        audio[name] = folder / f"{name}-{seconds}.wav"
        noise = 0.1 * rng.standard_normal(int(seconds * SAMPLE_RATE))
        soundfile.write(audio[name], noise, SAMPLE_RATE, subtype="FLOAT")
    return audio


def labelled(utterances: Sequence[str]) -> Examples:
    """Give clips distributions over emotions."""
    targets = np.random.default_rng(len(utterances)).dirichlet(np.ones(CLASSES), len(utterances))
    return Examples(tuple(utterances), targets.astype(np.float32))


class Subject:
    """What a run holds: the runner's upstream and featurizer, and the expert's learner; and clips."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.settings = settings_of(case)
        self.upstream = wavlm_local(str(checkpoint_file(case, folder)))
        self.featurizer = Featurizer(self.upstream, upstream_device="cpu")
        self.audio = write_clips(case, folder)
        torch.manual_seed(0)
        self.learner = Learner(self.settings, self.featurizer.output_dim, torch.ones(CLASSES))
        self.learner.bind_layer_weights(self.featurizer.weights, self.featurizer.layer_num)
        self.adapted = 0
        """Bytes of the parameters that the inner loop moves, once the upstream is bound."""

    @property
    def support(self) -> Examples:
        """All clips but the one to warm up on."""
        return labelled([name for name in self.audio if name != WARMING])

    def bind(self) -> TrainableFeatures:
        """Let the upstream adapt, as a run does; its features' scale is left as it is."""
        pooled = PooledUpstream(self.upstream, self.featurizer, "mean", CPU, self.settings.precision)
        trainable = TrainableUpstream(pooled, self.settings.entire)
        self.learner.bind_upstream(list(trainable.adapted))
        moved = [*trainable.adapted.values(), *self.learner.initialisation().values()]
        self.adapted = sum(tensor.nbytes for tensor in moved)
        return TrainableFeatures(trainable, self.audio, CPU)

    def forget_gradients(self) -> None:
        """Drop what a backward pass has left."""
        for module in (self.upstream, self.featurizer, self.learner):
            module.zero_grad(set_to_none=True)


def own_meta_step(subject: Subject) -> Callable[[Examples], float]:
    """Give the package's meta-step: the loss of one episode, and its backward pass."""
    features = subject.bind()

    def step(support: Examples) -> float:
        meta = episodes_loss(subject.learner, features, [Episode("E", 0, support, support)], "combined", 1.0)
        meta.loss.backward()
        return meta.loss.item()

    return step


class AsOneModule(nn.Module):
    """The same model as learn2learn takes it: waveforms → logits."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.upstream = subject.upstream
        self.model = subject.learner.model
        self.layer_weights = subject.featurizer.weights

    def forward(self, wavs: list[Tensor]) -> Tensor:
        layers = torch.stack(self.upstream(wavs)["hidden_states"])
        return self.model(torch.einsum("l,lcd->cd", self.layer_weights.softmax(dim=0), layers.mean(dim=2)))


def learn2learn_meta_step(subject: Subject) -> Callable[[Examples], float]:
    """Give learn2learn's: MAML with one rate, the convolutional front end frozen as s3prl keeps it."""
    from learn2learn.algorithms import MAML  # type: ignore[import-not-found]

    subject.upstream.requires_grad_(True)
    for name, parameter in subject.upstream.named_parameters():
        if "feature_extractor." in name:
            parameter.requires_grad_(False)
    maml = MAML(AsOneModule(subject).eval(), lr=RATE, allow_nograd=True, allow_unused=True)

    def step(support: Examples) -> float:
        wavs = [read_audio(subject.audio[utterance]) for utterance in support.utterances]
        targets = torch.from_numpy(support.targets)
        adapting = maml.clone()
        with sdpa_kernel(SDPBackend.MATH):
            for _ in range(subject.case.steps):
                adapting.adapt(example_losses(adapting(wavs), targets, subject.learner.class_weights).mean())
            loss = example_losses(adapting(wavs), targets, subject.learner.class_weights).mean()
            loss.backward()
        return loss.item()

    return step


def measure_meta_step(case: Case, folder: Path) -> Row:
    """Make one meta-step, after a small one."""
    subject = Subject(case, folder)
    step = learn2learn_meta_step(subject) if case.how == "learn2learn" else own_meta_step(subject)
    step(labelled([WARMING]))
    subject.forget_gradients()
    memory, began, began_cpu = Memory(), time.perf_counter(), time.process_time()
    loss = step(subject.support)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    times = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    return {"held": memory.held, "peak": memory.peak(), **times, "loss": loss, "adapted": subject.adapted}


def measure_costs(case: Case, folder: Path) -> Row:
    """Take one gradient, and one Hessian-vector product with its graph, of all clips at once.

    Returns:
        Seconds of the forward pass, the gradient after it, the gradient with a graph, and the product after that;
        bytes that the forward pass's graph holds, that both graphs hold, and the peaks; operations.
    """
    subject = Subject(case, folder)
    features = subject.bind()
    network = WholeNetwork(subject.learner, features)
    names = subject.learner.meta_names
    params = network.initialisation(names)
    leaves = list(params.values())
    row: Row = {}

    def gradient(loss: Tensor) -> None:
        torch.autograd.grad(loss, leaves, allow_unused=True)

    def product(slopes: Sequence[Tensor]) -> None:
        torch.autograd.grad(slopes, leaves, leaves, allow_unused=True)

    def graph(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, leaves, create_graph=True))

    with sdpa_kernel(SDPBackend.MATH):
        for support in (labelled([WARMING]), subject.support):
            (part,) = network.objective(network.clips(support), names).parts
            # The frozen front end's output is kept from here on, as it is from one inner step to the next.
            with torch.no_grad():
                part(params)
            memory, clock = Memory(), Clock()
            row |= {"held": memory.held, "adapted": subject.adapted}
            loss = part(params)
            row |= {"forward_seconds": clock.lap(), "forward_graph": memory.now(), "loss": loss.item()}
            clock.lap()
            gradient(loss)
            row |= {"gradient_seconds": clock.lap(), "gradient_peak": memory.peak()}
            loss = part(params)
            clock.lap()
            slopes = graph(loss)
            row |= {"graph_seconds": clock.lap(), "both_graphs": memory.now()}
            clock.lap()
            product(slopes)
            row |= {"product_seconds": clock.lap(), "product_peak": memory.peak()}
            del loss, slopes
        (anew,) = network.objective(network.clips(subject.support), names).parts
        loss = counted(row, "first", lambda: anew(params))
        loss = counted(row, "forward", lambda: part(params))
        counted(row, "gradient", lambda: gradient(loss))
        loss = part(params)
        slopes = counted(row, "graph", lambda: graph(loss))
        counted(row, "product", lambda: product(slopes))
    row["padding_is_harmless"] = features.upstream.pooled.padding_is_harmless
    return row


class Clock:
    """Wall-clock seconds between laps."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def lap(self) -> float:
        """Give the seconds since the last lap."""
        began, self._began = self._began, time.perf_counter()
        return self._began - began


class Calls(TorchDispatchMode):
    """Counts the operations that are called: on a GPU each is at least one kernel to launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def convolution_backward_flops(
    given: Sequence[int], _input: Sequence[int], weight: Sequence[int], *others: Any, **_: Any
) -> int:
    """Count a convolution's backward pass; torch's own count forgets that groups divide the weight's gradient."""
    output_mask = others[-1]
    return 2 * math.prod(given) * math.prod(weight[1:]) * (output_mask[0] + output_mask[1])


def counted(row: Row, kind: str, function: Callable[[], Any]) -> Any:
    """Note a call's floating-point operations (of matrix products and convolutions) and its torch operations."""
    own_count = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    flops, calls = FlopCounterMode(display=False, custom_mapping=own_count), Calls()
    with flops, calls:
        result = function()
    row[f"{kind}_flops"], row[f"{kind}_calls"] = flops.get_total_flops(), calls.count
    return result


def measure_here(case: Case, folder: Path, limit: int) -> None:
    """Measure in this process, and print the result as JSON."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    # Should the machine run out of memory all the same, it is this process that goes.
    Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        row = (measure_costs if case.how == "costs" else measure_meta_step)(case, folder)
    except (RuntimeError, MemoryError) as error:
        if "allocate memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        raise SystemExit(DOES_NOT_FIT) from None
    print(json.dumps(row))


# The processes, one after the other


class Bench:
    """Starts the processes and keeps what they gave.

    Args:
        folder: for checkpoints and clips.
        layers: of the transformer; None: as published.
        threads: of each process.
        repeats: how often a time is taken.
    """

    def __init__(self, folder: Path, layers: int | None, threads: int, repeats: int) -> None:
        self.folder, self.layers, self.threads, self.repeats = folder, layers, threads, repeats
        self.rows: list[Row] = []

    def measure(self, part: str, case: Case) -> Row:
        """Measure in a process of its own."""
        row = self.measure_if_it_fits(part, case)
        if row is None:
            raise MetaPerSERError(f"{case} needs more memory than is left; run this where more is free")
        return row

    def measure_if_it_fits(self, part: str, case: Case) -> Row | None:
        """Measure in a process of its own; None where it needs more memory than it may have."""
        case = replace(case, layers=case.layers or self.layers)
        limit = min(MOST_BYTES, available_bytes() - LEFT_FREE)
        command = [sys.executable, __file__, "--measure", json.dumps(asdict(case)), str(self.folder), str(limit)]
        own = {name: value for name, value in os.environ.items() if name not in GLIBC_RETURNS}
        own |= {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        own |= GLIBC_RETURNS if case.memory else {}
        load = os.getloadavg()[0]
        done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
        row = {"part": part, **asdict(case), "limit": limit, "load": round(load, 2)}
        if done.returncode not in (0, DOES_NOT_FIT):
            raise MetaPerSERError(f"measuring {case} failed: {done.stderr.strip()[-2000:]}")
        result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
        self.rows.append(row | (result or {"peak": float("nan")}))
        print(f"{part}: {case} → {result or f'more than {limit / 1e9:.0f} GB'}", file=sys.stderr, flush=True)
        return result

    def in_turns(self, part: str, cases: Sequence[Case]) -> list[list[Row]]:
        """Take times of several cases, A B C A B C …; a case that does not fit has none."""
        timed = [replace(case, memory=False) for case in cases]
        rounds = [[self.measure_if_it_fits(part, case) for case in timed] for _ in range(self.repeats)]
        return [[row for row in own if row is not None] for own in zip(*rounds, strict=True)]


def available_bytes() -> int:
    """Give the memory that the machine has left."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def median(rows: Sequence[Row], key: str) -> float:
    """Give the median of a time, not a number where there is none."""
    return statistics.median(row[key] for row in rows) if rows else float("nan")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a Markdown table."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


def verdict(met: bool) -> str:
    return "met" if met else "not met"


# What is measured


def steps_part(bench: Bench) -> str:
    """Memory of further inner steps."""
    part, numbers = "steps", (1, 3, 5, 10)
    rows = [bench.measure(part, Case(steps=number, clips=4)) for number in numbers]
    first, adapted = rows[0]["peak"], rows[0]["adapted"]
    shown, growths = [], []
    for number, row in zip(numbers, rows, strict=True):
        growth = (row["peak"] - first) / (number - 1) / adapted if number > 1 else None
        growths += [] if growth is None else [growth]
        shown.append([number, gigabytes(row["peak"]), "" if growth is None else f"{growth:.2f}"])
    return (
        f"### Memory by inner steps\n\n`checkpointed`, K = 4 in chunks of 2; the adapted parameters take "
        f"{gigabytes(adapted)} GB.\n\n"
        + table(["inner steps", "peak, GB", "per further step / adapted parameters"], shown)
        + f"\nTarget ≤ {TARGET_GROWTH}: {verdict(max(growths) <= TARGET_GROWTH)} ({max(growths):.2f}).\n"
    )


def clips_part(bench: Bench) -> str:
    """Memory of further clips."""
    part, numbers = "clips", (4, 8, 16, 32)
    peaks = [bench.measure(part, Case(steps=2, clips=number))["peak"] for number in numbers]
    spread = max(peaks) / min(peaks) - 1
    shown = [[n, gigabytes(peak), f"{peak / peaks[0]:.3f}"] for n, peak in zip(numbers, peaks, strict=True)]
    return (
        "### Memory by support clips\n\n`checkpointed`, 2 inner steps, chunks of 2.\n\n"
        + table(["K", "peak, GB", "/ that of K = 4"], shown)
        + f"\nTarget: within {TARGET_SPREAD:.0%}: {verdict(spread <= TARGET_SPREAD)} ({spread:.1%}).\n"
    )


BACKENDS: dict[str, Case] = {
    "`checkpointed`, chunks of 2": Case(),
    "`higher`, plain unrolling": Case(how="higher", chunk_clips=None),
    "learn2learn's MAML": Case(how="learn2learn", chunk_clips=None),
}


def backends_part(bench: Bench) -> str:
    """Memory and time against plain unrolling."""
    part, cases, note = "backends", dict(BACKENDS), ""
    if importlib.util.find_spec("learn2learn") is None:
        note = (
            f"\n{cases.popitem()[0]}: not installed (pip install learn2learn; the benchmark's first lines say how).\n"
        )
    own, plain = list(cases)[:2]
    reference = bench.measure(part, cases[own])
    memory = {own: reference, **{name: bench.measure_if_it_fits(part, cases[name]) for name in list(cases)[1:]}}
    losses = [row["loss"] for row in memory.values() if row is not None]
    if not np.allclose(losses, losses[0], rtol=1e-3):
        raise MetaPerSERError(f"the backends' outer losses are {losses}; they should be one and the same")
    times = dict(zip(cases, bench.in_turns(part, list(cases.values())), strict=True))
    shown, shares = [], []
    for name, row in memory.items():
        peak, whole = (MOST_BYTES - reference["held"], MOST_BYTES) if row is None else (row["peak"], total(row))
        shares.append(max(reference["peak"] / peak, total(reference) / whole))
        longer = median(times[own], "seconds") / median(times[name], "seconds")
        shown.append(
            [
                *(name, *(("more than " if row is None else "") + gigabytes(one) for one in (peak, whole))),
                *(f"{reference['peak'] / peak:.2f}", f"{total(reference) / whole:.2f}"),
                *(f"{median(times[name], key):.0f}" for key in ("seconds", "cpu_seconds")),
                f"{longer:.2f}",
            ]
        )
    longer = median(times[own], "seconds") / median(times[plain], "seconds")
    columns = ["", "peak, GB", "whole process, GB", "checkpointed's peak / its", "… whole process / its"]
    columns += ["s", "CPU s", "checkpointed's s / its"]
    return (
        "### Backends\n\n5 inner steps, K = 12.\n\n"
        + table(columns, shown)
        + f"\nTarget of peak ≤ {TARGET_PEAK} of the others': {verdict(max(shares[1:]) <= TARGET_PEAK)}. Target of time "
        f"≤ {TARGET_TIME} × plain unrolling: {verdict(longer <= TARGET_TIME)} ({longer:.2f}).\n" + note
    )


def total(row: Row) -> int:
    return row["held"] + row["peak"]


def precision_part(bench: Bench) -> str:
    """Memory and time in bfloat16."""
    part, cases = "precision", [Case(clips=4), Case(clips=4, precision="bfloat16")]
    memory = [bench.measure(part, case) for case in cases]
    times = [median(rows, "seconds") for rows in bench.in_turns(part, cases)]
    shown = [
        [
            *(case.precision, gigabytes(row["peak"]), f"{row['peak'] / memory[0]['peak']:.2f}"),
            *(f"{seconds:.0f}", f"{seconds / times[0]:.2f}", f"{row['loss']:.4f}"),
        ]
        for case, row, seconds in zip(cases, memory, times, strict=True)
    ]
    columns = ["precision", "peak, GB", "/ float32", "s", "/ float32", "outer loss"]
    return "### Precision\n\n`checkpointed`, 5 inner steps, K = 4 in chunks of 2.\n\n" + table(columns, shown)


COST_SECONDS = (2.0, 4.5, 9.0)
"""Lengths of the one clip; attention makes costs quadratic in the length, which three of them determine."""
COSTS: tuple[tuple[Model, Precision, tuple[float, ...]], ...] = (
    ("base", "float32", (*COST_SECONDS, 18.0)),
    ("base", "bfloat16", COST_SECONDS),
    ("large", "float32", COST_SECONDS),
    ("large", "bfloat16", COST_SECONDS),
)
"""Base is measured at a fourth length, which the other three should foretell."""


def costs_part(bench: Bench) -> str:
    """What a clip costs, by its length."""
    work, time_taken, memory, fitted = [], [], [], []
    for model, precision, lengths in COSTS:
        rows = []
        for seconds in lengths:
            case = Case("costs", 1, 1, None, seconds, precision, model)
            row = bench.measure("costs", case)
            timed = bench.measure("costs", replace(case, memory=False))
            rows.append(row)
            label = [f"{model}, {precision}, {seconds:g} s"]
            if precision == "float32":
                front = (row["first_flops"] - row["forward_flops"]) / 1e9
                work.append([*label, f"{front:.0f}", *(f"{row[f'{kind}_flops'] / 1e9:.0f}" for kind in KINDS)])
                work[-1] += [row[f"{kind}_calls"] for kind in KINDS]
            time_taken.append(label + [f"{timed[f'{kind}_seconds']:.2f}" for kind in KINDS])
            memory.append(label + [gigabytes(row[key]) for key in GRAPHS])
        constant, linear, quadratic = quadratic_through(lengths[:3], [row["product_peak"] for row in rows[:3]])
        layers = ARCHITECTURES[model]["encoder_layers"] if bench.layers is None else bench.layers
        whole = [rows[0][key] for key in ("adapted", "held")]
        fitted.append([f"{model}, {precision}", *map(gigabytes, whole), gigabytes(constant)])
        fitted[-1] += [f"{linear / 1e6:.0f}", f"{quadratic / 1e6:.2f}", f"{linear / layers / 1e6:.1f}"]
        fitted[-1] += [f"{quadratic / layers / 1e6:.3f}", "yes" if rows[0]["padding_is_harmless"] else "no"]
        for seconds, row in zip(lengths[3:], rows[3:], strict=True):
            foretold = constant + linear * seconds + quadratic * seconds**2
            measured = gigabytes(row["product_peak"])
            fitted[-1][0] += f" ({seconds:g} s: {gigabytes(foretold)} GB foretold, {measured} measured)"
    kinds = ["F: forward", "B: gradient", "G: gradient with its graph", "D: Hessian-vector product"]
    return (
        "### Costs of one clip\n\nWork: GFLOP (2 a multiply-add, in matrix products and convolutions; the frozen front "
        "end, which runs once a task, apart) and calls of torch operations:\n\n"
        + table(
            ["", "front end, GFLOP", *(f"{kind}, GFLOP" for kind in kinds), *(f"{kind[0]}, calls" for kind in kinds)],
            work,
        )
        + "\nSeconds:\n\n"
        + table(["", *kinds], time_taken)
        + "\nMemory over what the process held, GB:\n\n"
        + table(["", "forward's graph", "peak of gradient", "with gradient's graph", "peak of product"], memory)
        + "\nPeak of the product as c + a·s + b·s² for a clip of s seconds:\n\n"
        + table(
            [
                *("", "adapted, GB", "process before, GB", "c, GB", "a, MB/s", "b, MB/s²"),
                *("a a layer", "b a layer", "clips of different lengths share a chunk"),
            ],
            fitted,
        )
    )


KINDS = ("forward", "gradient", "graph", "product")
GRAPHS = ("forward_graph", "gradient_peak", "both_graphs", "product_peak")


def quadratic_through(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Give c, a, b of the c + a·x + b·x² through three points."""
    constant, linear, quadratic = np.linalg.solve(np.vander(xs, 3, increasing=True), np.asarray(ys, float))
    return float(constant), float(linear), float(quadratic)


PARTS: dict[str, Callable[[Bench], str]] = {
    "steps": steps_part,
    "clips": clips_part,
    "backends": backends_part,
    "precision": precision_part,
    "costs": costs_part,
}


def machine(threads: int) -> str:
    """Say what it ran on."""
    names = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return (
        f"{names[0].strip() if names else platform.machine()}, {os.cpu_count()} cores, {threads} "
        f"thread{'s' if threads > 1 else ''} a process, {available_bytes() / 1e9:.0f} GB available, load "
        f"{os.getloadavg()[0]:.1f} at the start; torch {torch.__version__}, Python {platform.python_version()}."
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of: {', '.join(PARTS)}. By default all")
    parser.add_argument("--out", type=Path, metavar="RESULT", help="RESULT.csv and RESULT.md are written")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each process (default 1)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="how often a time is taken (default 3)")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers, to try this script")
    parser.add_argument("--measure", nargs=3, metavar=("CASE", "FOLDER", "LIMIT"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all parts and print the tables."""
    args = parse(arguments)
    if args.measure is not None:
        case, folder, limit = args.measure
        measure_here(Case(**json.loads(case)), Path(folder), int(limit))
        return
    for part in args.parts:
        if part not in PARTS:
            raise MetaPerSERError(f"part {part!r} is unknown; {suggest(part, PARTS)}")
    results = result_files(args.out)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.layers, args.threads, args.repeats)
        text = machine(args.threads) + "\n\n" + "\n".join(PARTS[part](bench) for part in args.parts or PARTS)
    for path, content in zip(results, (pd.DataFrame(bench.rows).to_csv(index=False), text), strict=False):
        write_text(path, content)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except MetaPerSERError as error:
        raise exit_with(error, "whole_network.py") from None
