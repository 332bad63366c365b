"""Reading s3prl's checkpoints safely, and knowing whether one fits the run at hand."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from s3prl_metaperser import torch_files
from s3prl_metaperser.checkpoint_form import about_fault, command_fault, not_finite, parent_fault, state_fault
from s3prl_metaperser.corpus.manifest import Corpus
from s3prl_metaperser.episodes import Split, Task
from s3prl_metaperser.errors import MetaPerSERError

DOWNSTREAM = "Downstream"
FEATURIZER = "Featurizer"
UPSTREAM = "Upstream"
TRAINED_UPSTREAM = "in the checkpoint"
"""Stands for the fingerprint of an upstream that was trained, and so is in the checkpoint itself."""
CHANGED_UPSTREAM = "ChangedUpstream"
"""A small personal checkpoint's tensors of the upstream; s3prl would load a part named ``Upstream`` as all of it."""
EXTRA_STATE = "_extra_state"
LEARNER_PREFIX = "learner."
"""Of the downstream's tensors that are its model, scale and rates, not where training is."""
RATES_PREFIX = f"{LEARNER_PREFIX}rates."
"""Of the downstream's tensors that only meta-training and adaptation read, never a listener's own model."""
PARENT = "parent"
"""Where a small personal checkpoint says what it is the difference from."""
LISTENER = "listener"
"""What a personal checkpoint says that it was trained on."""
CONTRACT, PROVENANCE, TRAINING, UPSTREAM_WEIGHTS = "contract", "provenance", "training", "upstream_weights"
RATES_FIELDS = ("scope", "adapts", "left_out", "inner_steps", "lslr")
"""Parts of the contract that only the inner loop's rates depend on."""
HEADS_FIELDS = ("heads",)
"""Parts of the contract that only Multi-Few's heads depend on."""
UPSTREAM_FIELDS = ("upstream_dim",)
"""Parts of the contract that are known once s3prl has made the upstream."""
MOST_SHOWN = 12
BEFORE = "before"
SAMPLE = 256
"""Recordings of a training that its checkpoint names. Where every fiftieth is met again, one of them is, as good as
surely (99.4%)."""


@dataclass(frozen=True)
class Contract:
    """What a checkpoint's weights only make sense with; saved beside them.

    Attributes:
        emotions: the classes, in order.
        upstream: s3prl's name (``-u``).
        upstream_dim: its feature dimension.
        feature_selection: s3prl's ``-s``.
        layer_selection: s3prl's ``-l``.
        normalize: s3prl's ``--upstream_feature_normalize``.
        pooling: ``mean``, ``mean_std`` or ``mean_std_per_layer``.
        projector_dim: width between the two linear layers.
        standardize: whether features are standardised.
        activation: between the two linear layers.
        naming: whether the model has a naming.
        class_balanced: whether its losses weigh classes.
        scope: what may adapt.
        adapts: what of it the inner loop moves.
        left_out: in scope ``entire``, patterns of the upstream's tensors that the inner loop leaves as they are.
        inner_steps: inner steps that have rates of their own.
        lslr: whether the rates are learned.
        heads: annotators that have a head of their own, in the order of the heads; empty except in Multi-Few.
    """

    emotions: list[str]
    upstream: str
    upstream_dim: int
    feature_selection: str
    layer_selection: int | None
    normalize: bool
    pooling: str
    projector_dim: int
    standardize: bool
    activation: str
    naming: bool
    class_balanced: bool
    scope: str
    adapts: str
    left_out: list[str]
    inner_steps: int
    lslr: bool
    heads: list[str]

    def check(
        self,
        found: Mapping[str, Any],
        source: str,
        with_rates: bool,
        with_heads: bool,
        with_upstream: bool,
    ) -> None:
        """Compare with the contract found in a checkpoint.

        Args:
            found: a contract as a mapping.
            source: names the checkpoint in the error.
            with_rates: whether the inner loop's rates are taken too, or the model only.
            with_heads: whether annotators' heads are taken too.
            with_upstream: whether what is said of the upstream here is what s3prl has made.

        Raises:
            MetaPerSERError: naming the first thing that differs.
        """
        considered = ((RATES_FIELDS, with_rates), (HEADS_FIELDS, with_heads), (UPSTREAM_FIELDS, with_upstream))
        ignored = {name for fields, is_used in considered if not is_used for name in fields}
        for name, value in asdict(self).items():
            if name not in ignored and found.get(name) != value:
                raise MetaPerSERError(
                    f"{source} was made with {name} {_shown(found.get(name))}, this run has {_shown(value)}; "
                    f"use a checkpoint of the same {name}, or set up the run like the checkpoint's"
                )


def corpus_identity(corpus: Corpus) -> str:
    """Give what a checkpoint knows a corpus by: its name and a hash of its utterances' names."""
    utterances = sorted(str(name) for name in corpus.annotations["utterance"].unique())
    digest = hashlib.sha256("\n".join(utterances).encode()).hexdigest()[:16]
    return f"{corpus.name} {digest}"


