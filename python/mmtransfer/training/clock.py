"""The clock of a run, evaluations and checkpoints excluded, and what the run's history says."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from .finite import check_loss

#: Called with the steps done, their number in all, and the latest mean training loss of an epoch.
OnStep = Callable[[int, int, "float | None"], None]
#: In each entry of the history: seconds of training until then.
SECONDS = "seconds"


@dataclass(frozen=True)
class Point:
    """A model on the way: after `steps` and `seconds` of training, evaluations excluded."""

    steps: int
    seconds: float
    scores: dict[str, float]


class Clock(TrainerCallback):
    """Measures the time of training, checks the loss, and tells of each step."""

    def __init__(self, on_step: OnStep | None) -> None:
        self.on_step = on_step
        self.loss: float | None = None
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Of training until now."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The clock stands still while the block runs."""
        _synchronize()
        self._seconds, running, self._since = self.seconds, self._since is not None, None
        try:
            yield
        finally:
            if running:
                _synchronize()
                self._since = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.resume(state.log_history)
        self._since = time.perf_counter()

    def resume(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the time in the history of a run that is resumed."""
        self._seconds = next(
            (entry[SECONDS] for entry in reversed(history) if SECONDS in entry), self._seconds
        )

    def on_train_end(self, *_: Any, **__: Any) -> None:
        _synchronize()
        self._seconds, self._since = self.seconds, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A mean loss from one state to the next is the same where the run was resumed between them.
        control.should_log |= control.should_save
        if self.on_step is not None:
            self.on_step(state.global_step, state.max_steps, self.loss)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.loss = float(logs["loss"])
            check_loss(self.loss, max(round(state.epoch or 1), 1))


def curve(history: Sequence[Mapping[str, Any]], prefix: str) -> list[Point]:
    """The evaluations in a run's history: entries whose names start with `prefix`."""
    return [
        Point(
            entry["step"],
            entry[SECONDS],
            {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)},
        )
        for entry in history
        if any(name.startswith(prefix) for name in entry)
    ]


def seconds_per_epoch(history: Sequence[Mapping[str, Any]]) -> float:
    """The median of the whole epochs; of a run that ends within the first one, in proportion."""
    ends = [(entry["epoch"], entry[SECONDS]) for entry in history if "loss" in entry]
    # Others are at states within an epoch.
    times = [0.0, *(seconds for epoch, seconds in ends if abs(epoch - round(epoch)) < 1e-3)]
    epochs, seconds = ends[-1]
    return statistics.median(b - a for a, b in itertools.pairwise(times)) if times[1:] else seconds / epochs


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
