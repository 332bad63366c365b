"""What s3prl's runner runs, whether to train, to judge or to listen: a learner, its upstream, and weights that fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from s3prl_metaperser.checkpoints import (
    CONTRACT,
    DOWNSTREAM,
    LISTENER,
    PARENT,
    PROVENANCE,
    RATES_PREFIX,
    TRAINED_UPSTREAM,
    TRAINING,
    UPSTREAM_WEIGHTS,
    Contract,
    extra_state,
    read_checkpoint,
    weights_fit,
)
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.personal_checkpoint import completed
from s3prl_metaperser.run_arguments import check_arguments
from s3prl_metaperser.run_features import NOT_BOUND, RunFeatures
from s3prl_metaperser.settings import Settings
from s3prl_metaperser.systems import TRAINED_ON
from s3prl_metaperser.upstream.extraction import wanted_processes


class Network(ABC):
    """Learner and upstream, and which checkpoints' weights fit them.

    Args:
        settings: the ``downstream_expert`` section.
        arguments: s3prl's command line and the other sections of the config.
        upstream_dim: feature dimension of the upstream.
        emotions: the classes, in order.
        class_weights: (classes,) of the class-balanced loss.
        heads: annotators that have a head of their own.
    """

    def __init__(
        self,
        settings: Settings,
        arguments: Mapping[str, Any],
        upstream_dim: int,
        emotions: Sequence[str],
        class_weights: Tensor,
        heads: Sequence[str] = (),
    ) -> None:
        self.settings = settings
        self.arguments = arguments
        self.training = TRAINED_ON[settings.system]
        check_arguments(arguments, settings, self.training)
        wanted_processes()
        self.learner = Learner(settings, upstream_dim, class_weights, len(heads))
        self.contract = Contract(
            emotions=list(emotions),
            upstream=arguments["upstream"],
            upstream_dim=upstream_dim,
            feature_selection=arguments.get("upstream_feature_selection", "hidden_states"),
            layer_selection=arguments.get("upstream_layer_selection"),
            normalize=bool(arguments.get("upstream_feature_normalize")),
            pooling=settings.model.pooling,
            projector_dim=settings.model.projector_dim,
            standardize=settings.model.standardize,
            activation=settings.model.activation,
            naming=settings.model.naming,
            class_balanced=settings.model.class_balanced,
            scope=settings.scope,
            adapts=settings.meta.adapts,
            left_out=_left_out(settings),
            inner_steps=settings.meta.inner_steps,
            lslr=settings.meta.lslr,
            heads=list(heads),
        )
        self.of_upstream = RunFeatures(settings, arguments, self.learner)

    @property
    def is_entire(self) -> bool:
        """Whether the upstream is trained and adapted too."""
        return self.settings.scope == "entire"

    @abstractmethod
    def saved_state(self) -> dict[str, Any]:
        """Describe the weights, for the checkpoint."""

    @abstractmethod
    def _check_provenance(self, found: Mapping[str, Any], source: str) -> None:
        """Refuse a checkpoint that has seen what this run is judged on; remember what else it has seen."""

    # Checkpoints

    def initial_checkpoint(self) -> dict[str, Any] | None:
        """Read what s3prl itself does not load: the checkpoint of ``init_from``, or a small personal one's parent."""
        if self.arguments.get("init_ckpt"):
            if self.training != LISTENER:
                return None
            path = Path(self.arguments["init_ckpt"])
            return completed(read_checkpoint(path), path)
        if self.training == "nothing":
            return None
        if self.arguments["mode"] != "train":
            raise MetaPerSERError(
                f"-m {self.arguments['mode']} of system {self.settings.system!r} needs a trained checkpoint; "
                "give -e CHECKPOINT"
            )
        return None if self.settings.init_from is None else read_checkpoint(Path(self.settings.init_from))

    def check_initial_weights(self, state: Mapping[str, Any], with_upstream: bool = True) -> None:
        """Refuse a downstream state of ``init_from`` that this run must not or cannot start from.

        Args:
            state: of the checkpoint.
            with_upstream: whether this run knows what s3prl has made of ``-u``.

        Raises:
            MetaPerSERError: when it has seen what this run is judged on, or is another model's.
        """
        source = f"checkpoint {self.settings.init_from}"
        trained = self._accept(state, source, with_rates=False, with_upstream=with_upstream)[TRAINING]
        if trained == LISTENER:
            raise MetaPerSERError(f"{source} is one listener's; start from the checkpoint that it was adapted from")
        if trained == "annotators" and self.training != "annotators":
            raise MetaPerSERError(
                f"{source} has a head for each annotator and no classifier to start from; use one of SSL-E"
            )

    def load_initial_weights(self, state: Mapping[str, Any]) -> None:
        """Take model and standardisation, and nothing else, from a checkpoint's downstream state."""
        if self.training == LISTENER:
            # What s3prl itself is to load as soon as it has the downstream.
            return
        self.check_initial_weights(state)
        kept = ("model.", "standardization.")
        own = {name.removeprefix("learner."): tensor for name, tensor in state.items() if name.startswith("learner.")}
        with weights_fit(f"checkpoint {self.settings.init_from}"):
            self.learner.load_state_dict({k: v for k, v in own.items() if k.startswith(kept)}, strict=False)

    def _accept(
        self, state: Mapping[str, Any], source: str, with_rates: bool, with_upstream: bool
    ) -> Mapping[str, Any]:
        extra = extra_state(state, source)
        with_heads = self.training == extra[TRAINING] == "annotators"
        self.contract.check(extra[CONTRACT], source, with_rates, with_heads, with_upstream)
        self._check_provenance(extra[PROVENANCE], source)
        self.of_upstream.expect_weights(extra[UPSTREAM_WEIGHTS], source)
        if (
            extra[UPSTREAM_WEIGHTS] == TRAINED_UPSTREAM
            and self.arguments["mode"] == "train"
            and self.settings.scope != "entire"
        ):
            raise MetaPerSERError(
                f"{source} has a fine-tuned upstream, which scope {self.settings.scope!r} would not keep in its own "
                "checkpoints; set downstream_expert.scope: entire and give -f, or use one trained without -f"
            )
        return extra

    def check_weights(self, state: Mapping[str, Any], with_upstream: bool = True) -> None:
        """Refuse a downstream state that ``-e`` or ``-i`` gives this run, and that it must not or cannot take.

        Args:
            state: of the checkpoint.
            with_upstream: whether this run knows what s3prl has made of ``-u``.

        Raises:
            MetaPerSERError: when it belongs to another upstream, emotion set or model, or lacks this system's weights.
        """
        source = f"checkpoint {self.arguments.get('init_ckpt')}"
        trained = self._accept(state, source, self.training == "episodes", with_upstream)[TRAINING]
        if self.training not in (trained, "nothing"):
            raise MetaPerSERError(
                f"{source} was trained on {trained}, but system {self.settings.system!r} needs one trained on "
                f"{self.training}; to start from its weights use downstream_expert.init_from"
            )
        if self.training == "nothing" and trained == "annotators":
            raise MetaPerSERError(f"{source} is Multi-Few's, whose heads fit no other system; leave -e and -i out")

    def fitting(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Check a checkpoint's downstream state against this run, and leave out what this system does not use.

        Raises:
            MetaPerSERError: as :meth:`check_weights` does.
        """
        source = f"checkpoint {self.arguments.get('init_ckpt')}"
        if PARENT in extra_state(state, source):
            state = completed({DOWNSTREAM: dict(state)}, Path(self.arguments["init_ckpt"]))[DOWNSTREAM]
        self.check_weights(state)
        if self.learner.needs_upstream and self.learner.rates is None and self.training == "episodes":
            raise MetaPerSERError(f"{source} cannot be loaded before the upstream is known: {NOT_BOUND}")
        own_rates = self.learner.rates is not None
        return {name: value for name, value in state.items() if own_rates or not name.startswith(RATES_PREFIX)}


def _left_out(settings: Settings) -> list[str]:
    if settings.scope != "entire":
        return []
    entire = settings.entire
    return [*(["the convolutional front end"] if entire.frozen is None else entire.frozen), *entire.not_adapted]
