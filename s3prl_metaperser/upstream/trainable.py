"""An upstream as a function of its parameters: what scope ``entire`` adapts, in chunks, with what is constant kept.

Of the upstream's tensors, those that reach the features are adapted by the inner loop, except for those that are
``frozen`` (no loop trains them) or ``not_adapted`` (the outer loop does); the rest stays as it is. A module whose
tensors are all frozen and that comes before everything trained, such as the convolutional front end, gives a clip the
same output at every inner step; it runs once for a chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from s3prl_metaperser.dropout import seed_dropout
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.model import pool_frames
from s3prl_metaperser.settings import SECTION, EntireSettings
from s3prl_metaperser.upstream.exact_weight_norm import ExactWeightNorm
from s3prl_metaperser.upstream.pooling import SAMPLE_RATE, PooledUpstream, evaluating, undisturbed

PREFIX = "upstream."
"""Of the upstream's tensors among the adapted parameters."""
FRONT_END = "feature_extractor"
"""What all of s3prl's and transformers' speech models call their convolutional front end."""
PROBE_SAMPLES = SAMPLE_RATE


@dataclass(frozen=True)
class Chunk:
    """Clips that go through the upstream together.

    Attributes:
        rows: their places among the clips that were asked for.
        wavs: (samples,) each, on the upstream's device.
        constants: what the modules before everything trained gave for them, by (module, call), once they have run.
    """

    rows: list[int]
    wavs: list[Tensor]
    constants: dict[tuple[str, int], Any] = field(default_factory=dict)


