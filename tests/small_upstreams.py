"""Small upstreams: s3prl's own architectures with random weights, in the files that its ``-u NAME -k CKPT`` reads.

Two transformer layers of 32 dimensions behind the seven convolutions of wav2vec 2.0, so 320 samples a frame as in the
published models, whose switches (norms, LayerDrop, normalised input, masking) they keep: these are what differs.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

LAYERS, DIM = 2, 32
ENCODER = {
    "encoder_layers": LAYERS,
    "encoder_embed_dim": DIM,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 2,
    "encoder_layerdrop": 0.5,
    "conv_feature_layers": "[(16,10,5)] + [(16,3,2)]*4 + [(16,2,2)]*2",
    "conv_pos": 16,
    "conv_pos_groups": 2,
}
"""The names are fairseq's, which s3prl's own copies of the architectures keep."""


def write_upstream(name: str, folder: Path) -> Path:
    """Write a checkpoint for the upstream of this name in s3prl's hub; give what ``-k`` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WRITERS[name](folder)


def _wavlm(folder: Path) -> Path:
    from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

    config = WavLMConfig({**ENCODER, "relative_position_embedding": True, "gru_rel_pos": True})
    return _saved({"cfg": vars(config), "model": WavLM(config).state_dict()}, folder)


def _unispeech_sat(folder: Path) -> Path:
    from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

    config = WavLMConfig({**ENCODER, "relative_position_embedding": False, "gru_rel_pos": False})
    return _saved({"cfg": vars(config), "model": WavLM(config).state_dict()}, folder)


def _wav2vec2(folder: Path) -> Path:
    """With the quantiser that pre-training needs and whose parameters no feature depends on."""
    from s3prl.upstream.wav2vec2.wav2vec2_model import AudioPretrainingConfig, Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(**ENCODER, quantize_targets=True, latent_vars=8, final_dim=16)
    return _converted(Wav2Vec2Model(config), config, AudioPretrainingConfig(), folder)


def _hubert(folder: Path) -> Path:
    from s3prl.upstream.hubert.hubert_model import HubertConfig, HubertModel, HubertPretrainingConfig

    config, task = HubertConfig(label_rate=50, **ENCODER, final_dim=16), HubertPretrainingConfig()
    symbols = [[str(cluster) for cluster in range(10)]]
    return _converted(HubertModel(config, task, symbols), config, task, folder, dictionaries_symbols=symbols)


def _data2vec(folder: Path) -> Path:
    """Layer norm in every convolution and clips brought to mean 0, deviation 1, unlike the others."""
    from s3prl.upstream.data2vec.data2vec_model import Data2VecAudioConfig, Data2VecAudioModel
    from s3prl.upstream.wav2vec2.wav2vec2_model import AudioPretrainingConfig

    config = Data2VecAudioConfig(**ENCODER, extractor_mode="layer_norm", pos_conv_depth=5)
    model = Data2VecAudioModel(config)
    model.remove_pretraining_modules()
    return _converted(model, config, AudioPretrainingConfig(normalize=True), folder, teacher={"_ema": {}})


def _distiller(folder: Path) -> Path:
    """Three predictions of a teacher's layers, which count as layers, beside the encoder's own."""
    from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel

    config = {name: value for name, value in ENCODER.items() if name != "conv_feature_layers"}
    config |= {"extractor_conv_feature_layers": ENCODER["conv_feature_layers"], "feature_grad_mult": 0.1}
    config |= {"final_dim": DIM, "n_tasks": 3, "pred_layer_id": [4, 8, 12]}
    model = DistillerModel(DistillerConfig(config))
    return _saved({"Config": {"distiller": config}, "Distiller": model.state_dict()}, folder)


def _hf_wav2vec2(folder: Path) -> Path:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return _pretrained(Wav2Vec2Model(Wav2Vec2Config(**HUGGING_FACE)), folder)


def _hf_hubert(folder: Path) -> Path:
    from transformers import HubertConfig, HubertModel

    return _pretrained(HubertModel(HubertConfig(**HUGGING_FACE)), folder)


HUGGING_FACE = {
    "num_hidden_layers": LAYERS,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "layerdrop": 0.5,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
"""The same size in the names of Hugging Face's transformers."""

WRITERS: dict[str, Callable[[Path], Path]] = {
    "wav2vec2_local": _wav2vec2,
    "hubert_local": _hubert,
    "wavlm_local": _wavlm,
    "unispeech_sat_local": _unispeech_sat,
    "data2vec_local": _data2vec,
    "distiller_local": _distiller,
    "hf_wav2vec2_custom": _hf_wav2vec2,
    "hf_hubert_custom": _hf_hubert,
}
"""s3prl's name of an upstream → what writes its checkpoint into a folder and gives the path for ``-k``."""


def _converted(
    model: nn.Module, config: object, task: object, folder: Path, teacher: dict | None = None, **more: object
) -> Path:
    """The format of s3prl's ``convert.py``, for the architectures that come from fairseq."""
    weights = {**model.state_dict(), **(teacher or {})}
    return _saved({"task_cfg": asdict(task), "model_cfg": asdict(config), "model_weight": weights, **more}, folder)


def _saved(checkpoint: dict, folder: Path) -> Path:
    path = folder / "upstream.pt"
    torch.save(checkpoint, path)
    return path


def _pretrained(model: nn.Module, folder: Path) -> Path:
    """A folder as on Hugging Face's hub: config.json, preprocessor_config.json, weights."""
    from transformers import Wav2Vec2FeatureExtractor

    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    return folder
