"""Records: results files in pytest-benchmark's JSON format, one entry per candidate of each case."""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benches.case import Case
from benches.measure import machine
from benches.measure.harness import Measurement

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One results file: the machine, and the rows, of which those without a time have a ``failure``."""

    machine: dict[str, Any]
    commit: str
    date: str
    rows: list[Row]


def header(device: str) -> dict[str, Any]:
    """Machine, commit and date. To be made before the measuring, which adds load and changes the record."""
    import pytest_benchmark
    from pytest_benchmark.utils import get_commit_info

    return {
        "machine_info": machine.facts(device),
        "commit_info": get_commit_info("mmkernels"),
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "version": pytest_benchmark.__version__,
    }


def write(path: pathlib.Path, header: dict[str, Any], measured: Sequence[tuple[Case, Measurement]]) -> None:
    """Write a results file, which ``pytest-benchmark compare`` reads too; one row per line, to diff."""
    from pytest_benchmark.stats import Stats

    benchmarks, failures = [], []
    for case, measurement in measured:
        row = describe(case, measurement)
        if measurement.failure is not None:
            failures.append(row)
            continue
        stats = Stats()
        stats.data = measurement.samples
        name = f"{case.id}: {measurement.candidate.name}"
        entry = {"group": case.id, "name": name, "fullname": name, "extra_info": row}
        benchmarks.append(entry | {"stats": stats.as_dict() | {"iterations": 1}})
    parts = [f'"{key}": {json.dumps(value)}' for key, value in header.items()]
    for key, items in (("benchmarks", benchmarks), ("failures", failures)):
        lines = ",\n  ".join(json.dumps(rounded(item), separators=(",", ":")) for item in items)
        parts.append(f'"{key}": [\n  {lines}\n ]' if items else f'"{key}": []')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n " + ",\n ".join(parts) + "\n}\n")


def load(path: str | pathlib.Path) -> Record:
    """Read a results file."""
    content = json.loads(pathlib.Path(path).read_text())
    commit = content["commit_info"]
    dirty = " with uncommitted changes" if commit.get("dirty") else ""
    return Record(
        machine=content["machine_info"],
        commit=commit.get("id", "unknown")[:12] + dirty,
        date=content["datetime"][:10],
        rows=[benchmark["extra_info"] for benchmark in content["benchmarks"]] + content["failures"],
    )


def describe(case: Case, measurement: Measurement) -> Row:
    """The facts of a row; reports read nothing else of it."""
    left_out = ("problem", "candidates", "tolerance", "max_rounds")
    row = {name: getattr(case, name) for name in case.__dataclass_fields__ if name not in left_out}
    row |= {"dtype": str(case.dtype).removeprefix("torch."), "id": case.id}
    row |= {"candidate": measurement.candidate.name, "role": measurement.candidate.role}
    return row | {"error": measurement.error, "failure": measurement.failure, **measurement.facts}


def rounded(value: Any) -> Any:
    """The same with five significant digits in all floats, which is more than any timing has."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
