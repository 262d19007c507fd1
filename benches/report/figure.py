"""Two figures of a record: the roofline of all rows, and a small picture of the headline cases."""

from __future__ import annotations

import math
import pathlib
from typing import TYPE_CHECKING, Any

from benches.measure.record import Record, Row
from benches.report import table
from benches.report.table import cases, ceilings, ceilings_by_kind, duration, first_of_roles, short_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart; the shapes differ too.
STYLE = {
    "mmkernels native": ("#0072B2", "o"),
    "mmkernels triton": ("#56B4E9", "P"),
    "compile": ("#D55E00", "D"),
    "hand_written": ("#E69F00", "s"),
    "papers": ("#7F7F7F", "^"),
    "library": ("#009E73", "v"),
}
#: The bars of the picture, from top to bottom, with their keys in STYLE.
BARS = {"papers": "papers", "compile": "compile", "kernel": "mmkernels native"}
MARKER: dict[str, Any] = {"ms": 7, "mec": "white", "mew": 0.6}
LABEL = {
    "compile": "torch.compile",
    "hand_written": "best hand-written eager",
    "papers": "eager, as published",
    "library": "library",
}


def draw(record: Record, path: pathlib.Path) -> None:
    """Write the figure as PNG: the classical roofline, and each case's share of its ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in record.rows if row["failure"] is None and "share_of_ceiling" in row]
    count = len({row["id"] for row in rows})
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(15, max(5.5, 1.8 + 0.34 * count)), width_ratios=(1, 1.25), layout="constrained"
        )
        _roofline(left, record, rows)
        _shares(right, rows)
        found = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
        labels = [label for label in (LABEL.get(key, key) for key in STYLE) if label in found]
        handles = [found[label] for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        name, threads = record.machine["name"], record.machine["threads"]
        figure.suptitle(f"{name}, {threads} threads, {record.date}, commit {record.commit}", fontsize=11)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _key(row: Row) -> str:
    # A variant of a kernel is named behind a comma.
    name = row["candidate"].partition(",")[0]
    return name if name in STYLE else row["role"]


def _roofline(axes: Axes, record: Record, rows: list[Row]) -> None:
    intensities = [row["flops"] / row["minimum_bytes"] for row in rows]
    low = 10.0 ** math.floor(math.log10(min(intensities)))
    high = 10.0 ** math.ceil(math.log10(max(intensities)))
    _draw_ceilings(axes, ceilings_by_kind(record), low, high)
    # The kernels last, so that they lie on top.
    for row in sorted(rows, key=lambda r: r["role"] == "kernel"):
        colour, marker = STYLE[_key(row)]
        rate = row["flops"] / row["seconds"]["median"] / 1e9
        label = LABEL.get(_key(row), _key(row))
        intensity = row["flops"] / row["minimum_bytes"]
        axes.plot(intensity, rate, marker, color=colour, label=label, alpha=0.9, **MARKER)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(lambda *_: "")
    axes.set(xlabel="arithmetic intensity (operations per minimum byte)", ylabel="GFLOP/s")
    axes.set_title("Roofline, with ceilings measured in the same run", loc="left")
    # Nothing lies below the roof where it is flat: rows bound by arithmetic come near it.
    axes.text(0.98, 0.02, "\n".join(ceilings(record)), transform=axes.transAxes, ha="right")
    axes.grid(True, which="major", color="#E5E5E5", lw=0.6)
    axes.set_axisbelow(True)


def _draw_ceilings(axes: Axes, rates: dict[str, float], low: float, high: float) -> None:
    copy = rates.get("copy")
    peaks = [rate for kind, rate in rates.items() if kind != "copy"]
    if copy is not None:
        end = min(high, max(peaks) / copy) if peaks else high
        axes.plot([low, end], [low * copy / 1e9, end * copy / 1e9], color="black", lw=1.2)
    for peak in peaks:
        start = low if copy is None else max(low, peak / copy)
        axes.plot([start, high], [peak / 1e9] * 2, color="black", lw=1.2)


def _shares(axes: Axes, rows: list[Row]) -> None:
    """One line per case, its candidates side by side on the share of the ceiling."""
    bounds = {"memory": "100 % = copy bandwidth", "compute": "100 % = peak of matrix products"}
    names, ticks, position, top = [], [], 0.0, 1.0
    for bound, unit in bounds.items():
        cases: dict[str, list[Row]] = {}
        for row in rows:
            if row["bound"] == bound:
                cases.setdefault(row["id"], []).append(row)
        if cases:
            axes.text(0.01, position, unit, va="center", color="#555555", style="italic")
            position += 1
        for group in cases.values():
            ticks.append(position)
            names.append(short_title(group[0]) + _kernel_time(group))
            top = max(top, *(_line(axes, position, row) for row in group))
            position += 1
    axes.axvline(1.0, color="black", lw=1.0)
    axes.set(xlim=(0, math.ceil(top * 10 + 0.2) / 10), ylim=(position - 0.4, -0.7))
    axes.set_yticks(ticks, names)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel(
        "share of the ceiling (whiskers: 20 % and 80 % quantiles;\nin brackets: median time of the kernel)"
    )
    axes.set_title("Share of the ceiling by case", loc="left")
    axes.grid(True, axis="x", color="#E5E5E5", lw=0.6)
    axes.set_axisbelow(True)


def _kernel_time(rows: list[Row]) -> str:
    kernel = next((row for row in rows if row["role"] == "kernel"), None)
    return "" if kernel is None else f"  ({duration(kernel['seconds']['median'])})"


def _line(axes: Axes, position: float, row: Row) -> float:
    colour, marker = STYLE[_key(row)]
    share = row["share_of_ceiling"]
    order = 4 if row["role"] == "kernel" else 3
    axes.plot([share["p20"], share["p80"]], [position] * 2, color=colour, lw=1.6, alpha=0.5, zorder=2)
    axes.plot(share["median"], position, marker, color=colour, zorder=order, **MARKER)
    return share["p80"]


def picture(record: Record, path: pathlib.Path) -> None:
    """Write a small picture, SVG or PNG, of the headline cases: bars of time and of peak memory.

    The bars of a case are drawn to the scale of eager's. Colours are fixed, on a white card, so that they
    read on light and dark pages.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _headline(record)
    if not groups:
        raise ValueError("the record has no headline case with a kernel and a published baseline")
    hidden = {f"axes.spines.{side}": False for side in ("left", "top", "right", "bottom")}
    with pyplot.rc_context({"font.size": 9, "svg.hashsalt": "mmkernels", **hidden}):
        inches = (10, 1 + 0.52 * len(groups))
        figure, (left, right) = pyplot.subplots(1, 2, figsize=inches, sharey=True, layout="constrained")
        _bars(left, groups, "time", lambda row: row["seconds"]["median"], duration)
        _bars(right, groups, "peak memory", lambda row: row["peak_memory"], table.size)
        left.set_yticks(range(len(groups)), [_case_name(group["kernel"]) for group in groups])
        left.set_ylim(len(groups) - 0.45, -0.55)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(BARS), frameon=False)
        machine = record.machine
        source = f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}, {record.date}"
        figure.supxlabel(f"{source}; shorter is better", fontsize=8, color="#57606A")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def _headline(record: Record) -> list[dict[str, Row]]:
    """The headline cases of ops and methods, each with its first row of every role."""
    found = []
    for rows in cases(record):
        group = first_of_roles([row for row in rows if row["failure"] is None])
        shown = rows[0]["headline"] and rows[0]["memory"] == "system" and rows[0]["direction"] != "call"
        if shown and {"kernel", "papers"} <= group.keys():
            found.append(group)
    return found


def _case_name(row: Row) -> str:
    variant = f" ({row['variant'].replace('+', ', ')})" if row["variant"] else ""
    return f"{row['op']}{variant}\n{row['direction'].replace('_', ' + ')}"


def _bars(axes: Axes, groups: list[dict[str, Row]], name: str, value: Any, text: Any) -> None:
    height, longest = 0.26, 1.0
    for place, (role, key) in enumerate(BARS.items()):
        for position, group in enumerate(groups):
            if role not in group:
                continue
            share = value(group[role]) / value(group["papers"])
            longest = max(longest, share)
            y = position + (place - 1) * height
            label = LABEL.get(key, "mmkernels") if position == 0 else None
            axes.barh(y, share, height * 0.9, color=STYLE[key][0], label=label)
            weight = "bold" if role == "kernel" else "normal"
            axes.text(share + 0.015, y, text(value(group[role])), va="center", fontsize=7.5, weight=weight)
    axes.set(xlim=(0, longest * 1.16), xticks=[])
    axes.tick_params(axis="y", length=0)
    axes.set_title(name, loc="left", fontsize=10, weight="bold")
    axes.axvline(0, color="#57606A", lw=0.8)
