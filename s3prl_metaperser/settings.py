"""What a run is: the ``downstream_expert`` section of a config, as dataclasses that are checked once, when it is read.

An unknown key is an error that names the nearest known one; a value of the wrong kind is an error that names the key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from s3prl_metaperser.errors import MetaPerSERError, suggest
from s3prl_metaperser.recipes import with_recipe

SystemName = Literal[
    "random",
    "linear_few",
    "entire_few",
    "entire_zero",
    "multi_few",
    "entire_sim",
    "meta_perser",
    "reference",
    "personal",
]
Scenario = Literal["seen", "unseen"]
Scope = Literal["head", "linear", "entire"]
Query = Literal["combined", "resampled", "disjoint"]
Pooling = Literal["mean", "mean_std", "mean_std_per_layer"]
AnnealingOver = Literal["inner_steps", "training"]
MetricName = Literal["maF1", "miF1", "UA"]
Activation = Literal["none", "relu"]
Adapts = Literal["all", "naming"]
OuterLoss = Literal["cross_entropy", "cross_entropy_f1"]
AggregatedTargets = Literal["mean", "expressed"]
Recipe = Literal["paper", "best"]
Precision = Literal["float32", "bfloat16"]
Backend = Literal["analytic", "higher", "checkpointed"]
OnDivergence = Literal["skip", "stop"]


def _no_switch(value: Any) -> Any:
    """Refuse true and false, which Python takes for 1 and 0, and YAML for yes and no."""
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not true or false")
    return value


Switch = Annotated[bool, Field(strict=True)]
Int = Annotated[int, Field(strict=True)]
PositiveInt = Annotated[Int, Field(ge=1, le=1_000_000)]
Float = Annotated[float, BeforeValidator(_no_switch)]
"""Also of text such as ``1e-3``, which YAML does not take for a number."""
Rate = Annotated[Float, Field(gt=0, allow_inf_nan=False)]

Steps = PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)]
Rates = Rate | Annotated[list[Rate], Field(min_length=1)]

SECTION = "downstream_expert"
_strict = dataclass(frozen=True, config=ConfigDict(extra="forbid"))


@_strict
class DataSettings:
    """Which annotators and sessions belong to training, development and test (paper section 3)."""

    min_annotations: PositiveInt = 32
    """An annotator with fewer labels is left out, by name."""
    fold_count: PositiveInt | None = None
    """Number of groups the external annotators are dealt into; None: one annotator a fold, or 5 groups above 12."""
    test_annotator: str | None = None
    """Name of the test annotator; chooses the fold in which it is tested, over ``fold``."""
    test_sessions: list[Int] | None = None
    """Sessions kept for the test annotator in the unseen scenario; None: the corpus's last session."""


@_strict
class EpisodeSettings:
    """Meta-test episodes (paper section 3.3)."""

    shots: PositiveInt = 32
    """K, labelled clips to adapt on."""
    queries: PositiveInt = 128
    """Q, clips to evaluate on; never among the K."""
    number: Annotated[Int, Field(ge=1, le=10_000)] = 10
    """Episodes per annotator, each with its own draw."""
    seed: Int | None = None
    """Seed of the draws; None: the runner's ``--seed``."""


@_strict
class ModelSettings:
    """The downstream model (paper section 2.1)."""

    pooling: Pooling = "mean"
    """Over frames: the mean (the paper), or mean and standard deviation, the latter of the weighted sum over layers
    (``mean_std``, much memory with many layers) or of each layer (``mean_std_per_layer``)."""
    projector_dim: PositiveInt = 256
    """Width between the two linear layers."""
    standardize: Switch = True
    """Bring each feature dimension to mean 0, deviation 1 over the training utterances; false is the paper's model."""
    activation: Activation = "none"
    """Between the two linear layers."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Share of the dimensions between the two layers that training leaves out; nothing is left out at evaluation."""
    naming: Switch = False
    """The two layers say what is expressed, and a small matrix, which a listener's labels adapt, what it is called."""
    class_balanced: Switch = True
    """Weigh classes by the inverse of their effective number (paper section 2.1); false: all alike."""


