"""The files below a folder: links followed, hidden ones left out, in an order of their names alone."""

from __future__ import annotations

import heapq
import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from .audio import SUFFIXES
from .errors import DataError, counted
from .names import composed, is_hidden, part_of


@dataclass(order=True, frozen=True)
class Place:
    """A path below the root; those over fewer links come first, then by name."""

    links: int
    order: tuple[str, ...]
    parts: tuple[str, ...]

    @classmethod
    def of(cls, links: int, parts: tuple[str, ...]) -> Place:
        return cls(links, tuple(map(composed, parts)), parts)


@dataclass
class Tree:
    """What lies below `root`.

    Attributes:
        audio: the files that are read, by their suffix.
        others: the other files.
        folders: all of them, but for those that a second link leads to.
        hidden: how many files and folders are hidden; they are not entered.
        repeated: how many links lead back to a folder that is there already.
    """

    root: Path
    audio: list[Place] = field(default_factory=list)
    others: list[Place] = field(default_factory=list)
    folders: list[Place] = field(default_factory=list)
    hidden: int = 0
    repeated: int = 0


def read_tree(root: Path) -> Tree:
    """The tree below `root`; DataError for a link to nowhere, a device, or a folder that may not be read."""
    tree = Tree(root)
    entered: set[object] = set()
    # Without links first: a file keeps the path that it really has, whatever links are added.
    pending = [(Place.of(0, ()), frozenset[tuple[int, int]]())]
    while pending:
        place, above = heapq.heappop(pending)
        folder = root.joinpath(*place.parts)
        status = _status(folder)
        here = (status.st_dev, status.st_ino)
        # A second visit under the same class and part could find nothing new, and loops have no end.
        meaning = (here, place.parts[:2], frozenset(map(part_of, place.parts[2:])))
        if here in above or meaning in entered:
            tree.repeated += 1
            continue
        entered.add(meaning)
        if place.parts:
            tree.folders.append(place)
        for name, is_link in _entries(folder):
            if is_hidden(name):
                tree.hidden += 1
                continue
            below = Place.of(place.links + is_link, (*place.parts, name))
            mode = _status(folder / name).st_mode
            if stat.S_ISDIR(mode):
                heapq.heappush(pending, (below, above | {here}))
            elif not stat.S_ISREG(mode):
                raise DataError(f"{folder / name} is neither a file nor a folder; remove it")
            else:
                (tree.audio if suffix(name) in SUFFIXES else tree.others).append(below)
    for found in (tree.audio, tree.others, tree.folders):
        found.sort(key=lambda place: (place.order, place.parts))
    return tree


def suffix(name: str) -> str:
    return PurePath(name).suffix.strip().lower()


def count_suffixes(places: Iterable[Place], most: int = 6) -> list[str]:
    """`["4 .m4a files", "1 file without a suffix"]`, the most frequent first, the rest as one."""
    counts = sorted(Counter(suffix(place.parts[-1]) for place in places).items(), key=lambda c: (-c[1], c[0]))
    shown = [
        counted(count, f"{name} file")
        if name
        else counted(count, "file without a suffix", "files without a suffix")
        for name, count in counts[:most]
    ]
    rest = sum(count for _, count in counts[most:])
    return [*shown, counted(rest, "file of other types", "files of other types")] if rest else shown


def count_unused(tree: Tree, repeated: int) -> list[str]:
    """Hidden entries, and the links that lead to what is there already: `repeated` files, and folders."""
    counts = [f"{tree.hidden} hidden"] if tree.hidden else []
    if links := repeated + tree.repeated:
        counts.append(counted(links, "link to what is used already", "links to what is used already"))
    return counts


def _entries(folder: Path) -> list[tuple[str, bool]]:
    try:
        with os.scandir(folder) as entries:
            return [(entry.name, entry.is_symlink()) for entry in entries]
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}); change its permissions") from error


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        problem = "is a link that leads nowhere" if path.is_symlink() else "cannot be read"
        raise DataError(f"{path} {problem} ({error.strerror}); remove or mend it") from error
