"""A self-contained HTML page of one or more records."""

from __future__ import annotations

import base64
import pathlib
from collections.abc import Sequence
from html import escape

from benches.report.table import (
    COLUMNS,
    TARGET_COLUMNS,
    Record,
    cases,
    cells,
    header,
    lost,
    target_cells,
    target_lines,
    title,
)
from benches.report.targets import Row

_CSS = """
body { font: 14px/1.45 system-ui, sans-serif; color: #1b1f24; max-width: 1180px; margin: 32px auto;
  padding: 0 20px; }
h1 { font-size: 22px; } h2 { font-size: 18px; margin-top: 40px; } h3 { font-size: 15px; margin: 28px 0 6px; }
p.facts { color: #57606a; margin: 2px 0; }
p.caution { background-color: #fff3cd; padding: 6px 10px; border-radius: 4px; }
img { width: 100%; margin: 16px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: #57606a; font-weight: 500; border-bottom: 1px solid #d0d7de; }
tr.case td { font-weight: 600; padding-top: 16px; border-bottom: 1px solid #d0d7de; white-space: normal; }
tr.kernel td { background-color: #eaf3fb; }
tr.lost td { background-color: #fff4e5; }
tr.failed td { background-color: #fdecea; }
td.bar { background-repeat: no-repeat; background-size: var(--share) 100%;
  background-image: linear-gradient(#0072b233, #0072b233); }
td.met { color: #1a7f37; font-weight: 600; } td.missed { color: #b35900; font-weight: 600; }
"""


def render(records: Sequence[tuple[Record, pathlib.Path | None]]) -> str:
    """HTML of records, each with the path of its figure, which is embedded."""
    body = "".join(_section(record, figure) for record, figure in records)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>mmkernels benchmarks</title><style>{_CSS}</style></head>"
        f"<body><h1>mmkernels benchmarks</h1>{_LEGEND}{body}</body></html>\n"
    )


_LEGEND = (
    "<p>Every candidate is first checked against float64; what is wrong gets no time. Then all are timed in "
    "turns, in shuffled order, together with a copy or a matrix product as the ceiling. Blue rows are the "
    "kernels, orange rows are baselines that were faster than the kernel.</p>"
)


def _section(record: Record, figure: pathlib.Path | None) -> str:
    facts = "".join(
        f'<p class="{"caution" if line.startswith("CAUTION") else "facts"}">{escape(line)}</p>'
        for line in header(record)[1:]
    )
    image = ""
    if figure is not None:
        data = base64.b64encode(figure.read_bytes()).decode()
        image = (
            f'<img alt="Roofline and share of the ceiling of each case" src="data:image/png;base64,{data}">'
        )
    return (
        f"<h2>{escape(header(record)[0])}</h2>{facts}{image}"
        f"<h3>Targets</h3>{_targets(record)}<h3>All rows</h3>{_table(record)}"
    )


def _targets(record: Record) -> str:
    lines = []
    for target, value in target_lines(record):
        *texts, verdict = target_cells(target, value)
        row = "".join(f"<td>{escape(text)}</td>" for text in texts)
        lines.append(f'<tr>{row}<td class="{verdict}">{verdict}</td></tr>')
    return _wrap(TARGET_COLUMNS, lines)


def _table(record: Record) -> str:
    lines = []
    for _, rows in cases(record):
        lines.append(f'<tr class="case"><td colspan="{len(COLUMNS)}">{escape(title(rows[0]))}</td></tr>')
        lines += map(_row, rows)
    return _wrap(COLUMNS, lines)


def _row(row: Row) -> str:
    kind = (
        "failed" if row["failure"] else "kernel" if row["role"] == "kernel" else "lost" if lost(row) else ""
    )
    texts = []
    for name, text in zip(COLUMNS, cells(row), strict=True):
        bar = ""
        if name == "of ceiling" and text:
            bar = f' class="bar" style="--share: {min(row["share_of_ceiling"]["median"], 1):.1%}"'
        texts.append(f"<td{bar}>{escape(text)}</td>")
    note = (
        f'<tr class="failed"><td colspan="{len(COLUMNS)}">{escape(row["failure"])}</td></tr>'
        if row["failure"]
        else ""
    )
    return f'<tr class="{kind}">{"".join(texts)}</tr>{note}'


def _wrap(columns: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'
