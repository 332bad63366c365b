"""A meta-training step with a frozen speech model: features kept, and the upstream run at every step.

WavLM in the base model's architecture with random weights, 9 tasks of K = 32 clips of 4.5 s, projector 256, 9 emotions,
5 inner steps of second order with learned rates, scope ``linear``, the outer loss on the support (CSMT). A step is what
s3prl's runner makes of a batch: upstream and featurizer on the batch's ``wavs``, the expert's loss, its backward pass,
clipping of the gradient's norm, the optimizer.

- ours: ``wavs`` is the silent clip; statistics are gathered from the feature table;
- with the upstream at every step: ``wavs`` are the step's 288 clips, as s3prl's downstreams have it; the rest is the
  same. One task's 32 clips in one forward pass are timed, of which a step has nine.

The silent clip's share is what upstream and featurizer take on it in our step, beside what they would take if the
upstream were run on it each time.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np
import torch
from s3prl.hub import wavlm_local
from s3prl.upstream.interfaces import Featurizer
from torch import Tensor, nn
from whole_network import Case, checkpoint_file

from frozen.inner_loop import CLASSES, CLIPS, DIM, LAYERS, PROJECTOR, RATE, STEPS, TASKS
from frozen.measuring import Line, Options, Ratio, side_by_side
from s3prl_metaperser.datasets import SILENT_SAMPLES, silent_clip
from s3prl_metaperser.episodes import Episode, Examples
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.settings import read_settings
from s3prl_metaperser.training import episodes_loss
from s3prl_metaperser.upstream.features import FeatureTable
from s3prl_metaperser.upstream.pooling import SAMPLE_RATE
from s3prl_metaperser.upstream.silence import recall_silence

SECONDS, UTTERANCES = 4.5, 2000
TARGET_RATIO, TARGET_SILENCE = 300, 0.15


class Subject:
    """The runner's modules, the expert's learner, and the episodes of a step."""

    def __init__(self, options: Options) -> None:
        torch.manual_seed(0)
        path = str(checkpoint_file(Case(), options.scratch))
        self.upstream = wavlm_local(path).eval()
        self.bare_upstream = wavlm_local(path).eval()
        self.featurizer = Featurizer(self.upstream, upstream_device="cpu")
        meta = {"inner_steps": STEPS, "annealing": None, "inner_lr": RATE, "query": "combined"}
        section = {"corpus": "none", "model": {"projector_dim": PROJECTOR}, "meta": meta}
        self.learner = Learner(read_settings(section), DIM, torch.rand(CLASSES) + 0.5)
        self.learner.bind_layer_weights(self.featurizer.weights, LAYERS)
        recall_silence(self.upstream, SILENT_SAMPLES)
        names = [f"utterance{number}" for number in range(UTTERANCES)]
        self.features = FeatureTable(
            names, torch.randn(UTTERANCES, LAYERS, DIM), torch.ones(UTTERANCES), torch.device("cpu")
        )
        rng = np.random.default_rng(0)
        self.episodes = []
        for task in range(TASKS):
            targets = rng.dirichlet(np.ones(CLASSES), CLIPS).astype(np.float32)
            clips = Examples(tuple(rng.choice(names, CLIPS, replace=False)), targets)
            self.episodes.append(Episode(f"listener{task}", 0, clips, clips))
        self.learned = [*self.learner.parameters(), *self.featurizer.parameters()]
        self.optimizer = torch.optim.Adam(self.learned, lr=1e-5)
        self.task_wavs = [
            torch.from_numpy(0.1 * rng.standard_normal(int(SECONDS * SAMPLE_RATE))).float() for _ in range(CLIPS)
        ]

    def heard(self, upstream: nn.Module, wavs: list[Tensor]) -> None:
        """Send a batch's clips through upstream and featurizer, as the runner does with a frozen upstream."""
        with torch.no_grad():
            features = upstream(wavs)
        self.featurizer(wavs, features)

    def silence(self) -> None:
        """The runner's part of our step."""
        self.heard(self.upstream, silent_clip())

    def silence_computed(self) -> None:
        """The same if the upstream were run on it at every step."""
        self.heard(self.bare_upstream, silent_clip())

    def one_tasks_clips(self) -> None:
        """The runner's part of a step for one of its tasks, without a feature cache."""
        self.heard(self.bare_upstream, self.task_wavs)

    def step(self) -> None:
        """Our step."""
        self.silence()
        episodes_loss(self.learner, self.features, self.episodes, "combined", 0.0).loss.backward()
        nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(options: Options) -> Iterator[Line]:
    """See the module's docstring."""
    subject = Subject(options)
    quick = {"step": subject.step, "silence": subject.silence, "computed": subject.silence_computed}
    seconds = side_by_side(quick, 5 * options.rounds, warming=2)
    slow = side_by_side({"step": subject.step, "upstream": subject.one_tasks_clips}, 3, settling=0)
    with_upstream = [TASKS * one + step for one, step in zip(slow["upstream"], slow["step"], strict=True)]
    own = statistics.median(seconds["step"])
    ratio = Ratio.of(with_upstream, slow["step"])
    yield Line(
        f"meta-training step, WavLM base, {TASKS} tasks of {CLIPS} clips of {SECONDS} s: upstream at every step / ours",
        f"≥ {TARGET_RATIO}",
        str(ratio),
        ratio.median >= TARGET_RATIO,
        f"with the upstream {statistics.median(with_upstream):.0f} s; ours, just after that, "
        f"{statistics.median(slow['step']) * 1e3:.0f} ms, after another of its kind {own * 1e3:.0f} ms",
    )
    silence, computed = (statistics.median(seconds[name]) for name in ("silence", "computed"))
    yield Line(
        "the silent clip's share of a step",
        f"≤ {TARGET_SILENCE:.0%}",
        f"{silence / own:.1%}",
        silence / own <= TARGET_SILENCE,
        f"{silence * 1e3:.1f} ms; run through the upstream each time it would take {computed * 1e3:.0f} ms",
    )
