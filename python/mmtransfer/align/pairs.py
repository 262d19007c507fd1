"""Recordings and their texts: one pair, a manifest, or folders."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path, PurePath

from mmtransfer.data.audio import SUFFIXES
from mmtransfer.data.columns import find_column
from mmtransfer.data.errors import DataError, first, shortened
from mmtransfer.data.finding import Finder, check_no_address
from mmtransfer.data.json_lines import JSON_SUFFIXES, read_json_lines
from mmtransfer.data.manifests import check_no_offset
from mmtransfer.data.names import composed, is_text
from mmtransfer.data.rows import relative_name
from mmtransfer.data.table import read_table, read_text
from mmtransfer.data.tree import count_suffixes, read_tree, suffix

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


@dataclass(frozen=True)
class Pairs:
    """What a command is given.

    Attributes:
        pairs: recordings with their texts.
        sources: files that were read for them, which no result may replace.
        left_out: what lies in the folders besides.
    """

    pairs: list[Pair]
    sources: frozenset[Path]
    left_out: tuple[str, ...] = ()


def find_pairs(audio: Path, text: Path | None) -> Pairs:
    """The pairs that are meant.

    Args:
        audio: a recording; a manifest with the columns path and text; or a folder of recordings.
        text: of a recording, a text file, or "-" for standard input; of a folder, the folder of text files
            with the recordings' names. None: text files next to the recordings.

    DataError if there are none, or two results would have one name.
    """
    if audio.is_dir():
        found = _of_folders(audio, audio if text is None else text)
    elif audio.suffix.lower() in _TABLE_SUFFIXES:
        if text is not None:
            raise DataError(f"{audio} is a manifest, which has the texts itself; leave out {text}")
        found = _of_manifest(audio)
    else:
        found = _of_file(audio, text)
    _check_names(found.pairs)
    return found


def _of_file(audio: Path, text: Path | None) -> Pairs:
    if not audio.exists():
        raise DataError(f"{audio} does not exist")
    folder = audio.parent if text is None else text
    if text is None or text.is_dir():
        tried = [folder / f"{audio.stem}{suffix}" for suffix in (_TEXT_SUFFIX, _TEXT_SUFFIX.upper())]
        text = next((place for place in tried if place.exists()), None)
        if text is None:
            raise DataError(f"{audio} has no text: {tried[0]} does not exist")
    sources = frozenset((audio, text))
    return Pairs([Pair(audio, _read(text), audio.stem)], sources)


def _read(place: Path) -> str | DataError:
    if str(place) != "-":
        try:
            return read_text(place, "text")
        except DataError as error:
            return error
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        return DataError("the text of standard input is not UTF-8")


def _of_folders(audio: Path, texts: Path) -> Pairs:
    if not texts.is_dir():
        raise DataError(f"{audio} is a folder and {texts} is not; give the folder of its text files")
    tree = read_tree(audio)
    if not tree.audio:
        raise DataError(f"{audio} holds no {', '.join(SUFFIXES)} files")
    others = tree.others if texts == audio else read_tree(texts).others
    # By their composed names: some file systems write an accent as a separate character.
    by_name = {
        _without_suffix(place.parts): texts.joinpath(*place.parts)
        for place in others
        if suffix(place.parts[-1]) == _TEXT_SUFFIX
    }
    pairs = []
    used: set[Path] = set()
    for place in sorted(tree.audio, key=lambda place: place.order):
        file = audio.joinpath(*place.parts)
        name = _without_suffix(place.parts)
        found = by_name.get(name)
        missing = DataError(f"{file} has no text: {texts.joinpath(*name)}{_TEXT_SUFFIX} does not exist")
        used |= {file} if found is None else {file, found}
        pairs.append(Pair(file, missing if found is None else _read(found), os.path.join(*name)))
    left_out = count_suffixes(place for place in tree.others if suffix(place.parts[-1]) != _TEXT_SUFFIX)
    if alone := [str(path) for path in by_name.values() if path not in used]:
        left_out.append(first(alone, "text without a recording", "texts without a recording"))
    return Pairs(pairs, frozenset(used), tuple(left_out))


def _without_suffix(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(composed, (*parts[:-1], PurePath(parts[-1]).stem)))


def _of_manifest(manifest: Path) -> Pairs:
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
        place = f"{manifest} line {number}"
        check_no_address(cells[path], place)
        check_no_offset(manifest, number, table.header, cells)
        if not cells[path].strip():
            raise DataError(f"{place} has no path")
        file = finder.find(cells[path])
        if file is None:
            written = manifest.parent / cells[path].strip()
            fault = "is no file" if written.exists() else "does not exist"
            pairs.append(Pair(written, DataError(f"{place}: {written} {fault}"), ""))
        elif not is_text(cells[text]):
            pairs.append(Pair(file, DataError(f"{place} has characters in text that Unicode lacks"), ""))
        else:
            pairs.append(Pair(file, cells[text], _result_name(file, manifest.parent)))
    return Pairs(pairs, frozenset((manifest, *(pair.audio for pair in pairs))))


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
