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
    DOWNSTREAM,
    FEATURIZER,
    LEARNER_PREFIX,
    LISTENER,
    PROVENANCE,
    TRAINING,
    UPSTREAM,
    UPSTREAM_WEIGHTS,
    Provenance,
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
from s3prl_metaperser.distributed import Appointment, own_share
from s3prl_metaperser.divergence import Divergence, find_divergence
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
from s3prl_metaperser.learner import MetaLoss
from s3prl_metaperser.metrics import METRICS
from s3prl_metaperser.model import ListenerModel
from s3prl_metaperser.network import Network
from s3prl_metaperser.objective import class_balanced_weights
from s3prl_metaperser.personal_checkpoint import completed, model_fingerprint
from s3prl_metaperser.prediction import Prediction
from s3prl_metaperser.reporting import EvaluatedEpisode, Report, Weights, summary_line
from s3prl_metaperser.resuming import refuse_used
from s3prl_metaperser.settings import SECTION, check_tested_once, read_settings
from s3prl_metaperser.systems import DISPLAY_NAMES, make_system
from s3prl_metaperser.training import differentiated, episodes_loss, minibatch_loss
from s3prl_metaperser.tuning import Tuning
from s3prl_metaperser.upstream.features import Features
from s3prl_metaperser.upstream.trainable import PREFIX


