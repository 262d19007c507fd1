"""Hands measured samples to pytest-benchmark, whose JSON is the record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from benches.case import Candidate, Case
from benches.measure.harness import Measurement


class ReplayTimer:
    """A timer that lets pytest-benchmark, which reads it before and after every round, see given times."""

    def __init__(self, samples: Sequence[float]) -> None:
        self._readings = self._read(samples)

    @staticmethod
    def _read(samples: Sequence[float]) -> Iterator[float]:
        for sample in samples:
            yield 0.0
            yield sample

    def __call__(self) -> float:
        return next(self._readings)

    def __str__(self) -> str:
        return "benches.measure.harness.interleave"


@dataclass
class Row:
    """One candidate of one case, as a bench function gets it."""

    case: Case
    candidate: Candidate
    measurement: Callable[[], Measurement]
    request: pytest.FixtureRequest
    failures: list[dict[str, Any]]

    def record(self) -> None:
        """Record this candidate; the first row measures the case. A wrong result has no time and fails."""
        measurement = self.measurement()
        info = describe(self.case, self.candidate, measurement)
        if measurement.failure is not None:
            self.failures.append(info)
            pytest.fail(measurement.failure, pytrace=False)
        marker = pytest.mark.benchmark(timer=ReplayTimer(measurement.samples), group=self.case.id)
        self.request.node.add_marker(marker)
        benchmark = self.request.getfixturevalue("benchmark")
        benchmark.extra_info.update(info)
        benchmark.pedantic(lambda: None, rounds=len(measurement.samples))


def describe(case: Case, candidate: Candidate, measurement: Measurement) -> dict[str, Any]:
    """The facts of a row; ``benches.report.table`` reads nothing else of it."""
    info = asdict_without_calls(case)
    info |= {"candidate": candidate.name, "role": candidate.role, "error": measurement.error}
    info |= {"failure": measurement.failure, **measurement.facts}
    return info


def asdict_without_calls(case: Case) -> dict[str, Any]:
    fields = {name: getattr(case, name) for name in case.__dataclass_fields__}
    del fields["problem"], fields["candidates"], fields["tolerance"], fields["max_rounds"]
    return fields | {"dtype": str(case.dtype).removeprefix("torch."), "id": case.id}


def compact(record: dict[str, Any], failures: list[dict[str, Any]]) -> None:
    """Drop from pytest-benchmark's JSON what the rows repeat: raw samples, parameters, options."""
    for benchmark in record["benchmarks"]:
        for name in ("params", "param", "options"):
            benchmark.pop(name, None)
        benchmark["stats"].pop("data", None)
        benchmark["stats"] = rounded(benchmark["stats"])
        benchmark["extra_info"] = rounded(benchmark["extra_info"])
    record["failures"] = rounded(failures)


def rounded(value: Any) -> Any:
    """The same with all floats at five significant digits, which is more than any timing has."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
