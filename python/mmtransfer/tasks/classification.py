"""One class for each utterance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from mmtransfer.data.recordings import Recordings
from mmtransfer.encoders.taps import Taps
from mmtransfer.training.settings import check_integer

from .base import Metric, Task, register_task


class ClassificationHead(nn.Module):
    """Mean over the valid frames of an utterance, then a linear layer; no valid frame counts as zeros."""

    def __init__(self, dim: int, num_labels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, num_labels)

    def forward(self, frames: torch.Tensor, taps: Taps) -> torch.Tensor:
        """Logits `(B, num_labels)` from the frames `(N, dim)`."""
        pooled = taps.scatter(frames).sum(dim=1) / taps.lengths.clamp(min=1).unsqueeze(1)
        return self.classifier(pooled)


@register_task
@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """A linear layer on the mean of an utterance's frames, with cross-entropy.

    Attributes:
        num_labels: number of classes.
        labels: their names, in the order of the logits; None where they are not known.

    ValueError for a count below 1, or names that are not as many, or not distinct.
    """

    name: ClassVar[str] = "classification"
    metric: ClassVar[Metric] = Metric("accuracy", "Accuracy")

    num_labels: int
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_integer("num_labels", self.num_labels)
        if self.labels is None:
            return
        # A checkpoint has a list.
        object.__setattr__(self, "labels", tuple(self.labels))
        if len(set(self.labels)) != self.num_labels or len(self.labels) != self.num_labels:
            raise ValueError(
                f"labels must be {self.num_labels} distinct names, as num_labels says, got {self.labels}"
            )

    @classmethod
    def of(cls, recordings: Recordings) -> Classification:
        if recordings.transcribed:
            raise ValueError(
                f"{recordings.name} has transcripts; the task classification needs labels, in a column label"
            )
        return cls(num_labels=len(recordings.classes), labels=recordings.classes)

    def head(self, dim: int) -> nn.Module:
        return ClassificationHead(dim, self.num_labels)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), labels)

    def decode(self, logits: torch.Tensor, lengths: torch.Tensor) -> list[Any]:
        return logits.argmax(dim=-1).tolist()

    def name_predictions(self, predictions: Sequence[Any]) -> list[Any]:
        return list(predictions) if self.labels is None else [self.labels[index] for index in predictions]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any]) -> dict[str, float]:
        right = sum(a == b for a, b in zip(predictions, targets, strict=True))
        return {self.metric.name: right / len(targets)}

    def chance(self, recordings: Recordings) -> float | None:
        return max(Counter(clip.label for clip in recordings.test).values()) / len(recordings.test)
