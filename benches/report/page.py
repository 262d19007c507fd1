"""A self-contained HTML page of one or more records, and their figures."""

from __future__ import annotations

import base64
import importlib.util
import io
import pathlib
from collections.abc import Mapping
from html import escape

from benches.measure.record import Record
from benches.report import figure, table

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mmkernels benchmarks</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 14px/1.45 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 1180px;
  margin: 32px auto; padding: 0 20px; }}
img {{ width: 100%; }} pre {{ overflow-x: auto; font-size: 12px; }}
</style></head><body><h1>mmkernels benchmarks</h1>
<p>Every candidate is first checked against float64; a wrong one gets no time. Then all are timed, interleaved
in shuffled order, together with a copy or a matrix product as the ceiling. Blue lines are the kernels; yellow
lines are baselines that are faster than the kernel, and cases that have one.</p>
{sections}</body></html>
"""


def write(records: Mapping[pathlib.Path, Record], folder: pathlib.Path) -> pathlib.Path:
    """Write a figure for each record and one page for all into ``folder``; returns the path of the page.

    Raises:
        SystemExit: matplotlib or rich is not installed.
    """
    for package in ("matplotlib", "rich"):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"the page needs {package}: pip install {package}")
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for path, record in records.items():
        image = folder / f"{path.stem}.png"
        has_ceiling = any("share_of_ceiling" in row for row in record.rows)
        if has_ceiling:
            figure.draw(record, image)
        sections.append(_section(path.stem, record, image if has_ceiling else None))
    result = folder / "benchmarks.html"
    result.write_text(_PAGE.format(sections="".join(sections)))
    return result


def _section(name: str, record: Record, image: pathlib.Path | None) -> str:
    """The figure, and the tables as on the terminal, in colour."""
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), force_terminal=True, width=1000)
    table.show(record, console)
    text = console.export_html(code_format="{code}", inline_styles=True)
    data = base64.b64encode(image.read_bytes()).decode() if image else ""
    shown = (
        f'<img alt="Roofline and shares of the ceilings" src="data:image/png;base64,{data}">' if image else ""
    )
    return f"<h2>{escape(name)}</h2>{shown}<pre>{text}</pre>"
