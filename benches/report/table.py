"""A results file as text: its header, its rows as cells of a table, its targets."""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benches.report.targets import TARGETS, Row, Target

COLUMNS = ("candidate", "time", "20-80 %", "x kernel", "rate", "of ceiling", "extra memory", "error", "right")


@dataclass(frozen=True)
class Record:
    """One results file: the machine, and the rows, of which those without a time have a ``failure``."""

    machine: dict[str, Any]
    commit: str
    date: str
    rows: list[Row]


def load(path: str | pathlib.Path) -> Record:
    """Read a results file that ``python -m benches`` wrote."""
    content = json.loads(pathlib.Path(path).read_text())
    commit = content["commit_info"]
    rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]] + content["failures"]
    return Record(
        machine=content["machine_info"],
        commit=commit.get("id", "unknown")[:12]
        + (" with uncommitted changes" if commit.get("dirty") else ""),
        date=content["datetime"][:10],
        rows=rows,
    )


def cases(record: Record) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each case, under its title, in the order measured; failures stay with their case."""
    groups: dict[str, list[Row]] = {}
    for row in record.rows:
        groups.setdefault(row["id"], []).append(row)
    for rows in groups.values():
        yield title(rows[0]), rows


def title(row: Row) -> str:
    """One line that says what a case is."""
    sizes = " ".join(f"{name}={size}" for name, size in row["sizes"].items())
    dtype = row["dtype"] if row["dtype"] == "float32" else ""
    return "  ".join(part for part in (short_title(row), dtype, sizes) if part)


def short_title(row: Row) -> str:
    """The same without the sizes, and without the dtype if that is float32."""
    parts = [row["op"], row["shape"], row["variant"], row["direction"].replace("_", " + ")]
    if row["dtype"] != "float32":
        parts.append(row["dtype"])
    if row["memory"] != "system":
        parts.append(f"{row['memory']} memory")
    return ", ".join(part for part in parts if part)


def header(record: Record) -> list[str]:
    """What the numbers were measured on."""
    machine = record.machine
    names = ("torch", "triton", "cuda", "driver", "compiler", "instructions", "python")
    software = [f"{name} {machine[name]}" for name in names if machine.get(name)]
    lines = [
        f"{machine['name']}, {machine['threads']} threads; commit {record.commit}; {record.date}",
        "; ".join(software),
        f"ceilings (medians): {', '.join(ceilings(record)) or 'none measured'}",
        f"timing: {machine['timing']}",
        f"memory: {machine['memory']}",
    ]
    if machine.get("busy"):
        lines.append(
            f"CAUTION: the machine was busy (load average {machine['load_average']} before the start)"
        )
    return lines


def ceilings(record: Record) -> list[str]:
    """The measured copy bandwidth and matmul rates, as text."""
    return [
        f"{kind} {rate / 1e9:,.1f} {'GB/s' if kind == 'copy' else 'GFLOP/s'}"
        for kind, rate in ceilings_by_kind(record).items()
    ]


def ceilings_by_kind(record: Record) -> dict[str, float]:
    """ "copy" in bytes per second, "matmul <dtype>" in operations per second: the median over all cases."""
    found: dict[str, list[float]] = {}
    for row in record.rows:
        if "ceiling" in row:
            kind = "copy" if row["bound"] == "memory" else f"matmul {row['dtype']}"
            found.setdefault(kind, []).append(row["ceiling"])
    return {kind: statistics.median(rates) for kind, rates in found.items()}


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table as text; see COLUMNS."""
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    if row["failure"] is not None:
        return row["candidate"], "none", "", "", "", "", "", error, "NO"
    spread = row["seconds"]
    share = row.get("share_of_ceiling")
    memory = row.get("peak_memory")
    return (
        row["candidate"],
        duration(spread["median"]),
        f"{duration(spread['p20'])} - {duration(spread['p80'])}",
        f"{row['times_kernel']['median']:.2f}" if "times_kernel" in row else "",
        rate(row),
        f"{share['median']:.0%}" if share else "",
        "" if memory is None else f"{memory / 1e6:,.1f} MB",
        error,
        "yes" if error else "",
    )


def rate(row: Row) -> str:
    """Achieved bandwidth of the minimum bytes, or operations per second, by what bounds the case."""
    if row["bound"] == "latency" or row["role"] == "different":
        return ""
    work, unit = (row["minimum_bytes"], "GB/s") if row["bound"] == "memory" else (row["flops"], "GFLOP/s")
    return f"{work / row['seconds']['median'] / 1e9:,.1f} {unit}"


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def lost(row: Row) -> bool:
    """A baseline that was faster than the kernel."""
    return (
        row["failure"] is None
        and row["role"] not in ("kernel", "different")
        and row.get("times_kernel", {"median": 1})["median"] < 1
    )


def target_lines(record: Record) -> list[tuple[Target, float | None]]:
    """The targets for this device, with what was measured."""
    device = record.machine["device"]
    asked = [target for target in TARGETS if target.rows.get("device", device) == device]
    return [(target, target.measured(record.rows)) for target in asked]


def target_cells(target: Target, value: float | None) -> tuple[str, str, str, str]:
    wanted = f"{'<=' if target.at_most else '>='} {_figure(target, target.wanted)}"
    if value is None:
        return target.text, wanted, "not measured", ""
    return target.text, wanted, _figure(target, value), "met" if target.met(value) else "missed"


def _figure(target: Target, value: float) -> str:
    if target.figure == "share":
        return f"{value:.0%}"
    if target.figure == "seconds":
        return duration(value)
    return f"{value:.3g}x"


TARGET_COLUMNS = ("target", "asked", "measured", "")
