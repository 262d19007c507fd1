"""The results of a comparison: plain data, from which reports and figures are made."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mmtransfer.training.clock import Point

from .step import StepComparison, StepCost


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        score: on the test clips, by the task's metric.
        scores: all of the task's figures.
        loss: on the training clips, mean of the last epoch.
        seconds: of training, that of the method it starts from included, evaluations excluded.
        curve: scores on the way, on some of the test clips, by the same seconds.
        insights: figures of the trained model, see `Method.insights`.
    """

    seed: int
    score: float
    scores: dict[str, float]
    loss: float
    seconds_per_epoch: float
    seconds: float
    curve: list[Point]
    insights: dict[str, dict[str, float]]


@dataclass(frozen=True)
class MethodResult:
    """All runs of one method, and the cost of its training step.

    Attributes:
        about: the method in a sentence, and its paper.
        through_encoder: whether the encoder runs in every step, and gradients enter it.
        options: of the method, as a checkpoint has them.
        epochs, steps, batch_size: of every run.
        step: of readout and head, or, through the encoder, of the whole model, on `step_clips` clips.
        whole_step: of the whole model with the encoder in the loop, on the same clips for every method.
    """

    name: str
    title: str
    about: str
    through_encoder: bool
    trainable_parameters: int
    learning_rate: float
    epochs: float
    steps: int
    batch_size: int
    options: dict[str, dict[str, Any]]
    taps: list[str]
    runs: list[Run]
    step: StepComparison
    step_clips: int
    whole_step: StepCost

    @property
    def score(self) -> float:
        return statistics.fmean(run.score for run in self.runs)

    def mean(self, name: str) -> float:
        """Of one of the task's figures, over the seeds."""
        return statistics.fmean(run.scores[name] for run in self.runs)

    @property
    def seconds(self) -> float:
        """Median training time of a run."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return statistics.stdev(run.score for run in self.runs) if len(self.runs) > 1 else None

    @property
    def seconds_per_epoch(self) -> float:
        return statistics.median(run.seconds_per_epoch for run in self.runs)


@dataclass(frozen=True)
class FailedMethod:
    """A method that has no result.

    Attributes:
        reason: one sentence.
        runs: those that were done before.
    """

    name: str
    title: str
    about: str
    through_encoder: bool
    options: dict[str, dict[str, Any]]
    reason: str
    runs: list[Run]


@dataclass(frozen=True)
class Example:
    """A test clip: its target, and the predictions of the methods by their names, of the first seed."""

    clip: str
    target: str
    predictions: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """Everything that a report says.

    Attributes:
        methods: those with a result.
        failed: those without.
        examples: some test clips.
        feature_seconds: for the frozen encoder's features of all clips, None if they were not cached.
    """

    task: dict[str, Any]
    settings: dict[str, Any]
    machine: dict[str, Any]
    methods: list[MethodResult]
    failed: list[FailedMethod]
    examples: list[Example]
    feature_seconds: float | None
    total_seconds: float

    def rows(self) -> list[list[MethodResult | FailedMethod]]:
        """All methods in the parts of the tables; in each, those that failed come last."""
        return in_parts([*self.methods, *self.failed])


_M = TypeVar("_M", MethodResult, FailedMethod, MethodResult | FailedMethod)


def in_parts(methods: Sequence[_M]) -> list[list[_M]]:
    """The methods on the frozen encoder, then those that train through it; no part is empty."""
    ordered = sorted(methods, key=lambda method: method.through_encoder)
    return [list(part) for _, part in itertools.groupby(ordered, key=lambda method: method.through_encoder)]