class Run(Network):
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
        settings = read_settings(section, arguments.get("downstream_variant"))
        if not arguments.get("past_exp"):
            check_tested_once(settings, arguments.get("downstream_variant"))
        self._section = section
        self.seed = int(arguments["seed"])
        self.corpus = load_corpus(Path(settings.corpus))
        self.split = make_split(self.corpus, settings.scenario, settings.fold, settings.data)
        self.system = make_system(settings, self.seed, self.split)
        targets = torch.from_numpy(self.split.annotation_targets())
        balanced = settings.model.class_balanced
        weights = class_balanced_weights(targets) if balanced else torch.ones(targets.shape[1])
        heads = [task.annotator for task in self.split.train] if self.system.training == "annotators" else []
        super().__init__(settings, arguments, upstream_dim, self.corpus.emotions, weights, heads)
        self.report = Report(folder, settings, arguments["upstream"], self.corpus.emotions)
        self.provenance = Provenance.of(self.corpus, self.split)
        self._episodes: dict[str, list[Episode]] = {}
        self._is_tuned = False
        self._tuning: Tuning | None = None
        self._dev_improved_at: int | None = None
        self._passed_over = 0
        self._before_gradients = Appointment()
        self._evaluated = self._weights_to_evaluate()
        for role in ("dev", "test"):
            episodes = self.episodes(role)
            if self._evaluated is not None:
                # Of both, whichever is evaluated: what is chosen on dev is kept with the results of test.
                self.report.refuse_others(role, episodes, self._evaluated)
        self._learn_expressed()

    def _learn_expressed(self) -> None:
        """Start the naming, and SSL-E's targets, from what the training annotators' labels say is expressed."""
        model = self.learner.model
        if self.arguments["mode"] != "train" or not isinstance(model, ListenerModel) or model.naming is None:
            return
        learns = self.training == "aggregated" and self.settings.ssl.targets == "expressed"
        if learns or self.settings.init_from is None:
            expressed = estimate_expressed(self.split.annotations())
            model.naming.teach(torch.from_numpy(expressed.naming))
            if learns:
                self.split = replace(self.split, aggregated=expressed.examples)

    def _weights_to_evaluate(self) -> Weights | None:
        """Know the checkpoint that is evaluated; None in training, and where a system has learned nothing."""
        given = self.arguments.get("init_ckpt")
        if self.arguments["mode"] != "evaluate" or self.training == "nothing" or not given:
            return None
        path = Path(given)
        # A runner that has loaded it itself may have it from elsewhere.
        return Weights(path, model_fingerprint(completed(read_checkpoint(path), path))) if path.is_file() else None

    def _weights_in_training(self, checkpoint: str) -> Weights:
        pooled = self.of_upstream.pooled
        learned = {f"{LEARNER_PREFIX}{name}": tensor for name, tensor in self.learner.state_dict().items()}
        parts = {DOWNSTREAM: learned, FEATURIZER: pooled.featurizer.state_dict()}
        if self.arguments.get("upstream_trainable"):
            parts[UPSTREAM] = pooled.upstream.state_dict()
        return Weights(self.report.folder / checkpoint, model_fingerprint(parts), in_training=True)

    def hold_folder(self) -> None:
        """Keep the folder that is trained into from other processes; warn where nothing would be left to resume from.

        Raises:
            MetaPerSERError: when another process trains into it, or has, and this run does not go on from there.
        """
        if own_share().rank > 0:
            return
        resumed_from = self.arguments["init_ckpt"] if self.arguments.get("past_exp") else None
        command = {**self.arguments, SECTION: self._section}
        refuse_used(self.report.folder, resumed_from, command if self.arguments.get("auto_resume") else None)
        self.report.hold()
        if self.arguments["runner"]["max_keep"] < 2:
            print(
                "[metaperser] warning: with runner.max_keep below 2, s3prl deletes the last checkpoint before it "
                "writes the next; killed between the two, this training cannot be resumed",
                file=sys.stderr,
            )

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
        if self.training == LISTENER:
            print(
                "[metaperser] a personal model is judged as it is; of the listener it was adapted to, it knows the "
                "clips it was adapted on (`metaperser adapt` judges on clips left out)",
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

    def saved_state(self) -> dict[str, Any]:
        """Describe the weights, for the checkpoint."""
        return {
            CONTRACT: asdict(self.contract),
            PROVENANCE: asdict(self.provenance),
            TRAINING: self.training,
            UPSTREAM_WEIGHTS: self.of_upstream.upstream_weights,
        }

    def _check_provenance(self, found: Mapping[str, Any], source: str) -> None:
        self.provenance.check(found, self.corpus, self.split.test, source)
        if self.arguments["mode"] == "train" and self.arguments.get("past_exp"):
            self.provenance.check_goes_on(found, source)
        self.provenance = self.provenance.started_from(found)

    # Features

    @property
    def features(self) -> Features:
        """The utterances' standardised statistics; the first call extracts what no run has extracted yet."""
        return self.of_upstream.prepared(self.corpus, self.split.aggregated.utterances)

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
            last = max(last, batches_seen + self._accumulated)
        given = self.split, self.settings, self.seed, batches_seen, last, share
        match self.training:
            case "aggregated":
                return loader(AggregatedBatches(*given))
            case "annotators":
                return loader(AnnotationBatches(*given))
        return loader(TrainingEpisodes(*given))

    @property
    def _accumulated(self) -> int:
        return int(self.arguments["runner"]["gradient_accumulate_steps"])

    @property
    def _total_batches(self) -> int:
        return int(self.arguments["runner"]["total_steps"]) * self._accumulated

    def training_loss(self, batch: Batch, batches_seen: int, records: dict[str, list[Any]]) -> Tensor:
        """Compute the loss of a minibatch of SSL-E or Multi-Few, or of a meta-batch of episodes.

        Every process waits here for the last of them.
        """
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
            value = loss.item()
            if not np.isfinite(value):
                self._check_weights()
                tqdm.write("[metaperser] warning: the loss of this batch is not finite; it is passed over", sys.stderr)
            records["loss"].append(value)
            return self._finite_or_nothing(loss, value, batches_seen)
        share = own_share()
        progress = share.position(batches_seen) / (share.world * self._total_batches)
        meta = self._episodes_loss(batch, progress, dropout_seed)
        value = meta.loss.item()
        records["query_loss"].append(value)
        for step, support in enumerate(meta.support.tolist()):
            records[f"support_loss/step{step}"].append(support)
        return self._finite_or_nothing(meta.loss, value, batches_seen)

    def _finite_or_nothing(self, loss: Tensor, value: float, batches_seen: int) -> Tensor:
        """Give a loss that spoils no other's gradient: a batch that is passed over adds nothing to its outer step.

        Where no batch of a step is left, of any process, its gradient is NaN: s3prl then takes none.
        """
        if batches_seen % self._accumulated == 0:
            self._passed_over = 0
        is_sound = bool(np.isfinite(value))
        # Called for every batch, whatever becomes of it: each process waits for all the others' counts.
        self._passed_over += self._before_gradients.total(int(not is_sound))
        if is_sound:
            return loss
        is_left = self._passed_over < self._accumulated * own_share().world
        learned = [parameter for parameter in self.learner.parameters() if parameter.requires_grad]
        return torch.stack([((0.0 if is_left else np.nan) * parameter).sum() for parameter in learned]).sum()

    def _episodes_loss(self, episodes: Sequence[Episode], progress: float, dropout_seed: int) -> MetaLoss:
        """Give the outer loss, without the episodes whose inner loops leave the finite numbers; NaN if all of them do.

        One does, too, when its losses are finite still and the gradient through it is not.
        """
        learned = self._learned()

        def of(some: Sequence[Episode]) -> MetaLoss:
            # Each time from the start of dropout's draws: what is left is as if nothing else had been drawn.
            seed_dropout(dropout_seed, self.learner.class_weights.device)
            meta = episodes_loss(self.learner, self.features, some, self.settings.meta.query, progress)
            return replace(meta, loss=differentiated(meta.loss, learned, self._accumulated))

        meta = of(episodes)
        if _is_finite(meta):
            return meta
        self._check_weights()
        nothing = replace(meta, loss=torch.full_like(meta.loss, torch.nan))
        # Side by side losses are summed, so whose it was is found one by one; that is paid for only when it happens.
        alone = [of([episode]) for episode in episodes]
        found = [
            find_divergence(episode, own.support.cpu().numpy(), bool(own.loss.isfinite()))
            for episode, own in zip(episodes, alone, strict=True)
        ]
        diverged = [one for one in found if one is not None]
        if not diverged:
            # Each alone is finite, such as with another draw of dropout: it is the batch that is passed over.
            tqdm.write(
                "[metaperser] warning: the outer loss or its gradient is not finite; it is passed over", sys.stderr
            )
            return nothing
        named = "; ".join(_some(str(one) for one in diverged))
        if self.settings.meta.on_divergence == "stop":
            raise MetaPerSERError(
                f"{named}; lower meta.inner_lr or optimizer.lr, or set meta.on_divergence: skip to train without such "
                "episodes"
            )
        tqdm.write(f"[metaperser] warning: {named}; training goes on without", file=sys.stderr)
        sound = [episode for episode, one in zip(episodes, found, strict=True) if one is None]
        return of(sound) if sound else nothing

    def _learned(self) -> list[Tensor]:
        """Give all tensors that the outer loop moves, each once."""
        trainable = self.of_upstream.trainable
        of_upstream = [] if trainable is None else [*trainable.adapted.values(), *trainable.held]
        tensors = [*self.learner.shared_tensors().values(), *self.learner.parameters(), *of_upstream]
        return list(dict.fromkeys(tensor for tensor in tensors if tensor.requires_grad))

    def _check_weights(self) -> None:
        """Stop where it is the model itself that has left the finite numbers: nothing would come of going on."""
        learned = {**self.learner.shared_tensors(), **dict(self.learner.named_parameters())}
        trainable = self.of_upstream.trainable
        if trainable is not None:
            learned |= trainable.adapted
        for name, tensor in learned.items():
            if not bool(tensor.isfinite().all()):
                raise MetaPerSERError(
                    f"the weights {name} are no longer finite: the last outer steps were too large; go on from an "
                    "earlier checkpoint (-e) with a lower runner.gradient_clipping, or begin a new training from its "
                    "weights (downstream_expert.init_from) with a lower optimizer.lr"
                )

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
        # s3prl's writer keeps for two minutes what is logged. A kill would take it, and a resumed run not log it again.
        logger.flush()

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
            divergence = None if np.isfinite(probabilities).all() else self._where_it_diverged(episode)
            if divergence is not None:
                tqdm.write(f"[metaperser] warning: {divergence}; its scores are 0", file=sys.stderr)
            records["episodes"].append(EvaluatedEpisode(episode, probabilities, scores, divergence))
        if len(prediction.support_losses):
            records["support_losses"].append((len(batch), prediction.support_losses))

    def _where_it_diverged(self, episode: Episode) -> Divergence | None:
        """Adapt to a failed episode alone: among others it cannot be told whose loss it was that left the numbers."""
        alone = self.system.predict(self.learner, self.features, [episode])
        return find_divergence(episode, alone.support_losses, is_finite_after=False)

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
            state = "dev-best.ckpt" if selects else f"states-{global_step}.ckpt"
            weights = self._weights_in_training(state) if training else self._evaluated
            path = self.report.write(split, evaluated, weights)
            if self._tuning is not None:
                self.report.write_tuning(self._tuning, self.split.fold)
            line += f"  → {path}"
        tqdm.write(line)
        logger.flush()
        return dev_score


def _is_finite(meta: MetaLoss) -> bool:
    return bool(meta.loss.isfinite()) and bool(meta.support.isfinite().all())


def _some(names: Any, most: int = 8) -> list[str]:
    listed = list(names)
    return [*listed[:most], f"… {len(listed) - most} more"] if len(listed) > most else listed
