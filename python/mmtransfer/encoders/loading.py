"""Load a pretrained speech model, and refuse a checkpoint whose encoder is not complete."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from mmtransfer.data import DataError

from .encoder import Encoder
from .folders import find_fault, find_misfit

# Weights that a checkpoint may lack: they serve pre-training only.
_UNUSED_WEIGHTS = ("masked_spec_embed",)


def load_model(source: str | Path) -> nn.Module:
    """A speech model from a folder or the hub, in eval mode; DataError unless its encoder is complete.

    transformers itself would fill weights that a checkpoint lacks with random numbers.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and (fault := find_fault(folder)) is not None:
        raise DataError(f"{folder} cannot be loaded: {fault}; it must be the folder of a speech model")
    if not folder.is_dir() and (folder.is_absolute() or str(source).startswith((".", "~"))):
        raise DataError(f"{folder} does not exist; give the folder or the hub name of a speech model")
    try:
        with _quiet_transformers():
            model, report = AutoModel.from_pretrained(
                str(source), output_loading_info=True, ignore_mismatched_sizes=True
            )
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
        encoder = Encoder(model)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source} cannot be used: {error}") from error
    if encoder.description.main_input == "input_ids":
        raise DataError(f"{source} is a text model; give a speech model, such as Whisper or wav2vec2")
    if (misfit := find_misfit(encoder, model, report)) is not None:
        raise DataError(f"{source} cannot be used: {misfit}; give a complete checkpoint")
    prefix = next(name for name, module in model.named_modules() if module is encoder.model)
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


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings while a model is loaded; its report is checked instead."""
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
