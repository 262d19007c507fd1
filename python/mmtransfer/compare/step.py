"""Time and memory of a training step with mmkernels and with the same model in eager PyTorch."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmtransfer.training.finite import NotFiniteError
from mmtransfer.training.memory import peak_memory

# Rounds of timing per method: the first number at least, then on until the seconds or the second number.
SECONDS = 4.0
ROUNDS = (5, 25)
_MEMORY_STEPS = 3
# Both sides compute in fp32 and in another order. Where that moves the input of a ReLU across zero, a whole
# term of a gradient comes or goes; one in a hundred thousand does.
_TOLERANCE = 1e-2
#: Gradients below this share of the largest one are compared at that scale.
_LEAST_SHARE = 1e-4


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
        agrees: whether that is within rounding, which half-precision weights make larger; where it is not,
            the times mean nothing.
    """

    mmkernels: StepCost
    eager: StepCost | None = None
    speedup: float | None = None
    difference: float | None = None
    agrees: bool = True


class Step:
    """Forward, loss, backward and AdamW update of a model on one batch.

    Args:
        model: gives an output with `loss` and `logits`; it is trained a little.
        batch: its keyword arguments, labels among them.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
        self.model, self.batch = model, batch
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.reset()

    def reset(self) -> None:
        """Drop gradients and optimiser state."""
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6)
        self.optimizer.zero_grad()

    def backward(self) -> torch.Tensor:
        """Leave the gradients in the parameters; returns the logits, or the loss of a model without."""
        self.optimizer.zero_grad()
        output: Any = self.model(**self.batch)
        output.loss.backward()
        return (output.loss if output.logits is None else output.logits).detach()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of what is trained, under the names of the state dict, which a twin shares."""
        values = [parameter.data for parameter in self.parameters]
        # The twin's state dict stacks its per-slot tensors, so it must do so with the gradients.
        for parameter in self.parameters:
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = dict(self.model.state_dict())
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value
        frozen = {name for name, each in self.model.named_parameters() if not each.requires_grad}
        return {name: value for name, value in found.items() if name not in frozen}


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
    bound = _TOLERANCE + 2 * _rounding(theirs)
    our_times, their_times = _interleave([ours, theirs])
    return StepComparison(
        mmkernels=StepCost(statistics.median(our_times) * 1e3, _memory(ours)),
        eager=StepCost(statistics.median(their_times) * 1e3, _memory(theirs)),
        speedup=statistics.median(b / a for a, b in zip(our_times, their_times, strict=True)),
        difference=difference,
        agrees=difference <= bound,
    )


def _difference(ours: Step, theirs: Step) -> float:
    """Infinite if ours alone is not finite; NotFiniteError if the eager step is not."""
    found = {"logits": ours.backward(), **ours.gradients()}
    expected = {"logits": theirs.backward(), **theirs.gradients()}
    # A gradient that a norm behind its parameter makes zero is rounding alone, in both.
    gradients = [
        value.abs().max().item() for name, value in expected.items() if name != "logits" and value.numel()
    ]
    least = max(1e-12, _LEAST_SHARE * max(gradients, default=0.0))
    differences = [0.0]
    for name, ours_now in found.items():
        value = expected[name]
        if not bool(value.isfinite().all()):
            raise NotFiniteError(f"{name} is not finite in a training step")
        if value.numel():
            largest = value.abs().max().float().clamp(min=1e-12 if name == "logits" else least)
            differences.append(float((ours_now - value).abs().max() / largest))
    return max(math.inf if math.isnan(each) else each for each in differences)


def _rounding(step: Step) -> float:
    """How far a step with half-precision weights is from the same in float32; 0 without such weights."""
    if all(parameter.dtype.itemsize >= 4 for parameter in step.model.parameters()):
        return 0.0
    return _difference(step, Step(copy.deepcopy(step.model).float(), step.batch))


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
    """Peak MiB of a few steps beyond the memory in use before: activations, gradients, optimiser state."""
    step.reset()
    gc.collect()

    def steps() -> None:
        for _ in range(_MEMORY_STEPS):
            step()

    return peak_memory(steps, step.parameters[0].device.type) / 2**20


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
