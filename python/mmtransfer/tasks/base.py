"""The interface of a task: head, loss, collation and metric, for one target an utterance or many."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

from mmtransfer.data.recordings import Clip, Recordings


@dataclass(frozen=True)
class Metric:
    """The figure by which a task judges a model, a share between 0 and 1.

    Attributes:
        name: in records: "accuracy".
        title: in tables and figures: "Accuracy".
        higher_is_better: False for error rates.
    """

    name: str
    title: str
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """The purpose of a model; its fields are all that a checkpoint needs to build its head again.

    Attributes:
        name: on the command line, in checkpoints and reports.
        metric: the value of `score` by which models are judged.
        further: the others, for tables.
        by_length: whether training batches hold clips of like length, as where the loss has a value a frame.
        kind: "label" or "text": the column of a data set that has the targets, and in records the name of a
            prediction.
        reads_language_model: whether it takes the options `language_model` and `stage`.
        whole_clips: whether the target is of all of a clip, so that clips cannot be cropped.
    """

    name: ClassVar[str]
    metric: ClassVar[Metric]
    further: ClassVar[tuple[Metric, ...]] = ()
    by_length: ClassVar[bool] = False
    kind: ClassVar[Literal["label", "text"]] = "label"
    whole_clips: ClassVar[bool] = False
    reads_language_model: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def of(cls, recordings: Recordings) -> Task:
        """The task on these recordings. A subclass may take fields by name."""

    @classmethod
    def of_tokenizer_file(cls, path: Path) -> Task:
        """The task with the symbols of a tokenizer, a file or a folder; ValueError if it takes none."""
        raise ValueError(f"the task {cls.name} takes no tokenizer")

    @classmethod
    def of_own_head(cls, model: nn.Module, source: str) -> tuple[Task, Mapping[str, torch.Tensor]]:
        """The task that a pretrained model has a head for, and the state dict of `head` that continues it.

        Args:
            model: of transformers, with its head.
            source: where it is from, and its tokenizer too.

        ValueError if it has no such head, or the task keeps none.
        """
        raise ValueError(f"the task {cls.name} keeps no head of a pretrained model")

    @abc.abstractmethod
    def head(self, dim: int) -> nn.Module:
        """A module of `(frames (N, dim), taps)` that gives logits; see `encoders.Taps` for the frames."""

    @abc.abstractmethod
    def loss(self, logits: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The training loss, a scalar; `lengths` (B,) are the frames of each utterance."""

    @abc.abstractmethod
    def decode(self, logits: torch.Tensor, lengths: torch.Tensor) -> list[Any]:
        """One prediction for each utterance of a batch, in plain Python or as tensors on the CPU."""

    def sound(self, logits: torch.Tensor, lengths: torch.Tensor) -> list[bool]:
        """Whether each utterance of a batch has finite logits; those `(B, ...)`, or `(N, ...)` for N frames.

        A task that masks classes with -inf overrides this.
        """
        each = logits.unbind() if len(logits) == len(lengths) else logits.split(lengths.tolist())
        return [bool(values.isfinite().all()) for values in each]

    @abc.abstractmethod
    def score(self, predictions: Sequence[Any], targets: Sequence[Any]) -> dict[str, float]:
        """Figures of a test set by name, that of `metric` among them."""

    def name_predictions(self, predictions: Sequence[Any]) -> list[Any]:
        """The predictions as their users read them: names of classes where the task knows them."""
        return list(predictions)

    def target(self, clip: Clip) -> Any:
        """The target of a clip."""
        return clip.label

    @property
    def keeps_best(self) -> bool:
        """Whether the weights of the best score on the validation part are kept, and not the last."""
        return True

    def frames_needed(self, target: Any) -> int:
        """The frames that a clip with this target needs to be trained on."""
        return 0

    def unknown(self, target: Any) -> list[str]:
        """The characters of a target that the task has no symbol for, each as often as it occurs."""
        return []

    def is_empty(self, target: Any) -> bool:
        """Whether nothing of a target is left to be trained on."""
        return False

    def collate(self, targets: Sequence[Any]) -> torch.Tensor:
        """The targets of a batch as the tensor that `loss` takes; its first dimension is the batch."""
        return torch.tensor(targets)

    def chance(self, recordings: Recordings) -> float | None:
        """The metric of the best constant prediction on the test clips; None where there is no such thing."""
        return None

    def options(self) -> dict[str, Any]:
        """The fields, for a checkpoint."""
        return dataclasses.asdict(self)


def check_task(task: Any) -> None:
    """TypeError unless this is a task, or None."""
    if task is not None and not isinstance(task, Task):
        is_class = isinstance(task, type) and issubclass(task, Task)
        hint = f"the class {task.__name__}; write {task.__name__}(...)" if is_class else f"{task!r}"
        raise TypeError(f"task must be a Task or None, got {hint}")


TASKS: dict[str, type[Task]] = {}
_T = TypeVar("_T", bound=type[Task])


def register_task(task: _T) -> _T:
    """Make a task known by its name, on the command line too; usable as a decorator.

    ValueError if another task has the name. TypeError for what is no class of tasks, or one without name or
    metric.
    """
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise TypeError(f"register_task takes a class of tasks, got {task!r}")
    for attribute, kind in (("name", str), ("metric", Metric)):
        if not isinstance(getattr(task, attribute, None), kind):
            raise TypeError(f"{task.__name__} must have a class attribute {attribute}, a {kind.__name__}")
    if TASKS.get(task.name, task) is not task:
        raise ValueError(f"a task is called {task.name!r} already")
    TASKS[task.name] = task
    return task


def default_task(kind: str) -> type[Task]:
    """The first task that was registered for labels ("label") or transcripts ("text")."""
    return next(task for task in TASKS.values() if task.kind == kind)


def language_model_task() -> type[Task]:
    """The first task that was registered for a language model."""
    return next(task for task in TASKS.values() if task.reads_language_model)


def find_task(name: str) -> type[Task]:
    """The task of a name; ValueError if there is none."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]
