"""The names of the classes of a model of transformers, and of a checkpoint of its head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn


def class_names(model: nn.Module) -> list[str] | None:
    """The names in a model's configuration; None for LABEL_0, LABEL_1, ..., which transformers makes up."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not names or all(name == f"LABEL_{index}" for index, name in names.items()):
        return None
    return [name for _, name in sorted(names.items())]


def find_labels(model: nn.Module, config: Mapping[str, Any], folder: str | Path) -> list[str] | None:
    """The names for the head of a checkpoint; ValueError if the model calls its own classes otherwise."""
    saved, own = config.get("labels"), class_names(model)
    if not config["head"] or saved is None:
        return None
    if own is not None and own != saved:
        raise ValueError(f"{folder} was trained for the classes {saved}, the model's are {own}")
    return saved


def set_labels(model: nn.Module, labels: list[str] | None) -> None:
    """Have a model's configuration name its classes so, if it has as many."""
    config: Any = getattr(model, "config", None)
    if labels is not None and len(labels) == getattr(config, "num_labels", None):
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
