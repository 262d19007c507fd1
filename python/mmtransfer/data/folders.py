"""`from_folder`: a tree of class folders, with or without folders for train and test."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from .audio import SUFFIXES
from .building import build
from .errors import DataError
from .layout import Labelled, arrange
from .names import is_text, normal
from .recordings import Recordings
from .rows import Row, identity, relative_name
from .tree import Place, count_suffixes, count_unused, read_tree
from .unusable import Unusable

_logger = logging.getLogger(__name__)


def from_folder(
    path: str | Path, *, test_fraction: float = 0.2, seed: int = 0, strict: bool = False
) -> Recordings:
    """Read a tree of class folders, `<path>/<class>/**/*.{wav,flac,ogg,mp3}`.

    `<path>/train/<class>` and `<path>/test/<class>`, or `<path>/<class>/train` and `<path>/<class>/test`, in
    any case, give the split; otherwise it is drawn per class, the same on every machine for the same file
    names and `seed`. A validation part next to train and test becomes `Recordings.validation`. Links are
    followed. Hidden files, files of other types and audio that cannot be read are left out, counted in
    `Recordings.ignored` and logged; if `strict`, audio that cannot be read is an error. docs/data.md has all
    rules.

    DataError if the folder is missing or empty, more than half of its audio cannot be read, a class folder
    has no audio, a file has two labels or parts, folders are parts of a data set without being train and
    test, there are fewer than two classes, or a class is missing from train or test. ValueError for a bad
    `test_fraction`.
    """
    root = Path(os.path.expanduser(path))
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give a folder of class folders, or a CSV manifest")
    tree = read_tree(root)
    if not tree.audio:
        found = f", found {', '.join(count_suffixes(tree.others))}" if tree.others else ""
        raise DataError(
            f"{root} holds no audio; expected <class>/<name> with {', '.join(SUFFIXES)} files{found}"
        )
    clips, ignored = arrange(tree)
    rows, repeated = _once(root, clips)
    ignored += count_suffixes(tree.others) + count_unused(tree, repeated)
    name = Path(os.path.abspath(root)).name
    return build(
        name, rows, ignored=ignored, unusable=Unusable(strict), test_fraction=test_fraction, seed=seed
    )


def _once(root: Path, clips: list[Labelled]) -> tuple[list[Row], int]:
    """A row per file, and how many more paths lead to it; DataError if these give it two meanings."""
    labels = _labels(root, clips)
    rows: dict[tuple[int, int], tuple[Place, Row]] = {}
    # Paths without links first: they name the file in the draw of the split.
    for clip in sorted(clips, key=lambda clip: clip.place):
        file = root.joinpath(*clip.place.parts)
        row = Row(file, relative_name(file, root), clip.split, label=labels[clip.folder])
        _, known = rows.setdefault(identity(file), (clip.place, row))
        if (known.label, known.split) != (row.label, row.split):
            raise DataError(
                f"{known.source} and {row.source} are one file, in two "
                f"{'classes' if known.label != row.label else 'parts'}; remove one"
            )
    in_order = sorted(rows.values(), key=lambda found: (found[0].order, found[0].parts))
    return [row for _, row in in_order], len(clips) - len(rows)


def _labels(root: Path, clips: list[Labelled]) -> dict[str, str]:
    """The label of each class folder's name."""
    labels = {clip.folder: normal(clip.folder) for clip in clips}
    for folder, label in labels.items():
        if not label or not is_text(label):
            raise DataError(f"{root} has the class folder {folder!r}, which is blank or not UTF-8; rename it")
    shared = {label for label in labels.values() if list(labels.values()).count(label) > 1}
    for label in sorted(shared):
        _logger.warning("%s: several spellings of the class folder %r are one class", root, label)
    return labels
