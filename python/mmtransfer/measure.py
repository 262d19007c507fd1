"""Time and memory of a training step with mmkernels and with the same fusion in eager PyTorch."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from mmtransfer.hff import Taps

# Rounds of timing per method: the first number at least, then on until the seconds or the second number.
SECONDS = 4.0
ROUNDS = (5, 25)
_MEMORY_STEPS = 3
# Both sides compute in fp32 and in another order; gradients sum over thousands of frames.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class StepCost:
    """One training step: median milliseconds, and peak memory in MiB (None where it cannot be measured)."""

    milliseconds: float
    memory_mib: float | None


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


class _Step:
    """Forward, loss, backward and AdamW update of a fusion and a classifier on one batch."""

    def __init__(self, fusion: nn.Module, head: nn.Module, taps: Taps, labels: torch.Tensor) -> None:
        self.fusion, self.head, self.taps, self.labels = fusion, head, taps, labels
        self.parameters = [p for module in (fusion, head) for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6)

    def backward(self) -> torch.Tensor:
        """Leave the gradients in the parameters; returns the logits."""
        self.optimizer.zero_grad()
        logits = self.head(self.taps, self.fusion(self.taps.features))
        F.cross_entropy(logits, self.labels).backward()
        return logits.detach()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients under the names of the state dict, which a fusion and its eager twin share."""
        found = {}
        for part, module in (("fusion", self.fusion), ("head", self.head)):
            # The twin's state dict stacks its per-slot tensors, so it must do so with the gradients.
            holder = copy.deepcopy(module)
            for target, source in zip(holder.parameters(), module.parameters(), strict=True):
                target.data = torch.zeros_like(source) if source.grad is None else source.grad
            found.update({f"{part}.{name}": value for name, value in holder.state_dict().items()})
        return found


def compare_step(
    fusion: nn.Module, eager: nn.Module | None, head: nn.Module, taps: Taps, labels: torch.Tensor
) -> StepComparison:
    """Measure a training step on one batch, with `fusion` and with its twin `eager` of the same state dict.

    The two are checked against each other before anything is timed, then timed in turn on the same batch. The
    modules are trained a little: pass copies.
    """
    ours = _Step(fusion, copy.deepcopy(head), taps, labels)
    if eager is None:
        (times,) = _interleave([ours])
        return StepComparison(StepCost(statistics.median(times) * 1e3, _memory(ours)))
    eager.load_state_dict(fusion.state_dict())
    theirs = _Step(eager, copy.deepcopy(head), taps, labels)
    difference = _difference(ours, theirs)
    our_times, their_times = _interleave([ours, theirs])
    return StepComparison(
        mmkernels=StepCost(statistics.median(our_times) * 1e3, _memory(ours)),
        eager=StepCost(statistics.median(their_times) * 1e3, _memory(theirs)),
        speedup=statistics.median(b / a for a, b in zip(our_times, their_times, strict=True)),
        difference=difference,
        agrees=difference <= _TOLERANCE,
    )


def _difference(ours: _Step, theirs: _Step) -> float:
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


def _memory(step: _Step) -> float | None:
    """Peak MiB of a few steps above what is in use without them: activations, gradients, optimiser state.

    On CUDA what the allocator hands out; on Linux the peak of the resident set, which the kernel keeps and
    lets a process reset; elsewhere None.
    """
    step.optimizer = torch.optim.AdamW(step.parameters, lr=1e-6)
    for parameter in step.parameters:
        parameter.grad = None
    gc.collect()
    if step.taps.features.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _run(step)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        _return_free_memory()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmHWM")
        _run(step)
        return (_status("VmHWM") - before) / 2**10
    except (OSError, KeyError):
        return None


def _run(step: _Step) -> None:
    for _ in range(_MEMORY_STEPS):
        step()


def _return_free_memory() -> None:
    """Have glibc give freed heap back, or a step would grow into it unseen; other C libraries keep theirs."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    """A size in KiB from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int({key: value for key, _, value in (line.partition(":") for line in lines)}[name].split()[0])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