@_strict
class SSLSettings:
    """Training of SSL-E on aggregated labels (paper section 2.3.1)."""

    batch_size: PositiveInt = 32
    """Utterances a step."""
    targets: AggregatedTargets = "mean"
    """Of the training annotators' labels: their mean (the paper), or what they say is expressed (``expressed.py``)."""


@_strict
class MultiTaskSettings:
    """Training of Multi-Few's shared body and the training annotators' heads (paper section 2.4)."""

    batch_size: PositiveInt = 32
    """Single annotations a step."""


@_strict
class AnnealingSettings:
    """Derivative annealing (paper section 2.3.3, MAML++ section 4)."""

    fraction: Annotated[Float, Field(ge=0, le=1)] = 0.3
    """The first part that uses first-order gradients only."""
    over: AnnealingOver = "inner_steps"
    """Part of what: each inner loop's steps (the paper's words) or the whole of training (MAML++)."""


@_strict
class MetaSettings:
    """Meta-training (paper section 2.3)."""

    tasks_per_batch: PositiveInt | None = None
    """Annotators in one runner batch; None: all training annotators, 16 at the most, and 1 in scope ``entire``, where
    ``runner.gradient_accumulate_steps`` says how many make an outer step."""
    inner_steps: PositiveInt = 5
    adapts: Adapts = "all"
    """What the inner loop moves: all that the scope lets adapt, or the listener's naming only."""
    outer_loss: OuterLoss = "cross_entropy"
    """On the query: cross-entropy (the paper), or with a smooth F1 at the decision threshold beside it."""
    query: Query = "combined"
    """The outer loss's examples: the support itself (CSMT, the paper), a fresh draw, or a disjoint one (MAML)."""
    queries: PositiveInt | None = None
    """How many examples the outer loss sees when ``query`` is not ``combined``; None: as many as ``shots``."""
    annealing: AnnealingSettings | None = AnnealingSettings()
    """None: second order throughout."""
    lslr: Switch = True
    """Learn a rate for each tensor and inner step; false: ``inner_lr`` throughout."""
    inner_lr: Rate = 0.1
    """The inner loop's rate, or the value LSLR's rates start from."""
    upstream_inner_lr: Rate = 0.001
    """The same for the upstream's tensors, in scope ``entire``: a speech model bears far smaller steps than a head."""
    backend: Backend | None = None
    """How the meta-gradient is made: ``analytic``, with the inner gradients written out, where the model is a weighted
    sum and two linear layers and nothing else; ``higher``, one graph of all inner steps; ``checkpointed``, one step's
    graph at a time. The same gradient. None: the quickest that applies, and ``checkpointed`` in scope ``entire``."""
    on_divergence: OnDivergence = "skip"
    """What meta-training does when an inner loop leaves the finite numbers: go on without that episode, or stop."""


@_strict
class EntireSettings:
    """Adapting the upstream too: scope ``entire``, with s3prl's ``-f``."""

    frozen: list[str] | None = None
    """Patterns (``*`` and ``?``) of the upstream's tensors that neither loop trains; None: the convolutional front
    end, which s3prl's own upstreams never train either."""
    not_adapted: list[str] = dataclasses.field(default_factory=list)
    """Patterns of the upstream's tensors that the outer loop trains and the inner loop leaves as they are."""
    chunk_seconds: Annotated[Float, Field(gt=0, allow_inf_nan=False)] = 32.0
    """Audio that goes through the upstream at once, at most (a longer clip goes alone); less takes less memory."""


@_strict
class AdaptationSettings:
    """Few-shot adaptation at meta-test (paper section 3.3); of several rates and steps the best on dev is used."""

    steps: Steps = dataclasses.field(default_factory=lambda: [5, 10, 20, 50])
    """Full-batch gradient steps on the support set; the paper takes 50."""
    lr: Rates = dataclasses.field(default_factory=lambda: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3])
    """One rate for all tensors. Meta-PerSER has learned its own and does not read this."""


