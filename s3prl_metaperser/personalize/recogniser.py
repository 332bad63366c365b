"""A trained checkpoint in Python: what it hears in recordings, and a copy of it that hears like one listener."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from s3prl_metaperser.adaptation.problem import Params
from s3prl_metaperser.adaptation.rates import Rates
from s3prl_metaperser.checkpoints import (
    DOWNSTREAM,
    FEATURIZER,
    LISTENER,
    PROVENANCE,
    TRAINING,
    UPSTREAM,
    extra_state,
    read_checkpoint,
    seen_parts,
    weights_fit,
)
from s3prl_metaperser.episodes import Episode, Examples
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.inference import Inference
from s3prl_metaperser.learner import LAYER_WEIGHTS
from s3prl_metaperser.metrics import decide
from s3prl_metaperser.personal_checkpoint import checkpoint_fingerprint, completed, write_personal
from s3prl_metaperser.personalize import STEPS
from s3prl_metaperser.personalize.clips import Recording, clip_features, common_folder, listed, name_of, waveform
from s3prl_metaperser.personalize.judgement import Judgement, compare, deal
from s3prl_metaperser.personalize.labels import distributions
from s3prl_metaperser.personalize.upstreams import command_line, make_upstream
from s3prl_metaperser.settings import SECTION, Settings
from s3prl_metaperser.systems import EntireFew, FineTuning, MetaPerSER, task_batch
from s3prl_metaperser.upstream.features import Features, TrainableFeatures
from s3prl_metaperser.upstream.trainable import PREFIX
from s3prl_metaperser.whole_network import WholeNetwork

AT_ONCE = 2048
"""Clips whose probabilities are computed together."""
CLIPS_THROUGH_THE_UPSTREAM = 16
"""The same where each goes through an adapted upstream."""


@dataclass(frozen=True)
class Heard:
    """What a model hears in one recording.

    Attributes:
        audio: the recording's path as it was given, or ``waveform N``.
        emotions: those whose probability is above chance, in the classes' order.
        probabilities: emotion → probability.
    """

    audio: str
    emotions: tuple[str, ...]
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Adaptation:
    """What adapting to a listener moved.

    Attributes:
        params: adapted tensors, by the learner's names.
        losses: (steps + 1,) support loss before each step and after the last.
        clips: how many labelled clips it was adapted to.
    """

    params: Params
    losses: np.ndarray
    clips: int


class Recogniser:
    """A checkpoint of this downstream with its upstream, ready to hear and to be adapted; made by :func:`load`.

    Args:
        network: bound to its upstream, with the checkpoint's weights.
        checkpoint: the file it was loaded from; of an adapted one, its parent.
        fingerprint: of the checkpoint's weights.
        about: what the checkpoint says of itself.
        adaptation: to one listener; None: the checkpoint as it is.
    """

    def __init__(
        self,
        network: Inference,
        checkpoint: Path,
        fingerprint: str,
        about: Mapping[str, Any],
        adaptation: Adaptation | None = None,
    ) -> None:
        self.network = network
        self.checkpoint = checkpoint
        self.fingerprint = fingerprint
        self.about = about
        self.adaptation = adaptation

    @property
    def emotions(self) -> tuple[str, ...]:
        """The classes, in order."""
        return self.network.emotions

    @property
    def settings(self) -> Settings:
        """The settings of the training run; ``settings.corpus`` is the folder of its corpus, as it was given then."""
        return self.network.settings

    @property
    def is_personal(self) -> bool:
        """Whether this is one listener's model."""
        return self.adaptation is not None or self.about[TRAINING] == LISTENER

    @property
    def known_annotators(self) -> tuple[str, ...]:
        """Annotators whose labels the checkpoint was trained or chosen on."""
        return tuple(sorted({name for part in seen_parts(self.about[PROVENANCE]) for name in part["annotators"]}))

    # Hearing

    def predict(self, wavs: Sequence[Recording], progress: bool = False) -> list[Heard]:
        """Say what is heard in recordings.

        Args:
            wavs: files (any format that libsndfile reads, of 4 to 192 kHz) or (samples,) waveforms at 16 kHz.
            progress: whether to show a progress bar on stderr.

        Returns:
            One result a recording, in their order.

        Raises:
            MetaPerSERError: for a recording that is missing, not audio, empty, cut off, too short or too loud, by name.
        """
        wavs = listed(wavs)
        probabilities = self.probabilities(wavs, progress)
        decided = decide(probabilities)
        return [
            Heard(
                audio=name_of(wav, place),
                emotions=tuple(emotion for emotion, is_heard in zip(self.emotions, chosen, strict=True) if is_heard),
                probabilities=dict(zip(self.emotions, own.astype(float).tolist(), strict=True)),
            )
            for place, (wav, chosen, own) in enumerate(zip(wavs, decided, probabilities, strict=True))
        ]

    def probabilities(self, wavs: Sequence[Recording], progress: bool = False) -> np.ndarray:
        """Give (recordings, classes) probabilities; see :meth:`predict`."""
        wavs = listed(wavs)
        if self.network.is_entire:
            probabilities = self._through_the_whole_network(wavs, progress)
        else:
            features, names = clip_features(self.network, wavs, progress)
            parts = [features.gather(some) for some in _slices(names, AT_ONCE)]
            # On the CPU one by one: products of matrices of other sizes differ in the last bit, and what is said of a
            # clip is not to depend on the clips that are given with it.
            at_once = 1 if parts[0].device.type == "cpu" else AT_ONCE
            probabilities = np.concatenate(
                [self._from_statistics(few) for part in parts for few in part.split(at_once)]
            )
        finite = np.isfinite(probabilities).all(axis=1)
        if not finite.all():
            place = int(np.argmin(finite))
            raise MetaPerSERError(
                f"{name_of(wavs[place], place)}: what is heard in it is not finite; expected samples from -1 to 1"
            )
        return probabilities

    def _from_statistics(self, statistics: Tensor) -> np.ndarray:
        params = None if self.adaptation is None else {k: t.unsqueeze(0) for k, t in self.adaptation.params.items()}
        probabilities: np.ndarray = self.network.learner.probabilities(statistics.unsqueeze(0), params)[0].cpu().numpy()
        return probabilities

    def _through_the_whole_network(self, wavs: Sequence[Recording], progress: bool) -> np.ndarray:
        parts: list[np.ndarray] = []
        with tqdm(total=len(wavs), desc="hearing", unit="clip", disable=not progress, dynamic_ncols=True) as bar:
            for number, some in enumerate(_slices(wavs, 1 if self.adaptation is None else CLIPS_THROUGH_THE_UPSTREAM)):
                if self.adaptation is None:
                    parts.append(self.network.hear([waveform(some[0], name_of(some[0], number))]))
                else:
                    features, names = clip_features(self.network, some)
                    parts.append(self._adapted_upstream(features, names, self.adaptation.params))
                bar.update(len(some))
        if not parts:
            raise MetaPerSERError("no recordings are given; expected at least one")
        return np.concatenate(parts)

    def _adapted_upstream(self, features: Features, names: tuple[str, ...], params: Params) -> np.ndarray:
        network = self._whole(features)
        blank = Examples(names, np.zeros((len(names), len(self.emotions)), dtype=np.float32))
        probabilities: np.ndarray = network.probabilities(network.clips(blank), params).cpu().numpy()
        return probabilities

    def _whole(self, features: Features) -> WholeNetwork:
        if not isinstance(features, TrainableFeatures):
            raise TypeError("an adapted upstream takes waveforms, not features")
        return WholeNetwork(self.network.learner, features)

    def statistics(self, wavs: Sequence[Path | str], progress: bool = False) -> Tensor:
        """Give files' standardised statistics, (files, S, dim), on the model's device.

        In scope ``entire`` they are of the upstream as the checkpoint has it.
        """
        files = {str(wav): Path(wav).absolute() for wav in wavs}
        root = common_folder(files.values())
        return self.network.of_upstream.as_the_upstream_is(files, root, progress).gather([str(wav) for wav in wavs])

    # Adapting

    def adapt(
        self,
        wavs: Sequence[Recording],
        labels: Sequence[str | Sequence[str]],
        steps: int = STEPS,
        lr: float | None = None,
        progress: bool = False,
    ) -> Recogniser:
        """Adapt to one listener as meta-test does, by full-batch gradient steps at the meta-learned rates.

        Args:
            wavs: the clips, as for :meth:`predict`.
            labels: what the listener heard in each: ``"angry;sad"`` or ``["angry", "sad"]``.
            steps: how many to take; beyond those that have rates of their own, the last ones' are used.
            lr: one rate for all tensors, for a checkpoint of SSL-E, which has learned none.
            progress: whether to show progress bars on stderr.

        Returns:
            The listener's own recogniser. It shares the upstream with this one, which stays as it is.

        Raises:
            MetaPerSERError: for bad recordings and labels, for a checkpoint that cannot be adapted, and when adaptation
                diverges.
        """
        system = self._system(lr, steps)
        features, examples = self._labelled(wavs, labels, progress)
        params, losses = self._descended(system, features, examples, steps, lr, progress)
        finite = np.isfinite(losses)
        if not finite.all() or not all(bool(tensor.isfinite().all()) for tensor in params.values()):
            where = f"at step {int(np.argmin(finite))}" if not finite.all() else f"after {steps} steps"
            cure = "take fewer steps" if lr is None else "give a lower rate (lr)"
            raise MetaPerSERError(f"adaptation diverged {where}: the support loss is no longer finite; {cure}")
        adaptation = Adaptation(params, losses, len(examples))
        return Recogniser(self.network, self.checkpoint, self.fingerprint, self.about, adaptation)

    def judge(
        self,
        wavs: Sequence[Recording],
        labels: Sequence[str | Sequence[str]],
        steps: int = STEPS,
        lr: float | None = None,
        folds: int | None = None,
        progress: bool = False,
    ) -> Judgement:
        """Leave labelled clips out in turn, adapt to the others, and compare with this model as it is.

        Args:
            wavs: as for :meth:`adapt`, at least two.
            labels: as for :meth:`adapt`.
            steps: as for :meth:`adapt`.
            lr: as for :meth:`adapt`.
            folds: number of groups; None: each clip on its own (more than 64: ten groups; in scope ``entire`` five).
            progress: whether to show progress bars on stderr.
        """
        system = self._system(lr, steps)
        if folds is not None and not _is_number(folds, Integral):
            raise MetaPerSERError(f"folds {folds!r}; expected a whole number from 2 on")
        wavs = listed(wavs)
        features, examples = self._labelled(wavs, labels, progress)
        if len(examples) < 2 or (folds is not None and folds < 2):
            raise MetaPerSERError(f"{len(examples)} labelled clips in {folds} groups; leaving out takes at least two")
        groups = deal(len(examples), folds, self._adapts_upstream(system))
        everyone = np.arange(len(examples))
        episodes = [
            Episode("this listener", index, examples.take(np.setdiff1d(everyone, group)), examples.take(group))
            for index, group in enumerate(groups)
        ]
        personal = np.empty_like(examples.targets)
        # Episodes through an adapted upstream come one after the other anyway; the others all at once.
        parts = [[episode] for episode in episodes] if self._adapts_upstream(system) else [episodes]
        for part in tqdm(parts, desc="leaving out", unit="group", disable=not progress or len(parts) < 2):
            prediction = system.adapt_and_predict(self.network.learner, features, part, lr, [steps])[steps]
            for episode, own in zip(part, prediction.probabilities, strict=True):
                personal[groups[episode.index]] = own[: len(episode.query)]
        generic = Recogniser(self.network, self.checkpoint, self.fingerprint, self.about).probabilities(wavs)
        return compare(personal, generic, examples.targets, len(groups))

    def _system(self, lr: float | None, steps: int) -> FineTuning:
        """Give the row of Table 1 that adapts this checkpoint."""
        if not _is_number(steps, Integral) or steps < 1:
            raise MetaPerSERError(f"steps {steps!r}; expected a whole number from 1 on")
        if lr is not None and not (_is_number(lr, Real) and math.isfinite(lr) and lr > 0):
            raise MetaPerSERError(f"rate {lr!r}; expected a number above 0, such as 0.1")
        if self.is_personal:
            raise MetaPerSERError(
                f"{self.checkpoint} is already one listener's model; adapt the checkpoint that it came from, with all "
                "of the listener's labels"
            )
        given = self.settings.adaptation, self.settings.select_by
        match self.about[TRAINING]:
            case "episodes":
                if lr is not None:
                    raise MetaPerSERError(f"{self.checkpoint} has learned its own rates; leave lr out")
                return MetaPerSER(*given)
            case "aggregated":
                if lr is None:
                    raise MetaPerSERError(
                        f"{self.checkpoint} is of SSL-E, which has learned no rates to adapt at; use a checkpoint of "
                        "Meta-PerSER, or give a rate (--lr, such as 0.1)"
                    )
                return EntireFew(*given)
        raise MetaPerSERError(
            f"{self.checkpoint} is of Multi-Few, which adapts a head of its own; use one of Meta-PerSER"
        )

    def _adapts_upstream(self, system: FineTuning) -> bool:
        learner = self.network.learner
        return not set(system.names(learner)).isdisjoint(learner.upstream_names)

    def _labelled(
        self, wavs: Sequence[Recording], labels: Sequence[str | Sequence[str]], progress: bool
    ) -> tuple[Features, Examples]:
        wavs = listed(wavs)
        several = None if isinstance(labels, str) or not isinstance(labels, Iterable) else list(labels)
        if several is None or len(wavs) != len(several):
            count = len(several) if several is not None else "a single text" if isinstance(labels, str) else labels
            raise MetaPerSERError(f"{len(wavs)} recordings and {count} as labels; expected a list with as many of both")
        files = [str(wav) for wav in wavs if isinstance(wav, (str, Path))]
        twice = [file for file in files if files.count(file) > 1]
        if twice:
            raise MetaPerSERError(f"{twice[0]} is labelled twice; give each clip once, with all emotions heard in it")
        targets = distributions(several, self.emotions)
        features, names = clip_features(self.network, wavs, progress)
        return features, Examples(names, targets)

    def _descended(
        self, system: FineTuning, features: Features, examples: Examples, steps: int, lr: float | None, progress: bool
    ) -> tuple[Params, np.ndarray]:
        learner = self.network.learner
        names, rates = system.names(learner), system.rates(learner, lr)
        if self._adapts_upstream(system):
            return self._descended_through_upstream(features, examples, rates, names, steps, progress)
        support = task_batch([examples], features, learner.class_weights.device)
        # One step more than is kept, whose loss is the one after the last.
        adapted = learner.adapt_to(support, rates, steps + 1, [steps], names)
        return {name: tensor[0] for name, tensor in adapted.kept[steps].items()}, adapted.losses.cpu().numpy()

    def _descended_through_upstream(
        self, features: Features, examples: Examples, rates: Rates, names: Sequence[str], steps: int, progress: bool
    ) -> tuple[Params, np.ndarray]:
        network = self._whole(features)
        taken = network.descend(network.clips(examples), rates, steps + 1, names)
        losses: list[Tensor] = []
        kept: Params = {}
        bar = tqdm(taken, total=steps + 1, desc="adapting", unit="step", disable=not progress, dynamic_ncols=True)
        for number, (loss, params) in enumerate(bar, start=1):
            losses.append(loss)
            if number == steps:
                kept = params
        return kept, torch.stack(losses).cpu().numpy()

    # The personal checkpoint

    @torch.no_grad()
    def moved(self) -> dict[str, float]:
        """Say how far adaptation moved each tensor: the norm of its change, relative to the norm it had.

        NaN where that is 0.

        Raises:
            MetaPerSERError: for a model that was not adapted here.
        """
        before = self._before()
        norms = {name: float(before[name].norm()) for name in self._adapted().params}
        return {
            name: float((tensor - before[name]).norm()) / norms[name] if norms[name] else math.nan
            for name, tensor in self._adapted().params.items()
        }

    def _before(self) -> Params:
        trainable = self.network.of_upstream.trainable
        return {**self.network.learner.shared_tensors(), **({} if trainable is None else trainable.adapted)}

    def _adapted(self) -> Adaptation:
        if self.adaptation is None:
            raise MetaPerSERError(f"{self.checkpoint} was not adapted here; call adapt() first")
        return self.adaptation

    def save(self, path: Path | str, standalone: bool = False, overwrite: bool = False) -> Path:
        """Write the listener's model as a checkpoint that s3prl's runner takes (``-m inference``, ``-m evaluate``).

        Args:
            path: of the file.
            standalone: whether it holds everything, or the difference from the checkpoint it was adapted from.
            overwrite: replace a file that is already there.

        Returns:
            The path.

        Raises:
            MetaPerSERError: when nothing was adapted, or the file is there, cannot be written, or is the parent.
        """
        path = Path(path)
        params = self._adapted().params
        refuse_existing(path, overwrite)
        if path.exists() and path.samefile(self.checkpoint):
            raise MetaPerSERError(f"{path} is the checkpoint that was adapted; write the listener's beside it")
        changes: dict[str, dict[str, Tensor]] = {DOWNSTREAM: {}, FEATURIZER: {}}
        trainable = self.network.of_upstream.trainable
        for name, tensor in params.items():
            if name == LAYER_WEIGHTS:
                changes[FEATURIZER]["weights"] = tensor
            elif name.startswith(PREFIX) and trainable is not None:
                places = trainable.aliases[name.removeprefix(PREFIX)]
                changes.setdefault(UPSTREAM, {}).update(dict.fromkeys(places, tensor))
            else:
                changes[DOWNSTREAM][f"learner.model.{name}"] = tensor
        write_personal(path, self.checkpoint, self.fingerprint, changes, standalone)
        return path


