"""Time and memory of a training step with mmkernels and with the same model in eager PyTorch."""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

# Rounds of timing per method: the first number at least, then on until the seconds or the second number.
SECONDS = 4.0
ROUNDS = (5, 25)
_MEMORY_STEPS = 3
# Both sides compute in fp32 and in another order. Where that moves the input of a ReLU across zero, a whole
# term of a gradient comes or goes; one in a hundred thousand does.
_TOLERANCE = 1e-2

_T = TypeVar("_T")


@dataclass(frozen=True)
class StepCost:
    """One training step: median milliseconds, and peak memory in MiB."""

    milliseconds: float
    memory_mib: float


@dataclass(frozen=True)
class StepComparison:
    """A step with mmkernels, and with eager operations where there is an eager twin.

    Attributes:
        speedup: median over the rounds of eager time / mmkernels time.
        difference: the largest difference of logits and gradients, relative to the largest eager value of
            each tensor.
        agrees: whether that is within rounding; where it is not, the times mean nothing.
    """

    mmkernels: StepCost
    eager: StepCost | None = None
    speedup: float | None = None
    difference: float | None = None
    agrees: bool = True


class Step:
    """Forward, loss, backward and AdamW update of a model on one batch.

    Args:
        model: where the parameters are; it is trained a little.
        forward: logits of the model, on inputs that it holds.
        labels: `(B,)` class indices.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[[nn.Module], torch.Tensor], labels: torch.Tensor
    ) -> None:
        self.model, self.forward, self.labels = model, forward, labels
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.reset()

    def reset(self) -> None:
        """Drop gradients and optimiser state."""
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6)
        self.optimizer.zero_grad()

    def backward(self) -> torch.Tensor:
        """Leave the gradients in the parameters; returns the logits."""
        self.optimizer.zero_grad()
        logits = self.forward(self.model)
        F.cross_entropy(logits, self.labels).backward()
        return logits.detach()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients under the names of the state dict, which a fusion and its eager twin share.

        Frozen parameters are there as they are.
        """
        values = [parameter.data for parameter in self.parameters]
        # The twin's state dict stacks its per-slot tensors, so it must do so with the gradients.
        for parameter in self.parameters:
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = dict(self.model.state_dict())
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value
        return found


def compare_steps(ours: Step, theirs: Step | None = None) -> StepComparison:
    """Measure a training step, and the same of an eager twin, whose model has the same state dict.

    The twin gets our parameters. The two are checked against each other before anything is timed, then timed
    in turn.
    """
    if theirs is None:
        (times,) = _interleave([ours])
        return StepComparison(StepCost(statistics.median(times) * 1e3, _memory(ours)))
    theirs.model.load_state_dict(ours.model.state_dict())
    difference = _difference(ours, theirs)
    our_times, their_times = _interleave([ours, theirs])
    return StepComparison(
        mmkernels=StepCost(statistics.median(our_times) * 1e3, _memory(ours)),
        eager=StepCost(statistics.median(their_times) * 1e3, _memory(theirs)),
        speedup=statistics.median(b / a for a, b in zip(our_times, their_times, strict=True)),
        difference=difference,
        agrees=difference <= _TOLERANCE,
    )


def _difference(ours: Step, theirs: Step) -> float:
    found = {"logits": ours.backward(), **ours.gradients()}
    expected = {"logits": theirs.backward(), **theirs.gradients()}
    return max(
        float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-12))
        for name, value in expected.items()
        if value.numel()
    )


def _interleave(steps: Sequence[Callable[[], None]]) -> list[list[float]]:
    """Seconds of each step, taken in turn (A B A B) after two warm-up calls of each."""
    for step in (*steps, *steps):
        step()
    times: list[list[float]] = [[] for _ in steps]
    least, most = ROUNDS
    began = time.perf_counter()
    while len(times[0]) < least or (len(times[0]) < most and time.perf_counter() - began < SECONDS):
        for step, taken in zip(steps, times, strict=True):
            _synchronize()
            start = time.perf_counter()
            step()
            _synchronize()
            taken.append(time.perf_counter() - start)
    return times


def _memory(step: Step) -> float:
    """Peak MiB of a few steps above what is in use without them: activations, gradients, optimiser state."""
    step.reset()
    gc.collect()

    def steps() -> None:
        for _ in range(_MEMORY_STEPS):
            step()

    return peak_memory(steps, step.labels.device.type) / 2**20


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Most bytes that torch's allocator held at once during one call beyond what it held before.

    What the call returns counts. The size of the process is no measure of this: it also depends on what the
    C library kept of memory freed earlier.

    Args:
        call: what to run.
        device: type of the device whose memory counts, `"cpu"` or `"cuda"`.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before
    _, changes = allocations(call)
    return max(itertools.accumulate(changes, initial=0))


def allocations(call: Callable[[], _T]) -> tuple[_T, list[int]]:
    """What a call returns, and what torch's allocators gave (bytes) and took back (negative) during it.

    Memory that was allocated before the call and is freed in it does not appear.
    """
    # Or the profiler says on stderr that it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    profiler: Any = profile.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    return result, [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
