"""One run of s3prl's runner: the corpus it reads, the features it needs, what it trains and how it is judged.

The expert translates the runner's calls into this class's; nothing here knows of the runner's containers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from s3prl_metaperser.adaptation.rates import LSLR
from s3prl_metaperser.checkpoints import (
    CONTRACT,
    PROVENANCE,
    TRAINED_UPSTREAM,
    TRAINING,
    UPSTREAM_WEIGHTS,
    Contract,
    Provenance,
    extra_state,
    read_checkpoint,
)
from s3prl_metaperser.corpus.manifest import load_corpus
from s3prl_metaperser.datasets import (
    AggregatedBatches,
    AnnotationBatches,
    Batch,
    EvaluationEpisodes,
    TrainingEpisodes,
    loader,
)
from s3prl_metaperser.distributed import own_share
from s3prl_metaperser.dropout import seed_dropout
from s3prl_metaperser.episodes import (
    Episode,
    Task,
    generator,
    make_split,
    meta_test_episodes,
)
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.expressed import estimate_expressed
from s3prl_metaperser.learner import Learner
from s3prl_metaperser.metrics import METRICS, decide
from s3prl_metaperser.model import ListenerModel
from s3prl_metaperser.objective import class_balanced_weights
from s3prl_metaperser.prediction import Prediction
from s3prl_metaperser.reporting import EvaluatedEpisode, Report, summary_line
from s3prl_metaperser.run_arguments import check_arguments
from s3prl_metaperser.run_features import NOT_BOUND, RunFeatures
from s3prl_metaperser.settings import Settings, read_settings
from s3prl_metaperser.systems import DISPLAY_NAMES, make_system
from s3prl_metaperser.training import episodes_loss, minibatch_loss
from s3prl_metaperser.tuning import Tuning
from s3prl_metaperser.upstream.extraction import wanted_processes
from s3prl_metaperser.upstream.features import Features
from s3prl_metaperser.upstream.trainable import PREFIX

RATES_PREFIX = "learner.rates."


class Run:
    """A run, from its config.

    Args:
        section: the ``downstream_expert`` section.
        upstream_dim: feature dimension of the upstream.
        folder: s3prl's expdir.
        arguments: s3prl's command line and the other sections of the config.

    Raises:
        MetaPerSERError: when the config, the corpus or the split cannot be used.
    """

    def __init__(
        self, section: Mapping[str, Any] | None, upstream_dim: int, folder: Path, arguments: Mapping[str, Any]
    ) -> None:
        self.settings = read_settings(section, arguments.get("downstream_variant"))
        self.arguments = arguments
        self.seed = int(arguments["seed"])
        self.corpus = load_corpus(Path(self.settings.corpus))
        self.split = make_split(self.corpus, self.settings.scenario, self.settings.fold, self.settings.data)
        self.system = make_system(self.settings, self.seed, self.split)
        check_arguments(arguments, self.settings, self.system.training)
        wanted_processes()
        targets = torch.from_numpy(self.split.annotation_targets())
        balanced = self.settings.model.class_balanced
        weights = class_balanced_weights(targets) if balanced else torch.ones(targets.shape[1])
        heads = [task.annotator for task in self.split.train] if self.system.training == "annotators" else []
        self.learner = Learner(self.settings, upstream_dim, weights, len(heads))
        self.report = Report(folder, self.settings, arguments["upstream"], self.corpus.emotions)
        self.contract = Contract(
            emotions=list(self.corpus.emotions),
            upstream=arguments["upstream"],
            upstream_dim=upstream_dim,
            feature_selection=arguments.get("upstream_feature_selection", "hidden_states"),
            layer_selection=arguments.get("upstream_layer_selection"),
            normalize=bool(arguments.get("upstream_feature_normalize")),
            pooling=self.settings.model.pooling,
            projector_dim=self.settings.model.projector_dim,
            standardize=self.settings.model.standardize,
            activation=self.settings.model.activation,
            naming=self.settings.model.naming,
            class_balanced=balanced,
            scope=self.settings.scope,
            adapts=self.settings.meta.adapts,
            left_out=_left_out(self.settings),
            inner_steps=self.settings.meta.inner_steps,
            lslr=self.settings.meta.lslr,
            heads=heads,
        )
        self.provenance = Provenance.of(self.corpus, self.split)
        self.of_upstream = RunFeatures(self.settings, self.corpus, arguments, self.learner)
        self._episodes: dict[str, list[Episode]] = {}
        self._is_tuned = False
        self._tuning: Tuning | None = None
        self._dev_improved_at: int | None = None
        for role in ("dev", "test"):
            self.episodes(role)
        self._learn_expressed()

    def _learn_expressed(self) -> None:
        """Start the naming, and SSL-E's targets, from what the training annotators' labels say is expressed."""
        model = self.learner.model
        if self.arguments["mode"] != "train" or not isinstance(model, ListenerModel) or model.naming is None:
            return
        learns = self.system.training == "aggregated" and self.settings.ssl.targets == "expressed"
        if learns or self.settings.init_from is None:
            expressed = estimate_expressed(self.split.annotations())
            model.naming.teach(torch.from_numpy(expressed.naming))
            if learns:
                self.split = replace(self.split, aggregated=expressed.examples)

    def announce(self) -> None:
        """Say on stderr who trains, chooses and is tested, and who is left out and why."""
        if own_share().rank > 0:
            return
        split = self.split
        test, dev = (", ".join(_some(task.annotator for task in tasks)) for tasks in (split.test, split.dev))
        print(
            f"[metaperser] {self.settings.scenario} fold{split.fold}: test {test}; dev {dev}; "
            f"{len(split.train)} training annotators, {len(split.aggregated)} training utterances",
            file=sys.stderr,
        )
        if split.left_out:
            listed = "; ".join(_some(f"{name} ({reason})" for name, reason in split.left_out.items()))
            print(f"[metaperser] left out: {listed}", file=sys.stderr)

    def episodes(self, role: str) -> list[Episode]:
        """Give the meta-test episodes of ``dev`` or ``test``; drawn once."""
        if role not in self._episodes:
            tasks: dict[str, tuple[Task, ...]] = {"dev": self.split.dev, "test": self.split.test}
            if role not in tasks:
                raise MetaPerSERError(f"split {role!r} does not exist; expected dev or test")
            wanted = self.settings.episodes
            seed = self.seed if wanted.seed is None else wanted.seed
            drawn, passed_over = meta_test_episodes(tasks[role], wanted.shots, wanted.queries, wanted.number, seed)
            if passed_over and own_share().rank == 0:
                print(
                    f"[metaperser] {role}: {len(passed_over)} annotators have fewer than "
                    f"{wanted.shots + wanted.queries} labels and are passed over",
                    file=sys.stderr,
                )
            self._episodes[role] = drawn
        return self._episodes[role]

    # Checkpoints

    def initial_checkpoint(self) -> dict[str, Any] | None:
        """Read the checkpoint of ``init_from``, unless s3prl itself loads one (``-e``, ``-i``)."""
        if self.arguments.get("init_ckpt") or self.system.training == "nothing":
            return None
        if self.arguments["mode"] != "train":
            raise MetaPerSERError(
                f"-m {self.arguments['mode']} of system {self.settings.system!r} needs a trained checkpoint; "
                "give -e CHECKPOINT"
            )
        return None if self.settings.init_from is None else read_checkpoint(Path(self.settings.init_from))

    def load_initial_weights(self, state: Mapping[str, Any]) -> None:
        """Take model and standardisation, and nothing else, from a checkpoint's downstream state."""
        source = f"checkpoint {self.settings.init_from}"
        trained = self._accept(state, source, with_rates=False)[TRAINING]
        if trained == "annotators" and self.system.training != "annotators":
            raise MetaPerSERError(
                f"{source} has a head for each annotator and no classifier to start from; use one of SSL-E"
            )
        kept = ("model.", "standardization.")
        own = {name.removeprefix("learner."): tensor for name, tensor in state.items() if name.startswith("learner.")}
        self.learner.load_state_dict({k: v for k, v in own.items() if k.startswith(kept)}, strict=False)

    def saved_state(self) -> dict[str, Any]:
        """Describe the weights, for the checkpoint."""
        return {
            CONTRACT: asdict(self.contract),
            PROVENANCE: asdict(self.provenance),
            TRAINING: self.system.training,
            UPSTREAM_WEIGHTS: self.of_upstream.upstream_weights,
        }

    def _accept(self, state: Mapping[str, Any], source: str, with_rates: bool) -> Mapping[str, Any]:
        extra = extra_state(state, source)
        with_heads = self.system.training == extra[TRAINING] == "annotators"
        self.contract.check(extra[CONTRACT], source, with_rates, with_heads)
        if self.arguments["mode"] != "inference":
            self.provenance.check(extra[PROVENANCE], self.split.test, source)
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

    def fitting(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Check a checkpoint's downstream state against this run, and leave out what this system does not use.

        Raises:
            MetaPerSERError: when it belongs to another upstream, emotion set or model, or lacks this system's weights.
        """
        source = f"checkpoint {self.arguments.get('init_ckpt')}"
        trained = self._accept(state, source, with_rates=self.system.training == "episodes")[TRAINING]
        if self.system.training not in (trained, "nothing"):
            raise MetaPerSERError(
                f"{source} was trained on {trained}, but system {self.settings.system!r} needs one trained on "
                f"{self.system.training}; to start from its weights use downstream_expert.init_from"
            )
        if self.learner.needs_upstream and self.learner.rates is None and self.system.training == "episodes":
            raise MetaPerSERError(f"{source} cannot be loaded before the upstream is known: {NOT_BOUND}")
        if self.system.training == "nothing" and trained == "annotators":
            raise MetaPerSERError(f"{source} is Multi-Few's, whose heads fit no other system; leave -e and -i out")
        own_rates = self.learner.rates is not None
        return {name: value for name, value in state.items() if own_rates or not name.startswith(RATES_PREFIX)}

    # Features

    @property
    def is_entire(self) -> bool:
        """Whether the upstream is trained and adapted too."""
        return self.settings.scope == "entire"

    @property
    def features(self) -> Features:
        """The utterances' standardised statistics; the first call extracts what no run has extracted yet."""
        return self.of_upstream.prepared(self.split.aggregated.utterances)

    # Training

    def dataloader(self, split: str, batches_seen: int) -> DataLoader[Any]:
        """Give a split's batches; training goes on after ``batches_seen``."""
        if split == "train" and self.arguments["mode"] != "train":
            raise MetaPerSERError("-t train: evaluation is of dev or test")
        if split != "train":
            return loader(EvaluationEpisodes(self.episodes(split)))
        share, last = own_share(), self._total_batches
        if share.rank == 0:
            # The runner ends training, by its own count of steps. It differs from ours once gradient_accumulate_steps
            # was changed on resuming or a batch was skipped for memory, and is not kept on other ranks.
            last = max(last, batches_seen + int(self.arguments["runner"]["gradient_accumulate_steps"]))
        given = self.split, self.settings, self.seed, batches_seen, last, share
        match self.system.training:
            case "aggregated":
                return loader(AggregatedBatches(*given))
            case "annotators":
                return loader(AnnotationBatches(*given))
        return loader(TrainingEpisodes(*given))

    @property
    def _total_batches(self) -> int:
        runner = self.arguments["runner"]
        return int(runner["total_steps"]) * int(runner["gradient_accumulate_steps"])

    def training_loss(self, batch: Batch, batches_seen: int, records: dict[str, list[Any]]) -> Tensor:
        """Compute the loss of a minibatch of SSL-E or Multi-Few, or of a meta-batch of episodes."""
        # The next evaluation is of other weights, for which another rate may be best.
        self._is_tuned = False
        device = self.learner.class_weights.device
        # Dropout depends on the position in training alone, so that a resumed run goes on as if never stopped.
        seed = int(generator(self.seed, "dropout", own_share().position(batches_seen)).integers(2**63))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            seed_dropout(seed, device)
            return self._training_loss(batch, batches_seen, records, seed)

    def _training_loss(
        self, batch: Batch, batches_seen: int, records: dict[str, list[Any]], dropout_seed: int
    ) -> Tensor:
        if not isinstance(batch, list):
            loss = minibatch_loss(self.learner, self.features, batch, dropout_seed)
            records["loss"].append(loss.item())
            return loss
        share = own_share()
        progress = share.position(batches_seen) / (share.world * self._total_batches)
        meta = episodes_loss(self.learner, self.features, batch, self.settings.meta.query, progress)
        records["query_loss"].append(meta.loss.item())
        for step, value in enumerate(meta.support.tolist()):
            records[f"support_loss/step{step}"].append(value)
        return meta.loss

    def log_training(self, records: dict[str, list[Any]], logger: Any, global_step: int) -> None:
        """Write losses (means over ``log_step``) and LSLR's rates to TensorBoard."""
        for name, values in records.items():
            logger.add_scalar(f"metaperser/train-{name}", float(np.mean(values)), global_step=global_step)
        if isinstance(self.learner.rates, LSLR):
            for step, row in enumerate(self.learner.rates.rates.tolist()):
                of_upstream = []
                for tensor, rate in zip(self.learner.rates.names, row, strict=True):
                    if tensor.startswith(PREFIX):
                        of_upstream.append(rate)
                    else:
                        logger.add_scalar(f"metaperser/lslr/{tensor}/step{step}", rate, global_step=global_step)
                # An upstream has hundreds of tensors, more than anybody looks at one by one.
                for name, reduce in (("min", min), ("mean", np.mean), ("max", max)) if of_upstream else ():
                    logger.add_scalar(f"metaperser/lslr/upstream-{name}/step{step}", reduce(of_upstream), global_step)

    # Evaluation

    def _tune(self) -> None:
        """Let the system choose on dev, once for the weights as they are."""
        if self._is_tuned:
            return
        self._is_tuned = True
        self._tuning = self.system.tune(self.learner, self.features, self.episodes("dev"))
        if self._tuning is not None:
            line = self._tuning.line(DISPLAY_NAMES[self.settings.system])
            tqdm.write(f"[metaperser] {line}", file=sys.stderr)

    def _prediction(self, split: str, episodes: Sequence[Episode]) -> Prediction:
        """Predict, unless tuning has just done so for the same episodes, weights and choice."""
        if split == "dev" and self._tuning is not None:
            return self._tuning.predictions[episodes[0].annotator, episodes[0].index]
        return self.system.predict(self.learner, self.features, episodes)

    def evaluate(self, split: str, batch: Batch, records: dict[str, list[Any]]) -> None:
        """Adapt to a batch of episodes of ``dev`` or ``test``, and score their queries."""
        if not isinstance(batch, list):
            raise TypeError("evaluation takes episodes")
        self._tune()
        prediction = self._prediction(split, batch)
        for episode, probabilities, scores in zip(
            batch, prediction.probabilities, prediction.scores(batch), strict=True
        ):
            if not np.isfinite(probabilities).all():
                tqdm.write(
                    f"[metaperser] warning: adaptation to {episode.annotator}, episode {episode.index}, diverged; "
                    "it counts as deciding for no emotion",
                    file=sys.stderr,
                )
            records["episodes"].append(EvaluatedEpisode(episode, probabilities, scores))
        if len(prediction.support_losses):
            records["support_losses"].append((len(batch), prediction.support_losses))

    def hear(self, wav: Tensor) -> dict[str, Any]:
        """Give the shared model's decisions and probabilities for one (samples,) waveform."""
        pooled = self.of_upstream.pooled
        statistics = pooled([wav])[0].statistics.unsqueeze(0).to(pooled.device)
        standardised = self.learner.standardization(statistics).unsqueeze(0)
        probabilities = self.learner.probabilities(standardised)[0].cpu().numpy()
        chosen = decide(probabilities)[0]
        return {
            "emotions": [emotion for emotion, one in zip(self.corpus.emotions, chosen, strict=True) if one],
            "probabilities": dict(zip(self.corpus.emotions, probabilities[0].round(6).tolist(), strict=True)),
        }

    def log_evaluation(
        self, split: str, records: dict[str, list[Any]], logger: Any, global_step: int, best: float
    ) -> float | None:
        """Log a whole evaluation and write its results.

        During training, the files hold the results of ``dev-best.ckpt``: they are written when dev has just improved
        (or where dev is not evaluated at all). Outside training they are always written.

        Args:
            split: ``dev`` or ``test``.
            records: what :meth:`evaluate` appended.
            logger: TensorBoard writer.
            global_step: the optimizer's step; 0 outside training.
            best: the best dev score so far.

        Returns:
            The dev score (the metric of ``select_by``, mean over episodes); None for another split.
        """
        evaluated: Sequence[EvaluatedEpisode] = records["episodes"]
        means = {name: float(np.mean([getattr(one.scores, name) for one in evaluated])) for name in METRICS}
        for name, mean in means.items():
            logger.add_scalar(f"metaperser/{split}-{name}", mean, global_step=global_step)
            spread = float(np.std([getattr(one.scores, name) for one in evaluated]))
            logger.add_scalar(f"metaperser/{split}-{name}-std", spread, global_step=global_step)
        if records["support_losses"]:
            counts, curves = zip(*records["support_losses"], strict=True)
            curve = np.average(np.stack(curves), axis=0, weights=counts)
            logger.add_scalar(f"metaperser/{split}-support_loss-first", float(curve[0]), global_step=global_step)
            logger.add_scalar(f"metaperser/{split}-support_loss-last", float(curve[-1]), global_step=global_step)

        training = self.arguments["mode"] == "train"
        # As the checkpoint's float32 buffer keeps it, so that an equal score is no improvement.
        dev_score = float(np.float32(means[self.settings.select_by])) if split == "dev" else None
        if dev_score is not None and dev_score > best:
            self._dev_improved_at = global_step
        selects = "dev" in self.arguments["runner"].get("eval_dataloaders", [])
        line = summary_line(evaluated, DISPLAY_NAMES[self.settings.system], split)
        if not training or not selects or self._dev_improved_at == global_step:
            path = self.report.write(split, evaluated)
            if self._tuning is not None:
                self.report.write_tuning(self._tuning)
            line += f"  → {path}"
        tqdm.write(line)
        return dev_score


def _left_out(settings: Settings) -> list[str]:
    if settings.scope != "entire":
        return []
    entire = settings.entire
    return [*(["the convolutional front end"] if entire.frozen is None else entire.frozen), *entire.not_adapted]


def _some(names: Any, most: int = 8) -> list[str]:
    listed = list(names)
    return [*listed[:most], f"… {len(listed) - most} more"] if len(listed) > most else listed