def _hashes(utterances: Iterable[object]) -> set[int]:
    return {int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:7], "big") for name in utterances}


def _labels_digest(tasks: Iterable[Task]) -> str:
    digest = hashlib.sha256()
    for task in tasks:
        digest.update("\n".join((task.annotator, *task.examples.utterances, "")).encode())
        digest.update(task.examples.targets.tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Provenance:
    """Whose labels and which recordings a checkpoint has seen; saved with it, so that no later run is judged on them.

    Attributes:
        corpus: name and fingerprint of the corpus.
        recordings: a sample of those that it may have heard, which are all outside ``kept_sessions``: the
            :data:`SAMPLE` least of the hashes of their utterances' names (Broder, "On the resemblance and containment
            of documents", 1997).
        annotators: those it was trained and chosen on.
        kept_sessions: sessions whose recordings it never saw.
        labels: hash of what those annotators said.
        before: the same of the trainings whose weights it started from, where they saw something else.
    """

    corpus: str
    recordings: list[int]
    annotators: list[str]
    kept_sessions: list[int]
    labels: str
    before: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, corpus: Corpus, split: Split) -> Provenance:
        """Describe what training on a split sees."""
        heard = corpus.annotations["utterance"][~corpus.annotations["session"].isin(list(split.kept_sessions))]
        tasks = (*split.train, *split.dev)
        return cls(
            corpus=corpus_identity(corpus),
            recordings=sorted(_hashes(heard.unique()))[:SAMPLE],
            annotators=sorted({task.annotator for task in tasks}),
            kept_sessions=sorted(split.kept_sessions),
            labels=_labels_digest(tasks),
        )

    def started_from(self, found: Mapping[str, Any]) -> Provenance:
        """Add what a checkpoint has seen whose weights a training starts from.

        Args:
            found: the checkpoint's provenance as a mapping.
        """
        own = {name: value for name, value in asdict(self).items() if name != BEFORE}
        known = [own, *self.before]
        for part in seen_parts(found):
            seen = {name: part[name] for name in own if name in part}
            if seen not in known:
                known.append(seen)
        return replace(self, before=known[1:])

    def check(self, found: Mapping[str, Any], corpus: Corpus, test: Sequence[Task], source: str) -> None:
        """Refuse a checkpoint that has seen what this run (``self``) is judged on.

        Args:
            found: the checkpoint's provenance as a mapping.
            corpus: this run's.
            test: this run's test annotators.
            source: names the checkpoint in the error.

        Raises:
            MetaPerSERError: naming the test annotator, recording or session it has seen.
        """
        there = _hashes(corpus.annotations["utterance"].unique())
        judged = {name for task in test for name in task.examples.utterances} if self.kept_sessions else set()
        for part in seen_parts(found):
            heard = set(part.get("recordings", []))
            has_recordings = not heard.isdisjoint(there)
            if not (has_recordings or _is_of_that_name(part, self.corpus)):
                continue
            is_same = part["corpus"] == self.corpus
            where, cure = "", ""
            if not is_same:
                shared = "recordings" if has_recordings else "name"
                where = f" in the corpus {part['corpus']!r:.80}, which has the {shared} of this one"
            if not (is_same or has_recordings):
                cure = "; or, where this is another corpus, prepare it under another --name"
            known = sorted({task.annotator for task in test} & set(part["annotators"]))
            if known:
                other = f", or, where this is another {known[0]}, give annotators other names"
                raise MetaPerSERError(
                    f"{source} was trained or chosen on labels of {known[0]}{where}, whom this run tests on; "
                    f"use a checkpoint of the same fold{'' if is_same else cure or other}"
                )
            what = next((f"the recording {name!r:.80}" for name in sorted(judged) if _hashes([name]) <= heard), None)
            seen = sorted(set(self.kept_sessions) - set(part["kept_sessions"]))
            # Where it is another corpus with recordings of this one, sessions may have other numbers.
            if seen and (is_same or not has_recordings):
                what = f"recordings of session {seen[0]}"
            if what is None:
                continue
            raise MetaPerSERError(
                f"{source} was trained on {what}{where}, which this run keeps for the test; use a "
                f"checkpoint of scenario unseen and the same data.test_sessions{cure}"
            )

    def check_goes_on(self, found: Mapping[str, Any], source: str) -> None:
        """Refuse to go on with a training on other labels than it was begun on.

        Args:
            found: the checkpoint's provenance as a mapping.
            source: names the checkpoint in the error.

        Raises:
            MetaPerSERError: where the labels of this run's training and dev annotators are others.
        """
        if found.get("labels", self.labels) != self.labels:
            raise MetaPerSERError(
                f"{source} was trained on other labels than those of the corpus {self.corpus!r:.80} now; go on with "
                "the corpus as it was, or train anew in another folder, for which downstream_expert.init_from takes "
                "the weights"
            )


