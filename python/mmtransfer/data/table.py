"""Tables of cells, and CSV files as people's programs write them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import DataError
from .names import normal

_DELIMITERS = (",", ";", "\t", "|")


@dataclass(frozen=True)
class Table:
    """A CSV file, or one of another format in the same form.

    Attributes:
        header: the names of the columns, in lower case, with _ for spaces.
        records: of each the number of its first line, from 1, and its cells, one per column at least.
        comments: how many lines begin with #.
    """

    header: list[str]
    records: list[tuple[int, list[str]]]
    comments: int


def read_table(path: Path) -> Table:
    """The cells of a UTF-8 file separated by commas, semicolons, tabs or bars.

    Lines without text are left out, and empty cells stand for those that a line lacks. DataError, with the
    line, if the file cannot be read, is not UTF-8, or has quotes that do not match.
    """
    text = read_text(path, "CSV manifest")
    records = list(_records(path, text, _delimiter(text)))
    used = [(line, cells) for line, cells in records if not cells[0].startswith("#")]
    if not used:
        return Table([], [], len(records))
    header = [column_name(cell) for cell in used[0][1]]
    padded = [(line, cells + [""] * (len(header) - len(cells))) for line, cells in used[1:]]
    return Table(header, padded, len(records) - len(used))


def column_name(text: str) -> str:
    """The name of a column in the form of `Table.header`."""
    return re.sub(r"[\s-]+", "_", normal(text).casefold())


def read_text(path: Path, kind: str) -> str:
    """The text of a UTF-8 file without a byte order mark; DataError if it is none, or cannot be read."""
    problem = f"{path} cannot be read as a {kind}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{problem} ({error})") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{problem} (line {line} is not UTF-8); save it as UTF-8") from error
    if "\0" in text:
        raise DataError(f"{problem} (it holds NUL characters, as UTF-16 does); save it as UTF-8")
    return text


def _delimiter(text: str) -> str:
    """The one that gives the header the most cells."""
    used = (line for line in lines(text) if line.strip() and not line.startswith("#"))
    header = next(used, "")
    return max(_DELIMITERS, key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), [])))


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    # Strict, as a quote that is never closed would otherwise take in all lines behind it.
    reader = csv.reader(lines(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path} line {line} cannot be read as CSV ({error}); mend its quotes") from error
        if any(cell.strip() for cell in cells):
            yield line, cells


def lines(text: str) -> Iterator[str]:
    """The lines with their ends, which may be those of any system."""
    return io.StringIO(text, newline="")
