"""Tiny random models of every type in `mmtransfer.encoders.DESCRIPTIONS`, and inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

_TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_SPEECH = {
    **_TRANSFORMER,
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    # Both would show, if the encoder were in training mode.
    "layerdrop": 0.5,
    "mask_time_prob": 0.5,
    "mask_time_length": 2,
}
_TEXT = {**_TRANSFORMER, "vocab_size": 30, "max_position_embeddings": 40}


@dataclass(frozen=True)
class TinyModel:
    """A configuration and its model class; `with_head` wraps the same encoder with something on top."""

    config_class: str
    model_class: str
    head_class: str
    options: dict[str, Any]

    def build(self, head: bool = False, **changes: Any) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config_class)(**{**self.options, **changes})
        model = getattr(transformers, self.head_class if head else self.model_class)(config)
        # Fresh encoders are close to the identity, and fresh norms hide a norm that is left out.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model


def _wav2vec2_like(name: str, **options: Any) -> TinyModel:
    return TinyModel(
        f"{name}Config", f"{name}Model", f"{name}ForCTC", {**_SPEECH, "vocab_size": 12, **options}
    )


TINY: dict[str, TinyModel] = {
    "wav2vec2": _wav2vec2_like("Wav2Vec2", do_stable_layer_norm=True),
    "hubert": _wav2vec2_like("Hubert", do_stable_layer_norm=True),
    "wavlm": _wav2vec2_like("WavLM", do_stable_layer_norm=True, num_buckets=8, max_bucket_distance=16),
    "unispeech": _wav2vec2_like("UniSpeech", do_stable_layer_norm=True),
    "unispeech-sat": _wav2vec2_like("UniSpeechSat", do_stable_layer_norm=True),
    "data2vec-audio": _wav2vec2_like("Data2VecAudio", conv_pos_kernel_size=3),
    "wav2vec2-conformer": _wav2vec2_like("Wav2Vec2Conformer", conv_depthwise_kernel_size=3),
    "wav2vec2-bert": TinyModel(
        "Wav2Vec2BertConfig",
        "Wav2Vec2BertModel",
        "Wav2Vec2BertForCTC",
        {
            **_TRANSFORMER,
            "vocab_size": 12,
            "feature_projection_input_dim": 6,
            "conv_depthwise_kernel_size": 3,
            "layerdrop": 0.5,
            "output_hidden_size": 16,
        },
    ),
    "whisper": TinyModel(
        "WhisperConfig",
        "WhisperModel",
        "WhisperForConditionalGeneration",
        {
            "d_model": 16,
            "encoder_layers": 4,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 24,
            "num_mel_bins": 6,
            "max_source_positions": 30,
            "max_target_positions": 8,
            "vocab_size": 20,
            "encoder_layerdrop": 0.5,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
        },
    ),
    "audio-spectrogram-transformer": TinyModel(
        "ASTConfig",
        "ASTModel",
        "ASTForAudioClassification",
        {
            **_TRANSFORMER,
            "num_mel_bins": 8,
            "max_length": 20,
            "patch_size": 4,
            "frequency_stride": 2,
            "time_stride": 2,
        },
    ),
    "vit": TinyModel(
        "ViTConfig",
        "ViTModel",
        "ViTForImageClassification",
        {**_TRANSFORMER, "image_size": 12, "patch_size": 4, "num_channels": 1},
    ),
    "deit": TinyModel(
        "DeiTConfig",
        "DeiTModel",
        "DeiTForImageClassification",
        {**_TRANSFORMER, "image_size": 12, "patch_size": 4, "num_channels": 1},
    ),
    "bert": TinyModel("BertConfig", "BertModel", "BertForMaskedLM", _TEXT),
    "electra": TinyModel(
        "ElectraConfig", "ElectraModel", "ElectraForMaskedLM", {**_TEXT, "embedding_size": 12}
    ),
    "roberta": TinyModel("RobertaConfig", "RobertaModel", "RobertaForMaskedLM", _TEXT),
    "xlm-roberta": TinyModel("XLMRobertaConfig", "XLMRobertaModel", "XLMRobertaForMaskedLM", _TEXT),
    "distilbert": TinyModel(
        "DistilBertConfig",
        "DistilBertModel",
        "DistilBertForMaskedLM",
        {
            "dim": 16,
            "n_layers": 4,
            "n_heads": 2,
            "hidden_dim": 24,
            "vocab_size": 30,
            "max_position_embeddings": 40,
        },
    ),
    "gpt2": TinyModel(
        "GPT2Config",
        "GPT2Model",
        "GPT2LMHeadModel",
        {
            "n_embd": 16,
            "n_layer": 4,
            "n_head": 2,
            "n_inner": 24,
            "vocab_size": 30,
            "n_positions": 40,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}

#: The types whose input is text.
TEXT = ("bert", "electra", "roberta", "xlm-roberta", "distilbert", "gpt2")

#: The post-norm and group-norm variants of the wav2vec2 family, as their "base" checkpoints have them.
BASE_VARIANT = {"do_stable_layer_norm": False, "feat_extract_norm": "group"}


def make_input(model_type: str, batch: int = 3, size: int | None = None) -> torch.Tensor:
    """A random main input; `size` along the time axis."""
    generator = torch.Generator().manual_seed(1)
    if model_type in TEXT:
        return torch.randint(3, 30, (batch, size or 11), generator=generator)
    if model_type == "whisper":
        return torch.randn(batch, 6, size or 60, generator=generator)
    if model_type == "audio-spectrogram-transformer":
        return torch.randn(batch, 20, 8, generator=generator)
    if model_type in ("vit", "deit"):
        return torch.randn(batch, 1, 12, 12, generator=generator)
    if model_type == "wav2vec2-bert":
        return torch.randn(batch, size or 11, 6, generator=generator)
    return torch.randn(batch, size or 120, generator=generator)
