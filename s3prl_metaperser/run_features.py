"""Which features a run works on: cached ones of a frozen upstream, or those of an upstream that is trained with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s3prl_metaperser.checkpoints import TRAINED_UPSTREAM
from s3prl_metaperser.corpus.manifest import Corpus
from s3prl_metaperser.datasets import SILENT_SAMPLES
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.fingerprint import fingerprint
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.model import Moments
from s3prl_metaperser.settings import Settings
from s3prl_metaperser.upstream.cache import (
    FeatureCache,
    FileHashes,
    UpstreamIdentity,
    default_cache,
    expanded,
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
        arguments: s3prl's command line.
        learner: is told of the upstream, and of the features' scale.

    Attributes:
        trainable: in scope ``entire``, once the upstream is known, what of it adapts.
    """

    def __init__(self, settings: Settings, arguments: Mapping[str, Any], learner: Learner) -> None:
        self.settings = settings
        self.arguments = arguments
        self.learner = learner
        self._own_weights = ""
        self._expected_weights: tuple[str, str] | None = None
        self._features: Features | None = None
        self._pooled: PooledUpstream | None = None
        self.trainable: TrainableUpstream | None = None

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
        self._own_weights = fingerprint(upstream.state_dict())
        self._check_weights()
        if self.settings.scope == "entire":
            self.trainable = TrainableUpstream(pooled, self.settings.entire)
            self.learner.bind_upstream(list(self.trainable.adapted))
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

    def prepared(self, corpus: Corpus, training_utterances: Sequence[str]) -> Features:
        """Give a corpus's standardised statistics; the first call extracts what no run has extracted yet.

        Args:
            corpus: whose utterances they are.
            training_utterances: ids of those that the features' scale is taken from.
        """
        if self._features is None:
            features = self._of(corpus.audio_paths(), corpus.root)
            if self.trainable is None:
                self._look_at(features, self.pooled, training_utterances)
            elif self._expected_weights is None and self.arguments["mode"] == "train":
                # A checkpoint's features were looked at when its training began.
                as_given = self._frozen(corpus.audio_paths(), corpus.root, self._held)
                self._look_at(as_given, self._held, training_utterances)
            self._features = self._standardised(features)
        return self._features

    def of_recordings(self, audio: Mapping[str, Path], root: Path, progress: bool = True) -> Features:
        """Give standardised statistics of any recordings, on the scale that a checkpoint has brought.

        Args:
            audio: name → file; those that the upstream has not met yet go through it now.
            root: a folder that they lie in, whose files' hashes are remembered together.
            progress: whether to show how far the upstream is.
        """
        return self._standardised(self._of(audio, root, progress))

    def as_the_upstream_is(self, audio: Mapping[str, Path], root: Path, progress: bool = True) -> Features:
        """Give what :meth:`of_recordings` gives, in scope ``entire`` too without a way to adapt the upstream."""
        return self._standardised(self._frozen(audio, root, self._held, progress))

    def of_waveforms(self, wavs: Mapping[str, Tensor]) -> Features:
        """Give features of (samples,) waveforms at 16 kHz, in scope ``entire``."""
        if self.trainable is None:
            raise TypeError("a frozen upstream's features are made by pooling, not kept as waveforms")
        return self._standardised(TrainableFeatures(self.trainable, {}, self.pooled.device, wavs))

    def _of(self, audio: Mapping[str, Path], root: Path, progress: bool = True) -> Features:
        if self.trainable is None:
            return self._frozen(audio, root, self.pooled, progress)
        return TrainableFeatures(self.trainable, audio, self.pooled.device)

    @cached_property
    def _held(self) -> PooledUpstream:
        """The upstream as it stands, in float32: what its features are kept by."""
        own = self.pooled
        if self.trainable is None:
            return own
        return PooledUpstream(own.upstream, own.featurizer, own.pooling, own.device, name=own.name)

    def _standardised(self, features: Features) -> Features:
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

    def _frozen(self, audio: Mapping[str, Path], root: Path, pooled: PooledUpstream, progress: bool = True) -> Features:
        """Give features of the upstream as it is now."""
        if self.settings.feature_cache == "off":
            return LiveFeatures(pooled, audio, pooled.device)
        place = self._cache_folder()
        cache = FeatureCache(place, self._identity(pooled, place))
        return cached_features(cache, FileHashes(place, root), pooled, audio, pooled.device, progress=progress)

    def _cache_folder(self) -> Path:
        # Whoever only listens has a checkpoint's config, which may be another's, and is not to say what is written.
        if self.settings.feature_cache == "auto" or self.arguments["mode"] == "inference":
            return default_cache()
        return expanded(self.settings.feature_cache)

    def _identity(self, pooled: PooledUpstream, cache: Path) -> UpstreamIdentity:
        featurizer = pooled.featurizer
        return UpstreamIdentity(
            upstream=self.arguments["upstream"],
            weights=self._own_weights,
            ckpt=self._content("upstream_ckpt", cache),
            model_config=self._content("upstream_model_config", cache),
            code=_code(),
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


def _code() -> str:
    """Name what computes an upstream's features, with versions; a clone of s3prl need not be installed to have one."""
    from s3prl import __version__ as of_s3prl

    others = (f"{name} {version(name)}" for name in ("torchaudio", "transformers"))
    return ", ".join([f"s3prl {of_s3prl}", *others])
