"""Measure one case: check every candidate against float64, then time all of them, interleaved."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benches.case import Candidate, Case, Runner
from benches.measure.devices import Device, copy_runner, matmul_runner

#: Largest relative error of a correct baseline. In float32 one wrong entry among millions exceeds it. Kernels
#: are judged by the error of the eager form as published, where there is one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}

_CEILING = "ceiling"


@dataclass(frozen=True)
class Effort:
    """Measuring time per case: rounds until the seconds are spent, but at least ``min_rounds``."""

    seconds: float = 4.0
    min_rounds: int = 7


@dataclass
class Measurement:
    """The result of one candidate.

    Attributes:
        error: relative error, None where there is nothing to compare.
        failure: why there is no time: a wrong result, or an exception.
        samples: seconds, one per round.
        facts: all else that the record keeps.
    """

    candidate: Candidate
    error: float | None = None
    failure: str | None = None
    samples: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def measure(case: Case, device: Device, effort: Effort) -> list[Measurement]:
    """Check and time all candidates of ``case``."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # else the shapes of earlier cases count against its limit of recompilations
    device.set_memory(case.memory)
    results = [Measurement(candidate) for candidate in case.candidates]
    try:
        samplers = _check_all(case, device, results)
        ceiling, work = _ceiling(case)
        if ceiling is not None:
            samplers[_CEILING] = device.sampler(ceiling)
        samples = interleave(samplers, effort, case.max_rounds)
    except Exception as error:
        for result in results:
            result.failure = result.failure or _describe(error)
        return results
    for result in results:
        result.samples = samples.get(result.candidate.name, [])
        if result.samples:
            of_ceiling = samples.get(_CEILING) if result.candidate.role != "different" else None
            result.facts |= _facts(case, result.samples, of_ceiling, work)
    _add_ratios(results)
    return results


def _check_all(case: Case, device: Device, results: list[Measurement]) -> dict[str, Callable[[], float]]:
    """A sampler for each candidate with a correct result; the others get a failure."""
    problem = case.problem()
    expected = problem.expected()
    runners: dict[str, Runner] = {}
    for result in results:
        try:
            runner = problem.runner(result.candidate)
            if expected:
                result.error = relative_error(runner.collect(runner.run(runner.prepare())), expected)
            runners[result.candidate.name] = runner
        except Exception as error:
            # A baseline that cannot run must not cost the other rows.
            result.failure = _describe(error)
    # In a training step the input of a ReLU may cross zero; a whole term comes or goes, for any candidate.
    eps = None if case.direction == "training step" else torch.finfo(case.dtype).eps
    judge(results, case.tolerance or TOLERANCE[case.dtype], eps)
    samplers: dict[str, Callable[[], float]] = {}
    for result in results:
        if result.failure is not None:
            continue
        runner = runners[result.candidate.name]
        try:
            result.facts["peak_memory"] = device.peak_memory(runner) if expected else None
            result.facts |= runner.facts
            samplers[result.candidate.name] = device.sampler(runner)
        except Exception as error:
            result.failure = _describe(error)
    return samplers


def judge(results: Sequence[Measurement], tolerance: float, eps: float | None) -> None:
    """Mark wrong results as failures.

    A kernel may have twice the error of the eager form as published, if that is correct, plus ``eps`` of the
    dtype; all others, and kernels without ``eps``, ``tolerance``.
    """
    errors = [r.error for r in results if r.candidate.role == "papers" and r.error is not None]
    published = [error for error in errors if error <= tolerance]
    for result in results:
        if result.failure is not None or result.error is None:
            continue
        allowed = tolerance
        if result.candidate.role == "kernel" and published and eps is not None:
            allowed = 2 * max(published) + eps
        if result.error > allowed:
            result.failure = f"wrong result: relative error {result.error:.1e}, allowed {allowed:.0e}"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def interleave(
    samplers: Mapping[str, Callable[[], float]], effort: Effort, max_rounds: int
) -> dict[str, list[float]]:
    """One sample of each in every round, in a new random order: none always follows the same other."""
    order = list(samplers)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in order}
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + effort.seconds
        for finished in range(max_rounds):
            if finished >= effort.min_rounds and time.perf_counter() > deadline:
                break
            shuffle(order)
            for name in order:
                samples[name].append(samplers[name]())
    finally:
        gc.enable()
    return samples


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median and 20 % and 80 % quantiles."""
    if len(samples) == 1:
        return dict.fromkeys(("median", "p20", "p80"), samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median": statistics.median(samples), "p20": fifths[0], "p80": fifths[3]}


def relative_error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the error over the norm of the expected result, of the worst result; infinite if NaN."""
    worst = 0.0
    for result, target in zip(results, expected, strict=True):
        if result.shape != target.shape:
            raise ValueError(f"expected a result of shape {tuple(target.shape)}, got {tuple(result.shape)}")
        error = torch.linalg.vector_norm(result.detach().double() - target).item()
        scale = torch.linalg.vector_norm(target).item()
        if math.isnan(error):
            return math.inf
        worst = max(worst, error / scale if scale else error)
    return worst


def _ceiling(case: Case) -> tuple[Runner | None, int]:
    """The hardware's best, measured in the same rounds: a copy or a matrix product, and its size."""
    if case.bound == "memory":
        return copy_runner(case.device)
    if case.bound == "compute":
        return matmul_runner(case.device, case.dtype)
    return None, 0


def _facts(
    case: Case, samples: list[float], ceiling: list[float] | None, ceiling_work: int
) -> dict[str, Any]:
    facts: dict[str, Any] = {"seconds": spread(samples), "rounds": len(samples)}
    if ceiling is not None:
        work = case.minimum_bytes if case.bound == "memory" else case.flops
        shares = [(work / s) / (ceiling_work / c) for s, c in zip(samples, ceiling, strict=True)]
        facts["ceiling"] = ceiling_work / statistics.median(ceiling)
        facts["share_of_ceiling"] = spread(shares)
    return facts


def _add_ratios(results: list[Measurement]) -> None:
    """Each candidate's time over that of the first kernel, round by round."""
    kernel = next((result.samples for result in results if result.candidate.role == "kernel"), [])
    for result in results:
        if kernel and result.samples:
            ratios = [s / k for s, k in zip(result.samples, kernel, strict=True)]
            result.facts["times_kernel"] = spread(ratios)
