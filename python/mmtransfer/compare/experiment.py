"""The subject of a comparison: a pretrained model, its feature extractor, and labelled recordings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import SequenceFeatureExtractor

from mmtransfer.data import DataError, Recordings, from_folder, from_manifest
from mmtransfer.data.audio import MIN_SECONDS
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
    test_fraction: float = 0.2,
    max_seconds: float = 10.0,
    dtype: torch.dtype | str = torch.float32,
) -> Experiment:
    """A model folder or hub name, and a folder of class folders or a CSV manifest.

    `dtype` is that of the weights, whatever they were stored in; see `load_model`.
    """
    path = Path(data).expanduser()
    read = from_folder if path.is_dir() else from_manifest
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder of class folders, or a CSV manifest")
    recordings = read(path, test_fraction=test_fraction)
    return Experiment(
        model=load_model(model, dtype=dtype),
        model_name=Path(model).name if Path(model).is_dir() else model,
        extractor=load_feature_extractor(model),
        recordings=recordings,
        max_seconds=max_seconds,
        note="Recordings and model given by the user.",
    )