@_strict
class ReferenceSettings(AdaptationSettings):
    """Fine-tuning on all of a listener's other labels: many more than K, so more steps."""

    steps: Steps = dataclasses.field(default_factory=lambda: [50, 150, 500])
    """Full-batch gradient steps on the listener's labels."""
    lr: Rates = dataclasses.field(default_factory=lambda: [0.01, 0.03, 0.1])
    """One rate for all tensors. A larger one gains nothing: on many labels it is rate times steps that counts."""


@_strict
class Settings:
    """A whole run, as the ``downstream_expert`` section of its config gives it."""

    corpus: str
    """Folder that ``metaperser prepare`` wrote."""
    recipe: Recipe = "paper"
    """Presets other keys (``recipes.py``); what the config gives itself wins over it."""
    system: SystemName = "meta_perser"
    """The row of Table 1 (paper section 2.4), or ``reference`` beside it; linear_few, entire_few, entire_zero,
    entire_sim and reference all train SSL-E. ``personal`` is one listener's model, as ``metaperser adapt`` makes it."""
    scenario: Scenario = "seen"
    fold: PositiveInt = 1
    """Which external annotator (or group) is the test; ``-v fold3`` on the command line wins."""
    scope: Scope = "linear"
    """What adapts: the two linear layers (``head``), the weighted sum over layers too (``linear``), or the upstream too
    (``entire``, the paper's), which needs s3prl's ``-f``."""
    precision: Precision = "float32"
    """Of the upstream's forward passes in scope ``entire``; weights, rates and losses are float32 in any case."""
    init_from: str | None = None
    """Checkpoint whose weights (and nothing else) training starts from: SSL-E for Meta-PerSER."""
    feature_cache: str = "auto"
    """Folder of the feature cache; ``auto``: the user's cache folder; ``off``: run the upstream at every batch."""
    select_by: MetricName = "miF1"
    """The dev metric that decides ``dev-best.ckpt``."""
    data: DataSettings = DataSettings()
    episodes: EpisodeSettings = EpisodeSettings()
    model: ModelSettings = ModelSettings()
    ssl: SSLSettings = SSLSettings()
    multi_task: MultiTaskSettings = MultiTaskSettings()
    meta: MetaSettings = MetaSettings()
    entire: EntireSettings = EntireSettings()
    adaptation: AdaptationSettings = AdaptationSettings()
    reference: ReferenceSettings = ReferenceSettings()


def read_settings(section: Any, variant: str | None = None) -> Settings:
    """Check the ``downstream_expert`` section of a config.

    Args:
        section: the mapping as YAML gave it.
        variant: s3prl's ``-v``; ``fold1``, ``fold2``, … choose the fold over the config's own.

    Returns:
        The settings.

    Raises:
        MetaPerSERError: for an unknown key, a missing one, or a value of the wrong kind.
    """
    if not isinstance(section, Mapping):
        raise MetaPerSERError(f"config section {SECTION!r} should be a mapping of settings, found {section!r}")
    chosen: dict[str, Any] = {} if variant is None else {"fold": _fold_of(variant)}
    if section.get("feature_cache") is False:
        # YAML 1.1 reads an unquoted ``off`` as false.
        chosen["feature_cache"] = "off"
    try:
        settings = TypeAdapter(Settings).validate_python(with_recipe({**section, **chosen}))
    except ValidationError as error:
        raise MetaPerSERError(_first_problem(error)) from None
    _check_naming(settings)
    _check_scope(settings)
    _check_backend(settings)
    return settings


def check_tested_once(settings: Settings, variant: str | None) -> None:
    """Refuse a command that says twice who is tested; an older checkpoint may hold both, and the annotator counts.

    Args:
        settings: of the command.
        variant: its ``-v``.

    Raises:
        MetaPerSERError: naming both.
    """
    if variant is not None and settings.data.test_annotator is not None:
        raise MetaPerSERError(
            f"-v {variant} and config key '{SECTION}.data.test_annotator' ({settings.data.test_annotator!r}) both say "
            "who is tested; leave one of them out"
        )


