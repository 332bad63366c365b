"""The contract with s3prl's runner: what comes in, in which container, on which device, and what may go out.

The runner makes one :class:`DownstreamExpert`, asks it for dataloaders, calls it on every batch and lets it log. What
is learned is in ``learner.py``, what is compared in ``systems.py``, who is learned from in ``episodes.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import is_initialized
from torch.utils.data import DataLoader

from s3prl_metaperser.audio import read_audio
from s3prl_metaperser.checkpoints import DOWNSTREAM, FEATURIZER, UPSTREAM, weights_fit
from s3prl_metaperser.datasets import Batch
from s3prl_metaperser.distributed import keep_buffers_apart, nothing_of, own_share
from s3prl_metaperser.errors import MetaPerSERError, exits_on_bad_input
from s3prl_metaperser.inference import Inference
from s3prl_metaperser.metrics import decide
from s3prl_metaperser.network import Network
from s3prl_metaperser.run import Run
from s3prl_metaperser.upstream.binding import catch_upstream_and_featurizer, modules_of_the_calling_runner


class DownstreamExpert(nn.Module):
    """Listener-personalised emotion recognition as an s3prl downstream.

    Args:
        upstream_dim: feature dimension of the upstream.
        upstream_rate: samples a frame; not needed, features are pooled over frames.
        downstream_expert: the config section of that name; see ``settings.py``.
        expdir: folder for everything this run writes.
        **kwargs: every command-line argument of ``run_downstream.py`` and every other section of the config. Used:
            ``runner``, ``mode``, ``seed``, ``device``, ``downstream_variant``, ``init_ckpt``, ``upstream``,
            ``upstream_model_config``, ``upstream_trainable``.
    """

    best_score: Tensor
    batches_seen: Tensor

    @exits_on_bad_input
    def __init__(
        self,
        upstream_dim: int,
        upstream_rate: int,
        expdir: str,
        downstream_expert: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.network: Network
        if kwargs["mode"] == "inference":
            self.network = Inference(downstream_expert, upstream_dim, kwargs)
        else:
            self.network = Run(downstream_expert, upstream_dim, Path(expdir), kwargs)
            self.run.announce()
        self.learner = self.network.learner
        self.register_buffer("best_score", torch.tensor(-1.0))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.long))
        self.is_bound = False
        keep_buffers_apart(self)
        self._initial = self.network.initial_checkpoint()
        if self._initial is not None:
            self.network.load_initial_weights(self._initial[DOWNSTREAM])
        modules = modules_of_the_calling_runner() if self.network.is_entire else None
        if modules is not None:
            self._bind(*modules, torch.device(kwargs["device"]))
        else:
            catch_upstream_and_featurizer(self)
        if kwargs["mode"] == "train":
            self.run.hold_folder()

    @property
    def run(self) -> Run:
        """The run that trains or is judged."""
        if not isinstance(self.network, Run):
            raise TypeError("-m inference has no corpus to train or to be judged on")
        return self.network

    @exits_on_bad_input
    def bind(self, upstream: nn.Module, featurizer: nn.Module) -> None:
        """Take the runner's own upstream and featurizer, unwrapped from DDP, before the first batch arrives.

        Called by a forward pre-hook, or by a runner that knows this method. References are kept out of this module's
        own submodules: the runner saves and optimises them already.

        Args:
            upstream: s3prl upstream, on the run's device.
            featurizer: s3prl ``Featurizer``, on the run's device.
        """
        if not self.is_bound:
            self._bind(upstream, featurizer, self.best_score.device)

    def _bind(self, upstream: nn.Module, featurizer: nn.Module, device: torch.device) -> None:
        self.is_bound = True
        initial, self._initial = self._initial or {}, None
        for name, module in ((UPSTREAM, upstream), (FEATURIZER, featurizer)):
            if initial.get(name):
                with weights_fit(f"the checkpoint that training starts from: its {name}"):
                    module.load_state_dict(initial[name])
        self.network.of_upstream.bind(upstream, featurizer, device)

    @exits_on_bad_input
    def get_dataloader(self, split: str, epoch: int = 0) -> DataLoader[Any]:
        """Give the batches of a split.

        Args:
            split: ``train``, ``dev`` or ``test``.
            epoch: s3prl's count; not used, since the position in training is kept in ``batches_seen``.

        Returns:
            A dataloader of ``([silent clip], batch)``: one (samples,) float tensor on CPU at 16 kHz, and the utterance
            ids and targets of the batch (``datasets.py``).
        """
        batches = self.run.dataloader(split, int(self.batches_seen))
        if split == "train" and len(batches) == 0 and own_share().rank > 0:
            # s3prl counts steps on rank 0 only: the other processes would go on asking for batches for ever.
            sys.exit()
        return batches

    @exits_on_bad_input
    def forward(
        self, split: str, features: list[Tensor], batch: Batch, records: dict[str, list[Any]], **kwargs: Any
    ) -> Tensor:
        """Compute one batch.

        Args:
            split: ``train`` inside the training loop, ``dev`` or ``test`` inside evaluation (under ``no_grad``).
            features: the silent clip's (frames, dim) on the run's device; not used, except that DDP waits for them.
            batch: a minibatch of SSL-E or Multi-Few, or a list of episodes; on CPU.
            records: lists that :meth:`log_records` gets back.
            **kwargs: ``batch_id`` during evaluation.

        Returns:
            The scalar loss to differentiate while training, zero during evaluation.
        """
        if split == "train":
            loss = self.run.training_loss(batch, int(self.batches_seen), records)
            if is_initialized():
                loss = loss + nothing_of(features)
            self.batches_seen += 1
            return loss
        self.run.evaluate(split, batch, records)
        return self.best_score.new_zeros(())

    @exits_on_bad_input
    def log_records(
        self,
        split: str,
        records: dict[str, list[Any]],
        logger: Any,
        global_step: int,
        batch_ids: list[int],
        total_batch_num: int,
        **kwargs: Any,
    ) -> list[str]:
        """Log ``log_step`` training batches, or one whole evaluation.

        Args:
            split: ``train``, ``dev`` or ``test``.
            records: what :meth:`forward` appended.
            logger: TensorBoard ``SummaryWriter``; keys are ``metaperser/{split}-{name}``.
            global_step: the optimizer's step; 0 outside training.
            batch_ids: not used.
            total_batch_num: not used.

        Returns:
            File names under which the runner saves a checkpoint: ``dev-best.ckpt`` when dev got better.
        """
        if split == "train":
            self.run.log_training(records, logger, global_step)
            return []
        dev_score = self.run.log_evaluation(split, records, logger, global_step, float(self.best_score))
        if dev_score is None or dev_score <= float(self.best_score):
            return []
        self.best_score.fill_(dev_score)
        return ["dev-best.ckpt"]

    @exits_on_bad_input
    def load_audio(self, filepath: Path) -> Tensor:
        """Read the file of ``-m inference -t FILE``: (samples,) at 16 kHz, on CPU."""
        self._wav = read_audio(filepath)
        return self._wav

    @exits_on_bad_input
    def inference(self, features: list[Tensor], filenames: list[str]) -> None:
        """Print what the shared model hears in one clip, as a line of JSON.

        Args:
            features: the clip's weighted sum, one (frames, dim) tensor; not used, since standardisation comes before
                the weighted sum.
            filenames: its name.
        """
        if not isinstance(self.network, Inference):
            raise TypeError("inference is of -m inference")
        emotions, probabilities = self.network.emotions, self.network.hear([self._wav])[0]
        if not np.isfinite(probabilities).all():
            raise MetaPerSERError(f"{filenames[0]}: what is heard in it is not finite; expected samples from -1 to 1")
        decided = decide(probabilities[None])[0]
        heard = {
            "utterance": filenames[0],
            "emotions": [emotion for emotion, is_heard in zip(emotions, decided, strict=True) if is_heard],
            "probabilities": dict(zip(emotions, probabilities.astype(float).round(8).tolist(), strict=True)),
        }
        print(json.dumps(heard))

    def get_extra_state(self) -> dict[str, Any]:
        """Give what the weights only make sense with; saved with them."""
        return self.network.saved_state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Accept what :meth:`load_state_dict` has checked."""

    @exits_on_bad_input
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load this run's own kind of weights, or refuse by name those of another upstream or emotion set."""
        fitting = self.network.fitting(state_dict)
        with weights_fit(f"checkpoint {self.network.arguments.get('init_ckpt')}: its {DOWNSTREAM}"):
            return super().load_state_dict(fitting, strict=strict, assign=assign)
