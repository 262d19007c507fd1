"""What a comparison finds: plain data, from which reports and figures are made."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmtransfer.measure import StepComparison


@dataclass(frozen=True)
class Run:
    """One training run: test accuracy and training loss of the last epoch."""

    seed: int
    accuracy: float
    loss: float
    seconds_per_epoch: float
    tap_weights: list[float] | None


@dataclass(frozen=True)
class MethodResult:
    """All runs of one method, and the cost of its training step.

    Attributes:
        through_encoder: whether the encoder runs in every step, and gradients enter it.
        epochs, batch_size: of every run.
        tap_weights_kind: what the runs' `tap_weights` are: "softmax" (a weighted sum's weights), "norm" (the
            Frobenius norm of each tap's part of LFF's first matrix, as in figure 4 of the paper), or None.
        step: of fusion and classifier, or, through the encoder, of the whole model.
    """

    name: str
    title: str
    through_encoder: bool
    trainable_parameters: int
    learning_rate: float
    epochs: int
    batch_size: int
    tap_names: list[str]
    tap_weights_kind: str | None
    runs: list[Run]
    step: StepComparison

    @property
    def accuracy(self) -> float:
        return statistics.fmean(run.accuracy for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return statistics.stdev(run.accuracy for run in self.runs) if len(self.runs) > 1 else None

    @property
    def seconds_per_epoch(self) -> float:
        return statistics.median(run.seconds_per_epoch for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """Everything that a report says.

    Attributes:
        feature_seconds: for the frozen encoder's features of all clips, None if they were not cached.
    """

    task: dict[str, Any]
    settings: dict[str, Any]
    machine: dict[str, Any]
    methods: list[MethodResult]
    feature_seconds: float | None
    total_seconds: float


def in_parts(methods: Sequence[MethodResult]) -> list[list[MethodResult]]:
    """The methods on the frozen encoder, then those that train through it; no part is empty."""
    ordered = sorted(methods, key=lambda method: method.through_encoder)
    return [list(part) for _, part in itertools.groupby(ordered, key=lambda method: method.through_encoder)]
