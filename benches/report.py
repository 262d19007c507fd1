"""Tables and figures from recorded results: ``python -m benches.report benches/results/*.json --output reports``."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benches.targets import TARGETS, Row, Target

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
    direction = row["direction"].replace("_", " + ")
    what = [row["op"], row["shape"], row["variant"], direction, row["dtype"], sizes]
    if row["memory"] != "system":
        what.append(f"{row['memory']} memory")
    return "  ".join(part for part in what if part)


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
    """The measured copy bandwidth and matmul rates."""
    found: dict[str, list[float]] = {}
    for row in record.rows:
        if "ceiling" in row:
            kind = "copy" if row["bound"] == "memory" else f"matmul {row['dtype']}"
            found.setdefault(kind, []).append(row["ceiling"])
    units = {kind: "GB/s" if kind == "copy" else "GFLOP/s" for kind in found}
    return [f"{kind} {sorted(v)[len(v) // 2] / 1e9:,.1f} {units[kind]}" for kind, v in found.items()]


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
    if row["bound"] == "latency":
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
        and row["role"] != "kernel"
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


def print_record(record: Record) -> None:
    """The tables on the terminal, in colour where rich is installed."""
    tables = [
        (name, [cells(row) for row in rows], [_style(row) for row in rows]) for name, rows in cases(record)
    ]
    widths = [
        max(len(line[i]) for line in [COLUMNS, *(c for _, t, _ in tables for c in t)])
        for i in range(len(COLUMNS))
    ]
    emit = _printer()
    for line in header(record):
        emit(line, None)
    for name, table, styles in tables:
        emit("", None)
        emit(name, "bold")
        emit(_line(COLUMNS, widths), "dim")
        for line, style in zip(table, styles, strict=True):
            emit(_line(line, widths), style)
    for row in record.rows:
        if row["failure"]:
            emit(f"\n{title(row)}, {row['candidate']}: {row['failure']}", "red")
    _print_targets(record, emit)


def _print_targets(record: Record, emit: Callable[[str, str | None], None]) -> None:
    lines = [target_cells(*line) for line in target_lines(record)]
    widths = [max(len(line[i]) for line in [TARGET_COLUMNS, *lines]) for i in range(len(TARGET_COLUMNS))]
    emit("", None)
    emit(_line(TARGET_COLUMNS, widths), "dim")
    for line in lines:
        emit(_line(line, widths), {"met": "green", "missed": "yellow"}.get(line[-1]))


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    """The first column to the left, the others to the right."""
    padded = [text.rjust(width) for text, width in zip(texts[1:], widths[1:], strict=True)]
    return "  ".join((texts[0].ljust(widths[0]), *padded)).rstrip()


def _style(row: Row) -> str | None:
    if row["failure"]:
        return "red"
    return "cyan" if row["role"] == "kernel" else "yellow" if lost(row) else None


def _printer() -> Callable[[str, str | None], None]:
    if importlib.util.find_spec("rich") is None:
        return lambda text, _: print(text)
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    return lambda text, style: console.print(Text(text, style=style or ""))
