"""Tables and figures from recorded results: ``python -m benches.report benches/results/*.json``."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Sequence

from benches.report import figure, page
from benches.report.table import (
    COLUMNS,
    TARGET_COLUMNS,
    Record,
    cases,
    cells,
    header,
    load,
    lost,
    target_cells,
    target_lines,
    title,
)
from benches.report.targets import Row


def print_record(record: Record) -> None:
    """The tables on the terminal, in colour where rich is installed."""
    widths = _widths([COLUMNS, *map(cells, record.rows)])
    emit = _printer()
    for text in header(record):
        emit(text, None)
    for name, rows in cases(record):
        emit("", None)
        emit(name, "bold")
        emit(_line(COLUMNS, widths), "dim")
        for row in rows:
            emit(_line(cells(row), widths), _style(row))
    for row in record.rows:
        if row["failure"]:
            emit(f"\n{title(row)}, {row['candidate']}: {row['failure']}", "red")
    _print_targets(record, emit)


def _print_targets(record: Record, emit: Callable[[str, str | None], None]) -> None:
    lines = [target_cells(*line) for line in target_lines(record)]
    widths = _widths([TARGET_COLUMNS, *lines])
    emit("", None)
    emit(_line(TARGET_COLUMNS, widths), "dim")
    for line in lines:
        emit(_line(line, widths), {"met": "green", "missed": "yellow"}.get(line[-1]))


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=pathlib.Path, help="files in benches/results")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("reports"), help="folder")
    parser.add_argument("--no-figure", action="store_true", help="where matplotlib is not installed")
    arguments = parser.parse_args()
    write(arguments.results, arguments.output, figures=not arguments.no_figure)
    return 0


def write(paths: Sequence[pathlib.Path], folder: pathlib.Path, *, figures: bool = True) -> pathlib.Path:
    """Print the tables, write a figure for each record and one page for all; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    records: list[tuple[Record, pathlib.Path | None]] = []
    for path in paths:
        record = load(path)
        print_record(record)
        image = folder / f"{path.stem}.png" if figures else None
        if image is not None:
            figure.draw(record, image)
            print(f"\nfigure: {image}")
        records.append((record, image))
    result = folder / "benchmarks.html"
    result.write_text(page.render(records))
    print(f"page: {result}")
    return result


if __name__ == "__main__":
    sys.exit(main())
