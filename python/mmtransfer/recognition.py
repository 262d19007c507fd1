"""Predictions of an adapted model for audio files, in the words of its task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmtransfer.data import DataError
from mmtransfer.data.audio import duration
from mmtransfer.model import AdaptedModel
from mmtransfer.tokens import UtteranceError
from mmtransfer.training.caching import encoder_inputs
from mmtransfer.training.finite import NotFiniteError
from mmtransfer.training.settings import check_integer

#: Files are sorted by length within groups of so many batches, so that results come soon and with little
#: padding.
_BATCHES_OF_A_GROUP = 16


def recognize(
    model: AdaptedModel, files: str | Path | Sequence[str | Path], *, batch_size: int = 16
) -> list[Any]:
    """The task's prediction for each audio file: the name of its class, or its text.

    Args:
        model: from `mmtransfer.load`, or with `model.audio` set; it runs where its weights are.
        files: one file, or several.
        batch_size: files at a time, of like length.

    Raises:
        ValueError: a model without a task, or one that does not know how audio becomes its input.
        DataError: a file that cannot be read, or is longer than the model takes.
        NotFiniteError: logits that are not finite; the file is named.
    """
    names = [files] if isinstance(files, (str, Path)) else list(files)
    found = list(recognize_each(model, names, batch_size=batch_size))
    for prediction in found:
        if isinstance(prediction, Exception):
            raise prediction
    return found


def recognize_each(
    model: AdaptedModel, files: Sequence[str | Path], *, batch_size: int = 16
) -> Iterator[Any]:
    """As `recognize`, one after the other, with the error itself for a file that raises one."""
    check_integer("batch_size", batch_size)
    if model.task is None:
        raise ValueError("model has no task, which makes predictions of its output; build it with one")
    if model.audio is None:
        raise ValueError("model does not know its feature extractor; set model.audio = AudioInput(extractor)")
    model.eval()
    size = _BATCHES_OF_A_GROUP * batch_size
    for start in range(0, len(files), size):
        yield from _recognize_group(model, [Path(file) for file in files[start : start + size]], batch_size)


def _recognize_group(model: AdaptedModel, files: Sequence[Path], batch_size: int) -> list[Any]:
    """The predictions, or errors, for some files, in their order."""
    assert model.audio is not None
    found: list[Any] = [None] * len(files)
    lengths: dict[int, float] = {}
    for index, file in enumerate(files):
        try:
            lengths[index] = _check_length(model, file)
        except DataError as error:
            found[index] = error
    order = sorted(lengths, key=lengths.__getitem__)
    for first in range(0, len(order), batch_size):
        read: dict[int, Any] = {}
        for index in order[first : first + batch_size]:
            try:
                read[index] = model.audio.load(files[index])
            except DataError as error:
                found[index] = error
        if read:
            predictions = _recognize_batch(model, list(read.values()), [files[index] for index in read])
            for index, prediction in zip(read, predictions, strict=True):
                found[index] = prediction
    return found


@torch.no_grad()
def _recognize_batch(model: AdaptedModel, audio: list[Any], files: list[Path]) -> list[Any]:
    task, device = model.task, next(model.parameters()).device
    assert task is not None
    assert model.audio is not None
    inputs = encoder_inputs(
        model.audio.extract(audio), model.audio.extractor, model.encoder.description.main_input
    )
    try:
        output = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
    except UtteranceError as error:
        # The others are predicted without it.
        audio, files = list(audio), list(files)
        audio.pop(error.row)
        wrong = DataError(f"{files.pop(error.row)} {error.reason}")
        found = _recognize_batch(model, audio, files) if files else []
        return [*found[: error.row], wrong, *found[error.row :]]
    named = task.name_predictions(task.decode(output.logits, output.lengths))
    sound = task.sound(output.logits, output.lengths)
    return [
        prediction if is_sound else NotFiniteError(f"the logits of {file} are not finite")
        for file, prediction, is_sound in zip(files, named, sound, strict=True)
    ]


def _check_length(model: AdaptedModel, file: Path) -> float:
    """Seconds of a file; DataError if it cannot be read, or its end would have no part in its text."""
    seconds = duration(file)
    assert model.audio is not None
    assert model.task is not None
    most = model.audio.longest
    if model.task.whole_clips and most is not None and seconds > most:
        raise DataError(
            f"{file} lasts {seconds:.1f} s and the model takes {most:g} s; cut it into parts that are shorter"
        )
    return seconds
