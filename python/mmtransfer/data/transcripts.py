"""`from_transcripts`: a tree of recordings with text files next to them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from .audio import SUFFIXES
from .building import build
from .errors import DataError, first, shortened
from .names import composed, names_a_part, part_of, transcript
from .recordings import SPLITS, Recordings
from .rows import Row, identity, relative_name
from .table import lines, read_text
from .tree import Place, Tree, count_suffixes, count_unused, read_tree, suffix
from .unusable import Unusable

# LibriSpeech's lists of a folder's transcripts: 19-198.trans.txt, speaker 19 and chapter 198.
_LIST = re.compile(r"(?:(?P<speaker>\d+)-\d+)?.*\.trans\.txt", re.IGNORECASE)


@dataclass(frozen=True)
class _Text:
    """A transcript, where it stands, and the speaker, if the name of its file says who."""

    text: str
    place: str
    speaker: str | None = None


def from_transcripts(
    path: str | Path, *, test_fraction: float = 0.2, seed: int = 0, strict: bool = False
) -> Recordings:
    """Read a tree of recordings with `x.txt` next to `x.wav`, or with LibriSpeech's `*.trans.txt`.

    `<path>/train` and `<path>/test`, in any case, give the split, and a validation part next to both is
    `Recordings.validation`; otherwise the split is drawn as in `from_manifest`. The speaker is known from
    the names of LibriSpeech's files alone. Clips without a transcript, and audio that cannot be read, are
    left out, counted in `Recordings.ignored` and logged, or, if `strict`, errors. docs/data.md has all rules.

    DataError if the folder is missing or has no audio, more than half of it cannot be used, a clip has two
    transcripts or parts, or a text file is not UTF-8. ValueError for a bad `test_fraction`.
    """
    root = Path(os.path.expanduser(path))
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give a folder of recordings with text files next to them")
    tree = read_tree(root)
    if not tree.audio:
        found = f", found {', '.join(count_suffixes(tree.others))}" if tree.others else ""
        raise DataError(f"{root} holds no {', '.join(SUFFIXES)} files{found}")
    parts = _parts_on_top(tree)
    texts = _texts(tree)
    unusable = Unusable(strict)
    rows, repeated = _rows(tree, parts, texts, unusable)
    ignored = _ignored(tree, texts, repeated)
    return build(
        Path(os.path.abspath(root)).name,
        rows,
        ignored=ignored,
        unusable=unusable,
        total=len(tree.audio) - repeated,
        test_fraction=test_fraction,
        seed=seed,
    )


def _parts_on_top(tree: Tree) -> dict[str, str]:
    """The part of each top folder with audio; {} if the split is to be drawn."""
    names = sorted({place.parts[0] for place in tree.audio if len(place.parts) > 1})
    parts = {name: part for name in names if (part := part_of(name))}
    loose = [place.parts[0] for place in tree.audio if len(place.parts) == 1]
    if set(SPLITS) <= set(parts.values()):
        if others := [*(name for name in names if name not in parts), *loose]:
            raise DataError(
                f"{tree.root} has train and test, and {shortened(others, 3)} with audio next to them; move "
                "it into one of them, or away"
            )
        return parts
    if like_parts := [name for name in names if names_a_part(name)]:
        raise DataError(
            f"{tree.root} holds parts of a data set ({shortened(like_parts, 6)}); name them train, test and, "
            "if wanted, validation, or give one alone to have its test part drawn"
        )
    return {}


def _texts(tree: Tree) -> dict[tuple[str, ...], _Text]:
    """The transcripts by the paths of their clips without suffixes; DataError for two of one clip."""
    texts: dict[tuple[str, ...], _Text] = {}
    for place in tree.others:
        if suffix(place.parts[-1]) != ".txt":
            continue
        for key, text in _read(tree.root.joinpath(*place.parts), place).items():
            if key in texts:
                raise DataError(
                    f"{text.place} and {texts[key].place} are transcripts of one clip; remove one"
                )
            texts[key] = text
    return texts


def _read(file: Path, place: Place) -> dict[tuple[str, ...], _Text]:
    """The transcripts in a text file, by clip."""
    content = read_text(file, "transcript")
    match = _LIST.fullmatch(place.parts[-1])
    if not match:
        return {_clip(place.parts): _Text(transcript(content), str(file))}
    found: dict[tuple[str, ...], _Text] = {}
    for number, line in enumerate(lines(content), start=1):
        if not line.strip():
            continue
        name, *text = line.split(maxsplit=1)
        where = f"{file} line {number}"
        key = tuple(map(composed, (*place.parts[:-1], name)))
        if key in found:
            raise DataError(f"{where} has the clip {name} for a second time; remove one of the lines")
        found[key] = _Text(transcript("".join(text)), where, match["speaker"])
    return found


def _clip(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The path of a clip or its text without the suffix, in one Unicode form."""
    return tuple(map(composed, (*parts[:-1], PurePath(parts[-1]).stem)))


def _rows(
    tree: Tree, parts: Mapping[str, str], texts: Mapping[tuple[str, ...], _Text], unusable: Unusable
) -> tuple[list[Row], int]:
    """A row per file that has a transcript, and how many more paths lead to one."""
    rows: dict[tuple[int, int], Row | None] = {}
    repeated = 0
    # Paths without links first: they name the file in the draw of the split.
    for place in sorted(tree.audio):
        file = tree.root.joinpath(*place.parts)
        found = texts.get(_clip(place.parts))
        split = parts.get(place.parts[0], "")
        row = None
        if found and found.text:
            name = relative_name(file, tree.root)
            row = Row(file, name, split, text=found.text, speaker=found.speaker)
        if (own := identity(file)) not in rows:
            rows[own] = row
            if row is None:
                fault = f"{found.place} has no text" if found else "there is no transcript"
                unusable.add(
                    relative_name(file, tree.root), f"{fault} for {file}; write it or remove the clip"
                )
            continue
        repeated += 1
        known = rows[own]
        if row and (known is None or (known.text, known.split) != (row.text, row.split)):
            other = known.source if known else "one without a transcript"
            raise DataError(f"{file} and {other} are one file, with two transcripts or parts; remove one")
    return sorted(filter(None, rows.values()), key=lambda row: row.name), repeated


def _ignored(tree: Tree, texts: Mapping[tuple[str, ...], _Text], repeated: int) -> list[str]:
    clips = {_clip(place.parts) for place in tree.audio}
    ignored = count_suffixes(place for place in tree.others if suffix(place.parts[-1]) != ".txt")
    if alone := [text.place for key, text in texts.items() if key not in clips]:
        ignored.append(first(alone, "transcript without audio", "transcripts without audio"))
    return ignored + count_unused(tree, repeated)
