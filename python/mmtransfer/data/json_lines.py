"""Files with a JSON object per line, as tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .columns import SYNONYMS
from .errors import DataError
from .table import Table, column_name, lines, read_text

#: What such files are called; NeMo writes them as .json.
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_READ = {name for column, synonyms in SYNONYMS.items() for name in (column, *synonyms)}


def read_json_lines(path: Path) -> Table:
    """The values of a UTF-8 file of JSON objects, a line each, by their names; numbers as they are written.

    Empty lines are left out; empty cells stand for null and for what an object lacks. DataError, with the
    line, for what is no object, for a name that comes twice in one, and for lists and objects in the columns
    that are read.
    """
    objects = list(_objects(path))
    names = list(dict.fromkeys(name for _, found in objects for name in found))
    header = [column_name(name) for name in names]
    records = [
        (line, [_cell(path, line, name, found.get(name)) for name in names]) for line, found in objects
    ]
    return Table(header, records, 0)


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines(read_text(path, "JSON lines manifest")), start=1):
        if not line.strip():
            continue
        try:
            found = _DECODER.decode(line.strip())
        except (ValueError, RecursionError) as error:
            column = f" in column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"{path} line {number} cannot be read as JSON ({reason}{column}); write one object per line"
            ) from error
        if not isinstance(found, dict):
            raise DataError(f"{path} line {number} is no JSON object; write one object per line")
        yield number, found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for index, (name, _) in enumerate(pairs) if name in dict(pairs[:index]))
        raise ValueError(f"{twice!r} comes twice")
    return found


# Numbers stay as they are written: 1.50, and 007 is none.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=_once)


def _cell(path: Path, line: int, name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return value
    if column_name(name) in _READ:
        kind = "a list" if isinstance(value, list) else "an object"
        raise DataError(f"{path} line {line} has {kind} as {name!r}; text is needed")
    return json.dumps(value)
