"""Tasks: head, loss, collation and metric."""

from __future__ import annotations

from .base import TASKS, Metric, Task, default_task, find_task, language_model_task, register_task
from .classification import Classification
from .ctc import CTC
from .text import Text

__all__ = [
    "CTC",
    "TASKS",
    "Classification",
    "Metric",
    "Task",
    "Text",
    "default_task",
    "find_task",
    "language_model_task",
    "register_task",
]
