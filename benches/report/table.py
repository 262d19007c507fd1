"""A record as text: the summary, one line per case, and the table of all candidates; also as Markdown."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benches.measure.record import Record, Row

#: A line of a table: its style, and its cells.
Line = tuple[str, tuple[str, ...]]

_SUMMARY = "op|case|replaces|time|x eager|x best eager|x compile|of ceiling|peak memory|of eager"
_COLUMNS = "candidate|time|20-80 %|x kernel|rate|of ceiling|peak memory|held|error|correct"
SUMMARY, COLUMNS = tuple(_SUMMARY.split("|")), tuple(_COLUMNS.split("|"))
LEGEND = (
    "time: median of the kernel; x eager, best eager, compile: speed-up over eager as published, the best\n"
    "hand-written eager and torch.compile; of ceiling: share of the copy bandwidth, or of the rate of a\n"
    "large matrix product; peak memory: of the kernel, then of eager as published"
)


def show(record: Record, console: Any = None) -> None:
    """Print the header, the summary and all candidates, in colour where rich is installed.

    Args:
        console: the console of rich to print on; by default the terminal.
    """
    if console is None and importlib.util.find_spec("rich"):
        from rich.console import Console

        console = Console()
    for text, style in lines(record):
        if console is None:
            print(text)
        else:
            console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


def lines(record: Record) -> Iterator[tuple[str, str]]:
    """The report as lines of text with a style of rich each."""
    for text in header(record):
        yield text, "bold yellow" if text.startswith("CAUTION") else ""
    yield "", ""
    yield from _padded(SUMMARY, summary(record), left=3)
    yield LEGEND, "dim"
    widths = _widths([COLUMNS, *(cells(row) for row in record.rows)])
    for rows in cases(record):
        yield "", ""
        yield title(rows[0]), "bold"
        yield from _padded(COLUMNS, [(_style(row), cells(row)) for row in rows], widths)
        for row in rows:
            if row["failure"]:
                yield f"{row['candidate']}: {row['failure']}", "red"


def _widths(texts: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*texts, strict=True)]


def _padded(
    columns: Sequence[str], table: Sequence[Line], widths: Sequence[int] = (), *, left: int = 1
) -> Iterator[tuple[str, str]]:
    """Lines of a table, of which the first ``left`` columns are aligned to the left."""
    widths = widths or _widths([columns, *(texts for _, texts in table)])
    for style, texts in [("dim", columns), *table]:
        padded = [
            text.ljust(width) if place < left else text.rjust(width)
            for place, (text, width) in enumerate(zip(texts, widths, strict=True))
        ]
        yield "  ".join(padded).rstrip(), style


def markdown(record: Record, *, headline: bool = False) -> str:
    """The summary as a Markdown table; ``headline``: the headline cases alone."""
    table = [SUMMARY, ["---"] * 3 + ["---:"] * (len(SUMMARY) - 3)]
    table += [texts for _, texts in summary(record, headline=headline)]
    rows = "\n".join(f"| {' | '.join(texts)} |" for texts in table)
    return f"{header(record)[0]}\n\n{rows}\n"


def _is_headline(row: Row) -> bool:
    """Headline cases under the allocator that users have."""
    return row["headline"] and row["memory"] == "system"


def summary(record: Record, *, headline: bool = False) -> list[Line]:
    """A line for each case that has a kernel and a published baseline."""
    found = []
    for rows in cases(record):
        first = first_of_roles(rows)
        if {"kernel", "papers"} <= first.keys() and (_is_headline(rows[0]) or not headline):
            found.append(_summary_line(first))
    return found


def first_of_roles(rows: list[Row]) -> dict[str, Row]:
    """The first row of each role: of several kernels the one that "auto" takes."""
    return {row["role"]: row for row in reversed(rows)}


def _summary_line(first: dict[str, Row]) -> Line:
    """The line of one case, from the first row of each role."""
    kernel, papers = first["kernel"], first["papers"]
    failed = kernel["failure"] is not None
    speedups = [_speedup(kernel, first.get(role)) for role in ("papers", "hand_written", "compile")]
    share = kernel.get("share_of_ceiling")
    op, _, case = short_title(kernel).partition(", ")
    texts = (
        op,
        case,
        papers["candidate"],
        "failed" if failed else duration(kernel["seconds"]["median"]),
        *speedups,
        f"{share['median']:.0%}" if share else "",
        size(kernel.get("peak_memory")),
        size(papers.get("peak_memory")),
    )
    slower = any("slower" in text for text in speedups)
    return "red" if failed else "yellow" if slower else "", texts


def _speedup(kernel: Row, baseline: Row | None) -> str:
    if baseline is None or kernel["failure"] is not None:
        return ""
    if baseline["failure"] is not None:
        return "failed"
    ratio = baseline["times_kernel"]["median"]
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"
    return f"{text}x slower" if float(text) < 1 else f"{text}x"


def cases(record: Record) -> list[list[Row]]:
    """The rows of each case, failures too; ops first, then training steps, then overheads."""
    groups: dict[str, list[Row]] = {}
    for row in record.rows:
        groups.setdefault(row["id"], []).append(row)
    last = ("training step", "call", "import")
    return sorted(
        groups.values(),
        key=lambda rows: last.index(rows[0]["direction"]) if rows[0]["direction"] in last else -1,
    )


def title(row: Row) -> str:
    """One line that describes a case."""
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
    """Machine, software, ceilings and way of measuring."""
    machine = record.machine
    names = ("torch", "triton", "cuda", "driver", "compiler", "instructions", "python")
    found = [
        f"{machine['name']}, {machine['threads']} threads; commit {record.commit}; {record.date}",
        "; ".join(f"{name} {machine[name]}" for name in names if machine.get(name)),
        f"ceilings (medians): {', '.join(ceilings(record)) or 'none measured'}",
        f"timing: {machine['timing']}",
        f"memory: {machine['memory']}",
    ]
    if machine.get("busy"):
        found.append(f"CAUTION: the machine was busy (load average {machine['load_average']})")
    return found


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
    """One candidate as text; see COLUMNS."""
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    if row["failure"] is not None:
        return row["candidate"], "none", "", "", "", "", "", "", error, "NO"
    spread = row["seconds"]
    share = row.get("share_of_ceiling")
    return (
        row["candidate"],
        duration(spread["median"]),
        f"{duration(spread['p20'])} - {duration(spread['p80'])}",
        f"{row['times_kernel']['median']:.2f}" if "times_kernel" in row else "",
        rate(row),
        f"{share['median']:.0%}" if share else "",
        size(row.get("peak_memory")),
        size(row.get("held_bytes")),
        error,
        "yes" if error else "",
    )


def rate(row: Row) -> str:
    """Achieved bandwidth of the minimum bytes, or operations per second, by the bound of the case."""
    if row["bound"] == "latency" or row["role"] == "different":
        return ""
    work, unit = (row["minimum_bytes"], "GB/s") if row["bound"] == "memory" else (row["flops"], "GFLOP/s")
    return f"{work / row['seconds']['median'] / 1e9:,.1f} {unit}"


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _style(row: Row) -> str:
    if row["failure"]:
        return "red"
    if row["role"] == "kernel":
        return "cyan"
    faster = row["role"] != "different" and row.get("times_kernel", {"median": 1})["median"] < 1
    return "yellow" if faster else ""
