"""`from_manifest`: a CSV file with a line per clip."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .building import Row, build, identity
from .errors import DataError, counted, first, shortened
from .finding import Finder
from .names import HELD_OUT, SPLIT_COLUMNS, normal, part_of
from .recordings import SPLITS, Recordings
from .table import Table, read_table

# Other tools' names for the column of paths. There are none for labels: files that are not there show that a
# path column was taken wrongly, a wrong column of labels would be trained on.
PATH_COLUMNS = (
    "file_name",
    "filename",
    "file_path",
    "filepath",
    "audio",
    "audio_path",
    "audio_file",
    "audio_filepath",
)


@dataclass(frozen=True)
class _Line:
    """A line for a clip; `split` is as written, and empty without such a column."""

    number: int
    path: str
    label: str
    split: str


def from_manifest(path: str | Path, *, test_fraction: float = 0.2, seed: int = 0) -> Recordings:
    """Read a CSV with a header and the columns `path`, `label` and, optionally, `split` (train or test).

    UTF-8, separated by commas, semicolons, tabs or bars; names of columns and parts in any case. Relative
    paths are resolved against the folder of the CSV. Without a `split` column the split is drawn as in
    `from_folder`. Lines of a validation part beside train and test, comments (#) and other columns are left
    out, counted in `Recordings.ignored` and logged. docs/data.md has all rules.

    DataError, naming the line, for missing columns, values or files, for a file that is listed twice, and
    as in `from_folder`. ValueError for a bad `test_fraction`.
    """
    manifest = Path(os.path.expanduser(path))
    table = read_table(manifest)
    columns = _columns(manifest, table)
    lines = list(_lines(manifest, table, columns))
    used, left_out = _used(manifest, lines)
    rows = _rows(manifest, used)
    ignored = [f"{counted(count, 'clip')} in {split}" for split, count in sorted(left_out.items())]
    if table.comments:
        ignored.append(counted(table.comments, "comment line"))
    if others := _other_columns(table, columns):
        ignored.append(f"{'column' if len(others) == 1 else 'columns'} {shortened(others, 6)}")
    return build(
        manifest.stem, manifest.parent, rows, ignored=ignored, test_fraction=test_fraction, seed=seed
    )


def _columns(manifest: Path, table: Table) -> dict[str, int]:
    """The indices of path, label and, if it is there, split; DataError with the columns that are there."""
    wanted = {"path": PATH_COLUMNS, "label": (), "split": ()}
    columns = {}
    for name, synonyms in wanted.items():
        found = [i for i, column in enumerate(table.header) if column == name]
        found = found or [i for i, column in enumerate(table.header) if column in synonyms]
        if len(found) > 1:
            names = ", ".join(table.header[i] for i in found)
            raise DataError(f"{manifest} has the columns {names} for {name!r}; call one of them {name}")
        if found:
            columns[name] = found[0]
        elif name != "split":
            header = ",".join(table.header[:8]) + (",..." if len(table.header) > 8 else "")
            raise DataError(
                f"{manifest} lacks the column {name!r}; expected path,label and optionally split in the "
                f"first line, found {header or 'no text'}"
            )
    if "split" not in columns:
        _check_no_other_split(manifest, table, columns)
    return columns


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
        raise DataError(f"{manifest} lists no clip; expected one path,label line per clip")
    width = len(table.header)
    for number, cells in table.records:
        if any(cell.strip() for cell in cells[width:]):
            raise DataError(
                f"{manifest} line {number} has {len(cells)} cells and the header has {width}; "
                "put quotes around text that holds a separator"
            )
        for name in ("path", "label"):
            if not cells[columns[name]].strip():
                raise DataError(f"{manifest} line {number} has no {name}; every line needs path and label")
        split = cells[columns["split"]] if "split" in columns else ""
        if "split" in columns and part_of(split) is None:
            raise _bad_split(manifest, number, split)
        yield _Line(number, cells[columns["path"]], normal(cells[columns["label"]]), split)


def _used(manifest: Path, lines: Sequence[_Line]) -> tuple[list[_Line], Counter[str]]:
    """The lines of train and test, and how many of each other part are left out; both must be there."""
    parts = {part_of(line.split) for line in lines}
    held_out = [line for line in lines if part_of(line.split) == HELD_OUT]
    if held_out and not set(SPLITS) <= parts:
        raise _bad_split(manifest, held_out[0].number, held_out[0].split)
    left_out = Counter(normal(line.split) for line in held_out)
    return [line for line in lines if part_of(line.split) != HELD_OUT], left_out


def _bad_split(manifest: Path, number: int, split: str) -> DataError:
    return DataError(f"{manifest} line {number} has split {split.strip()!r}; allowed are train and test")


def _rows(manifest: Path, lines: Sequence[_Line]) -> list[Row]:
    """The files of `lines`; DataError for those that are missing or listed twice."""
    finder = Finder(manifest.parent)
    rows, missing = [], []
    listed: dict[tuple[int, int], int] = {}
    for line in lines:
        if re.match(r"[A-Za-z][\w+.-]+://", line.path.strip()):
            raise DataError(
                f"{manifest} line {line.number} has the address {line.path.strip()}; "
                "download the file and give its path"
            )
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
        rows.append(Row(file, line.label, part_of(line.split) or "", place))
    if missing:
        raise DataError(
            f"{manifest} lists {first(missing, 'missing file', 'missing files')}; correct the paths"
        )
    return rows