def refuse_existing(path: Path, overwrite: bool, sources: Iterable[Path | str | None] = ()) -> None:
    """Stop before any work where a result cannot go.

    Args:
        path: of the result.
        overwrite: whether a file that is there is to be replaced.
        sources: files that the result is made from, which it must never replace; None stands for none.

    Raises:
        MetaPerSERError: for a folder, and for a file that is there, unless it is to be replaced.
    """
    if path.exists() and any(place is not None and os.path.exists(place) and path.samefile(place) for place in sources):
        raise MetaPerSERError(f"{path} is what the result is made from; choose another name for the result")
    if path.is_symlink() and not path.exists():
        raise MetaPerSERError(f"{path}: a link to {path.readlink()}, which is not there; expected a file to write")
    if path.is_dir():
        raise MetaPerSERError(f"{path}: is a folder; expected a file to write, such as {path / 'my.ckpt'}")
    if path.exists() and not overwrite:
        raise MetaPerSERError(f"{path}: already there; choose another name, or replace it with --overwrite")


def load(
    checkpoint: Path | str, device: str | torch.device | None = None, upstream_ckpt: str | None = None
) -> Recogniser:
    """Load a checkpoint of ``-d metaperser``, a listener's own or one that listeners can be adapted from.

    Args:
        checkpoint: such as ``RUN/dev-best.ckpt``, or what :meth:`Recogniser.save` wrote.
        device: of torch; None: the first CUDA device, or else the CPU.
        upstream_ckpt: where the upstream's own checkpoint (``-k``) is now, if it is not where training read it.

    Raises:
        MetaPerSERError: when it is no such checkpoint, its parent or upstream is missing, or the device.
    """
    path = Path(checkpoint)
    whole = completed(read_checkpoint(path), path)
    about = extra_state(whole[DOWNSTREAM], f"checkpoint {path}")
    if about[TRAINING] == "annotators":
        raise MetaPerSERError(f"checkpoint {path} is of Multi-Few, which has no head for a listener without labels")
    chosen = str(device) if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    args, config = command_line(whole, path, chosen, upstream_ckpt), whole.get("Config")
    if not isinstance(config, dict):
        raise MetaPerSERError(f"checkpoint {path} holds no config; expected one of s3prl's runner")
    upstream, featurizer = make_upstream(args, config)
    if whole.get(UPSTREAM):
        with weights_fit(f"checkpoint {path}: its {UPSTREAM}"):
            upstream.load_state_dict(whole[UPSTREAM])
    if whole.get(FEATURIZER):
        with weights_fit(f"checkpoint {path}: its {FEATURIZER}"):
            featurizer.load_state_dict(whole[FEATURIZER])
    network = Inference(config.get(SECTION), featurizer.output_dim, {**config, **vars(args)})
    network.learner.to(chosen)
    network.of_upstream.bind(upstream, featurizer, torch.device(chosen))
    network.load(whole[DOWNSTREAM])
    # It is read again by save(), wherever Python works by then.
    return Recogniser(network, path.absolute(), checkpoint_fingerprint(whole), dict(about))


def _is_number(given: object, kind: type) -> bool:
    """Take numpy's numbers too, and no truth value, which Python counts as one."""
    return isinstance(given, kind) and not isinstance(given, (bool, np.bool_))


def _slices(given: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(given), size):
        yield given[begin : begin + size]
