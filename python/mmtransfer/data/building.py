"""Rows to `Recordings`: lengths from the headers, the split, and warnings of probable mistakes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from .audio import duration
from .copies import copies
from .drawing import draw_split
from .errors import DataError, counted, first
from .names import VALIDATION, look_alike
from .recordings import SPLITS, Clip, Recordings
from .rows import Row
from .unusable import Unusable

_logger = logging.getLogger(__name__)


def build(
    name: str,
    rows: Sequence[Row],
    *,
    ignored: Iterable[str],
    unusable: Unusable,
    total: int | None = None,
    test_fraction: float,
    seed: int,
) -> Recordings:
    """The recordings of `rows`, of which all have labels or all have transcripts.

    Clips without readable audio join the `unusable` of `total` clips (default: the rows). These, what was
    ignored, and what looks like a mistake, are logged as warnings.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction}")
    total = len(rows) if total is None else total
    classes = tuple(sorted({row.label for row in rows if row.label is not None and row.split != VALIDATION}))
    rows, unknown = _of_classes(classes, rows)
    found = _readable(rows, unusable)
    ignored = (*ignored, *unknown)
    if ignored:
        _logger.warning("%s: ignored %s", name, ", ".join(ignored))
    ignored = (*ignored, *unusable.ignored(name, total))
    rows = [row for row, _ in found]
    if rows and not any(row.split for row in rows):
        rows = draw_split(name, rows, test_fraction, seed)
    index: dict[str | None, int] = {label: i for i, label in enumerate(classes)}
    parts: dict[str, list[Clip]] = {split: [] for split in (*SPLITS, VALIDATION)}
    for row, (_, seconds) in zip(rows, found, strict=True):
        clip = Clip(row.source, index.get(row.label), seconds, row.text, row.speaker)
        parts[row.split].append(clip)
    for group in look_alike(classes):
        _logger.warning("%s has classes that look alike: %s", name, ", ".join(map(repr, group)))
    _warn_of_copies(name, rows)
    _warn_of_speakers(name, rows)
    return Recordings(
        name, classes, parts["train"], parts["test"], ignored=ignored, validation=parts[VALIDATION]
    )


def _of_classes(classes: Sequence[str], rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows without those of the validation part whose class nothing is trained on, and these as words."""
    known = set(classes)
    other = [row for row in rows if row.label is not None and row.label not in known]
    if not other:
        return list(rows), []
    labels = first(sorted({str(row.label) for row in other}), "class", "classes")
    left_out = f"{counted(len(other), 'clip')} in validation alone of {labels}"
    return [row for row in rows if row.label is None or row.label in known], [left_out]


def _readable(rows: Sequence[Row], unusable: Unusable) -> list[tuple[Row, float]]:
    """The rows whose headers can be read, with their seconds."""
    found = []
    for row in rows:
        try:
            found.append((row, duration(row.source)))
        except DataError as error:
            unusable.add(row.name, f"{row.place}{error}")
    return found


def _warn_of_copies(name: str, rows: Sequence[Row]) -> None:
    """Of equal bytes in train and test, which score what was learnt by heart, and of two labels for them."""
    across, contrary = [], []
    for group in copies(rows, lambda row: row.source):
        train = [row for row in group if row.split == "train"]
        across += [(row, train[0]) for row in group if train and row.split == "test"]
        contrary += [
            (row, group[0]) for row in group if (row.label, row.text) != (group[0].label, group[0].text)
        ]
    meaning = (
        "with another label" if any(row.label is not None for row in rows) else "with another transcript"
    )
    for pairs, what in ((across, "in train and in test"), (contrary, meaning)):
        if pairs:
            one, other = pairs[0]
            _logger.warning(
                "%s has %s of equal content %s (%s and %s)",
                name,
                counted(len(pairs), "copy", "copies"),
                what,
                one.source,
                other.source,
            )


def _warn_of_speakers(name: str, rows: Sequence[Row]) -> None:
    """Of those in train and in another part, whose scores say little about other speakers."""
    speakers = {
        part: {row.speaker for row in rows if row.speaker and row.split == part}
        for part in (*SPLITS, VALIDATION)
    }
    for part in ("test", VALIDATION):
        both = sorted(speakers["train"] & speakers[part])
        if both:
            _logger.warning("%s has %s in train and in %s", name, first(both, "speaker", "speakers"), part)
