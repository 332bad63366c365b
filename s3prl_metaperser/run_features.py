"""Which features a run works on: cached ones of a frozen upstream, or those of an upstream that is trained with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s3prl_metaperser.checkpoints import TRAINED_UPSTREAM
from s3prl_metaperser.corpus.manifest import Corpus
from s3prl_metaperser.datasets import SILENT_SAMPLES
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.model import Moments
from s3prl_metaperser.settings import Settings
from s3prl_metaperser.upstream.cache import (
    FeatureCache,
    FileHashes,
    UpstreamIdentity,
    default_cache,
    weights_fingerprint,
)
from s3prl_metaperser.upstream.features import (
    Features,
    LiveFeatures,
    TrainableFeatures,
    cached_features,
    check_features_vary,
)
from s3prl_metaperser.upstream.pooling import PooledUpstream
from s3prl_metaperser.upstream.silence import recall_silence
from s3prl_metaperser.upstream.trainable import TrainableUpstream

NOT_BOUND = (
    "the runner's upstream was not found before its first batch; this needs s3prl's own runner, or one that calls "
    "expert.bind(upstream, featurizer)"
)


class RunFeatures:
    """The features of one run, once the runner's upstream is known.

    Args:
        settings: of the run.
        corpus: whose utterances they are.
        arguments: s3prl's command line.
        learner: is told of the upstream, and of the features' scale.
    """

    def __init__(self, settings: Settings, corpus: Corpus, arguments: Mapping[str, Any], learner: Learner) -> None:
        self.settings = settings
        self.corpus = corpus
        self.arguments = arguments
        self.learner = learner
        self._own_weights = ""
        self._expected_weights: tuple[str, str] | None = None
        self._features: Features | None = None
        self._pooled: PooledUpstream | None = None
        self._trainable: TrainableUpstream | None = None

    @property
    def pooled(self) -> PooledUpstream:
        """The runner's upstream.

        Raises:
            MetaPerSERError: when it is not known yet, or not the one that the loaded checkpoint was trained with.
        """
        if self._pooled is None:
            raise MetaPerSERError(NOT_BOUND)
        self._check_weights()
        return self._pooled

    def bind(self, upstream: nn.Module, featurizer: nn.Module, device: torch.device) -> None:
        """Take the runner's upstream and featurizer."""
        name = f"-u {self.arguments['upstream']}"
        precision = self.settings.precision
        pooled = PooledUpstream(upstream, featurizer, self.settings.model.pooling, device, precision, name)
        weights = getattr(featurizer, "weights", None) if pooled.layers > 1 else None
        self.learner.bind_layer_weights(weights, pooled.layers)
        self._pooled = pooled
        self._own_weights = weights_fingerprint(upstream)
        self._check_weights()
        if self.settings.scope == "entire":
            self._trainable = TrainableUpstream(pooled, self.settings.entire)
            self.learner.bind_upstream(list(self._trainable.adapted))
        else:
            recall_silence(upstream, SILENT_SAMPLES)

    @property
    def upstream_weights(self) -> str:
        """What a checkpoint says of its upstream: the fingerprint of a frozen one."""
        return TRAINED_UPSTREAM if self.settings.scope == "entire" else self._own_weights

    def expect_weights(self, fingerprint: str, source: str) -> None:
        """Take what a loaded checkpoint says of its upstream."""
        self._expected_weights = fingerprint, source

    def _check_weights(self) -> None:
        """Refuse an upstream of other weights than those that the loaded checkpoint was trained with."""
        if self._expected_weights is None:
            return
        expected, source = self._expected_weights
        if expected not in (self._own_weights, TRAINED_UPSTREAM):
            raise MetaPerSERError(f"{source} was trained on an upstream of other weights; give the same -k as then")

    def prepared(self, training_utterances: Sequence[str]) -> Features:
        """Give the utterances' standardised statistics; the first call extracts what no run has extracted yet.

        Args:
            training_utterances: ids of those that the features' scale is taken from.
        """
        if self._features is None:
            self._features = self._prepare(self.pooled, training_utterances)
        return self._features

    def _prepare(self, pooled: PooledUpstream, training_utterances: Sequence[str]) -> Features:
        if self._trainable is None:
            features = self._frozen(pooled)
            self._look_at(features, pooled, training_utterances)
        else:
            features = TrainableFeatures(self._trainable, self.corpus.audio_paths(), pooled.device)
            if self._expected_weights is None and self.arguments["mode"] == "train":
                # A checkpoint's features were looked at when its training began.
                as_given = PooledUpstream(
                    pooled.upstream, pooled.featurizer, pooled.pooling, pooled.device, name=pooled.name
                )
                self._look_at(self._frozen(as_given), as_given, training_utterances)
        if self.settings.model.standardize:
            features.transform(self.learner.standardization)
        return features

    def _look_at(self, features: Features, pooled: PooledUpstream, utterances: Sequence[str]) -> None:
        """Stop on features that do not vary; take their scale where no checkpoint has brought one."""
        rows, frame_deviations = features.raw(utterances)
        moments = Moments.of(rows, with_roots=pooled.pooling == "mean_std")
        check_features_vary(moments, frame_deviations, pooled)
        if self.settings.model.standardize and not self.learner.standardization.fitted:
            self.learner.fit_standardization(moments)

    def _frozen(self, pooled: PooledUpstream) -> Features:
        """Give features of the upstream as it is now."""
        audio = self.corpus.audio_paths()
        if self.settings.feature_cache == "off":
            return LiveFeatures(pooled, audio, pooled.device)
        chosen = self.settings.feature_cache
        root = default_cache() if chosen == "auto" else Path(chosen).expanduser()
        cache = FeatureCache(root, self._identity(pooled, root))
        return cached_features(cache, FileHashes(root, self.corpus.root), pooled, audio, pooled.device)

    def _identity(self, pooled: PooledUpstream, cache: Path) -> UpstreamIdentity:
        featurizer = pooled.featurizer
        return UpstreamIdentity(
            upstream=self.arguments["upstream"],
            weights=self._own_weights,
            ckpt=self._content("upstream_ckpt", cache),
            model_config=self._content("upstream_model_config", cache),
            code=", ".join(f"{name} {version(name)}" for name in ("s3prl", "torchaudio", "transformers")),
            feature_selection=featurizer.feature_selection,
            layer_selection=featurizer.layer_selection,
            normalize=featurizer.normalize,
            pooling=pooled.pooling,
        )

    def _content(self, argument: str, cache: Path) -> str:
        """Hash the file that an argument names; of a folder, such as an hf_* upstream's, all files."""
        given = self.arguments.get(argument)
        path = Path(given or "")
        if not given or not path.exists():
            return ""
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        return " ".join(FileHashes(cache, path.parent).of(files))
