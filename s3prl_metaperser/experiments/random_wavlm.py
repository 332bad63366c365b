"""A small WavLM with random weights, to run everything that an upstream takes part in, quickly and without a download.

The architecture is the published base model's: seven convolutions with group norm, so 320 samples a frame and features
that padding changes; relative positions with gates; layers that LayerDrop may leave out. It has fewer channels and
layers. It has learned nothing about speech.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from s3prl_metaperser.atomic import replacing

SIZES: dict[str, Any] = {
    "encoder_layers": 3,
    "encoder_embed_dim": 64,
    "encoder_ffn_embed_dim": 128,
    "encoder_attention_heads": 4,
    "conv_feature_layers": "[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)] * 2",
    "conv_pos": 32,
    "conv_pos_groups": 4,
}
"""What differs from WavLM base: 12 layers of 768 behind convolutions of 512, 95 million parameters against 0.2."""
AS_PUBLISHED: dict[str, Any] = {
    "encoder_layerdrop": 0.05,
    "relative_position_embedding": True,
    "max_distance": 800,
    "gru_rel_pos": True,
}
"""Switches of WavLM base that s3prl's class does not have by default."""


def write_random_wavlm(path: Path, seed: int) -> int:
    """Write the checkpoint that s3prl reads with ``-u wavlm_local -k PATH``.

    Args:
        path: of the file.
        seed: of the weights.

    Returns:
        The number of parameters.
    """
    from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

    config = WavLMConfig({**SIZES, **AS_PUBLISHED})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Of torch's about the weight norm that WavLM is built with.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        model = WavLM(config)
    with replacing(path) as temporary:
        torch.save({"cfg": vars(config), "model": model.state_dict()}, temporary)
    return sum(parameter.numel() for parameter in model.parameters())
