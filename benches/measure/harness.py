"""Measuring one case: check every candidate against float64, then time all of them in turns."""

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

#: Largest relative error of a candidate that counts as right. In float32 a wrong entry among millions shows.
#: The tests of the ops are stricter; this must let pass what eager baselines lose in half precision.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}

_CEILING = "ceiling"


@dataclass(frozen=True)
class Effort:
    """How long to measure a case: rounds until the time is spent, but at least so many."""

    seconds: float = 4.0
    min_rounds: int = 7


@dataclass
class Measurement:
    """One candidate's result.

    Attributes:
        error: relative error, None where there is nothing to compare.
        failure: why there is no time: a wrong result, or an exception.
        samples: seconds, one per round.
        facts: what the record keeps beside pytest-benchmark's statistics.
    """

    error: float | None = None
    failure: str | None = None
    samples: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def measure(case: Case, device: Device, effort: Effort) -> dict[str, Measurement]:
    """Check and time all candidates of ``case``; keys are their names."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # else the shapes of earlier cases count against its limit of recompilations
    device.set_memory(case.memory)
    problem = case.problem()
    expected = problem.expected()
    results: dict[str, Measurement] = {}
    samplers: dict[str, Callable[[], float]] = {}
    for candidate in case.candidates:
        results[candidate.name] = result = Measurement()
        try:
            runner = problem.runner(candidate)
            _check(result, runner, expected, case.tolerance or TOLERANCE[case.dtype])
            if result.failure is None:
                result.facts["peak_memory"] = device.peak_memory(runner) if expected else None
                samplers[candidate.name] = device.sampler(runner)
        except Exception as error:
            # A baseline that cannot run is a fact about it, and no reason to lose the other rows.
            result.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    del expected
    ceiling, work = _ceiling(case)
    if ceiling is not None:
        samplers[_CEILING] = device.sampler(ceiling)
    samples = interleave(samplers, effort, case.max_rounds)
    for candidate in case.candidates:
        result = results[candidate.name]
        result.samples = samples.get(candidate.name, [])
        if result.samples:
            of_ceiling = samples.get(_CEILING) if candidate.role != "different" else None
            result.facts |= _facts(case, result.samples, of_ceiling, work)
    _add_ratios(case.candidates, results)
    return results


def interleave(
    samplers: Mapping[str, Callable[[], float]], effort: Effort, max_rounds: int
) -> dict[str, list[float]]:
    """One sample of each in every round, in an order shuffled anew: nobody always follows the same one."""
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
    """Norm of the error over the norm of what is expected, of the worst result; infinite if not a number."""
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


def _check(result: Measurement, runner: Runner, expected: list[Tensor], tolerance: float) -> None:
    if not expected:
        return
    results = runner.run(runner.prepare())
    result.error = relative_error(runner.collect(results), expected)
    if result.error > tolerance:
        result.failure = f"wrong result: relative error {result.error:.1e}, allowed {tolerance:.0e}"


def _ceiling(case: Case) -> tuple[Runner | None, int]:
    """What the hardware does at best, measured in the same rounds: a copy or a product, and its size."""
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


def _add_ratios(candidates: Sequence[Candidate], results: dict[str, Measurement]) -> None:
    """How many times as long as the first kernel each candidate took, round by round."""
    kernel = next((results[c.name].samples for c in candidates if c.role == "kernel"), [])
    for result in results.values():
        if kernel and result.samples:
            ratios = [s / k for s, k in zip(result.samples, kernel, strict=True)]
            result.facts["times_kernel"] = spread(ratios)
