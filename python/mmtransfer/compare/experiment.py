"""The subject of a comparison: a pretrained model, its feature extractor, and labelled recordings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import SequenceFeatureExtractor

from mmtransfer.data import Recordings, load_data
from mmtransfer.data.audio import MIN_SECONDS
from mmtransfer.data.errors import counted
from mmtransfer.data.features import load_feature_extractor
from mmtransfer.encoders.loading import load_model
from mmtransfer.training.settings import check_number


@dataclass(frozen=True, eq=False)
class Experiment:
    """A pretrained model, recordings, and how clips become the model's input.

    Attributes:
        model: a transformers model with a speech encoder; it is left as it is but for being frozen.
        model_name: for reports.
        extractor: the model's feature extractor.
        recordings: with a train and a test part.
        max_seconds: clips are cropped to this.
        note: one or two sentences on the data, for reports.

    ValueError for `max_seconds` that would leave no clip long enough.
    """

    model: nn.Module
    model_name: str
    extractor: SequenceFeatureExtractor
    recordings: Recordings
    max_seconds: float
    note: str

    def __post_init__(self) -> None:
        check_number("max_seconds", self.max_seconds)
        if self.max_seconds < MIN_SECONDS:
            raise ValueError(f"max_seconds must be at least {MIN_SECONDS}, got {self.max_seconds}")


def user_experiment(
    model: str,
    data: str | Path,
    *,
    kind: Literal["label", "text"] = "label",
    test_fraction: float = 0.2,
    max_seconds: float | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> Experiment:
    """A model folder or hub name, and a folder of class folders or a manifest.

    Args:
        model: folder or hub name.
        data: what `mmtransfer.data.load_data` reads.
        kind: whether the task needs labels or transcripts.
        test_fraction: for the test part, where the data has no split.
        max_seconds: clips with a label are cropped to this (None: 10); longer ones with a transcript, which
            is of the whole, are left out (None: 30).
        dtype: of the weights, whatever they were stored in; see `load_model`.
    """
    recordings = load_data(data, kind=kind, test_fraction=test_fraction)
    if recordings.transcribed:
        max_seconds = 30.0 if max_seconds is None else max_seconds
        recordings = _shorter(recordings, max_seconds)
    return Experiment(
        model=load_model(model, dtype=dtype),
        model_name=Path(model).name if Path(model).is_dir() else model,
        extractor=load_feature_extractor(model),
        recordings=recordings,
        max_seconds=10.0 if max_seconds is None else max_seconds,
        note="Recordings and model given by the user.",
    )


def _shorter(recordings: Recordings, max_seconds: float) -> Recordings:
    """The clips of at most so many seconds."""
    parts = {
        split: [clip for clip in getattr(recordings, split) if clip.seconds <= max_seconds]
        for split in ("train", "validation", "test")
    }
    left_out = sum(len(getattr(recordings, split)) - len(clips) for split, clips in parts.items())
    if not left_out:
        return recordings
    note = f"{counted(left_out, 'clip')} longer than {max_seconds:g} s"
    return replace(
        recordings,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        ignored=(*recordings.ignored, note),
    )