class TrainableUpstream:
    """The runner's upstream, to be adapted and meta-learned.

    Args:
        pooled: the upstream and how its frames are pooled.
        settings: what stays as it is, and how much audio goes through at once.

    Raises:
        MetaPerSERError: when there is nothing in it to adapt, or a pattern names none of its tensors.
    """

    def __init__(self, pooled: PooledUpstream, settings: EntireSettings) -> None:
        self.pooled = pooled
        self.chunk_seconds = settings.chunk_seconds
        self._weight_normed = [
            (module, hook.name)
            for module in pooled.upstream.modules()
            for hook in module._forward_pre_hooks.values()
            if isinstance(hook, WeightNorm)
        ]
        self.aliases = _aliases(pooled.upstream)
        self._is_recurrent = any(isinstance(module, nn.RNNBase) for module in pooled.upstream.modules())
        self._is_own_pass = False
        self._runners_pass = ExitStack()
        pooled.upstream.register_forward_pre_hook(self._before_a_pass)
        pooled.upstream.register_forward_hook(self._after_a_pass)
        parameters = dict(pooled.upstream.named_parameters())
        if not parameters:
            raise MetaPerSERError(
                f"config key '{SECTION}.scope' has the value 'entire', but {pooled.name} has no parameters that could "
                "adapt; use scope linear or head without -f, or another upstream"
            )
        front_end = [f"*{FRONT_END}.*"] if any(f"{FRONT_END}." in name for name in parameters) else []
        frozen = _matching(parameters, front_end if settings.frozen is None else settings.frozen, "frozen")
        not_adapted = _matching(parameters, settings.not_adapted, "not_adapted") - frozen
        for name in frozen:
            parameters[name].requires_grad_(False)
        reached, before_all = self._probe(parameters, frozen)
        for name in parameters.keys() - set(reached):
            # Such as the embedding of a mask that only training puts on: DDP stops on a gradient that the runner's own
            # pass does not give.
            parameters[name].requires_grad_(False)
        self.adapted = {f"{PREFIX}{name}": parameters[name] for name in reached if name not in not_adapted}
        self.held = [parameters[name] for name in reached if name in not_adapted]
        self._constant_modules = before_all
        if not reached:
            raise MetaPerSERError(
                f"config key '{SECTION}.scope' has the value 'entire', but no trainable parameter of {pooled.name} "
                "reaches the features; use scope linear or head without -f, or freeze less of it"
            )

    def _before_a_pass(self, upstream: nn.Module, _: Any) -> None:
        """Keep the runner's own pass, of the silent clip, in ``eval()``, and random states as they are.

        In ``train()`` LayerDrop may leave out a layer, and then s3prl's weighted sum fails.
        """
        if not self._is_own_pass:
            upstream.eval()
            self._runners_pass.enter_context(undisturbed())

    def _after_a_pass(self, _: nn.Module, __: Any, ___: Any) -> None:
        self._runners_pass.close()

    @contextmanager
    def _own_pass(self) -> Iterator[None]:
        before, self._is_own_pass = self._is_own_pass, True
        try:
            yield
        finally:
            self._is_own_pass = before

    def _probe(self, parameters: dict[str, nn.Parameter], frozen: set[str]) -> tuple[list[str], dict[str, nn.Module]]:
        """Find the trainable tensors that reach the features, and the frozen modules that come before all of them."""
        upstream, fed_by_trained = self.pooled.upstream, set()
        with ExitStack() as hooks:
            frozen_modules = _wholly_frozen(upstream, frozen)
            for name, module in frozen_modules.items():

                def note(_: nn.Module, *given: Any, name: str = name) -> None:
                    # fairseq's layers call their self-attention by keyword.
                    if any(isinstance(one, Tensor) and one.requires_grad for one in tree_leaves(given)):
                        fed_by_trained.add(name)

                hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
            rng = torch.Generator().manual_seed(0)
            probe = (0.1 * torch.randn(PROBE_SAMPLES, generator=rng)).to(self.pooled.device)
            like = next(iter(parameters.values()))
            probe = probe.to(like.dtype)
            with torch.enable_grad(), evaluating(upstream), undisturbed(), self._own_pass():
                total = sum(frames.square().sum() for frames in self.pooled.frames([probe]))
        trainable = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
        if not (isinstance(total, Tensor) and total.requires_grad and trainable):
            return [], {}
        gradients = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
        # VGGish rounds its output: there every gradient is there, and zero.
        reached = [name for name, own in zip(trainable, gradients, strict=True) if own is not None and own.any()]
        return reached, {name: module for name, module in frozen_modules.items() if name not in fed_by_trained}

    def chunks(self, wavs: Sequence[Tensor]) -> list[Chunk]:
        """Plan which clips go through the upstream together.

        Args:
            wavs: (samples,) each, 16 kHz.
        """
        on_device = [wav.to(self.pooled.device) for wav in wavs]
        plan = self.pooled.batches([len(wav) for wav in wavs], self.chunk_seconds)
        return [Chunk(rows, [on_device[row] for row in rows]) for rows in plan]

    def statistics(self, chunk: Chunk, params: dict[str, Tensor] | None = None) -> Tensor:
        """Run the upstream with these parameters in place of its own: no dropout, no layer left out.

        Args:
            chunk: the clips.
            params: tensors by name, with their prefix; those of other modules are passed over. None: the own.

        Returns:
            (clips, S, dim) statistics, with their graph where gradients are enabled.
        """
        with evaluating(self.pooled.upstream), undisturbed(), self._recalling(chunk.constants):
            return self._pooled(chunk.wavs, params or {})

    def gathered(self, wavs: Sequence[Tensor], dropout_seed: int | None = None) -> Tensor:
        """Run the upstream as it stands; where gradients are enabled, differentiable with one chunk's graph at a time.

        Args:
            wavs: (samples,) each.
            dropout_seed: of the dropout to train with; None: no dropout. LayerDrop is off in any case: the weighted sum
                needs every layer.

        Returns:
            (clips, S, dim) statistics, in the order of ``wavs``.
        """
        chunks = self.chunks(wavs)
        given: list[Tensor] = []
        for number, chunk in enumerate(chunks):
            run = self._forward_of(chunk, None if dropout_seed is None else dropout_seed + number)
            if len(chunks) == 1 or not torch.is_grad_enabled():
                given.append(run())
            else:
                given.append(checkpoint(run, use_reentrant=False, preserve_rng_state=False))
        order = torch.tensor([row for chunk in chunks for row in chunk.rows], device=self.pooled.device)
        return torch.cat(given)[order.argsort()]

    def _forward_of(self, chunk: Chunk, dropout_seed: int | None) -> Callable[[], Tensor]:
        """Make a forward pass that can be made again, as checkpointing needs, with the same dropout."""
        if dropout_seed is None:
            return lambda: self.statistics(chunk)

        def run() -> Tensor:
            training = _training_every_layer(self.pooled.upstream, self._constant_modules)
            with training, undisturbed(), self._recalling(chunk.constants):
                seed_dropout(dropout_seed, self.pooled.device)
                np.random.seed(dropout_seed % 2**32)
                return self._pooled(chunk.wavs, {})

        return run

    def _pooled(self, wavs: list[Tensor], params: dict[str, Tensor]) -> Tensor:
        own = {name.removeprefix(PREFIX): tensor for name, tensor in params.items() if name.startswith(PREFIX)}
        swapped = {alias: tensor for name, tensor in own.items() for alias in self.aliases[name]}

        def forward(given: list[Tensor]) -> Any:
            return functional_call(self.pooled.upstream, swapped, (given,), tie_weights=False)

        # cuDNN's recurrent layers have no double backward, and none at all in eval().
        cudnn = torch.backends.cudnn.flags(enabled=False) if self._is_recurrent else nullcontext()
        with self._own_pass(), ExactWeightNorm(), cudnn:
            frames = self.pooled.frames(wavs, forward)
        for module, name in self._weight_normed:
            # The hook leaves its product on the module, and with it the graph of all inner steps before this one.
            setattr(module, name, getattr(module, name).detach())
        return torch.stack([pool_frames(one, self.pooled.pooling) for one in frames])

    @contextmanager
    def _recalling(self, constants: dict[tuple[str, int], Any]) -> Iterator[None]:
        """Let each module before everything trained run only once for a chunk, and then give what it gave."""
        calls: Counter[str] = Counter()

        def recall(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                key = name, calls[name]
                calls[name] += 1
                if key not in constants:
                    constants[key] = forward(*args, **kwargs)
                return constants[key]

            return call

        patched = [(module, vars(module).get("forward")) for module in self._constant_modules.values()]
        for name, module in self._constant_modules.items():
            module.forward = recall(name, module.forward)
        try:
            yield
        finally:
            for module, own in patched:
                if own is None:
                    del module.forward
                else:
                    module.forward = own


def _aliases(upstream: nn.Module) -> dict[str, list[str]]:
    """Give, for each tensor, all places that hold it, each module once: AudioALBERT uses its layers several times.

    ``functional_call`` would find such places itself, but swaps a module that stands in several of them several times,
    and then puts back what it had swapped in.
    """
    places: dict[int, list[str]] = {}
    for path, module in upstream.named_modules():
        for own, tensor in module.named_parameters(recurse=False):
            places.setdefault(id(tensor), []).append(f"{path}.{own}" if path else own)
    return {name: places[id(tensor)] for name, tensor in upstream.named_parameters()}


def _matching(parameters: dict[str, nn.Parameter], patterns: Sequence[str], key: str) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        own = {name for name in parameters if fnmatchcase(name, pattern)}
        if not own:
            raise MetaPerSERError(
                f"config key '{SECTION}.entire.{key}' has the pattern {pattern!r}, which matches none of the "
                f"upstream's {len(parameters)} tensors; expected a whole name such as '{next(iter(parameters))}', or "
                "'*PART*'"
            )
        matched |= own
    return matched


def _wholly_frozen(upstream: nn.Module, frozen: set[str]) -> dict[str, nn.Module]:
    """Give the outermost modules that have tensors, all of them frozen."""
    found: dict[str, nn.Module] = {}
    for name, module in upstream.named_modules():
        inner = [f"{name}.{own}" if name else own for own, _ in module.named_parameters()]
        within = any(name.startswith(f"{outer}.") for outer in found)
        if name and inner and not within and frozen.issuperset(inner):
            found[name] = module
    return found


@contextmanager
def _training_every_layer(upstream: nn.Module, constant_modules: dict[str, nn.Module]) -> Iterator[None]:
    """Put an upstream in ``train()`` for a while, without LayerDrop, and what no loop trains in ``eval()``.

    Batch norm stays in ``eval()`` too: in ``train()`` a clip's features would depend on its batch-mates.
    """
    training = {module: module.training for module in upstream.modules()}
    # fairseq's encoders hold their share of dropped layers themselves, transformers' in their config.
    holders: list[Any] = [holder for module in training for holder in (module, getattr(module, "config", None))]
    shares: dict[int, tuple[Any, float]] = {
        id(holder): (holder, float(holder.layerdrop)) for holder in holders if _has_layerdrop(holder)
    }
    upstream.train()
    batch_norms = [module for module in training if isinstance(module, _BatchNorm)]
    for module in (*constant_modules.values(), *batch_norms):
        module.eval()
    for holder, _ in shares.values():
        holder.layerdrop = 0.0
    try:
        yield
    finally:
        for holder, share in shares.values():
            holder.layerdrop = share
        for module, mode in training.items():
            module.training = mode


def _has_layerdrop(holder: Any) -> bool:
    return isinstance(getattr(holder, "layerdrop", None), float | int)
