"""Recordings and their texts: one pair, a manifest, or folders."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path, PurePath

from mmtransfer.data.audio import SUFFIXES
from mmtransfer.data.columns import find_column
from mmtransfer.data.errors import DataError, shortened
from mmtransfer.data.finding import Finder, check_no_address
from mmtransfer.data.json_lines import JSON_SUFFIXES, read_json_lines
from mmtransfer.data.names import composed
from mmtransfer.data.rows import relative_name
from mmtransfer.data.table import read_table, read_text
from mmtransfer.data.tree import read_tree, suffix

_TABLE_SUFFIXES = (".csv", ".tsv", *JSON_SUFFIXES)
_TEXT_SUFFIX = ".txt"


@dataclass(frozen=True)
class Pair:
    """A recording and its text.

    Attributes:
        audio: the file.
        text: what is spoken, or the error that keeps it from being read.
        name: path without suffix for the results, relative to their folder.
    """

    audio: Path
    text: str | DataError
    name: str


def find_pairs(audio: Path, text: Path | None) -> list[Pair]:
    """The pairs that are meant.

    Args:
        audio: a recording; a manifest with the columns path and text; or a folder of recordings.
        text: of a recording, a text file, or "-" for standard input; of a folder, the folder of text files
            with the recordings' names. None: text files next to the recordings.

    DataError if there are none, or two results would have one name.
    """
    if audio.is_dir():
        pairs = _of_folders(audio, audio if text is None else text)
    elif audio.suffix.lower() in _TABLE_SUFFIXES:
        if text is not None:
            raise DataError(f"{audio} is a manifest, which has the texts itself; leave out {text}")
        pairs = _of_manifest(audio)
    else:
        if not audio.exists():
            raise DataError(f"{audio} does not exist")
        if text is not None and text.is_dir():
            text = text / f"{audio.stem}{_TEXT_SUFFIX}"
        place = audio.with_suffix(_TEXT_SUFFIX) if text is None else text
        pairs = [Pair(audio, _read(place), audio.stem)]
    _check_names(pairs)
    return pairs


def _read(place: Path) -> str | DataError:
    if str(place) == "-":
        return sys.stdin.read()
    try:
        return read_text(place, "text")
    except DataError as error:
        return error


def _of_folders(audio: Path, texts: Path) -> list[Pair]:
    if not texts.is_dir():
        raise DataError(f"{audio} is a folder and {texts} is not; give the folder of its text files")
    tree = read_tree(audio)
    if not tree.audio:
        raise DataError(f"{audio} holds no {', '.join(SUFFIXES)} files")
    others = tree.others if texts == audio else read_tree(texts).others
    # By their composed names: some file systems write accents as characters of their own.
    by_name = {
        _without_suffix(place.parts): texts.joinpath(*place.parts)
        for place in others
        if suffix(place.parts[-1]) == _TEXT_SUFFIX
    }
    pairs = []
    for place in sorted(tree.audio, key=lambda place: place.order):
        file = audio.joinpath(*place.parts)
        name = _without_suffix(place.parts)
        found = by_name.get(name)
        missing = DataError(f"{file} has no text: {texts.joinpath(*name)}{_TEXT_SUFFIX} does not exist")
        pairs.append(Pair(file, missing if found is None else _read(found), os.path.join(*name)))
    return pairs


def _without_suffix(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(composed, (*parts[:-1], PurePath(parts[-1]).stem)))


def _of_manifest(manifest: Path) -> list[Pair]:
    table = (read_json_lines if manifest.suffix.lower() in JSON_SUFFIXES else read_table)(manifest)
    path, text = (find_column(manifest, name, table.header) for name in ("path", "text"))
    if path is None or text is None:
        missing = "path" if path is None else "text"
        found = ",".join(table.header[:8]) or "no text"
        raise DataError(f"{manifest} lacks the column {missing!r}; expected path and text, found {found}")
    if not table.records:
        raise DataError(f"{manifest} lists no recording")
    finder = Finder(manifest.parent)
    pairs = []
    for number, cells in table.records:
        check_no_address(cells[path], f"{manifest} line {number}")
        file = finder.find(cells[path])
        if file is None:
            written = manifest.parent / cells[path].strip()
            pairs.append(Pair(written, DataError(f"{manifest} line {number}: {written} does not exist"), ""))
            continue
        pairs.append(Pair(file, cells[text], _result_name(file, manifest.parent)))
    return pairs


def _result_name(file: Path, root: Path) -> str:
    """The path below `root`; of a file elsewhere, what does not lead out of the folder of results."""
    parts = PurePath(relative_name(file, root)).with_suffix("").parts
    return os.path.join(*(part for part in parts if part != os.pardir))


def _check_names(pairs: list[Pair]) -> None:
    """Two results of one name would overwrite each other: a.wav and a.flac, or a line that comes twice."""
    seen: dict[str, Path] = {}
    for pair in pairs:
        if pair.name and seen.setdefault(pair.name, pair.audio) is not pair.audio:
            both = shortened([str(seen[pair.name]), str(pair.audio)], 2)
            raise DataError(f"{both} would have one name for their results, {pair.name}; rename one")
