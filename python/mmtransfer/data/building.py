"""Files with labels to `Recordings`; the split is drawn where none is given."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .audio import duration
from .copies import copies
from .errors import DataError, counted
from .names import composed, look_alike
from .recordings import SPLITS, Clip, Recordings

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A file and its label; `split` is "train", "test" or, to be drawn, empty; `place` is for messages."""

    file: Path
    label: str
    split: str
    place: str = ""


def build(
    name: str,
    root: Path,
    rows: Sequence[Row],
    *,
    ignored: Iterable[str],
    test_fraction: float,
    seed: int,
) -> Recordings:
    """The recordings of `rows`; what was ignored, and what looks like a mistake, is logged as a warning."""
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction}")
    classes = tuple(sorted({row.label for row in rows}))
    if not any(row.split for row in rows):
        rows = _stratified_split(root, rows, test_fraction, seed)
    index = {label: i for i, label in enumerate(classes)}
    parts: dict[str, list[Clip]] = {split: [] for split in SPLITS}
    for row in rows:
        parts[row.split].append(Clip(row.file, index[row.label], _duration(row)))
    ignored = tuple(ignored)
    if ignored:
        _logger.warning("%s: ignored %s", name, ", ".join(ignored))
    for group in look_alike(classes):
        _logger.warning("%s has classes that look alike: %s", name, ", ".join(map(repr, group)))
    _warn_of_copies(name, rows)
    return Recordings(name, classes, parts["train"], parts["test"], ignored=ignored)


def identity(file: Path) -> tuple[int, int]:
    """The same for every path and link to one file."""
    status = os.stat(file)
    return status.st_dev, status.st_ino


def _duration(row: Row) -> float:
    try:
        return duration(row.file)
    except DataError as error:
        raise DataError(f"{row.place}{error}") from error


def _stratified_split(root: Path, rows: Iterable[Row], test_fraction: float, seed: int) -> list[Row]:
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)

    def draw(row: Row) -> str:
        # A hash of the name, not a shuffle of a listing: adding a file moves no other file across the split.
        # The name is the same for relative and absolute paths, and on file systems that decompose it.
        name = composed(Path(os.path.relpath(row.file, root)).as_posix())
        return hashlib.sha256(os.fsencode(f"{seed}/{name}")).hexdigest()

    split_rows = []
    for label, own in by_label.items():
        if len(own) < 2:
            raise DataError(
                f"{own[0].place}class {label!r} has one clip ({own[0].file}); "
                "a split needs at least two per class"
            )
        count = min(max(round(test_fraction * len(own)), 1), len(own) - 1)
        for rank, row in enumerate(sorted(own, key=draw)):
            split_rows.append(replace(row, split="test" if rank < count else "train"))
    return split_rows


def _warn_of_copies(name: str, rows: Sequence[Row]) -> None:
    """Of equal bytes in train and test, which score what was learnt by heart, and of two labels for them."""
    across, contrary = [], []
    for group in copies(rows, lambda row: row.file):
        train = [row for row in group if row.split == "train"]
        across += [(row, train[0]) for row in group if train and row.split == "test"]
        contrary += [(row, group[0]) for row in group if row.label != group[0].label]
    for pairs, what in ((across, "in train and in test"), (contrary, "with another label")):
        if pairs:
            one, other = pairs[0]
            _logger.warning(
                "%s has %s of equal content %s (%s and %s)",
                name,
                counted(len(pairs), "copy", "copies"),
                what,
                one.file,
                other.file,
            )
