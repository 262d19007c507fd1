"""Tasks: head, loss, collation and metric."""

from __future__ import annotations

from .base import TASKS, Metric, Task, find_task, register_task
from .classification import Classification

__all__ = ["TASKS", "Classification", "Metric", "Task", "find_task", "register_task"]
