"""Predicted times of the CUDA cases as a table, next to the measured ones where a record has them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from benches.case import Case
from benches.measure.record import Record, Row
from benches.predict.model import Prediction, predict
from benches.registry import registry
from benches.report import table

TITLE = "Predicted, H100: a model of machine code and bytes (benches/predict), not measured"
COLUMNS = ("op", "case", "predicted, H100", "limit", "of copy, predicted", "measured", "measured / predicted")


def show(
    record: Record | None = None, ops: Collection[str] = (), match: str = "", console: Any = None
) -> None:
    """Print the predictions of the chosen cases; nothing where there are none.

    Args:
        record: its times of the compiled kernels stand next to the predictions, if they are of an H100.
        ops: those to show; all if empty.
        match: only cases whose name contains this.
        console: of rich; by default plain print.
    """
    for text in lines(record, ops, match):
        print(text) if console is None else console.print(text, markup=False, highlight=False)


def lines(record: Record | None = None, ops: Collection[str] = (), match: str = "") -> Iterator[str]:
    measured = _measured(record)
    rows = [
        _cells(case, prediction, measured.get(case.id))
        for case in registry("cuda")
        if (not ops or case.op in ops) and match in case.id and (prediction := predict(case)) is not None
    ]
    if not rows:
        return
    columns = COLUMNS if measured else COLUMNS[:5]
    widths = [max(len(row[place]) for row in (COLUMNS, *rows)) for place in range(len(columns))]
    yield ""
    yield TITLE
    if record is not None and measured:
        name, commit = record.machine["name"], record.commit
        yield f"measured: {name}, {record.date}, commit {commit}, perhaps other kernels"
    for row in (columns, *rows):
        cells = zip(row[: len(columns)], widths, strict=True)
        yield "  ".join(
            text.ljust(width) if place < 2 else text.rjust(width) for place, (text, width) in enumerate(cells)
        ).rstrip()


def _measured(record: Record | None) -> dict[str, float]:
    """Seconds of the compiled kernels by case, if the record is of an H100."""
    if record is None or "H100" not in str(record.machine.get("name", "")):
        return {}
    return {row["id"]: row["seconds"]["median"] for row in record.rows if _is_native(row)}


def _is_native(row: Row) -> bool:
    return row["candidate"] == "mmkernels native" and row["failure"] is None and row["device"] == "cuda"


def _cells(case: Case, prediction: Prediction, measured: float | None) -> tuple[str, ...]:
    name = ", ".join(
        part
        for part in (case.shape, case.variant, case.direction.replace("_", " + "), str(case.dtype)[6:])
        if part
    )
    return (
        case.op,
        name,
        table.duration(prediction.seconds),
        prediction.limit,
        f"{prediction.share_of_copy:.0%}" if case.bound == "memory" else "",
        "" if measured is None else table.duration(measured),
        "" if measured is None else f"{measured / prediction.seconds:.2f}",
    )
