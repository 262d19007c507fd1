"""Small random models of transformers' audio classes, and inputs for them."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import torch
import transformers
from torch import Tensor, nn

LAYERS = 4  # three transformer layers and their input
HIDDEN = 32
BATCH = 2
LABELS = 3
RELEASE = tuple(int(number) for number in transformers.__version__.split(".")[:2])

_ENCODER = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS - 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "classifier_proj_size": 16,
    "num_labels": LABELS,
    "use_weighted_layer_sum": True,
    "layerdrop": 0.0,
    "tdnn_dim": (16, 16),
    "tdnn_kernel": (3, 1),
    "tdnn_dilation": (1, 1),
    "xvector_output_dim": 12,
    "apply_spec_augment": False,
    **{
        f"{name}_dropout": 0.0
        for name in ("hidden", "attention", "activation", "feat_proj", "final", "conformer_conv")
    },
}
_WAVEFORM = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
}
_SQUEEZED = {"squeeze_factor": 2, "feat_extract_norm": "group"}
_FAMILIES: dict[str, dict[str, Any]] = {
    "Wav2Vec2": _WAVEFORM,
    "Wav2Vec2Conformer": _WAVEFORM,
    "Hubert": _WAVEFORM,
    "WavLM": {**_WAVEFORM, "num_buckets": 8, "max_bucket_distance": 16},
    "UniSpeech": _WAVEFORM,
    "UniSpeechSat": _WAVEFORM,
    "Data2VecAudio": {**_WAVEFORM, "conv_pos_kernel_size": 3},
    "SEW": {**_WAVEFORM, **_SQUEEZED},
    "SEWD": {**_WAVEFORM, **_SQUEEZED, "position_buckets": 8, "max_position_embeddings": 64},
    "Wav2Vec2Bert": {"feature_projection_input_dim": 12, "left_max_position_embeddings": 4},
    "Whisper": {
        "d_model": HIDDEN,
        "encoder_layers": LAYERS - 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "encoder_layerdrop": 0.0,
        "num_mel_bins": 8,
        "max_source_positions": 20,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "vocab_size": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "dropout": 0.0,
    },
}


def classes_with_weighted_sum() -> list[str]:
    """Names of all classes of the installed transformers whose forward sums layers by ``layer_weights``."""
    models = pathlib.Path(transformers.__file__).parent / "models"
    classes = (
        body
        for file in sorted(models.glob("*/modeling_*.py"))
        if not file.name.startswith(("modeling_tf_", "modeling_flax_"))
        for body in re.split(r"^class ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    )
    return [body[: body.index("(")] for body in classes if "softmax(self.layer_weights" in body]


CLASS_NAMES = classes_with_weighted_sum()


def make_model(class_name: str, **overrides: Any) -> nn.Module:
    """A fresh model with random layer weights; the same parameters at every call."""
    family = class_name.split("For")[0]
    config_class = getattr(transformers, f"{family}Config")
    settings = {**_ENCODER, **_FAMILIES[family], **overrides}
    if family == "Whisper":
        settings = {k: v for k, v in settings.items() if k not in ("hidden_size", "num_attention_heads")}
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, class_name)(config_class(**settings))
    if hasattr(model, "layer_weights"):
        nn.init.normal_(model.layer_weights)
    return model


def make_inputs(class_name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs with labels; two utterances, one of them padded where the model takes a mask."""
    generator = torch.Generator().manual_seed(1)
    if class_name.startswith("Whisper"):
        inputs = {"input_features": torch.randn(BATCH, 8, 40, generator=generator, dtype=dtype)}
        frames = 20
    else:
        featured = class_name.startswith("Wav2Vec2Bert")
        shape = (BATCH, 30, 12) if featured else (BATCH, 400)
        inputs = {"input_features" if featured else "input_values": torch.randn(shape, generator=generator)}
        inputs = {name: value.to(dtype) for name, value in inputs.items()}
        mask = torch.ones(shape[:2], dtype=torch.long)
        mask[1, shape[1] * 2 // 3 :] = 0
        if not class_name.startswith("SEW") or RELEASE >= (5, 16):
            # SEW of earlier releases fails with a mask.
            inputs["attention_mask"] = mask
        frames = 30 if featured else 39
    if "AudioFrame" in class_name:
        labels = torch.randint(LABELS, (BATCH, frames), generator=generator)
        inputs["labels"] = nn.functional.one_hot(labels, LABELS)
    elif class_name.endswith("ForCTC"):
        inputs["labels"] = torch.tensor([[3, 4, 4], [5, -100, -100]])
    else:
        inputs["labels"] = torch.tensor([0, LABELS - 1])
    return inputs
