"""`from_manifest`: a file with a line per clip, CSV or JSON lines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .building import build
from .columns import Kind, check_kind, find_column
from .errors import DataError, counted, first, shortened
from .finding import Finder, check_no_address
from .json_lines import JSON_SUFFIXES, read_json_lines
from .names import SPLIT_COLUMNS, VALIDATION, is_text, normal, part_of, transcript
from .recordings import SPLITS, Recordings
from .rows import Row, identity, relative_name
from .table import Table, read_table
from .unusable import Unusable

_EXPECTED = "expected path, label or text, and optionally split and speaker"


@dataclass(frozen=True)
class _Line:
    """A line for a clip: `value` is the label or the transcript; the rest is empty without such a column."""

    number: int
    path: str
    value: str
    split: str
    speaker: str


def from_manifest(
    path: str | Path,
    *,
    kind: Kind | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    strict: bool = False,
) -> Recordings:
    """Read a list of clips with `path`, `label` or `text` and, optionally, `split` and `speaker`.

    A CSV with a header, separated by commas, semicolons, tabs or bars, or, called `.jsonl` or `.json`, a JSON
    object per line; in UTF-8, with names of columns and parts in any case. `text` makes transcribed
    recordings. Relative paths are resolved against the folder of the manifest. Without a `split` column the
    split is drawn as in `from_folder`; where speakers are given, none is in both parts. Comments (#) and
    other columns are left out, counted in `Recordings.ignored` and logged. docs/data.md has all rules.

    Args:
        path: the manifest.
        kind: "label" or "text", where it has both; None takes the one that is there.
        test_fraction: share of the test part, where the split is drawn.
        seed: of the draw.
        strict: whether audio that cannot be read and empty transcripts are errors, not left out and counted.

    DataError, naming the line, for missing columns, values or files, for a file that is listed twice, if more
    than half of the clips cannot be used, and as in `from_folder`. ValueError for a bad `kind` or
    `test_fraction`.
    """
    check_kind(kind)
    manifest = Path(os.path.expanduser(path))
    table = (read_json_lines if manifest.suffix.lower() in JSON_SUFFIXES else read_table)(manifest)
    columns = _columns(manifest, table, kind)
    unusable = Unusable(strict)
    lines = list(_lines(manifest, table, columns))
    _check_splits(manifest, lines)
    rows = _rows(manifest, lines, "text" if "text" in columns else "label", unusable)
    ignored = [counted(table.comments, "comment line")] if table.comments else []
    if others := _other_columns(table, columns):
        ignored.append(f"{'column' if len(others) == 1 else 'columns'} {shortened(others, 6)}")
    return build(
        manifest.stem,
        rows,
        ignored=ignored,
        unusable=unusable,
        total=len(lines),
        test_fraction=test_fraction,
        seed=seed,
    )


def _columns(manifest: Path, table: Table, kind: Kind | None) -> dict[str, int]:
    """The indices of path, of label or text and, if they are there, of split and speaker."""
    found = {name: find_column(manifest, name, table.header) for name in ("path", "split", "speaker")}
    columns = {name: index for name, index in found.items() if index is not None}
    if "path" not in columns:
        raise _missing(manifest, table, "'path'")
    columns.update([_value_column(manifest, table, kind)])
    if "split" not in columns:
        _check_no_other_split(manifest, table, columns)
    return columns


def _value_column(manifest: Path, table: Table, kind: Kind | None) -> tuple[str, int]:
    """ "label" or "text", and the index of its column; one without any value counts if it is alone."""
    kinds: tuple[Kind, ...] = ("label", "text") if kind is None else (kind,)
    found = {name: find_column(manifest, name, table.header) for name in kinds}
    columns = {name: index for name, index in found.items() if index is not None}
    if not columns:
        raise _missing(manifest, table, " or ".join(map(repr, kinds)))
    filled = {
        name: line
        for name, index in columns.items()
        if (line := next((line for line, cells in table.records if cells[index].strip()), None))
    }
    if len(filled) > 1:
        raise DataError(
            f"{manifest} has both labels and transcripts (label in line {filled['label']}, "
            f"text in line {filled['text']}); keep one of them, or ask for kind='label' or kind='text'"
        )
    name = next(iter(filled or columns))
    return name, columns[name]


def _missing(manifest: Path, table: Table, column: str) -> DataError:
    header = ",".join(table.header[:8]) + (",..." if len(table.header) > 8 else "")
    where = "" if manifest.suffix.lower() in JSON_SUFFIXES else " in the first line"
    return DataError(f"{manifest} lacks the column {column}; {_EXPECTED}{where}, found {header or 'no text'}")


def _check_no_other_split(manifest: Path, table: Table, columns: dict[str, int]) -> None:
    """A split under another name must not give way to a drawn one."""
    for index, name in enumerate(table.header):
        if index in columns.values():
            continue
        parts = {part_of(cells[index]) for _, cells in table.records}
        if set(SPLITS) <= parts and None not in parts:
            raise DataError(f"{manifest} has train and test in the column {name!r}; call it split")
        if name in SPLIT_COLUMNS:
            raise DataError(
                f"{manifest} has the column {name!r}, which looks like a split; call it split, with train "
                "and test in it, or remove it to have the test part drawn"
            )


def _other_columns(table: Table, columns: dict[str, int]) -> list[str]:
    """The names of the columns that are not read, but for empty ones without a name."""
    return [
        name or "(unnamed)"
        for index, name in enumerate(table.header)
        if index not in columns.values() and (name or any(cells[index].strip() for _, cells in table.records))
    ]


def _lines(manifest: Path, table: Table, columns: dict[str, int]) -> Iterator[_Line]:
    if not table.records:
        raise DataError(f"{manifest} lists no clip; expected a line per clip, with path and label or text")
    width = len(table.header)
    kind = "text" if "text" in columns else "label"
    for number, cells in table.records:
        if any(cell.strip() for cell in cells[width:]):
            raise DataError(
                f"{manifest} line {number} has {len(cells)} cells and the header has {width}; "
                "put quotes around text that holds a separator"
            )
        check_no_offset(manifest, number, table.header, cells)
        values = {name: cells[index] for name, index in columns.items()}
        # A transcript may be empty: there are recordings in which nobody speaks.
        for name in ("path", "label"):
            if name in values and not values[name].strip():
                raise DataError(f"{manifest} line {number} has no {name}; every line needs path and {kind}")
        for name in (kind, "speaker"):
            if not is_text(values.get(name, "")):
                raise DataError(f"{manifest} line {number} has characters in {name} that Unicode lacks")
        if "split" in values and part_of(values["split"]) is None:
            raise _bad_split(manifest, number, values["split"])
        yield _Line(
            number, values["path"], values[kind], values.get("split", ""), normal(values.get("speaker", ""))
        )


def check_no_offset(manifest: Path, number: int, header: Sequence[str], cells: Sequence[str]) -> None:
    """NeMo's lists may mean pieces of long recordings, whose texts are not those of the files."""
    if "offset" not in header:
        return
    offset = cells[header.index("offset")].strip()
    with contextlib.suppress(ValueError):
        if offset and float(offset) != 0:
            raise DataError(
                f"{manifest} line {number} has the offset {offset}, and whole files are read; "
                "cut the pieces out, and list their files"
            )


def _check_splits(manifest: Path, lines: Sequence[_Line]) -> None:
    """A validation part must be next to train and test."""
    parts = {part_of(line.split) for line in lines}
    held_out = [line for line in lines if part_of(line.split) == VALIDATION]
    if held_out and not set(SPLITS) <= parts:
        raise _bad_split(manifest, held_out[0].number, held_out[0].split)


def _bad_split(manifest: Path, number: int, split: str) -> DataError:
    return DataError(
        f"{manifest} line {number} has split {split.strip()!r}; allowed are train and test, "
        "and validation next to both"
    )


def _rows(manifest: Path, lines: Sequence[_Line], kind: str, unusable: Unusable) -> list[Row]:
    """The files of `lines`; DataError for those that are missing or listed twice."""
    finder = Finder(manifest.parent)
    rows, missing = [], []
    listed: dict[tuple[int, int], int] = {}
    for line in lines:
        check_no_address(line.path, f"{manifest} line {line.number}")
        file = finder.find(line.path)
        if file is None:
            missing.append(f"line {line.number}: {manifest.parent / line.path.strip()}")
            continue
        earlier = listed.setdefault(identity(file), line.number)
        if earlier != line.number:
            raise DataError(
                f"{manifest} lists {file} twice, in line {earlier} and line {line.number}; list it once"
            )
        place = f"{manifest} line {line.number}: "
        name = relative_name(file, manifest.parent)
        row = Row(file, name, part_of(line.split) or "", speaker=line.speaker or None, place=place)
        if kind == "label":
            rows.append(replace(row, label=normal(line.value)))
        elif text := transcript(line.value):
            rows.append(replace(row, text=text))
        else:
            unusable.add(name, f"{place}{file} has no text; write its transcript or remove the line")
    if missing:
        raise DataError(
            f"{manifest} lists {first(missing, 'missing file', 'missing files')}; correct the paths"
        )
    return rows
