"""Load a pretrained speech model, and refuse a checkpoint whose encoder is not complete."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from mmtransfer.data import DataError
from mmtransfer.model_files import find_fault

from .encoder import Encoder
from .folders import find_misfit
from .precision import find_dtype

# Weights that a checkpoint may lack: they serve pre-training only.
_UNUSED_WEIGHTS = ("masked_spec_embed",)


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    kind: Any = AutoModel,
    speech: bool = True,
) -> nn.Module:
    """A speech model from a folder or the hub, in eval mode.

    transformers itself would take over the precision that the weights were stored in, and fill those that a
    checkpoint lacks with random numbers.

    Args:
        source: a folder, or a name on the hub.
        dtype: of the weights, whatever they were stored in. float16 is for frozen encoders: nothing trains
            float16 weights.
        kind: the loader of transformers: `AutoModelForCTC` for a model with its head.
        speech: refuse models of text. Without it they are taken, for their layers: weights behind these may
            be missing.

    Raises:
        DataError: no model can be loaded, or its encoder is not complete.
        ValueError: `dtype` is none of float32, bfloat16, float16, float64.
    """
    dtype = find_dtype(dtype)
    named = "speech model" if speech else "model"
    folder = Path(source).expanduser()
    if folder.is_dir() and (fault := find_fault(folder)) is not None:
        raise DataError(f"{folder} cannot be loaded: {fault}; it must be the folder of a {named}")
    if not folder.is_dir() and (folder.is_absolute() or str(source).startswith((".", "~"))):
        raise DataError(f"{folder} does not exist; give the folder or the hub name of a {named}")
    # The model's configuration remembers where it is from; a relative path would mislead other programs.
    place = str(folder.resolve()) if folder.is_dir() else str(source)
    try:
        with quiet_transformers():
            model, report = kind.from_pretrained(
                place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:
        # Loaders of several libraries are behind this call; each has its own exceptions.
        reason = " ".join(str(error).split())[:300].removesuffix(".")
        raise DataError(
            f"no model can be loaded from {source} ({reason}); give the folder of a transformers {named} "
            "with its weights, or the name of one on the hub"
        ) from error
    _check_encoder(model, source, report, whole=kind is not AutoModel, speech=speech)
    # Composite models may hold parts that keep a dtype of their own.
    return model.to(dtype).eval()


def _check_encoder(
    model: nn.Module, source: str | Path, report: dict[str, Any], *, whole: bool, speech: bool
) -> None:
    try:
        encoder = Encoder(model)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source} cannot be used: {error}") from error
    if speech and encoder.description.main_input == "input_ids":
        raise DataError(f"{source} is a text model; give a speech model, such as Whisper or wav2vec2")
    if (misfit := find_misfit(encoder, model, report)) is not None:
        raise DataError(f"{source} cannot be used: {misfit}; give a complete checkpoint")
    prefix = "" if whole else next(name for name, module in model.named_modules() if module is encoder.model)
    behind = () if speech else tuple(f"{part}." for part in encoder.description.behind_layers)
    missing = [
        key
        for key in sorted(report["missing_keys"])
        if key.startswith(prefix) and not key.endswith(_UNUSED_WEIGHTS) and not key.startswith(behind)
    ]
    if missing:
        raise DataError(
            f"{source} lacks {len(missing)} weights of the {'model' if whole else 'encoder'} "
            f"({', '.join(missing[:2])}, ...); "
            "give a complete checkpoint"
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings while a model is loaded; its report is checked instead."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.set_verbosity(logging.ERROR)
        transformers_logging.disable_progress_bar()
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