def seen_parts(found: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Give what a checkpoint's own training has seen, then what those before it have.

    Args:
        found: the checkpoint's provenance as a mapping.
    """
    yield found
    yield from found.get(BEFORE, [])


def annotators_seen(found: Mapping[str, Any], corpus: Corpus) -> frozenset[str]:
    """Give the annotators of a corpus whose labels a checkpoint was trained or chosen on.

    Args:
        found: the checkpoint's provenance as a mapping.
        corpus: any.
    """
    identity, there = corpus_identity(corpus), _hashes(corpus.annotations["utterance"].unique())
    seen = (
        part["annotators"]
        for part in seen_parts(found)
        if _is_of_that_name(part, identity) or not there.isdisjoint(part.get("recordings", []))
    )
    return frozenset(name for annotators in seen for name in annotators)


def _is_of_that_name(part: Mapping[str, Any], corpus: str) -> bool:
    """Tell whether a corpus has the name, which stays when it is prepared anew, of that which a training has seen."""
    found: str = part["corpus"]
    return found.rsplit(" ", 1)[0] == corpus.rsplit(" ", 1)[0]


def _shown(value: object) -> str:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return repr(value)
    more = f" and {len(value) - MOST_SHOWN} more" if len(value) > MOST_SHOWN else ""
    return (", ".join(map(str, value[:MOST_SHOWN])) or "none") + more


def extra_state(state: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Give what a downstream state says of itself.

    Raises:
        MetaPerSERError: when it says nothing, and so was not made by this downstream, or what no run has written, and
            when its weights are not finite.
    """
    extra = state.get(EXTRA_STATE)
    if not isinstance(extra, Mapping) or not {CONTRACT, PROVENANCE, TRAINING, UPSTREAM_WEIGHTS} <= extra.keys():
        raise MetaPerSERError(f"{source} was not made by -d metaperser: it has no listener model in it")
    fault = state_fault(state, EXTRA_STATE)
    if fault is None:
        texts = {name: extra[name] for name in (TRAINING, UPSTREAM_WEIGHTS)}
        fault = about_fault(extra[CONTRACT], extra[PROVENANCE], texts)
    if fault is None and PARENT in extra:
        fault = parent_fault(extra[PARENT])
    if fault is not None:
        raise MetaPerSERError(f"{source} was not written by a run of -d metaperser: its {DOWNSTREAM} {fault}")
    _check_finite(state, DOWNSTREAM, source)
    return extra


def _check_finite(state: Mapping[str, Any], part: str, source: str) -> None:
    name = not_finite(state)
    if name is not None:
        raise MetaPerSERError(
            f"{source}: its weights {name!r:.80} in {part} are not finite; train it again or use an older one"
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load an s3prl checkpoint onto the CPU with torch's safe loader, once its checksums have been found to match.

    Raises:
        MetaPerSERError: when there is no such file, or it is not a whole s3prl checkpoint of this downstream.
    """
    if not path.is_file():
        raise MetaPerSERError(f"checkpoint {path} does not exist; expected a file such as RUN/dev-best.ckpt")
    damage = torch_files.damage(path)
    if damage is not None:
        raise MetaPerSERError(
            f"checkpoint {path} is not a readable torch file ({damage}); train it again or use an older one"
        )
    # s3prl keeps its command line in the checkpoint as a Namespace.
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        # Mapped: of a file with optimizer states or a whole upstream, only what is used is ever read.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception:
        # On bytes that are no checkpoint torch's loader raises whatever its parser stumbles over.
        raise MetaPerSERError(
            f"checkpoint {path} is not a readable torch file; train it again or use an older one"
        ) from None
    state = checkpoint.get(DOWNSTREAM) if isinstance(checkpoint, dict) else None
    extra_state(state if isinstance(state, dict) else {}, f"checkpoint {path}")
    for part in (FEATURIZER, UPSTREAM, CHANGED_UPSTREAM):
        held = checkpoint.get(part)
        if held is None:
            continue
        fault = state_fault(held, EXTRA_STATE)
        if fault is not None:
            raise MetaPerSERError(f"checkpoint {path} was not written by a run of -d metaperser: its {part} {fault}")
        _check_finite(held, part, f"checkpoint {path}")
    fault = command_fault(checkpoint.get("Args"), checkpoint.get("Config"))
    if fault is not None:
        raise MetaPerSERError(f"checkpoint {path} was not written by s3prl's runner: {fault}")
    return checkpoint


@contextmanager
def weights_fit(source: str) -> Iterator[None]:
    """Say in one line of our own that a module could not take a state.

    Args:
        source: names checkpoint and part in the error.

    Raises:
        MetaPerSERError: when names or shapes are others than the module's.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise MetaPerSERError(f"{source} does not fit this run: {' '.join(str(error).split()):.300}") from None