def resolved_backend(settings: Settings) -> Backend:
    """Give the backend of a run: the chosen one, or the quickest that applies."""
    if settings.meta.backend is not None:
        return settings.meta.backend
    if settings.scope == "entire":
        return "checkpointed"
    return "higher" if analytic_obstacle(settings) else "analytic"


def analytic_obstacle(settings: Settings) -> str | None:
    """Name the first setting for which the backend ``analytic`` has no formula; None where it applies."""
    model = settings.model
    obstacles = {
        "meta.adapts: naming": settings.meta.adapts == "naming",
        "scope: entire": settings.scope == "entire",
        "model.naming: true": model.naming,
        f"model.activation: {model.activation}": model.activation != "none",
        f"model.dropout: {model.dropout:g}": model.dropout > 0,
        "model.pooling: mean_std with scope: linear": model.pooling == "mean_std" and settings.scope == "linear",
    }
    return next((name for name, stands_in_the_way in obstacles.items() if stands_in_the_way), None)


def _check_backend(settings: Settings) -> None:
    obstacle = analytic_obstacle(settings)
    if settings.meta.backend == "analytic" and obstacle is not None:
        raise MetaPerSERError(
            f"config key '{SECTION}.meta.backend' has the value 'analytic', which is written out for a weighted sum of "
            f"means and two linear layers, not for {obstacle}; leave backend out, and the quickest that applies is used"
        )


def _check_scope(settings: Settings) -> None:
    scope = settings.scope
    if scope == "entire":
        if (settings.meta.tasks_per_batch or 1) > 1:
            raise MetaPerSERError(
                f"config key '{SECTION}.meta.tasks_per_batch' has the value {settings.meta.tasks_per_batch}, but in "
                "scope entire one task is adapted at a time; leave it out, and set runner.gradient_accumulate_steps"
            )
        return
    if settings.precision != "float32":
        raise MetaPerSERError(
            f"config key '{SECTION}.precision' has the value {settings.precision!r}, but the features of scope {scope} "
            f"are computed once and kept in float32; leave it out, or set {SECTION}.scope: entire"
        )
    if settings.meta.backend == "checkpointed" and settings.meta.adapts == "all" and settings.model.dropout > 0:
        raise MetaPerSERError(
            f"config key '{SECTION}.meta.backend' has the value 'checkpointed', which computes a step twice and so "
            f"cannot have dropout within it; set {SECTION}.model.dropout: 0, or backend: higher"
        )


def _check_naming(settings: Settings) -> None:
    if settings.model.naming:
        return
    for key, value in (("meta.adapts", settings.meta.adapts), ("ssl.targets", settings.ssl.targets)):
        if value in ("naming", "expressed"):
            raise MetaPerSERError(
                f"config key '{SECTION}.{key}' has the value {value!r}, which needs a model that names what is "
                f"expressed; set {SECTION}.model.naming: true, or {SECTION}.recipe: best"
            )


def _fold_of(variant: str) -> int:
    digits = variant.removeprefix("fold")
    if not (variant.startswith("fold") and digits.isdecimal() and int(digits) >= 1):
        raise MetaPerSERError(f"-v {variant!r} is not a fold; expected fold1, fold2, …")
    return int(digits)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    path: list[str] = []
    for part in problem["loc"]:
        # Below a key pydantic names the alternative of a union that it tried; that is no key of the config.
        if problem["type"] == "unexpected_keyword_argument" or part in _keys_at(path):
            path.append(str(part))
    known = _keys_at(path[:-1])
    key = ".".join([SECTION, *path])
    match problem["type"]:
        case "unexpected_keyword_argument":
            return f"config key {key!r} is unknown; {suggest(path[-1], known)}"
        case "missing":
            return f'config key {key!r} is missing; add it to the config or give -o "config.{key}=…"'
    return f"config key {key!r} has the value {problem['input']!r}: {problem['msg']}"


def _keys_at(path: list[str]) -> list[str]:
    kind: Any = Settings
    for name in path:
        default = next((field.default for field in dataclasses.fields(kind) if field.name == name), None)
        if not dataclasses.is_dataclass(default):
            return []
        kind = type(default)
    return [field.name for field in dataclasses.fields(kind)]
