"""Predictions of an adapted model for audio files, in the words of its task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmtransfer.model import AdaptedModel
from mmtransfer.training.caching import encoder_inputs
from mmtransfer.training.finite import NotFiniteError
from mmtransfer.training.settings import check_integer


@torch.no_grad()
def recognize(
    model: AdaptedModel, files: str | Path | Sequence[str | Path], *, batch_size: int = 16
) -> list[Any]:
    """The task's prediction for each audio file: the name of its class.

    Args:
        model: from `mmtransfer.load`, or with `model.audio` set; it runs where its weights are.
        files: one file, or several.
        batch_size: files at a time.

    Raises:
        ValueError: a model without a task, or one that does not know how audio becomes its input.
        DataError: a file that cannot be read.
        NotFiniteError: logits that are not finite; the file is named.
    """
    check_integer("batch_size", batch_size)
    if model.task is None:
        raise ValueError("model has no task, which makes predictions of its output; build it with one")
    if model.audio is None:
        raise ValueError("model does not know its feature extractor; set model.audio = AudioInput(extractor)")
    names = [files] if isinstance(files, (str, Path)) else list(files)
    weight = next(model.parameters())
    model.eval()
    predictions: list[Any] = []
    for start in range(0, len(names), batch_size):
        chosen = names[start : start + batch_size]
        inputs = encoder_inputs(
            model.audio.read(chosen), model.audio.extractor, model.encoder.description.main_input
        )
        output = model(**{name: tensor.to(weight.device) for name, tensor in inputs.items()})
        for file, sound in zip(chosen, model.task.sound(output.logits, output.lengths), strict=True):
            if not sound:
                raise NotFiniteError(f"the logits of {file} are not finite")
        predictions += model.task.decode(output.logits, output.lengths)
    return model.task.name_predictions(predictions)
