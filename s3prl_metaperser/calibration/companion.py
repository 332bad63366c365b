"""The model behind the page: what it is after the answers so far, how it differs, what it hears.

One thing is done at a time, whoever asks; what has been made of some labels is kept until the labels change.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

import numpy as np

from s3prl_metaperser.calibration.explain import Differences, differences
from s3prl_metaperser.calibration.session import Session
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.personalize.judgement import FEWEST_TO_JUDGE

if TYPE_CHECKING:
    from torch import Tensor

    from s3prl_metaperser.personalize import Heard, Judgement, Recogniser

MOST_COMPARED = 400
"""Clips on which the two models are compared; more would not change the picture."""
MOST_THROUGH_THE_UPSTREAM = 40
"""The same where the upstream adapts, and each clip goes through it again after every answer."""


def check_adapts(generic: Recogniser, recording: Path, lr: float | None) -> None:
    """Try whether a model can be adapted at all, before anyone listens to anything.

    Args:
        generic: the model.
        recording: any that it may hear.
        lr: of adaptation.

    Raises:
        MetaPerSERError: saying why not.
    """
    generic.adapt([recording], [generic.emotions[:1]], steps=1, lr=lr)


class Companion:
    """A listener's model as their answers stand.

    Args:
        generic: the model that is personalised.
        session: the answers.
        recordings: on which the two models are compared: all there are.
        steps: of adaptation.
        lr: its rate, for a model that has learned none.
    """

    def __init__(
        self, generic: Recogniser, session: Session, recordings: Sequence[Path], steps: int, lr: float | None = None
    ) -> None:
        self.session = session
        self.generic = generic
        self.steps = steps
        self.lr = lr
        most = MOST_THROUGH_THE_UPSTREAM if generic.settings.scope == "entire" else MOST_COMPARED
        chosen = np.random.default_rng(0).permutation(len(recordings))[:most]
        self._recordings = [recordings[index] for index in sorted(chosen)]
        self._generic_probabilities: np.ndarray | None = None
        self._adapted_to: dict[str, tuple[str, ...]] = {}
        self._personal: Recogniser | None = None
        self._differences: Differences | None = None
        self._judgement: Judgement | None = None
        self._working = RLock()

    def personal(self) -> Recogniser:
        """Give the model adapted to the labels so far.

        Raises:
            MetaPerSERError: there are none yet, or a labelled recording cannot be read.
        """
        with self._working:
            labels = self.session.labels
            if not labels:
                raise MetaPerSERError("no clip is labelled yet; label one, and there is a model of yours")
            if self._personal is None or labels != self._adapted_to:
                self._forget()
                self._personal = self.generic.adapt(*self._support(labels), steps=self.steps, lr=self.lr)
                self._adapted_to = labels
            return self._personal

    def differences(self) -> Differences:
        """Compare the listener's model with the generic one on the recordings."""
        with self._working:
            personal = self.personal()
            if self._generic_probabilities is None:
                self._generic_probabilities = self.generic.probabilities(self._recordings)
            if self._differences is None:
                own = personal.probabilities(self._recordings)
                self._differences = differences(self._generic_probabilities, own, self.generic.emotions)
            return self._differences

    def judgement(self) -> Judgement:
        """Judge on labelled clips that are left out of adaptation in turn whether the listener's model is better.

        Raises:
            MetaPerSERError: there are too few labels.
        """
        with self._working:
            self.personal()
            if len(self._adapted_to) < FEWEST_TO_JUDGE:
                raise MetaPerSERError(
                    f"label {FEWEST_TO_JUDGE} clips to see whether your model is better than the generic"
                )
            if self._judgement is None:
                self._judgement = self.generic.judge(*self._support(self._adapted_to), steps=self.steps, lr=self.lr)
            return self._judgement

    def hear(self, wav: Tensor) -> tuple[Heard, Heard | None]:
        """Predict for a clip that is nowhere kept.

        Args:
            wav: (samples,) at 16 kHz.

        Returns:
            What the generic model hears, and what the listener's does: None without any label.
        """
        with self._working:
            (generic,) = self.generic.predict([wav])
            if not self.session.labels:
                return generic, None
            (personal,) = self.personal().predict([wav])
            return generic, personal

    def save(self, path: Path, standalone: bool) -> None:
        """Write the listener's model so far.

        Args:
            path: of the checkpoint, replaced where it exists.
            standalone: whether it works without its parent.
        """
        with self._working:
            self.personal().save(path, standalone=standalone, overwrite=True)

    def _support(self, labels: dict[str, tuple[str, ...]]) -> tuple[list[Path], list[tuple[str, ...]]]:
        return [self.session.audio_root / clip for clip in labels], list(labels.values())

    def _forget(self) -> None:
        self._personal = self._differences = self._judgement = None
