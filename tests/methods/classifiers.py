"""Tiny classifiers of transformers with a head of several parts, as people prepare and wrap them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny_encoders import TINY, make_input
from torch import nn

CLASSES = {
    "wav2vec2": "Wav2Vec2ForSequenceClassification",
    "whisper": "WhisperForAudioClassification",
    "bert": "BertForSequenceClassification",
}
#: The names of their heads.
HEADS = {
    "wav2vec2": {"projector", "classifier", "layer_weights"},
    "whisper": {"projector", "classifier", "layer_weights"},
    "bert": {"classifier"},
}


def build_classifier(model_type: str = "wav2vec2", **changes: Any) -> Any:
    """In eval mode, without anything random in training."""
    tiny = TINY[model_type]
    steady = {
        "wav2vec2": {
            "layerdrop": 0.0,
            "mask_time_prob": 0.0,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "feat_proj_dropout": 0.0,
            "final_dropout": 0.0,
            "use_weighted_layer_sum": True,
            "classifier_proj_size": 8,
        },
        "whisper": {
            "encoder_layerdrop": 0.0,
            "dropout": 0.0,
            "use_weighted_layer_sum": True,
            "classifier_proj_size": 8,
        },
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    }[model_type]
    torch.manual_seed(0)
    config = getattr(transformers, tiny.config_class)(
        **{**tiny.options, **steady, "num_labels": 3, **changes}
    )
    return getattr(transformers, CLASSES[model_type])(config).eval()


def logits(model: nn.Module, model_type: str = "wav2vec2") -> torch.Tensor:
    return model(make_input(model_type)).logits
